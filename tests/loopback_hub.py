"""A Hub of models on the loopback interface, in memory: what `huggingface_hub` asks for an upload and a download, no
more. Large files travel by Git LFS; with a `store`, a folder, by xet, whose client takes a folder for its server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from helpers import environment

TOKEN = "hf_loopback"


@dataclass
class Entry:
    """A file of a commit; `sha256` is set for large files, whose content is in the Hub's storage."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self) -> str:
        if self.sha256 is not None:
            return self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()


@dataclass
class Repo:
    commits: list[tuple[str, dict[str, Entry]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def add(self, files: dict[str, Entry], message: str) -> str:
        listing = "".join(f"{path}{entry.oid}" for path, entry in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{message}{listing}".encode()).hexdigest()
        self.commits.append((oid, files))
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Entry]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url` until the block ends. `requests` are the method and the path of
    all that was asked for, `repos` what was pushed, and `xet_hashes` sha256: xet hash, which a test has to fill in, as
    only the real xet server learns it from an upload."""

    def __init__(self, store: Path | None = None) -> None:
        self.store = store
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.xet_hashes: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def asked(self, pattern: str) -> int:
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path in self.requests)


class Refusal(Exception):
    def __init__(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.content = self.read_content()
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            try:
                for pattern, method in ROUTES:
                    found = re.fullmatch(pattern, f"{self.command} {path}")
                    if found:
                        return method(self, **found.groupdict())
                raise Refusal(404, "NotFound")
            except Refusal as refusal:
                self.reply({"error": refusal.headers["X-Error-Code"]}, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_content(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, body: Any = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/json", **(headers or {})}
        if found and status == 200:
            first, last = int(found[1]), int(found[2] or len(raw) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
            raw, status = raw[first : last + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(raw))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def repo(self, repo_id: str, writes: bool = False) -> Repo:
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized")
        if repo_id not in self.hub.repos:
            raise Refusal(404, "RepoNotFound")
        return self.hub.repos[repo_id]

    def commit_of(self, repo_id: str, revision: str) -> tuple[str, dict[str, Entry]]:
        found = self.repo(repo_id).at(revision)
        if found is None:
            raise Refusal(404, "RevisionNotFound")
        return found

    # Upload

    def whoami(self) -> None:
        token = {"displayName": "loopback", "role": "write"}
        self.reply({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create(self) -> None:
        wanted = json.loads(self.content)
        repo_id = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized")
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            self.hub.repos[repo_id] = Repo()
            attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.hub.repos[repo_id].add({".gitattributes": Entry(len(attributes), attributes)}, "initial commit")
        self.reply({"url": f"{self.hub.url}/{repo_id}"}, status)

    def validate_card(self) -> None:
        """The Hub refuses a card whose metadata it can't read, or whose results lack a name or a value."""
        errors = []
        try:
            metadata = yaml.safe_load(json.loads(self.content)["content"].split("---\n")[1])
            for model in metadata.get("model-index", []):
                for result in model["results"]:
                    assert model["name"] and result["task"]["type"]
                    assert result["dataset"]["type"] and result["dataset"]["name"]
                    assert all(metric["type"] and metric["value"] is not None for metric in result["metrics"])
        except (yaml.YAMLError, IndexError, KeyError, AssertionError, AttributeError) as error:
            errors.append({"message": f"metadata: {error!r}"})
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> None:
        files = self.repo(repo_id, writes=True).at(revision)[1]
        answers = []
        for wanted in json.loads(self.content)["files"]:
            mode = "lfs" if wanted["path"].endswith(".safetensors") else "regular"
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False})
            if wanted["path"] in files:
                answers[-1]["oid"] = files[wanted["path"]].oid
        self.reply({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id, writes=True)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            objects.append({"oid": wanted["oid"], "size": wanted["size"]})
            if wanted["oid"] not in self.hub.storage:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                objects[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
        answer = {"transfer": "basic", "objects": objects}
        self.reply(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, sha256: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != sha256:
            raise Refusal(400, "WrongHash")
        self.hub.storage[sha256] = self.content
        self.reply()

    def lfs_verify(self, sha256: str) -> None:
        self.reply({}, 200 if sha256 in self.hub.storage else 404)

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id, writes=True)
        files, message = dict(repo.at(revision)[1]), ""
        for line in self.content.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "header":
                message = value["summary"]
            elif change["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = Entry(len(content), content)
            elif change["key"] == "lfsFile":
                # A pointer to what was never uploaded; what went by xet is in its store, in pieces.
                if value["oid"] not in self.hub.storage and self.hub.store is None:
                    raise Refusal(400, "LfsObjectMissing")
                files[value["path"]] = Entry(value["size"], sha256=value["oid"])
            elif change["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.add(files, message)
        self.reply({"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "success": True})

    def xet_token(self, repo_id: str, revision: str) -> None:
        if self.hub.store is None:
            raise Refusal(404, "NotFound")
        self.repo(repo_id)
        names = ("casUrl", "accessToken", "exp")
        values = (f"local://{self.hub.store}", "xet", 4102444800)
        headers = zip(("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration"), map(str, values), strict=True)
        self.reply(dict(zip(names, values, strict=True)), headers=dict(headers))

    # Download

    def info(self, repo_id: str, revision: str | None = None) -> None:
        oid, files = self.commit_of(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.reply({"_id": "0", "id": repo_id, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        prefix, answer, folders = f"{folder}/" if folder else "", [], set()
        for path, entry in sorted(self.commit_of(repo_id, revision)[1].items()):
            below = path.removeprefix(prefix)
            if not path.startswith(prefix):
                continue
            if "/" in below:
                folders.add(prefix + below.partition("/")[0])
                if not self.query.get("recursive"):
                    continue
            answer.append({"type": "file", "path": path, "oid": entry.oid[:40], "size": entry.size})
            if entry.sha256 is not None:
                answer[-1]["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
                if entry.sha256 in self.hub.xet_hashes:
                    answer[-1]["xetHash"] = self.hub.xet_hashes[entry.sha256]
        if prefix and not answer:
            raise Refusal(404, "EntryNotFound")
        self.reply(answer + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        oid, files = self.commit_of(repo_id, revision)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if path not in files:
            raise Refusal(404, "EntryNotFound", headers)
        entry = files[path]
        headers["ETag"] = f'"{entry.oid}"'
        if entry.sha256 is None:
            return self.reply(entry.content, headers=headers)
        headers |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": headers["ETag"]}
        # Under another name: the client follows redirects within one host, and would miss the headers of this answer.
        headers["Location"] = f"http://localhost:{self.hub.port}/lfs/{entry.sha256}"
        if entry.sha256 in self.hub.xet_hashes:
            headers["X-Xet-Hash"] = self.hub.xet_hashes[entry.sha256]
            headers["Link"] = f'<{self.hub.url}/api/models/{repo_id}/xet-read-token/{oid}>; rel="xet-auth"'
        self.reply(b"", 302, headers)

    def lfs_get(self, sha256: str) -> None:
        if sha256 not in self.hub.storage:
            raise Refusal(404, "EntryNotFound")
        self.reply(self.hub.storage[sha256], headers={"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


MODEL, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/repos/create", Handler.create),
    ("POST /api/validate-yaml", Handler.validate_card),
    (f"POST /api/models/{MODEL}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /{MODEL}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<sha256>\w+)", Handler.lfs_put),
    (r"POST /lfs/(?P<sha256>\w+)", Handler.lfs_verify),
    (r"(?:GET|HEAD) /lfs/(?P<sha256>\w+)", Handler.lfs_get),
    (f"POST /api/models/{MODEL}/commit/{REVISION}", Handler.commit),
    (f"GET /api/models/{MODEL}/xet-(?:read|write)-token/{REVISION}", Handler.xet_token),
    (f"GET /api/models/{MODEL}(?:/revision/{REVISION})?", Handler.info),
    (f"GET /api/models/{MODEL}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    (f"(?:GET|HEAD) /{MODEL}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


def run(script: str, *arguments: object, **variables: str) -> None:
    """Runs a Python script in a new process, as a user of the Hub that `settings` names."""
    folder = Path(variables["HF_HOME"])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**environment(folder), "HF_HUB_DISABLE_TELEMETRY": "1", **variables},
        cwd=folder.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def settings(hub: LoopbackHub, home: Path, **changes: str) -> dict[str, str]:
    """The environment of a user of `hub`, whose cache is below `home`."""
    xet = "0" if hub.store else "1"
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": xet,
        "HF_HOME": str(home),
        "HF_MODULES_CACHE": str(home / "modules"),
        **changes,
    }
