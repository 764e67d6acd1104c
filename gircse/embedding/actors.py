"""The pool's actors: each loads the model once, and embeds and writes one shard after the other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from transformers import AutoModel, AutoProcessor

from .. import ROOT
from ..cluster import resources, room_on_gpus
from ..loading import load
from ..locking import one_at_a_time
from ..rows import RowFile
from .shards import BAD_ROWS_KEY, write_whole

ID_TYPES = {"int": pyarrow.int64(), "str": pyarrow.string()}


class Embedder:
    """One actor of the pool: the model, loaded once, and what is done with each shard.

    Args:
        plan: what [`make_plan`] returns.
        document_prompt: the model's own, literally, for texts without an instruction.
        output: the folder of the shards, an absolute path that all nodes share.
        batch_size: texts that go through the model together.
        trust_remote_code: for [`load_model`].
        device: "cuda" or "cpu".
        tally: handle of a [`Tally`], which is told how many rows of a shard are done, about once a second.
    """

    def __init__(
        self,
        *,
        plan: dict[str, Any],
        document_prompt: str,
        output: str,
        batch_size: int,
        trust_remote_code: bool,
        device: str,
        tally: Any,
    ):
        self.settings, self.files, self.id_kind = plan["settings"], plan["files"], plan["id"]
        self.output, self.batch_size, self.device = Path(output), batch_size, device
        self.tally, self.reader = tally, None
        with one_at_a_time():
            self.model, self.processor = load_model(self.settings, trust_remote_code)
        self.model.to(device)
        self.prompt = self.processor.prompt_for(self.settings["instruction"]) or document_prompt
        self.max_length = self.model.text_limit(self.processor.max_length, self.settings["k"])

    def __call__(self, shard: dict[str, Any]) -> dict[str, int]:
        """Embeds and writes a shard; returns how many of its rows are bad."""
        ids, texts, bad = [], [], []
        file = self.files[shard["file"]]
        text_column, id_column = self.settings["text_column"], self.settings["id_column"]
        if self.reader is None or self.reader.path != file["path"]:
            self.reader = RowFile(file["path"])  # kept: it reads on, as a file's shards come mostly in order
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
        # The bad rows are in the shard's own file, so that both are there together or not at all.
        table = pyarrow.table(columns).replace_schema_metadata({BAD_ROWS_KEY: json.dumps(bad)})
        write_whole(self.output / shard["name"], lambda path: pyarrow.parquet.write_table(table, path))
        self.tally.tell.remote(shard["name"], shard["stop"] - shard["start"])
        return {"bad": len(bad)}

    def embed(self, texts: list[str], shard: str) -> torch.Tensor:
        """(n, d) float32 on the CPU, in the order of `texts`; texts of about one length go together."""
        embeddings = torch.empty(len(texts), self.model.config.hidden_size)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
        told = time.monotonic()
        for start in range(0, len(texts), self.batch_size):
            rows = order[start : start + self.batch_size]
            inputs = self.processor([texts[row] for row in rows], prompt=self.prompt, max_length=self.max_length)
            vectors = self.model.generate_embedding(**inputs.to(self.device), k=self.settings["k"])
            if not vectors.isfinite().all():
                remedy = "use another --dtype, as bfloat16, and a new --output"
                raise RuntimeError(f"{shard}: vectors are not finite in {self.model.dtype}: {remedy}")
            embeddings[rows] = vectors.cpu()
            if time.monotonic() - told > 1:
                told = time.monotonic()
                self.tally.tell.remote(shard, start + len(rows))
        return embeddings


def field(row: dict[str, Any], name: str, kind: str) -> Any:
    """The field `name` of a row, an "int" or a "str"; a ValueError says why it is none."""
    if name not in row:
        raise ValueError(f"no field {name!r}, only {', '.join(map(repr, row))}"[:200])
    value = row[name]
    if type(value).__name__ != kind:
        raise ValueError(f"{name!r} is {value!r:.60} ({type(value).__name__}), not {kind}")
    if kind == "str" and not value.isascii():
        value.encode()  # raises for half an emoji: JSON can hold it, but neither Arrow nor a tokenizer takes it
    if kind == "int" and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name!r} is {value!r:.60}, more than 64 bits")
    return value


def load_model(settings: dict[str, Any], trust_remote_code: bool) -> tuple[Any, Any]:
    """The model and its processor: of this repo by its own code; of others by the code that they bring, since a node of
    a cluster may have no clone of this repo."""
    if settings["model"] == str(ROOT):
        return load(ROOT, dtype=settings["dtype"])
    common = {"revision": settings["revision"] or "main", "trust_remote_code": trust_remote_code}
    return (
        AutoModel.from_pretrained(settings["model"], **common, dtype=getattr(torch, settings["dtype"])),
        AutoProcessor.from_pretrained(settings["model"], **common),
    )


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
    """How many actors there are in all, and the GPUs and CPU cores of each. Actors on CPUs have equally many cores: as
    many as puts most cores to work, which may leave the smallest nodes out.

    Raises:
        ValueError: if no node has room for `num_actors` of them.
    """
    nodes, gpus = resources(num_gpus)
    rooms = [(min(cpu, room_on_gpus(gpu, gpus)) if gpus else cpu, cpu) for cpu, gpu in nodes]
    used = [(room, cpu) for room, cpu in rooms if room >= (num_actors or 1)]
    if not used:
        raise ValueError(
            f"no node has room for num_actors={num_actors} of num_gpus={gpus:g} and a CPU core each (CPUs and GPUs of "
            f"the nodes: {nodes}); ask for fewer"
        )
    if gpus:
        return sum(num_actors or room for room, _ in used), gpus, 1
    count = num_actors or 1
    shares = sorted(cpu // count for _, cpu in used)
    actors = {cores: count * sum(share >= cores for share in shares) for cores in shares}
    cores = max(actors, key=lambda cores: cores * actors[cores])
    return actors[cores], gpus, cores
