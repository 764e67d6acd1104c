"""The files of a bulk embedding: shards that appear whole or not at all, and the report of what they set aside."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet

from ..command_line import progress

BAD_ROWS = "_bad_rows.jsonl"  # readers of a folder of Parquet pass over names that start with "_" or "."
BAD_ROWS_KEY = b"gircse_bad_rows"
A_DAY = 24 * 60 * 60


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


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """`write(file)`, so that `path` is there with all its content or not at all. Two writers don't disturb each other:
    they write the same, and the last one to rename its file wins."""
    temporary = path.with_name(f".{path.name}.{_machine()}-{os.getpid()}.tmp")
    write(temporary)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())  # else a loss of power may leave the name without the content
    temporary.replace(path)


def is_there(path: Path) -> bool:
    """Whether a shard was written. An empty one wasn't: its disk lost the content."""
    return path.exists() and path.stat().st_size > 0


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody is writing a file of [`write_whole`] any more: its process, of this machine, is gone, or it has
    not changed for a day. Another run may be at work on the same shards, on any machine."""
    own = re.fullmatch(rf"\.\w+\.\w+\.{_machine()}-([1-9]\d*)\.tmp", temporary.name)
    if own and platform.node() and not psutil.pid_exists(int(own[1])):
        return True
    try:
        return time.time() - temporary.stat().st_mtime > A_DAY
    except FileNotFoundError:  # its writer has just renamed it
        return False


def _machine() -> str:
    """A hash that stands for this machine in names of files, whatever characters the machine's own name has."""
    return hashlib.blake2b(platform.node().encode("utf-8", "backslashreplace"), digest_size=8).hexdigest()
