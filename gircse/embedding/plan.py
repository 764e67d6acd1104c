"""The plan of a bulk embedding: which rows of which files make which shard, and what the run was asked for."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from .. import ROOT
from ..command_line import progress
from ..loading import commit_of, identify_base, model_files, read_config
from ..rows import PARQUET, RowFile, is_text, matching_files
from .shards import write_whole

PLAN = "_plan.json"  # readers of a folder of Parquet pass over names that start with "_" or "."


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the plan in `options.output`, or makes it: the settings, the files' rows and names, the type of the ids.

    Raises:
        FileNotFoundError: if a pattern of `options.input` matches no file.
        ValueError: if the folder is in use for anything else, a file can't be read, has another ending or lacks a
            column, one is of a wrong type, ids are of several types, or the model is no GIRCSE model or not trusted.
    """
    files = find_files(options.input, options.output)
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


def find_files(patterns: Sequence[str], output: Path) -> list[Path]:
    """The absolute paths of all input files, sorted, each once; without those of an output below them."""
    files: set[Path] = set()
    for pattern in patterns:
        found = {file.absolute() for file in matching_files(pattern)}
        if not found:
            raise FileNotFoundError(f"input={pattern!r} matches no file (working directory: {Path.cwd()})")
        files |= found
    files = {file for file in files if output.absolute() not in file.parents}
    for file in files:
        RowFile(file)  # raises for an ending that it can't read
    return sorted(files)


def name_files(files: Sequence[Path]) -> list[str]:
    """The files' names in ids and reports: their paths below the folder that holds all of them."""
    try:
        top = os.path.commonpath([file.parent for file in files])
        names = [file.relative_to(top).as_posix() for file in files]
    except ValueError:  # they are on several drives of Windows
        names = [file.as_posix() for file in files]
    # Linux takes any bytes as a name. Those that are not UTF-8 could be neither an id nor in the report: escaped.
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def identify_model(options: argparse.Namespace, begun: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Path]]:
    """What identifies the model: a folder's path, and the files in it that the vectors depend on; or a Hub id and its
    commit. A run that goes on keeps the commit of its settings, `begun`, unless another revision is asked for."""
    folder = Path(options.model).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else options.model
    revision = options.revision or (begun.get("revision") if begun.get("model") == model else None)
    config = read_config(model, revision)
    if config.get("model_type") != "gircse":
        raise ValueError(
            f"model={model!r} is no GIRCSE model but of type {config.get('model_type')!r}; train one first"
        )
    if model != str(ROOT) and not options.trust_remote_code:
        raise ValueError(f"model={model!r} brings code of its own: read it, then add --trust_remote_code")
    if folder.is_dir():
        names = {f"model file {file.relative_to(model).as_posix()}": file for file in model_files(Path(model))}
        base, its_files = identify_base(Path(model))
        return {"model": model, "revision": None, **base}, names | its_files
    commit = commit_of(model, revision)
    if commit is None:
        raise ValueError(f"model={model!r}: its commit can't be told, as its files are not in the cache of the Hub")
    return {"model": model, "revision": commit}, {}


def digest(files: dict[str, Path]) -> dict[str, str]:
    """A hash of each file's content, under the same names; the same on every machine."""
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
    for row in reader.read():  # until columns and type are known
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
