"""Tiny models for the tests: random weights, CPU, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# Sliding windows are shorter than the tests' texts, so that they matter.
BACKBONES = {
    "qwen2": SMALL,  # its head is not tied to the embedding
    "qwen2-tied": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 8},
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 6},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": SMALL,
    "gpt2": {
        "vocab_size": 99,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neo": {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "local"], 1]],
        "window_size": 6,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "opt": {
        "vocab_size": 99,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "cohere": {**SMALL, "logit_scale": 0.3},
    "granite": {**SMALL, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


def text_config(name: str, **changes):
    settings = {**BACKBONES[name], **changes}
    config = AutoConfig.for_model(name.split("-")[0], **settings)
    if name.startswith("opt") or name == "gpt2":
        for dropout in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if hasattr(config, dropout):
                setattr(config, dropout, 0.0)
    return config


@pytest.fixture(scope="session")
def gircse() -> SimpleNamespace:
    """The repo's remote code, imported as `from_pretrained` imports it."""
    model = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    module = sys.modules[model.__module__]
    return SimpleNamespace(GircseModel=model, GircseConfig=module.GircseConfig, GircseOutput=module.GircseOutput)


def room(model, name: str):
    """The module `name` of the remote code that a model, or its class, is of."""
    package = (model if isinstance(model, type) else type(model)).__module__.rpartition(".")[0]
    return sys.modules[f"{package}.{name}"]


def step_loop(model, ids, mask, k: int):
    """A batch after its prefill."""
    return room(model, "step_loop_gircse").StepLoop(
        model, *room(model, "inputs_gircse").check_inputs(model, ids, mask, k)
    )


@pytest.fixture
def make_model(gircse):
    def make(backbone: str = "qwen2", *, dtype=torch.float32, seed: int = 0, text_changes=None, **axes):
        torch.manual_seed(seed)
        config = gircse.GircseConfig(text_config=text_config(backbone, **(text_changes or {})), **axes)
        model = gircse.GircseModel(config).to(dtype).eval()
        # How the backbone is driven is tried at the first text: now, so that tests can count passes.
        model.generate_embedding(torch.tensor([[3, 4]]), k=None if model.config.step_token == "none" else 1)
        return model

    return make


@pytest.fixture
def batch():
    """Right-padded ids of four texts of different lengths, (4, 11), and their mask."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([11, 4, 1, 8])
    mask = (torch.arange(11) < lengths[:, None]).long()
    ids = torch.randint(3, 99, (4, 11), generator=generator)
    return ids * mask, mask
