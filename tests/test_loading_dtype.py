"""Weights may be saved in bfloat16; a plain load has them in float32, which is fast on any CPU."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, PretrainedConfig

from helpers import ROOT

ARGUMENT = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # transformers < 4.56


def dtypes(model) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters()}


def test_root_loads_in_float32_from_bfloat16():
    files = ROOT.glob("model*.safetensors")
    assert {weight.dtype for file in files for weight in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((ROOT / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert dtypes(AutoModel.from_pretrained(ROOT, trust_remote_code=True)) == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16"])
def test_an_explicit_dtype_holds(dtype):
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert dtypes(AutoModel.from_pretrained(ROOT, trust_remote_code=True, **{ARGUMENT: dtype})) == {expected}


def test_sentence_transformers_take_the_dtype_of_model_kwargs():
    """ "auto" stands for the config's dtype, as everywhere in transformers."""
    for dtype, expected in (("auto", torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = SentenceTransformer(str(ROOT), trust_remote_code=True, device="cpu", model_kwargs={ARGUMENT: dtype})
        assert dtypes(model) == {expected}
