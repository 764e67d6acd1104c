"""Invariants of the step loop: values, gradients, padding, batches, backbones, cost, precision, bad input."""

from __future__ import annotations

import gc
import logging
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache
from transformers.utils import ModelOutput

from conftest import BACKBONES, SMALL, room, text_config


def algorithm_1(model, ids, mask, k):
    """The paper's Algorithm 1: all of the sequence again at each step, from the causal LM's own forward pass. Rows are
    done one by one without padding. Returns (B, K, d): z_1..z_K, not normalised."""
    lm = model.language_model
    embed = lm.get_input_embeddings()
    rows = []
    for row_ids, row_mask in zip(ids, mask, strict=True):
        sequence = embed(row_ids[row_mask.bool()])[None]  # (1, N, d)
        length = sequence.shape[1]
        # (V, d), with whatever scaling the module does; by the weight, since a lookup gives padding_idx no gradient.
        table = embed.weight * (embed(torch.tensor(5)) / embed.weight[5]).detach()
        for _ in range(k):
            logits = lm(inputs_embeds=sequence, attention_mask=torch.ones(sequence.shape[:2]), use_cache=False).logits
            soft = torch.softmax(logits[:, -1] / model.config.logit_temperature, dim=-1)
            sequence = torch.cat([sequence, (soft @ table)[:, None]], dim=1)
        output = lm(
            inputs_embeds=sequence,
            attention_mask=torch.ones(sequence.shape[:2]),
            use_cache=False,
            output_hidden_states=True,
        )
        states = output.hidden_states[-1][:, length:]
        rows.append(torch.stack([states[0, : i + 1].mean(0) for i in range(k)]))
    return torch.stack(rows)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def decoder_shapes(model):
    """A list that each call of the decoder appends its rows and positions to."""
    shapes = []
    room(model, "backbone_gircse").decoder_of(model.language_model).register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes


def attention_for(backbone):
    """transformers 4.51 can't make GPT-2's padding mask for SDPA in float64."""
    return {"attn_implementation": "eager"} if backbone == "gpt2" else {}


