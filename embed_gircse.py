"""Bulk embedding on Ray Data: files of texts in, Parquet shards of embeddings out, in any number of runs.

    python embed_gircse.py --input "corpus/*.parquet" --text_column text --output vectors --k 20

A row on its way through this file:

    make_plan     files -> shards of `rows_per_shard` rows; `_plan.json` holds what the run was asked for
    Ray Data      gives each shard that isn't there yet to one of a pool of actors, and to another one if that dies
    Embedder      reads the shard, sets bad rows aside, embeds the others and writes them under the shard's name
    report        what all shards set aside -> `_bad_rows.jsonl`

A shard's file appears whole or not at all, and its name follows from the plan: whatever is killed, and whenever, no row
is lost or repeated. Ray Data's own readers don't number rows, and one broken line ends them, so reading is done here.

Exit status: 0 if every row was embedded, 3 if bad rows were set aside, 2 for an unknown or missing argument, 1 for any
other error. After an error the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import json
import logging
import os
import re
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import ray
import torch
from filelock import FileLock
from huggingface_hub import try_to_load_from_cache
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import HF_MODULES_CACHE

ROOT = Path(__file__).resolve().parent
# Readers of a folder of Parquet pass over names that start with "_" or ".".
PLAN, BAD_ROWS = "_plan.json", "_bad_rows.jsonl"
BAD_ROWS_KEY = b"gircse_bad_rows"
EXIT_BAD_ROWS = 3
A_DAY = 24 * 60 * 60
DTYPES = ("float32", "bfloat16", "float16")
ID_TYPES = {"int": pyarrow.int64(), "str": pyarrow.string()}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files or quoted glob patterns: .parquet, .jsonl, .jsonl.gz")
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
            column, ids are of several types, or the model is no GIRCSE model or not trusted.
    """
    files = find_files(options.input)
    names = ("text_column", "id_column", "k", "instruction", "dtype", "rows_per_shard")
    path = options.output / PLAN
    plan = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    settings = {name: getattr(options, name) for name in names}
    settings |= identify_model(options, plan["settings"] if plan else {})
    with ThreadPoolExecutor() as pool:
        settings |= {f"input {file}": found for file, found in zip(files, pool.map(digest, files), strict=True)}
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
        measured = list(pool.map(lambda file: measure(file, options.text_column, options.id_column), files))
    kinds = {kind: file for file, (_, kind) in zip(files, measured, strict=True) if kind}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} in {file}" for kind, file in kinds.items())
        raise ValueError(f"id_column={options.id_column!r} is of several types ({found}): make them one")
    # What ids and reports call a file: its path below the folder that all of them are in.
    top = os.path.commonpath([file.parent for file in files])
    plan = {
        "settings": settings,
        "id": next(iter(kinds), "str"),
        "files": [
            {"path": str(file), "name": file.relative_to(top).as_posix(), "rows": rows}
            for file, (rows, _) in zip(files, measured, strict=True)
        ],
    }
    write_whole(path, lambda file: file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8"))
    return plan


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
        if not file.name.endswith((".parquet", ".jsonl", ".jsonl.gz")):
            raise ValueError(f"input: {file} ends in none of .parquet, .jsonl, .jsonl.gz: rename it or leave it out")
    return sorted(files)


def identify_model(options: argparse.Namespace, begun: dict[str, Any]) -> dict[str, Any]:
    """Which model it is: a folder's path and the digests of its files, or an id and the commit it stands for, which is
    that of the settings `begun` with as long as nobody asks for another."""
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
    folders = {Path(model), Path(model, config.get("adapter") or "")}  # an adapter may take the weights' place
    files = [f for path in folders for f in path.glob("*") if f.suffix in (".json", ".safetensors", ".bin")]
    digests = {f"model file {file.relative_to(model).as_posix()}": digest(file) for file in files}
    if folder.is_dir():
        return {"model": model, "revision": None} | digests
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(cached, str):
        raise ValueError(f"model={model!r}: its commit can't be told, as its files are not in the cache of the Hub")
    return {"model": model, "revision": Path(cached).parent.name}


def digest(file: Path) -> str:
    """What changes with the content of a file, on whichever machine it lies."""
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as content:
        while part := content.read(2**20):
            found.update(part)
    return found.hexdigest()


def measure(file: Path, text_column: str, id_column: str | None) -> tuple[int, str | None]:
    """The number of rows (of JSONL: lines), and the type of the ids, "int" or "str"; None if no row has one."""
    columns = [text_column] if id_column is None else [text_column, id_column]
    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                rows, schema = table.metadata.num_rows, table.schema_arrow
            check_columns(file, columns, schema.names)
            if id_column is None:
                return rows, None
            kind = schema.field(id_column).type
            if pyarrow.types.is_integer(kind):
                return rows, "int"
            if _is_text(kind):
                return rows, "str"
            raise ValueError(f"{file}: id_column={id_column!r} is of type {kind}; int and str can be ids")
        rows, kind, fields, searching = 0, None, None, True
        with open_lines(file) as lines:
            for line in lines:
                rows += 1
                if searching:
                    with suppress(ValueError):
                        row = line_to_row(line)
                        fields = {**(fields or {}), **dict.fromkeys(row)}
                        if kind is None and type(value := row.get(id_column)) in (int, str):
                            kind = type(value).__name__
                        searching = not fields.keys() >= set(columns) or (id_column is not None and kind is None)
        if fields is not None:  # else no line is a row, and the report will say so of each
            check_columns(file, columns, fields)
        return rows, kind
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} can't be read to its end ({error}): write or download it again") from error


