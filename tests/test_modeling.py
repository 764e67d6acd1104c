"""Invariants of the step loop: values, gradients, padding, batches, precision, bad input."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import DynamicCache

from helpers import algorithm_1, attention_for, gradients, relative, room


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


def test_a_configuration_that_asks_for_tuples(make_model, batch):
    """`from_pretrained(repo, return_dict=False)`: a call gives a tuple, embedding works all the same."""
    model = make_model()
    expected = model.generate_embedding(*batch, k=2)
    model.config.return_dict = False
    assert isinstance(model(*batch, k=2), tuple)
    assert torch.equal(model.generate_embedding(*batch, k=2), expected)


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
    states = []
    decoder = room(model, "backbone_gircse").decoder_of(model.language_model)
    decoder.register_forward_hook(lambda module, args, output: states.append(output[0][0, 0]))  # of the first token
    for token in (6, 7):
        model.generate_embedding(torch.tensor([[5, token]]))
    assert relative(*states) > 1e-3


def test_steps_enter_the_decoder_in_the_dtype_of_the_prompt_under_autocast(make_model, batch):
    model = make_model()
    dtypes = []
    model.language_model.model.register_forward_pre_hook(
        lambda m, args, kwargs: dtypes.append(kwargs["inputs_embeds"].dtype), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(*batch, k=2)
    assert dtypes == [torch.float32] * 3


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
    assert set(output.keys()) == {"embeddings", "step_embeddings", "step_states", "prompt_state"}


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
    with pytest.raises(ValueError, match="top_k=0 must be an int >= 1"):
        model.describe_steps(*batch, top_k=0)


# Gradient checkpointing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("by", ["transformers", "torch"])
def test_gradient_checkpointing_gives_the_plain_gradients(make_model, batch, by, padded):
    """torch's is what FSDP's `fsdp_activation_checkpointing` puts around the layers."""
    model = make_model(dtype=torch.float64).train()  # norms are in float32 inside
    ids, mask = batch if padded else (batch[0][:1], batch[1][:1])
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            if by == "transformers":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                layers = model.language_model.model.layers
                model.language_model.model.layers = torch.nn.ModuleList(map(checkpoint_wrapper, layers))
            assert room(model, "step_loop_gircse").checkpoints(model.language_model)
        model.zero_grad()
        (model(ids, mask, k=4).step_embeddings @ direction).sum().backward()
        results.append({name.replace("_checkpoint_wrapped_module.", ""): x for name, x in gradients(model).items()})
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
    for wrong, value in ((torch.where(mask == 1, 0.0, -torch.inf), "-inf"), (mask * 2, "2")):
        with pytest.raises(ValueError, match=f"attention_mask holds {value}: it must be 1 for tokens and 0"):
            model.generate_embedding(ids, wrong, k=1)
    for right in (mask.bool(), mask.float()):
        assert torch.equal(model.generate_embedding(ids, right, k=1), model.generate_embedding(ids, mask, k=1))
    with pytest.raises(TypeError, match="input_ids must be int64, not float32"):
        model.generate_embedding(ids.float(), mask, k=1)
    for wrong in ({"input_ids": ids}, ["a text"], ids.numpy()):
        with pytest.raises(TypeError, match=f"must be a tensor, not {type(wrong).__name__}: call generate_embedding"):
            model.generate_embedding(wrong)
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
        ({"pooling": "max"}, "pooling='max' is unknown; choose one of 'mean', 'mean_with_prompt', 'last'"),
        ({"pooling": "mean_with_prompt", "step_token": "learned"}, "needs step_token='soft' or 'hard', not 'learned'"),
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
