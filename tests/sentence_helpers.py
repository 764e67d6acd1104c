"""What the tests of Sentence Transformers share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from helpers import ROOT

TEXTS = ["a red fox", "", "how do I renew the card that was stolen from me last week?", "rain", "a red fox runs"]
PROMPT = "Instruct: Retrieve semantically similar text.\nQuery: "
SUFFIX = " In short:"


def load(folder: Path, **kwargs) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **kwargs)


def auto_embeddings(folder: Path, prompt: str | None = None, k: int | None = None) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = [model.generate_embedding(**processor(text, prompt=prompt), k=k) for text in TEXTS]
    return torch.cat(rows).numpy()


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


class Inputs:
    """Keeps what the model is given while the block runs: `ids` has each row's token ids, longest text first."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model, self.ids = model[0].model, []

    def __enter__(self) -> Inputs:
        self.hook = self.model.register_forward_pre_hook(self.keep)
        return self

    def keep(self, module, args) -> None:
        self.ids += [ids[mask.bool()].tolist() for ids, mask in zip(*args[:2], strict=True)]

    def __exit__(self, *_) -> None:
        self.hook.remove()


# Prompts and lengths ------------------------------------------------------------------------------------------------


def golden_ids(text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)(text, add_special_tokens=False)["input_ids"]
