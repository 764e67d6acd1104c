"""LaSER (arXiv 2603.01425) is GIRCSE with the prompt's own last state in the mean: parity with its procedure, here
written out without a cache, in float64. Its T thinking steps are k = T - 1 generated tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers import gradients, laser, relative, text_config

LASER = {"pooling": "mean_with_prompt", "num_steps": 2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thinking_steps", [1, 2, 3, 5])
def test_parity_with_the_published_procedure(gircse, batch, tied, thinking_steps):
    """T = 1 generates nothing, and is Causal-EOS."""
    torch.manual_seed(0)
    axes = LASER if thinking_steps > 1 else {"step_token": "none", "pooling": "last"}
    config = gircse.GircseConfig(text_config=text_config("qwen3", head_dim=8, tie_word_embeddings=tied), **axes)
    model, (ids, mask) = gircse.GircseModel(config).double().eval(), batch
    k = thinking_steps - 1 or None
    with torch.no_grad():
        expected = laser(model, ids, mask, thinking_steps)
    found = model.generate_embedding(ids, mask, k=k, normalize=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    left = torch.stack([row.roll(len(row) - int(m.sum())) for row, m in zip(ids, mask, strict=True)])
    padded_left = model.generate_embedding(left, mask.flip(1), k=k)
    torch.testing.assert_close(padded_left, F.normalize(expected, dim=-1), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_published_procedure(make_model, batch):
    model = make_model("qwen3", dtype=torch.float64, **LASER)
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    (F.normalize(laser(model, *batch, 3), dim=-1) @ direction).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    (model(*batch, k=2).embeddings @ direction).sum().backward()
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_all_ways_through_the_loop_agree(make_model, batch):
    """Every step of one pass, early stopping with room for all steps, and z_k as a running mean with h'_0 in it."""
    model = make_model(dtype=torch.float64, **LASER)
    output = model(*batch, k=6)
    states = torch.cat([output.prompt_state[:, None], output.step_states], dim=1)
    for k in range(1, 7):
        expected = F.normalize(states[:, : k + 1].mean(1), dim=-1)
        torch.testing.assert_close(output.step_embeddings[:, k - 1], expected)
        torch.testing.assert_close(model.generate_embedding(*batch, k=k), expected)
    all_steps, steps = model.generate_embedding(*batch, k=6, return_steps=True, tolerance=1e-15)
    torch.testing.assert_close(all_steps, output.step_embeddings)
    assert steps.tolist() == [6] * 4


def test_a_text_stops_by_the_mean_that_it_ends_with(make_model, batch):
    model = make_model(dtype=torch.float64, **LASER)
    plain = model.generate_embedding(*batch, k=12, return_steps=True)
    changes = 1 - F.cosine_similarity(plain[:, 1:], plain[:, :-1], dim=-1)  # (B, 11), at steps 2..12
    tolerance = float(changes.flatten().median())
    expected = [next((i + 2 for i, c in enumerate(row) if c < tolerance), 12) for row in changes.tolist()]
    found, steps = model.generate_embedding(*batch, k=12, tolerance=tolerance)
    assert steps.tolist() == expected and len(set(expected)) > 1
    torch.testing.assert_close(found, plain[torch.arange(4), steps - 1])