@pytest.mark.parametrize("backbone, tolerance", [("gpt2", 1e-9), ("qwen2", 1e-5)])
@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_cached_loop_equals_algorithm_1(make_model, batch, k, backbone, tolerance):
    """In float64; Qwen2 (like most) computes its norms and rotations in float32 all the same."""
    model = make_model(backbone, dtype=torch.float64, **attention_for(backbone))
    weights = torch.randn(k, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected = F.normalize(algorithm_1(model, *batch, k), dim=-1)
    (expected * weights).sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    output = model(*batch, k=k)
    (output.step_embeddings * weights).sum().backward()

    assert relative(output.step_embeddings, expected) < tolerance
    ours = gradients(model)
    assert ours.keys() == expected_gradients.keys()
    for name, gradient in ours.items():
        assert relative(gradient, expected_gradients[name]) < tolerance, name


@pytest.mark.parametrize("k", [1, 5])
def test_cached_loop_equals_algorithm_1_in_float32(make_model, batch, k):
    model = make_model("qwen2", text_changes={"initializer_range": 0.05})
    expected = F.normalize(algorithm_1(model, *batch, k), dim=-1)
    direction = torch.linspace(-1, 1, 32)
    (expected @ direction).sum().backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    output = model(*batch, k=k)
    (output.step_embeddings @ direction).sum().backward()
    assert relative(output.step_embeddings, expected) < 1e-5
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones(make_model, batch, backbone):
    """Each backbone's own forward pass, run by Algorithm 1, is the reference: embedding scale, soft-capping, logit
    scale, learned positions and sliding windows come out right, padded or not."""
    # Beyond its window, eager attention (Gemma 2's) makes NaN of rows that see nothing in float64.
    dtype = torch.float32 if backbone == "gemma2" else torch.float64
    model = make_model(backbone, dtype=dtype, **attention_for(backbone))
    with torch.no_grad():
        expected = F.normalize(algorithm_1(model, *batch, 4), dim=-1)
        output = model(*batch, k=4)
        assert relative(output.step_embeddings, expected) < 1e-5
        left = torch.stack([torch.roll(row, 11 - int(mask.sum())) for row, mask in zip(*batch, strict=True)])
        assert relative(model(left, batch[1].flip(1), k=4).step_embeddings, expected) < 1e-5


@pytest.mark.parametrize("backbone", ["qwen2", "mistral", "gpt2", "gemma3_text"])
def test_padding_and_batch_mates_change_nothing(make_model, batch, backbone):
    model = make_model(backbone)
    ids, mask = batch
    together = model.generate_embedding(ids, mask, k=8, return_steps=True)
    wider = model.generate_embedding(F.pad(ids, (3, 5), value=-100), F.pad(mask, (3, 5)), k=8, return_steps=True)
    shuffled = torch.tensor([2, 0, 3, 1])
    others = model.generate_embedding(ids[shuffled], mask[shuffled], k=8, return_steps=True)
    for row in range(4):
        alone = model.generate_embedding(ids[row : row + 1, : mask[row].sum()], k=8, return_steps=True)[0]
        for version in (together[row], wider[row], others[shuffled.tolist().index(row)]):
            assert F.cosine_similarity(alone, version, dim=-1).min() > 0.99999


def test_all_steps_equal_separate_calls(make_model, batch):
    model = make_model(dtype=torch.float64)
    steps = model.generate_embedding(*batch, k=6, return_steps=True)
    for k in range(1, 7):
        torch.testing.assert_close(steps[:, k - 1], model.generate_embedding(*batch, k=k), rtol=1e-10, atol=1e-12)


def test_default_k_is_num_steps(make_model, batch):
    model = make_model(num_steps=3)
    assert model.generate_embedding(*batch, return_steps=True).shape == (4, 3, 32)
    torch.testing.assert_close(model.generate_embedding(*batch), model.generate_embedding(*batch, k=3))


def test_normalize_false_is_the_mean_of_the_states(make_model, batch):
    model = make_model()
    output = model(*batch, k=4)
    torch.testing.assert_close(model.generate_embedding(*batch, k=4, normalize=False), output.step_states.mean(1))
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(4))


def test_empty_batch(make_model):
    model = make_model()
    empty = torch.zeros(0, 0, dtype=torch.long)
    assert model.generate_embedding(empty, k=3).shape == (0, 32)
    assert model.generate_embedding(empty, k=3, return_steps=True).shape == (0, 3, 32)
    embeddings, steps = model.generate_embedding(empty, k=3, tolerance=0.1)
    assert embeddings.shape == (0, 32) and steps.shape == (0,)


def test_logit_temperature(make_model, batch):
    model = make_model(dtype=torch.float64, logit_temperature=2.5)
    with torch.no_grad():
        expected = F.normalize(algorithm_1(model, *batch, 3), dim=-1)
    assert relative(model(*batch, k=3).step_embeddings, expected) < 1e-10
    model.config.logit_temperature = 1.0
    assert relative(model(*batch, k=3).step_embeddings, expected) > 1e-4


# The other rows of the axes table ------------------------------------------------------------------------------------


def test_hard_tokens(make_model, batch):
    model = make_model(dtype=torch.float64, step_token="hard")
    lm, (ids, mask) = model.language_model, batch
    for row in range(4):
        sequence = ids[row : row + 1, : mask[row].sum()]
        length = sequence.shape[1]
        with torch.no_grad():
            for _ in range(4):
                logits = lm(input_ids=sequence).logits[:, -1]
                sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], dim=1)
            states = lm(input_ids=sequence, output_hidden_states=True).hidden_states[-1][0, length:]
        expected = F.normalize(states.mean(0), dim=0)
        torch.testing.assert_close(model.generate_embedding(ids, mask, k=4)[row], expected, rtol=1e-8, atol=1e-10)


