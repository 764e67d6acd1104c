"""Bulk embedding on Ray Data: files of texts in, Parquet shards of embeddings out, in any number of runs.

    python embed_gircse.py --input "corpus/*.parquet" --text_column text --output vectors --k 20

A row on its way through this file:

    make_plan     files -> shards of `rows_per_shard` rows; `_plan.json` holds what the run was asked for
    Ray Data      gives each shard that isn't there yet to one of a pool of actors, and to another one if that dies
    Embedder      reads the shard, sets bad rows aside, embeds the others and writes them under the shard's name
    report        what all shards set aside -> `_bad_rows.jsonl`

A shard's file appears whole or not at all, and its name follows from the plan: whatever is killed, and whenever, no row
is lost or repeated. Ray Data's own readers don't number rows, and one broken line ends them: `gircse.rows` reads.

Exit status: 0 if every row was embedded, 3 if bad rows were set aside, 2 for an unknown or missing argument, 1 for any
other error. After an error the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import logging
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import ray
import torch
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import HF_MODULES_CACHE

from gircse import rows as reader
from gircse.rows import ENDINGS, PARQUET, RowFile, is_text

ROOT = Path(__file__).resolve().parent
# Readers of a folder of Parquet pass over names that start with "_" or ".".
PLAN, BAD_ROWS = "_plan.json", "_bad_rows.jsonl"
BAD_ROWS_KEY = b"gircse_bad_rows"
EXIT_BAD_ROWS = 3
A_DAY = 24 * 60 * 60
LOG_SECONDS = 30  # between the lines of a log that stand for a bar
DTYPES = ("float32", "bfloat16", "float16")
ID_TYPES = {"int": pyarrow.int64(), "str": pyarrow.string()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files or quoted glob patterns: {', '.join(ENDINGS)}")
    add("--text_column", default="text", help="column or JSON field that holds the text (default: text)")
    add("--id_column", help="int or str column that becomes `id`; by default it is file:row, rows counted from 1")
    add("--output", type=Path, required=True, help="folder of the shards, empty or of an earlier run")
    add("--model", default=str(ROOT), help="GIRCSE model, Hub id or folder; by default the one of this repo")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--trust_remote_code", action="store_true", help="run the code of --model; this repo's model needs none but it")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; embeddings are float32")
    add("--k", type=_count, help="generated tokens, by default what the model's config says")
    add("--instruction", help="of every text; by default none, as for the documents of a retrieval task")
    add("--batch_size", type=_count, default=32)
    add("--rows_per_shard", type=_count, default=10_000, help="what a kill costs an actor at most (default: 10000)")
    add("--num_actors", type=_count, help="models on each node; by default one for each GPU, or one on all CPU cores")
    add("--num_gpus", type=float, help="GPUs of each actor, also a part of one; by default 1 where there are any")
    return parser.parse_args(argv)


def _count(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number above 0")
    return int(value)


# The plan ------------------------------------------------------------------------------------------------------------


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the plan in `options.output`, or makes it: the settings, the files' rows and names, the type of the ids.

    Raises:
        FileNotFoundError: if a pattern of `options.input` matches no file.
        ValueError: if the folder is in use for anything else, a file can't be read, has another ending or lacks a
            column, one is of a wrong type, ids are of several types, or the model is no GIRCSE model or not trusted.
    """
    files = find_files(options.input)
    names = ("text_column", "id_column", "k", "instruction", "dtype", "rows_per_shard")
    path = options.output / PLAN
    plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    settings = {name: getattr(options, name) for name in names}
    model, read = identify_model(options, plan["settings"] if plan else {})
    settings |= model | digest(read | {f"input {file}": file for file in files})
    if plan:
        names = sorted(settings.keys() | plan["settings"].keys())
        pairs = [(name, plan["settings"].get(name), settings.get(name)) for name in names]
        changed = [f"{name} was {old!r:.80}, is {new!r:.80}" for name, old, new in pairs if old != new]
        if changed:
            raise ValueError(
                f"output={str(options.output)!r} was begun with other arguments or files ({'; '.join(changed[:3])}): "
                "give the same ones, or choose another folder"
            )
        return plan
    options.output.mkdir(parents=True, exist_ok=True)
    if any(not entry.name.startswith(".") for entry in options.output.iterdir()):
        raise ValueError(f"output={str(options.output)!r} holds other files: choose an empty or a new folder")
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: measure(file, options.text_column, options.id_column), files)
        measured = list(progress(iterable=found, total=len(files), unit=" files", desc="counting rows", leave=False))
    kinds = {kind: file for file, (_, kind) in zip(files, measured, strict=True) if kind}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {file}" for kind, file in kinds.items())
        raise ValueError(f"id_column={options.id_column!r} is of several types ({found}): make them one")
    plan = {
        "settings": settings,
        "id": next(iter(kinds), "str"),
        "files": [
            {"path": str(file), "name": name, "rows": rows}
            for file, name, (rows, _) in zip(files, name_files(files), measured, strict=True)
        ],
    }
    write_whole(path, lambda file: file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8"))
    return plan


def list_shards(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The shards in order: the names of their files, and the rows start..stop - 1 of which input file they are."""
    size, files = plan["settings"]["rows_per_shard"], plan["files"]
    places = [(i, start, file["rows"]) for i, file in enumerate(files) for start in range(0, file["rows"], size)]
    return [
        {"name": f"{number:06d}.parquet", "file": file, "start": start, "stop": min(start + size, rows)}
        for number, (file, start, rows) in enumerate(places)
    ]


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The absolute paths of all input files, sorted, each once."""
    files: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
        found = {file.absolute() for file in found if file.is_file()}
        if not found:
            raise FileNotFoundError(f"input={pattern!r} matches no file (working directory: {Path.cwd()})")
        files |= found
    for file in files:
        RowFile(file)  # refuses a file that it can't read by its name
    return sorted(files)


def name_files(files: Sequence[Path]) -> list[str]:
    """What ids and reports call the files: their paths below the folder that all of them are in."""
    try:
        top = os.path.commonpath([file.parent for file in files])
        names = [file.relative_to(top).as_posix() for file in files]
    except ValueError:  # they are on several drives of Windows
        names = [file.as_posix() for file in files]
    # Linux takes any bytes for a name; as text they could neither be an id nor be written to the report.
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def identify_model(options: argparse.Namespace, begun: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Which model it is: a folder's path, and the files in it that make the vectors; or an id and the commit it stands
    for, which is that of the settings `begun` with as long as nobody asks for another."""
    folder = Path(options.model).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else options.model
    if model != str(ROOT) and not options.trust_remote_code:
        raise ValueError(f"model={model!r} brings code of its own: read it, then add --trust_remote_code")
    revision = options.revision or (begun.get("revision") if begun.get("model") == model else None)
    config = PretrainedConfig.get_config_dict(model, revision=revision)[0]
    if config.get("model_type") != "gircse":
        raise ValueError(
            f"model={model!r} is no GIRCSE model but of type {config.get('model_type')!r}; train one first"
        )
    if folder.is_dir():
        folders = {Path(model), Path(model, config.get("adapter") or "")}  # an adapter may take the weights' place
        files = [f for path in folders for f in path.glob("*") if f.suffix in (".json", ".safetensors", ".bin")]
        names = {f"model file {file.relative_to(model).as_posix()}": file for file in files}
        return {"model": model, "revision": None}, names
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise ValueError(f"model={model!r}: its commit can't be told, as its files are not in the cache of the Hub")
    return {"model": model, "revision": Path(cached).parent.name}, {}


def digest(files: dict[str, Path]) -> dict[str, str]:
    """Under the same names, what changes with the content of the files, on whichever machine they lie."""
    size = sum(file.stat().st_size for file in files.values())
    bar = progress(total=size, unit="B", unit_scale=True, desc="reading model and input", leave=False)

    def digest_one(file: Path) -> str:
        found = hashlib.blake2b(digest_size=16)
        with file.open("rb") as content:
            while part := content.read(2**20):
                found.update(part)
                with bar.get_lock():
                    bar.update(len(part))
        return found.hexdigest()

    with bar, ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(digest_one, files.values()), strict=True))


def measure(file: Path, text_column: str, id_column: str | None) -> tuple[int, str | None]:
    """The number of rows (blank lines count), and the type of the ids, "int" or "str"; None if no row has one."""
    columns = [text_column] if id_column is None else [text_column, id_column]
    reader = RowFile(file)
    count = reader.count()
    if reader.kind == PARQUET:
        schema = pyarrow.parquet.read_schema(file)
        check_columns(file, columns, schema.names)
        _kind_of(file, schema, "text_column", text_column, ["str"])
        return count, id_column and _kind_of(file, schema, "id_column", id_column, ["int", "str"])
    kind, names = None, None
    for row in reader.read():  # up to where all has been seen
        if row.fields is not None:
            names = {**(names or {}), **dict.fromkeys(row.fields)}
            if kind is None and type(value := row.fields.get(id_column)) in (int, str):
                kind = type(value).__name__
            if names.keys() >= set(columns) and (id_column is None or kind is not None):
                break
    if names is not None:  # else no line is a row, and the report will say so of each
        check_columns(file, columns, names)
    return count, kind


def _kind_of(file: Path, schema: pyarrow.Schema, argument: str, column: str, kinds: Sequence[str]) -> str | None:
    """Which of `kinds` a column of Parquet is; None if it holds nothing at all, and each of its rows will be bad."""
    found = schema.field(column).type
    kind = "int" if pyarrow.types.is_integer(found) else "str" if is_text(found) else None
    if kind not in kinds and not pyarrow.types.is_null(found):
        raise ValueError(f"{file}: {argument}={column!r} is of type {found}: cast it to {' or '.join(kinds)}")
    return kind


def check_columns(file: Path, columns: Sequence[str], names: Collection[str]) -> None:
    lacking = [name for name in columns if name not in names]
    if lacking:
        found = ", ".join(map(repr, names)) or "empty rows"
        raise ValueError(f"{file} has no column {lacking[0]!r}, only {found:.500}")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(file)`, so that `path` is there with all its content or not at all. Two writers don't disturb each other:
    they write the same, and the last one to rename its file wins."""
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody is writing a file of [`write_whole`] any more: its process, of this machine, is gone, or it has
    not changed for a day. Another run may be at work on the same shards, on any machine."""
    own = re.fullmatch(rf"\.\w+\.\w+\.{_machine()}-([1-9]\d*)\.tmp", temporary.name)
    if own and platform.node() and not psutil.pid_exists(int(own[1])):
        return True
    try:
        return time.time() - temporary.stat().st_mtime > A_DAY
    except FileNotFoundError:  # it has just got its name
        return False


def _machine() -> str:
    """Stands for this machine in the name of a file, whatever letters its own name is made of."""
    return hashlib.blake2b(platform.node().encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()


class _Log:
    """What tqdm writes over and over, as lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress(**options: Any) -> tqdm:
    """A bar; where it can't be drawn, as in a log, a line at once and at most every LOG_SECONDS."""
    if not sys.stderr.isatty():
        options |= {"file": _Log(), "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "miniters": 0}
    return tqdm(**options)


# The actors ----------------------------------------------------------------------------------------------------------


def field(row: dict[str, Any], name: str, kind: str) -> Any:
    """The field `name` of a row, an "int" or a "str"; a ValueError says why it is none."""
    if name not in row:
        raise ValueError(f"no field {name!r}, only {', '.join(map(repr, row))}"[:200])
    value = row[name]
    if type(value).__name__ != kind:
        raise ValueError(f"{name!r} is {value!r:.60} ({type(value).__name__}), not {kind}")
    if kind == "str" and not value.isascii():
        value.encode()  # half an emoji, which JSON can hold, but neither Arrow nor a tokenizer takes
    if kind == "int" and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name!r} is {value!r:.60}, more than 64 bits")
    return value


def load_model(settings: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its processor; those of this repo by its own code, others by the code they bring."""
    model, processor, trust = AutoModel, AutoProcessor, trust_remote_code
    if settings["model"] == str(ROOT):
        model = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
        processor = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
        AutoConfig.register("gircse", model.config_class, exist_ok=True)  # or loading a tokenizer asks for trust
        trust = False
    common = {"revision": settings["revision"] or "main", "trust_remote_code": trust}
    return (
        model.from_pretrained(settings["model"], **common, dtype=getattr(torch, settings["dtype"])).eval(),
        processor.from_pretrained(settings["model"], **common),
    )


class Embedder:
    """One actor of the pool: the model, loaded once, and what is done with each shard.

    Args:
        plan: what [`make_plan`] returns.
        output: the folder of the shards, an absolute path that all nodes share.
        batch_size: texts that go through the model together.
        device: "cuda" or "cpu".
        trust_remote_code: for [`load_model`].
        tally: handle of a [`Tally`], which is told about each second how many rows of a shard are done.
    """

    def __init__(
        self,
        plan: dict[str, Any],
        output: str,
        batch_size: int,
        device: str,
        trust_remote_code: bool,
        tally: Any = None,
    ):
        self.settings, self.files, self.id_kind = plan["settings"], plan["files"], plan["id"]
        self.output, self.batch_size, self.device = Path(output), batch_size, device
        self.tally, self.reader = tally, None
        Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
        # Loading copies the model's code there, and another actor of this node must not import half a file.
        with FileLock(Path(HF_MODULES_CACHE) / "embed_gircse.lock"):
            self.model, self.processor = load_model(self.settings, trust_remote_code)
        self.model.to(device)
        self.max_length = self.model.text_limit(self.processor.max_length, self.settings["k"])

    def __call__(self, shard: dict[str, Any]) -> dict[str, int]:
        """Embeds and writes a shard; returns how many rows it has and how many of them are bad."""
        ids, texts, bad = [], [], []
        file = self.files[shard["file"]]
        text_column, id_column = self.settings["text_column"], self.settings["id_column"]
        if self.reader is None or self.reader.path != file["path"]:
            self.reader = RowFile(file["path"])  # the shards of a file come mostly in order, and it reads on
        for row in self.reader.read(shard["start"], shard["stop"], {text_column, id_column} - {None}):
            try:
                if row.fields is None:
                    raise ValueError(row.error)
                text = field(row.fields, text_column, "str")
                default = f"{file['name']}:{row.number}"
                ids.append(default if id_column is None else field(row.fields, id_column, self.id_kind))
                texts.append(text)
            except ValueError as error:
                bad.append({"file": file["name"], "row": row.number, "reason": str(error)})
        embeddings = pyarrow.array(self.embed(texts, shard["name"]).flatten().numpy())
        columns = {
            "id": pyarrow.array(ids, ID_TYPES[self.id_kind]),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(embeddings, self.model.config.hidden_size),
        }
        # In the same file, so that a shard and what it set aside are there together or not at all.
        table = pyarrow.table(columns).replace_schema_metadata({BAD_ROWS_KEY: json.dumps(bad)})
        write_whole(self.output / shard["name"], lambda path: pyarrow.parquet.write_table(table, path))
        rows = shard["stop"] - shard["start"]
        self.tell(shard["name"], rows)
        return {"rows": rows, "bad": len(bad)}

    def tell(self, shard: str, rows: int) -> None:
        if self.tally is not None:
            self.tally.tell.remote(shard, rows)

    def embed(self, texts: list[str], shard: str) -> torch.Tensor:
        """(n, d) float32 on the CPU, in the order of `texts`; texts of about one length go together."""
        embeddings = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        told = time.monotonic()
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            part, instruction = [texts[row] for row in rows], self.settings["instruction"]
            inputs = self.processor(part, instruction=instruction, max_length=self.max_length)
            vectors = self.model.generate_embedding(**inputs.to(self.device), k=self.settings["k"])
            embeddings[rows] = vectors.cpu()
            if time.monotonic() - told > 1:
                told = time.monotonic()
                self.tell(shard, start + len(rows))
        return embeddings


class Tally:
    """An actor beside the pool that counts the rows of unfinished shards, too. A shard that begins anew, since its
    actor died, counts anew."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}

    def tell(self, shard: str, rows: int) -> None:
        self.rows[shard] = rows

    def total(self) -> int:
        return sum(self.rows.values())


def size_pool(num_actors: int | None, num_gpus: float | None) -> tuple[int, float, int]:
    """How many actors there are in all, and the GPUs and CPU cores of each.

    Raises:
        ValueError: if no node has room for `num_actors` of them.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(node.get("CPU", 0)), node.get("GPU", 0)) for node in nodes]
    gpus = float(any(gpu for _, gpu in nodes)) if num_gpus is None else num_gpus
    rooms = [(min(cpu, int(gpu // gpus)) if gpus else cpu, cpu) for cpu, gpu in nodes]
    used = [(num_actors or (room if gpus else 1), cpu) for room, cpu in rooms if room >= (num_actors or 1)]
    if not used:
        raise ValueError(
            f"no node has room for num_actors={num_actors} of num_gpus={gpus:g} and a CPU core each (CPUs and GPUs of "
            f"the nodes: {nodes}); ask for fewer"
        )
    return sum(count for count, _ in used), gpus, 1 if gpus else min(cpu // count for count, cpu in used)


# The run -------------------------------------------------------------------------------------------------------------


def report(output: Path, names: Sequence[str]) -> tuple[int, int]:
    """Writes `_bad_rows.jsonl` out of all shards; returns how many rows were embedded and how many set aside."""
    embedded, bad = 0, []
    for name in progress(iterable=names, unit=" shards", desc="reading what was set aside", leave=False):
        with pyarrow.parquet.ParquetFile(output / name) as shard:
            embedded += shard.metadata.num_rows
            bad += json.loads(shard.schema_arrow.metadata[BAD_ROWS_KEY])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    write_whole(output / BAD_ROWS, lambda path: path.write_text(lines, encoding="utf-8"))
    return embedded, len(bad)


def run(options: argparse.Namespace, plan: dict[str, Any], waiting: Sequence[dict[str, Any]]) -> None:
    """Embeds the shards that are `waiting`."""
    if not ray.is_initialized():
        ray.init(include_dashboard=False)  # joins the cluster of RAY_ADDRESS, or else starts one here
    count, gpus, cpus = size_pool(options.num_actors, options.num_gpus)
    ray.data.DataContext.get_current().enable_progress_bars = False  # they count shards; the one below, rows
    for name, level in (("ray.data", logging.WARNING), ("ray.data._internal.progress", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    ray.cloudpickle.register_pickle_by_value(reader)  # a node may have no clone of this repo
    tally = ray.remote(num_cpus=0)(Tally).remote()
    device = "cuda" if gpus else "cpu"
    output = str(options.output.absolute())
    finished = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map(
        Embedder,
        fn_constructor_args=(plan, output, options.batch_size, device, options.trust_remote_code, tally),
        compute=ray.data.ActorPoolStrategy(size=count),
        num_gpus=gpus,
        num_cpus=cpus,
    )
    total = sum(file["rows"] for file in plan["files"])
    before = total - sum(shard["stop"] - shard["start"] for shard in waiting)
    over, bad = threading.Event(), 0
    with progress(total=total, initial=before, unit=" rows", desc=f"{count} actors load the model") as bar:
        follower = threading.Thread(target=follow, args=(bar, tally, f"{count} actors", over.wait), daemon=True)
        follower.start()
        try:
            for shard in finished.iter_rows():
                bad += shard["bad"]
                bar.set_postfix(bad=bad, refresh=False)
        finally:
            over.set()
            follower.join()
        bar.update(total - bar.n)


def follow(bar: tqdm, tally: Any, working: str, wait: Callable[[float], bool]) -> None:
    """Moves the bar each second by what a [`Tally`] has been told, until `wait(1)` is true; its title becomes `working`
    with the first row."""
    while not wait(1):
        with suppress(ray.exceptions.RayError):  # it is late, or lost with its node, and the job goes on without it
            rows = bar.initial + ray.get(tally.total.remote(), timeout=5)
            if rows > bar.initial:
                bar.set_description(working, refresh=False)
            bar.update(rows - bar.n)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name with a letter that the console lacks must not end the run
            stream.reconfigure(errors="backslashreplace")
    options = parse(argv)
    plan = make_plan(options)
    shards = list_shards(plan)
    waiting = [shard for shard in shards if not (options.output / shard["name"]).exists()]
    if waiting:
        run(options, plan, waiting)

    embedded, bad = report(options.output, [shard["name"] for shard in shards])
    for leftover in filter(is_abandoned, options.output.glob(".*.tmp")):  # of killed runs
        with suppress(OSError):  # gone, or not ours to delete
            leftover.unlink()
    print(f"{embedded} rows embedded in {options.output}, {len(shards)} shards, {len(shards) - len(waiting)} of before")
    if bad:
        print(f"{bad} bad rows set aside, see {options.output / BAD_ROWS}")
    return EXIT_BAD_ROWS if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for reports to a third party
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
