"""One text, one vector: AutoModel, Sentence Transformers, the handler, a pipeline and bulk embedding agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoProcessor, pipeline

pytest.importorskip("ray.data")
import pyarrow.parquet as pq

import embed_gircse
from helpers import ROOT, make_handler

TEXTS = [
    "a red fox",
    "how do I renew the card that was stolen from me last week?",
    "rain",
    "Füchse 狐 🦊",
    "word " * 700,
]
INSTRUCTION = "Retrieve semantically similar text."
K = 4


def by_auto_model(folder: Path, instruction: str | None, _: Path) -> torch.Tensor:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return model.generate_embedding(**processor(TEXTS, instruction=instruction), k=K)


def by_sentence_transformers(folder: Path, instruction: str | None, _: Path) -> torch.Tensor:
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    prompt = model[0].processor.prompt_for(instruction) if instruction else None
    return model.encode(TEXTS, prompt=prompt, k=K, convert_to_tensor=True)


def by_handler(folder: Path, instruction: str | None, _: Path) -> torch.Tensor:
    handler, _ = make_handler(folder)
    return torch.tensor(handler({"inputs": TEXTS, "parameters": {"k": K, "instruction": instruction}}))


def by_pipeline(folder: Path, instruction: str | None, _: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    embed = pipeline("feature-extraction", model=str(folder), tokenizer=processor, trust_remote_code=True, device="cpu")
    embed.model.config.num_steps = K
    return torch.tensor(embed(TEXTS, tokenize_kwargs={"instruction": instruction}))[:, 0]


def by_bulk_embedding(folder: Path, instruction: str | None, work: Path) -> torch.Tensor:
    (work / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    call = ["--input", str(work / "in.jsonl"), "--output", str(work / "out"), "--model", str(folder), "--k", str(K)]
    call += ["--num_gpus", "0", "--trust_remote_code"] + (["--instruction", instruction] if instruction else [])
    assert embed_gircse.main(call) == 0
    return torch.tensor(pq.read_table(work / "out")["embedding"].to_pylist())


@pytest.fixture(scope="module")
def folders(exported) -> dict[str, Path]:
    """The root model, and one with a suffix and a shorter limit, as training exports it."""
    return {"root": ROOT, "exported": exported}


@pytest.mark.slow
@pytest.mark.parametrize("instruction", [INSTRUCTION, None])
@pytest.mark.parametrize("name", ["root", "exported"])
def test_every_surface_gives_the_same_vectors(folders, cluster, tmp_path, name, instruction):
    expected = by_auto_model(folders[name], instruction, tmp_path)
    assert F.cosine_similarity(expected, expected.roll(1, 0)).max() < 0.9999  # or equal vectors would mean nothing
    for surface in (by_sentence_transformers, by_handler, by_pipeline, by_bulk_embedding):
        found = surface(folders[name], instruction, tmp_path)
        assert found.shape == expected.shape and found.dtype == torch.float32, surface.__name__
        assert F.cosine_similarity(found, expected).min() > 0.9999, surface.__name__
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(TEXTS)))