def check_columns(file: Path, columns: Sequence[str], names: Collection[str]) -> None:
    lacking = [name for name in columns if name not in names]
    if lacking:
        found = ", ".join(map(repr, names)) or "empty rows"
        raise ValueError(f"{file} has no column {lacking[0]!r}, only {found:.500}")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(file)`, so that `path` is there with all its content or not at all. Two writers don't disturb each other:
    they write the same, and the last one to rename its file wins."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    write(temporary)
    temporary.replace(path)


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody is writing a file of [`write_whole`] any more: its process, of this machine, is gone, or it has
    not changed for a day. Another run may be at work on the same shards, on any machine."""
    own = re.fullmatch(rf"\.\w+\.\w+\.{re.escape(os.uname().nodename)}-([1-9]\d*)\.tmp", temporary.name)
    try:
        old = time.time() - temporary.stat().st_mtime > A_DAY
        if own:
            os.kill(int(own[1]), 0)  # sends nothing, and fails if there is no such process
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # it has just got its name
        return False
    except PermissionError:  # the process is there, of another user
        pass
    return old


# Rows ----------------------------------------------------------------------------------------------------------------


def open_lines(file: str | Path) -> Any:
    return gzip.open(file, "rb") if str(file).endswith(".gz") else open(file, "rb")


def _is_text(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def line_to_row(line: bytes) -> dict[str, Any]:
    """The row of a line of JSON; a ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of a wrong encoding, too
        raise ValueError(f"broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object but {row!r:.60}")
    return row


def field(row: dict[str, Any], name: str, kind: str) -> Any:
    """The field `name` of a row, an "int" or a "str"; a ValueError says why it is none."""
    if name not in row:
        raise ValueError(f"no field {name!r}, only {', '.join(map(repr, row))}"[:200])
    value = row[name]
    if isinstance(value, bytes) and kind == "str":  # what `parquet_rows` gives for text
        value = value.decode()
    if type(value).__name__ != kind:
        raise ValueError(f"{name!r} is {value!r:.60} ({type(value).__name__}), not {kind}")
    if kind == "str" and not value.isascii():
        value.encode()  # half an emoji, which JSON can hold, but neither Arrow nor a tokenizer takes
    if kind == "int" and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name!r} is {value!r:.60}, more than 64 bits")
    return value


def parquet_rows(file: str, columns: set[str], start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows start..stop - 1 of a Parquet file, from its row groups that hold any of them. Text comes as bytes, since
    Parquet does not make sure that it is UTF-8."""
    with pyarrow.parquet.ParquetFile(file) as table:
        counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        ends = list(accumulate(counts))
        groups = [group for group, end in enumerate(ends) if end > start and end - counts[group] < stop]
        position = ends[groups[0]] - counts[groups[0]]
        for batch in table.iter_batches(row_groups=groups, columns=sorted(columns)):
            first = max(start, position)
            part = batch[first - position : max(0, stop - position)]
            position += len(batch)
            as_bytes = [f.with_type(pyarrow.large_binary()) if _is_text(f.type) else f for f in part.schema]
            yield from enumerate(part.cast(pyarrow.schema(as_bytes)).to_pylist(), first)


class Lines:
    """Goes forward in a file of lines, over many calls: the shards of a file come mostly in order, and a gzip file can
    only be read from its start."""

    def __init__(self) -> None:
        self.file, self.lines, self.position = None, None, 0

    def read(self, file: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        if file != self.file or start < self.position:
            if self.lines is not None:
                self.lines.close()
            self.file, self.lines, self.position = file, open_lines(file), 0
        skipped, self.position = start - self.position, stop
        for _ in islice(self.lines, skipped):
            pass
        return enumerate(islice(self.lines, stop - start), start)


# The actors ----------------------------------------------------------------------------------------------------------


def load_model(settings: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its processor; those of this repo by its own code, others by the code they bring."""
    model, processor, trust = AutoModel, AutoProcessor, trust_remote_code
    if settings["model"] == str(ROOT):
        model = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
        processor = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
        AutoConfig.register("gircse", model.config_class, exist_ok=True)  # or loading a tokenizer asks for trust
        trust = False
    name_of_dtype = "dtype" if int(version("transformers").split(".")[0]) >= 5 else "torch_dtype"
    dtype = {name_of_dtype: getattr(torch, settings["dtype"])}
    common = {"revision": settings["revision"] or "main", "trust_remote_code": trust}
    return (
        model.from_pretrained(settings["model"], **common, **dtype).eval(),
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
    """

    def __init__(self, plan: dict[str, Any], output: str, batch_size: int, device: str, trust_remote_code: bool):
        self.settings, self.files, self.id_kind = plan["settings"], plan["files"], plan["id"]
        self.output, self.batch_size, self.device = Path(output), batch_size, device
        self.lines = Lines()
        Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
        # Loading copies the model's code there, and another actor of this node must not import half a file.
        with FileLock(Path(HF_MODULES_CACHE) / "embed_gircse.lock"):
            self.model, self.processor = load_model(self.settings, trust_remote_code)
        self.model.to(device)
        k, self.max_length = self.settings["k"], self.processor.max_length
        room = self.model.max_input_length(k)
        if room is not None:
            if room < 1:
                raise ValueError(f"k={k or self.model.config.num_steps} takes all positions of the backbone: lower it")
            self.max_length = min(self.max_length, room)

    def __call__(self, shard: dict[str, Any]) -> dict[str, int]:
        """Embeds and writes a shard; returns how many rows it has and how many of them are bad."""
        ids, texts, bad = [], [], []
        file = self.files[shard["file"]]
        for index, raw in self.rows(file["path"], shard["start"], shard["stop"]):
            try:
                row = line_to_row(raw) if isinstance(raw, bytes) else raw
                text = field(row, self.settings["text_column"], "str")
                name = self.settings["id_column"]
                ids.append(f"{file['name']}:{index + 1}" if name is None else field(row, name, self.id_kind))
                texts.append(text)
            except ValueError as error:
                bad.append({"file": file["name"], "row": index + 1, "reason": str(error)})
        embeddings = pyarrow.array(self.embed(texts).flatten().numpy())
        columns = {
            "id": pyarrow.array(ids, ID_TYPES[self.id_kind]),
            "embedding": pyarrow.FixedSizeListArray.from_arrays(embeddings, self.model.config.hidden_size),
        }
        # In the same file, so that a shard and what it set aside are there together or not at all.
        table = pyarrow.table(columns).replace_schema_metadata({BAD_ROWS_KEY: json.dumps(bad)})
        write_whole(self.output / shard["name"], lambda path: pyarrow.parquet.write_table(table, path))
        return {"rows": shard["stop"] - shard["start"], "bad": len(bad)}

    def rows(self, file: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(index, row of Parquet or line of JSON); blank lines are no rows."""
        if file.endswith(".parquet"):
            columns = {self.settings["text_column"], self.settings["id_column"]} - {None}
            return parquet_rows(file, columns, start, stop)
        return ((index, line) for index, line in self.lines.read(file, start, stop) if line.strip())

    def embed(self, texts: list[str]) -> torch.Tensor:
        """(n, d) float32 on the CPU, in the order of `texts`; texts of about one length go together."""
        embeddings = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            part, instruction = [texts[row] for row in rows], self.settings["instruction"]
            inputs = self.processor(part, instruction=instruction, max_length=self.max_length)
            vectors = self.model.generate_embedding(**inputs.to(self.device), k=self.settings["k"])
            embeddings[rows] = vectors.cpu()
        return embeddings


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
    for name in names:
        with pyarrow.parquet.ParquetFile(output / name) as shard:
            embedded += shard.metadata.num_rows
            bad += json.loads(shard.schema_arrow.metadata[BAD_ROWS_KEY])
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in bad)
    write_whole(output / BAD_ROWS, lambda path: path.write_text(lines, encoding="utf-8"))
    return embedded, len(bad)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit status."""
    options = parse(argv)
    plan = make_plan(options)
    size = options.rows_per_shard
    places = [(index, start) for index, file in enumerate(plan["files"]) for start in range(0, file["rows"], size)]
    shards = [
        {
            "name": f"{number:06d}.parquet",
            "file": index,
            "start": start,
            "stop": min(start + size, plan["files"][index]["rows"]),
        }
        for number, (index, start) in enumerate(places)
    ]
    waiting = [shard for shard in shards if not (options.output / shard["name"]).exists()]
    total, left = (sum(shard["stop"] - shard["start"] for shard in part) for part in (shards, waiting))

    if waiting:
        if not ray.is_initialized():
            ray.init(include_dashboard=False)  # joins the cluster of RAY_ADDRESS, or else starts one here
        count, gpus, cpus = size_pool(options.num_actors, options.num_gpus)
        ray.data.DataContext.get_current().enable_progress_bars = False  # they count shards; the one below, rows
        for name, level in (("ray.data", logging.WARNING), ("ray.data._internal.progress", logging.ERROR)):
            logging.getLogger(name).setLevel(level)
        finished = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map(
            Embedder,
            fn_constructor_args=(
                plan,
                str(options.output.absolute()),
                options.batch_size,
                "cuda" if gpus else "cpu",
                options.trust_remote_code,
            ),
            compute=ray.data.ActorPoolStrategy(size=count),
            num_gpus=gpus,
            num_cpus=cpus,
        )
        with tqdm(total=total, initial=total - left, unit=" rows", desc=f"{count} actors") as bar:
            bad = 0
            for done in finished.iter_rows():
                bad += done["bad"]
                bar.set_postfix(bad=bad, refresh=False)
                bar.update(done["rows"])

    embedded, bad = report(options.output, [shard["name"] for shard in shards])
    for leftover in filter(is_abandoned, options.output.glob(".*.tmp")):  # of killed runs
        leftover.unlink(missing_ok=True)
    print(f"{embedded} rows embedded in {options.output}, {len(shards)} shards, {len(shards) - len(waiting)} of before")
    if bad:
        print(f"{bad} bad rows set aside, see {options.output / BAD_ROWS}")
    return EXIT_BAD_ROWS if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked for reports to a third party
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