def test_learned_tokens(make_model, batch):
    model = make_model(dtype=torch.float64, step_token="learned", num_steps=4)
    ids, mask = batch
    output = model(ids, mask)
    assert output.step_embeddings.shape == (4, 4, 32)
    for row in range(4):
        prompt = model.get_input_embeddings()(ids[row : row + 1, : mask[row].sum()])
        sequence = torch.cat([prompt, model.learned_tokens.weight[None]], dim=1)
        states = model.language_model(inputs_embeds=sequence, output_hidden_states=True).hidden_states[-1][0, -4:]
        torch.testing.assert_close(output.step_states[row], states, rtol=1e-8, atol=1e-10)
    output.embeddings[:, 0].sum().backward()
    assert model.learned_tokens.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="k=5 exceeds the 4 learned tokens"):
        model(ids, mask, k=5)


def test_causal_eos_and_bidirectional_average(make_model, batch):
    ids, mask = batch
    eos = make_model(dtype=torch.float64, step_token="none", pooling="last")
    average = make_model(dtype=torch.float64, step_token="none", attention="bidirectional")
    causal_average = make_model(dtype=torch.float64, step_token="none")
    for row in range(4):
        alone = ids[row : row + 1, : mask[row].sum()]
        states = eos.language_model(input_ids=alone, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(eos(ids, mask).embeddings[row], F.normalize(states[-1], dim=0))
        torch.testing.assert_close(causal_average(ids, mask).embeddings[row], F.normalize(states.mean(0), dim=0))
        torch.testing.assert_close(average(ids, mask).embeddings[row], average(alone).embeddings[0])
    assert relative(average(ids, mask).embeddings[:2], causal_average(ids, mask).embeddings[:2]) > 1e-2
    with pytest.raises(ValueError, match="k=3 has no meaning"):
        eos(ids, mask, k=3)


@pytest.mark.parametrize("backbone", ["qwen2", "llama", "mistral", "gemma2", "opt"])
def test_bidirectional_attention_reaches_the_first_token(make_model, backbone):
    """Under causal attention the first token's state can't know the second; here a change of the last token of two
    changes the average by more than its own share."""
    model = make_model(backbone, dtype=torch.float64, step_token="none", attention="bidirectional")
    way, ones = model._find_way(model.device), torch.ones(1, 2, dtype=torch.long)
    with torch.no_grad():
        prompts = (model.get_input_embeddings()(torch.tensor([[5, token]])) for token in (6, 7))
        first = [room(model, "single_pass_gircse").decode_all(model, prompt, ones, way)[0, 0] for prompt in prompts]
    assert relative(*first) > 1e-3


# Cost ----------------------------------------------------------------------------------------------------------------


def test_head_sees_one_position_a_row_and_decoder_one_new_position(make_model, batch):
    model = make_model()
    head, decoder = [], []
    model.get_output_embeddings().register_forward_pre_hook(lambda m, args: head.append(tuple(args[0].shape)))
    model.language_model.model.register_forward_pre_hook(
        lambda m, args, kwargs: decoder.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    model.generate_embedding(*batch, k=5)
    assert head == [(4, 32)] * 5  # s_1..s_5; nothing after the last step
    assert decoder == [11, 1, 1, 1, 1, 1]


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
    shapes, results = decoder_shapes(model), []
    for grouped in (True, False):
        if not grouped:
            monkeypatch.setattr(room(model, "step_loop_gircse"), "prefill_groups", lambda *args: [None])
        model.zero_grad()
        output = model(ids, mask, k=3)
        (output.step_embeddings @ direction).sum().backward()
        results.append((output.step_embeddings.detach(), gradients(model)))
    if model._find_way(model.device).cache is not None:  # GPT-2 in transformers 4.51 has none
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
        return room(model, "step_loop_gircse").shared_prefix(model.language_model, ids, torch.ones_like(ids), 3)

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


def test_steps_enter_the_decoder_in_the_dtype_of_the_prompt_under_autocast(make_model, batch):
    model = make_model()
    dtypes = []
    model.language_model.model.register_forward_pre_hook(
        lambda m, args, kwargs: dtypes.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch, k=2)
    assert dtypes == [torch.float32] * 3


def test_a_backbone_whose_states_are_smaller_than_its_layers(make_model, batch):
    model = make_model("opt", text_changes={"word_embed_proj_dim": 16})
    assert model.config.hidden_size == 16
    embeddings, _ = model.generate_embedding(*batch, k=3, tolerance=1e-3)
    assert embeddings.shape == (4, 16) == model.generate_embedding(*batch, k=3).shape


def test_no_cache_and_no_layer_states_outlive_a_call(make_model, batch, monkeypatch):
    caches = []
    original = DynamicCache.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(DynamicCache, "__init__", spy)
    model = make_model()
    with torch.no_grad():
        output = model(*batch, k=3)
    gc.collect()
    assert caches and all(cache() is None for cache in caches)
    assert set(output.keys()) == {"embeddings", "step_embeddings", "step_states"}


def test_tolerance_stops_each_text_by_itself(make_model, batch):
    model = make_model(dtype=torch.float64)
    ids, mask = batch
    plain = model.generate_embedding(ids, mask, k=12, return_steps=True)
    cosines = F.cosine_similarity(plain[:, 1:], plain[:, :-1], dim=-1)
    tolerance = float((1 - cosines[:, 4:9]).median())
    embeddings, steps = model.generate_embedding(ids, mask, k=12, return_steps=True, tolerance=tolerance)
    assert len(set(steps.tolist())) > 1 and steps.max() > 2
    for row in range(4):
        settled = (cosines[row] > 1 - tolerance).nonzero()[:, 0]
        expected = int(settled[0]) + 2 if len(settled) else 12
        assert steps[row] == expected
        torch.testing.assert_close(embeddings[row, :expected], plain[row, :expected], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(embeddings[row, -1], plain[row, expected - 1], rtol=1e-8, atol=1e-10)
        alone, alone_steps = model.generate_embedding(
            ids[row : row + 1], mask[row : row + 1], k=12, tolerance=tolerance
        )
        torch.testing.assert_close(alone[0], embeddings[row, -1], rtol=1e-8, atol=1e-10)
        assert alone_steps.tolist() == [expected]


def test_describe_steps(make_model, batch):
    model = make_model(dtype=torch.float64)
    described = model.describe_steps(*batch, k=2, top_k=3)
    assert [len(described), len(described[0]), len(described[0][0])] == [4, 2, 3]
    row = batch[0][1:2, :4]
    with torch.no_grad():
        expected = torch.softmax(model.language_model(input_ids=row).logits[0, -1], dim=-1).topk(3)
    assert [token for token, _ in described[1][0]] == expected.indices.tolist()
    assert [p for _, p in described[1][0]] == pytest.approx(expected.values.tolist())


# Gradient checkpointing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
def test_gradient_checkpointing_gives_the_plain_gradients(make_model, batch, padded):
    model = make_model(dtype=torch.float64).train()  # norms are in float32 inside
    ids, mask = batch if padded else (batch[0][:1], batch[1][:1])
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert room(model, "step_loop_gircse").checkpoints(model.language_model)
        model.zero_grad()
        (model(ids, mask, k=4).step_embeddings @ direction).sum().backward()
        results.append(gradients(model))
    for name in results[0]:
        assert relative(results[1][name], results[0][name]) < 1e-5, name


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_half_precision_is_finite_with_float32_unit_output(make_model, batch, dtype, attn_implementation):
    # Weights that are less peaked than the other tests': k = 20 would amplify the rounding of those.
    settings = {"attn_implementation": attn_implementation, "text_changes": {"initializer_range": 0.05}}
    model, reference = make_model(dtype=dtype, **settings), make_model(**settings)
    embeddings = model.generate_embedding(*batch, k=20)
    assert embeddings.dtype == torch.float32 and torch.isfinite(embeddings).all()
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4), rtol=1e-5, atol=1e-5)
    assert F.cosine_similarity(embeddings, reference.generate_embedding(*batch, k=20)).min() > 0.99


LEARNED = {"step_token": "learned", "num_steps": 4}


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="backbones take no such masks in transformers 4")
@pytest.mark.parametrize(
    "backbone, axes",
    [("qwen2", {}), ("qwen2", LEARNED), ("llama", {}), ("gemma2", {}), ("gpt2", {}), ("gpt2", LEARNED), ("opt", {})],
)
def test_padding_is_no_nan_in_eager_float16(make_model, backbone, axes):
    """Scores of large weights overflow where padding sees nothing."""
    window = {"sliding_window": 64} if backbone == "gemma2" else {}
    model = make_model(backbone, dtype=torch.float16, attn_implementation="eager", text_changes=window, **axes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.dim() == 2 else 1)
    ids = torch.randint(3, 99, (48, 24), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(24) < torch.arange(48)[:, None] % 24 + 1).long()
    alone = torch.cat([model.generate_embedding(row[None, :n], k=4) for row, n in zip(ids, mask.sum(1), strict=True)])
    assert torch.isfinite(alone).all()
    together = model.generate_embedding(ids * mask, mask, k=4)
    assert torch.isfinite(together).all() and F.cosine_similarity(together, alone).median() > 0.9


