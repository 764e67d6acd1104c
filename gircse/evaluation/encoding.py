"""Encoders as mteb calls them: one pass for all k of a model, and models that mteb loads itself."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from mteb.models.abs_encoder import AbsEncoder
from torch.utils.data import DataLoader

from .subjects import Subject, instruction_of, progress, say


class Vectors:
    """z_k of every distinct text of a task under its prompt, for several k, from one pass.

    They wait on disk in a folder for temporary files (`TMPDIR`), which goes when the block ends: 4 bytes x d x number
    of k for each text, so 2 GB for 100,000 documents with d = 896 and six k. In memory there is one k at a time.
    """

    def __init__(self, subject: Subject, steps: list[int | None], batch_size: int) -> None:
        self.subject, self.steps, self.batch_size = subject, steps, batch_size
        self.rows: dict[bytes, int] = {}

    def __enter__(self) -> Vectors:
        self.folder = tempfile.TemporaryDirectory(prefix="gircse-vectors-")
        self.files = {k: Path(self.folder.name, f"{k}.f32").open("wb") for k in self.steps}
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.folder.cleanup()

    def __call__(self, texts: list[str], prompt: str, side: str | None, k: int | None) -> np.ndarray:
        """(len(texts), d) float32: z_k of each text, embedded now unless it was before, at any k."""
        keys = [self._key(text, prompt, side) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.rows}
        by_length = sorted(new, key=lambda key: len(new[key]), reverse=True)  # so that little is padded
        if new:
            say(f"  embedding {len(new):,} texts")
        for start in progress(range(0, len(by_length), self.batch_size)):
            batch = by_length[start : start + self.batch_size]
            embeddings = self.subject.embed([new[key] for key in batch], prompt, side, self.steps)  # (B, |k|, d)
            check_finite(embeddings, self.subject)
            for column, file in enumerate(self.files.values()):
                np.ascontiguousarray(embeddings[:, column], dtype=np.float32).tofile(file)
            self.rows.update(zip(batch, range(len(self.rows), len(self.rows) + len(batch)), strict=True))
        self.files[k].flush()
        stored = np.memmap(self.files[k].name, np.float32, "r").reshape(len(self.rows), -1)
        return np.asarray(stored[[self.rows[key] for key in keys]])

    @staticmethod
    def _key(text: str, prompt: str, side: str | None) -> bytes:
        parts = json.dumps([text, prompt, side])
        return hashlib.blake2b(parts.encode(), digest_size=16).digest()  # texts as keys would fill the memory


class StepEncoder(AbsEncoder):
    """The model at one k, as mteb calls it (its `EncoderProtocol`)."""

    def __init__(self, vectors: Vectors, k: int | None) -> None:
        self.vectors, self.k = vectors, k
        self.mteb_model_meta = vectors.subject.meta_at(k)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
        side, subject = prompt_type.value if prompt_type else None, self.vectors.subject
        texts = texts_of(inputs, subject, task_metadata, side)
        return self.vectors(texts, subject.prompt(task_metadata, side), side, self.k)


class LoadedEncoder(AbsEncoder):
    """A model that mteb loaded, which writes its own prompts."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.mteb_model_meta = subject.meta_at(None)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> Any:
        if self.subject.expand:
            texts = texts_of(inputs, self.subject, task_metadata, prompt_type.value if prompt_type else None)
            inputs = DataLoader(Dataset.from_dict({"text": texts}), batch_size=inputs.batch_size)
        embeddings = self.subject.loaded.encode(inputs, task_metadata=task_metadata, prompt_type=prompt_type, **kwargs)
        if isinstance(embeddings, torch.Tensor):  # numpy has no bfloat16, and none on a GPU
            embeddings = embeddings.float().cpu().numpy()
        check_finite(embeddings, self.subject)
        return embeddings

    def similarity(self, first: Any, second: Any) -> Any:
        return self.subject.loaded.similarity(first, second)

    def similarity_pairwise(self, first: Any, second: Any) -> Any:
        return self.subject.loaded.similarity_pairwise(first, second)


def check_finite(embeddings: Any, subject: Subject) -> None:
    """Raises a ValueError for NaN and infinity, of which a ranking would make a score like any other."""
    if not np.isfinite(embeddings).all():
        dtype = subject.settings.get("dtype", "its own dtype" if subject.loaded else "float32")
        raise ValueError(f"vectors are not finite in {dtype}: evaluate in another --dtype, as bfloat16")


def texts_of(inputs: Any, subject: Subject, task_metadata: Any, side: str | None) -> list[str]:
    """mteb's batches as one list, augmented if that was asked for."""
    texts = [text for batch in inputs for text in batch["text"]]
    if subject.expand:
        say("  augmenting texts")
        texts = subject.expand(texts, instruction_of(task_metadata, side))
    return texts
