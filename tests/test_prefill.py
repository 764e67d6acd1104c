"""The prompts' pass: what rows share runs once, in inference and in training, and changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers import algorithm_1, attention_for, decoder_shapes, gradients, keeps_a_cache, relative, room


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backbone, tolerance", [("gpt2", 1e-9), ("qwen2", 1e-5), ("gemma3_text", 1e-5)])
def test_shared_prefix_runs_once_and_changes_nothing(make_model, monkeypatch, backbone, tolerance, side):
    """Four texts of different lengths under one instruction of 9 tokens, in inference and in training."""
    changes = {"sliding_window": 64} if backbone == "gemma3_text" else {}
    model = make_model(backbone, dtype=torch.float64, text_changes=changes, **attention_for(backbone)).train()
    generator = torch.Generator().manual_seed(3)
    lengths = [12, 10, 15, 11]
    rows = [torch.cat([torch.arange(10, 19), torch.randint(20, 99, (n - 9,), generator=generator)]) for n in lengths]
    pad = [(0, 15 - n) if side == "right" else (15 - n, 0) for n in lengths]
    ids = torch.stack([F.pad(row, p) for row, p in zip(rows, pad, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), p) for row, p in zip(rows, pad, strict=True)])
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    shapes, results = decoder_shapes(model), []
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(room(model, "step_loop_gircse"), "shared_prefix", lambda *args: 0)
        model.zero_grad()
        output = model(ids, mask, k=3)
        (output.step_embeddings @ direction).sum().backward()
        results.append((output.step_embeddings.detach(), gradients(model)))
    once = [(1, 9), (4, 6), (4, 1), (4, 1), (4, 1)] + [(4, 15), (4, 1), (4, 1), (4, 1)]
    without_cache = 2 * [(4, 15), (4, 16), (4, 17), (4, 18)]  # GPT-2 and Gemma in transformers 4.51
    assert shapes == once or (backbone != "qwen2" and shapes == without_cache)
    assert relative(results[0][0], results[1][0]) < tolerance
    for name, gradient in results[1][1].items():
        assert relative(results[0][1][name], gradient) < tolerance, name


@pytest.mark.parametrize("backbone, tolerance", [("gpt2", 1e-9), ("qwen2", 1e-5), ("mistral", 1e-5)])
def test_rows_of_like_start_and_length_are_prefilled_together_and_nothing_changes(
    make_model, monkeypatch, backbone, tolerance
):
    """Four texts under one instruction of 22 tokens among long and short ones without: values and gradients, with the
    padding on either side; Mistral's window of 6 is shorter than most."""
    model = make_model(backbone, dtype=torch.float64, **attention_for(backbone)).train()
    generator = torch.Generator().manual_seed(3)
    lengths = [25, 3, 40, 23, 5, 38, 24, 4, 1, 39, 28, 37]
    rows = [torch.randint(30, 99, (n,), generator=generator) for n in lengths]
    for row in (0, 3, 6, 10):
        rows[row][:22] = torch.arange(5, 27)
    ids = torch.stack([F.pad(row, (0, 40 - len(row)) if i % 2 else (40 - len(row), 0)) for i, row in enumerate(rows)])
    mask = torch.stack(
        [F.pad(torch.ones_like(row), (0, 40 - len(row)) if i % 2 else (40 - len(row), 0)) for i, row in enumerate(rows)]
    )
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    cached, shapes, results = keeps_a_cache(model), decoder_shapes(model), []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(room(model, "step_loop_gircse"), "prefill_groups", lambda *args: [None])
        model.zero_grad()
        output = model(ids, mask, k=3)
        (output.step_embeddings @ direction).sum().backward()
        results.append((output.step_embeddings.detach(), gradients(model)))
    if cached:  # GPT-2 in transformers 4.51 keeps none
        prefills = [(4, 5), (8, 40)] if backbone == "mistral" else [(1, 22), (4, 6), (4, 5), (4, 40)]
        assert shapes == [*prefills, (12, 1), (12, 1), (12, 1), (12, 40), (12, 1), (12, 1), (12, 1)]
    assert relative(results[0][0], results[1][0]) < tolerance
    for name, gradient in results[1][1].items():
        assert relative(results[0][1][name], gradient) < tolerance, name


def test_prefix_is_not_shared_across_a_sliding_window_or_by_short_prefixes(make_model):
    ids = torch.arange(10, 22).repeat(2, 1)
    ids[1, -1] = 50

    def shared(backbone: str, ids: torch.Tensor) -> int:
        model = make_model(backbone)
        way = model._find_way(ids.device)
        return room(model, "step_loop_gircse").shared_prefix(model.language_model, ids, torch.ones_like(ids), 3, way)

    assert shared("mistral", ids) == 0  # a window of 6
    assert shared("qwen2", ids) == 11
    assert shared("qwen2", ids[:, 4:]) == 0
    assert shared("qwen2", ids[:1]) == 0
    assert shared("qwen2", ids[:1].repeat(3, 1)) == 11  # each row runs its last token


@pytest.mark.parametrize("backbone", ["mistral", "gpt_neo"])
def test_texts_with_one_prefix_that_exceed_a_window_equal_algorithm_1(make_model, backbone):
    """Of different lengths, so that padding between the prefix and the rest would be counted."""
    model = make_model(backbone)
    ids = torch.arange(10, 25).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    with torch.no_grad():
        expected = F.normalize(algorithm_1(model, ids, mask, 4), dim=-1)
        assert relative(model(ids, mask, k=4).step_embeddings, expected) < 1e-5


def test_processes_that_share_weights_call_layers_alike(make_model, monkeypatch):
    """In training, and with sharded weights: these are gathered at each call, by all processes together."""
    model = make_model()
    loop, weight = room(model, "step_loop_gircse"), next(model.language_model.parameters())
    assert not loop.runs_in_step(model.language_model.train())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert loop.runs_in_step(model.language_model.train())
    assert not loop.runs_in_step(model.language_model.eval())
    weight.ds_id = 0  # as DeepSpeed marks a weight of which this process holds a part
    assert loop.runs_in_step(model.language_model)