def test_longrope_is_used_up_to_its_original_limit(make_model, batch):
    """Beyond it, the length of the longest text of a batch would change all of them."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    changes = {"original_max_position_embeddings": 12, "max_position_embeddings": 128}
    field = "rope_scaling" if transformers.__version__.startswith("4.") else "rope_parameters"
    changes[field] = {**factors, "rope_theta": 1e4, "original_max_position_embeddings": 12}
    if field == "rope_scaling":
        changes[field] = {"type": "longrope", **{k: v for k, v in factors.items() if k != "rope_type"}}
    model = make_model("phi3", text_changes=changes)
    assert model.text_limit(k=4) == 8
    ids, mask = batch[0][:, :8], batch[1][:, :8]
    short = ids[1:2, :4]  # its mates have 8 tokens
    together = model.generate_embedding(ids, mask, k=4)[1:2]
    torch.testing.assert_close(together, model.generate_embedding(short, k=4), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exceeds the backbone's 12 positions: truncate the text to 8 tokens"):
        model.generate_embedding(*batch, k=4)


def test_float64_stays(make_model, batch):
    assert make_model(dtype=torch.float64).generate_embedding(*batch, k=2).dtype == torch.float64


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, error", [(0, ValueError), (-1, ValueError), (2.0, TypeError), ("3", TypeError), (True, TypeError)]
)
def test_bad_k(make_model, batch, k, error):
    with pytest.raises(error, match="k="):
        make_model().generate_embedding(*batch, k=k)
    model = make_model()
    model.config.num_steps = k
    with pytest.raises(error, match="config.num_steps="):
        model.generate_embedding(*batch)


def test_k_of_any_integer_type(make_model, batch):
    model = make_model()
    expected = model.generate_embedding(*batch, k=3)
    for k in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(model.generate_embedding(*batch, k=k), expected)
        assert model.text_limit(k=k) == 125


def test_bad_ids_and_masks(make_model, batch):
    model, (ids, mask) = make_model(), batch
    empty = mask.clone()
    empty[2] = 0
    with pytest.raises(ValueError, match="row 2 has no token"):
        model.generate_embedding(ids, empty, k=1)
    for value in (99, -1):
        outside = ids.clone()
        outside[0, 3] = value
        with pytest.raises(ValueError, match=rf"{value}, outside the vocabulary 0..98"):
            model.generate_embedding(outside, mask, k=1)
    with pytest.raises(ValueError, match=r"\(B, N\)"):
        model.generate_embedding(ids, mask[:, :4], k=1)
    assert model.text_limit(k=3) == 125 and model.text_limit() == 128 - model.config.num_steps
    assert model.text_limit(100, 3) == 100 and model.text_limit(126, 3) == 125
    with pytest.raises(ValueError, match="k=128 takes all positions of the backbone: choose k below 128"):
        model.text_limit(100, 128)
    with pytest.raises(ValueError, match="exceeds the backbone's 128 positions"):
        model.generate_embedding(torch.ones(1, 120, dtype=torch.long), k=9)
    model.generate_embedding(torch.ones(1, 120, dtype=torch.long), k=8)
    with pytest.raises(TypeError, match="labels"):
        model(ids, mask, labels=ids)


@pytest.mark.parametrize("tolerance", [0, -0.1, 2.5])
def test_bad_tolerance(make_model, batch, tolerance):
    with pytest.raises(ValueError, match="tolerance="):
        make_model().generate_embedding(*batch, k=2, tolerance=tolerance)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_token": "hidden"}, "step_token='hidden' is unknown; choose one of 'soft', 'hard', 'learned', 'none'"),
        ({"attention": "full"}, "attention='full' is unknown; choose one of 'causal', 'bidirectional'"),
        ({"pooling": "max"}, "pooling='max' is unknown; choose one of 'mean', 'last'"),
        ({"attention": "bidirectional"}, "needs step_token='none'"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 2.0}, "num_steps=2.0"),
        ({"logit_temperature": 0}, "logit_temperature=0"),
        ({"text_config": {"hidden_size": 3}}, "no 'model_type'"),
    ],
)
def test_bad_config(gircse, settings, message):
    with pytest.raises(ValueError, match=message):
        gircse.GircseConfig(**settings)
    with pytest.raises(TypeError, match="text_config"):
        gircse.GircseConfig(text_config=3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_token": "hidden"}, "step_token='hidden' is unknown"),
        ({"attention": "bidirectional"}, "needs step_token='none'"),
        ({"num_steps": "20"}, "num_steps='20'"),
        ({"logit_temperature": 0}, "logit_temperature=0"),
    ],
)
def test_bad_override_at_loading(gircse, tmp_path, settings, message):
    gircse.GircseConfig(num_steps=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        gircse.GircseConfig.from_pretrained(tmp_path, **settings)
    changed, unused = gircse.GircseConfig.from_pretrained(tmp_path, num_steps=7, x=1, return_unused_kwargs=True)
    assert changed.num_steps == 7 and unused == {"x": 1}


def backbone_of(gircse, model_type, settings):
    config = transformers.AutoConfig.for_model(model_type, **{"vocab_size": 99, "initializer_range": 0.2, **settings})
    torch.manual_seed(0)
    return gircse.GircseModel._from_config(gircse.GircseConfig(text_config=config), attn_implementation="eager").eval()


BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
CHUNKED = {**SMALL, "intermediate_size_mlp": 48, "attention_chunk_size": 6}


@pytest.mark.parametrize(
    "model_type, settings, reason",
    [("bart", BART, "transformers"), ("llama4_text", CHUNKED, "chunks of attention")],
)
def test_backbones_that_cannot_be_supported_are_refused_by_name(gircse, batch, model_type, settings, reason):
    name = model_type.removesuffix("_text")
    with pytest.raises(ValueError, match=rf"(?i){name}ForCausalLM can't be a GIRCSE backbone: .*{reason}"):
        backbone_of(gircse, model_type, settings).generate_embedding(*batch, k=2)


@pytest.mark.parametrize(
    "model_type, settings",
    [
        ("mamba2", dict(hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=1)),
        ("falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True}),
        ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    ],
)
def test_a_backbone_that_cannot_be_gone_on_from_runs_the_whole_sequence(gircse, batch, model_type, settings, caplog):
    """State-space layers keep another state than keys and values, and these two read positions from the whole mask."""
    logging.getLogger("transformers_modules").propagate = True
    model = backbone_of(gircse, model_type, settings)
    found = model.generate_embedding(*batch, k=4, return_steps=True)
    with torch.no_grad():
        expected = F.normalize(algorithm_1(model, *batch, 4), dim=-1)
    assert relative(found, expected) < 1e-5
    assert caplog.text.count("each step runs the whole sequence") == 1


def test_a_cache_is_passed_by_whatever_name_a_decoder_has_for_it(make_model, batch, monkeypatch):
    """As if the next version of transformers renamed the argument, and passed over the old name in silence."""
    model = make_model()
    expected = model.generate_embedding(*batch, k=3)
    decoder, name = model.language_model.model, model._find_way(model.device).cache
    original, lengths = type(decoder).forward, []

    def renamed(self, inputs_embeds, attention_mask=None, position_ids=None, memory=None, use_cache=None, **kwargs):
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        output = original(self, inputs_embeds=inputs_embeds, **inputs, **{name: memory})
        lengths.append(inputs_embeds.shape[1])
        return ModelOutput(last_hidden_state=output.last_hidden_state, memory=output.get(name))

    monkeypatch.setattr(type(decoder), "forward", renamed)
    model._ways.clear()
    assert relative(model.generate_embedding(*batch, k=3), expected) < 1e-6
    assert model._find_way(model.device).cache == "memory" and lengths[-4:] == [11, 1, 1, 1]


def test_dropout_is_as_it_was_after_the_trial_and_no_number_is_drawn(gircse):
    config = text_config("gpt2", resid_pdrop=0.5)
    model = gircse.GircseModel(gircse.GircseConfig(text_config=config)).train()
    frozen = model.language_model.transformer.h[0].eval()
    state = torch.get_rng_state()
    model._find_way(model.device)
    assert torch.equal(torch.get_rng_state(), state)
    assert not frozen.training and model.language_model.transformer.h[1].mlp.training


def test_a_backbone_by_code_of_its_own_is_refused(gircse):
    """Whoever loads the saved model would lack that code."""
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    class RemoteConfig(Qwen2Config):
        model_type = "remote_qwen"

    backbone = Qwen2ForCausalLM(RemoteConfig(**SMALL))
    with pytest.raises(ValueError, match="can't be a GIRCSE backbone: it is made by code of its own"):
        gircse.GircseModel(gircse.GircseConfig(text_config=backbone.config), backbone)
    native = AutoModelForCausalLM.from_config(text_config("qwen2"))
    native.config.auto_map = {"AutoConfig": "own.Config"}  # as Phi-3 carries it, which transformers knows
    gircse.GircseModel(gircse.GircseConfig(text_config=native.config), native)


@pytest.mark.skipif(not hasattr(DynamicCache, "has_previous_state"), reason="needs a cache of its own there")
def test_a_hybrid_of_attention_layers_alone_keeps_its_cache(gircse, batch):
    """As the small dense Granite 4 is."""
    settings = {**SMALL, "num_local_experts": 0, "shared_intermediate_size": 48, "mamba_n_heads": 4}

    def make(*layer_types: str):
        text = transformers.AutoConfig.for_model("granitemoehybrid", **settings, layer_types=list(layer_types))
        return gircse.GircseModel(gircse.GircseConfig(text_config=text)).eval()

    for kinds, cached in ((("attention", "mamba", "attention"), False), (("attention",) * 3, True)):
        model = make(*kinds)
        with torch.no_grad():
            expected = F.normalize(algorithm_1(model, *batch, 4), dim=-1)
        assert relative(model.generate_embedding(*batch, k=4, return_steps=True), expected) < 1e-4
        assert (model._find_way(model.device).cache is not None) == cached


def test_a_head_that_the_loop_does_not_reproduce_is_refused(gircse, tmp_path, monkeypatch):
    """As if a new architecture did something to its logits that the loop knows nothing of."""
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    AutoModelForCausalLM.from_config(text_config("qwen2")).save_pretrained(tmp_path)
    original = Qwen2ForCausalLM.forward

    def shifted(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.3
        return output

    gircse.GircseModel.from_causal_lm(str(tmp_path))
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", shifted)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is not supported: its logits"):
        gircse.GircseModel.from_causal_lm(str(tmp_path))
