"""What the tests of bulk embedding share: its input, its command line, and its output as a reader sees it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import torch

from gircse.embedding import actors, shards
from helpers import ROOT

ROWS = [json.loads(line) for line in (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
TEXTS = [text for row in ROWS for text in (row["query"], *row["pos"])]
MODEL: Path | None = None  # of the tests of a file that sets it; else that of this repo


def write_lines(file: Path, lines: list[bytes | dict]) -> Path:
    content = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def arguments(pattern: Path | str, output: Path, *more: str) -> list[str]:
    model = ["--model", str(MODEL), "--trust_remote_code"] if MODEL else []
    return ["--input", str(pattern), "--output", str(output), "--num_actors", "2", "--num_gpus", "0", *model, *more]


def read(output: Path) -> dict:
    """id -> embedding, of the folder as any reader of Parquet sees it; an id that is there twice is an error."""
    table = pq.read_table(output)
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, torch.tensor(table["embedding"].to_pylist()), strict=True))


def stamps(output: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in output.glob("[0-9]*.parquet")}


def machine(folder: Path) -> str:
    """What stands for this machine in the names of the files that it is writing."""
    names = []
    shards.write_whole(folder / "probe", lambda file: (file.write_text(""), names.append(file.name)))
    (folder / "probe").unlink()
    return names[0].removeprefix(".probe.").rpartition("-")[0]


def expected(texts: list[str], k: int, model: Path | None = None, **options: str | int) -> torch.Tensor:
    """`options` are the processor's."""
    settings = {"model": str(model or MODEL or ROOT), "revision": None, "dtype": "float32"}
    loaded, processor = actors.load_model(settings, trust_remote_code=True)
    return loaded.generate_embedding(**processor(texts, **options), k=k)
