"""Backbones: each that is supported equals the paper's Algorithm 1, and each that is not is refused by name."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import DynamicCache
from transformers.utils import ModelOutput

from helpers import BACKBONES, SMALL, algorithm_1, attention_for, dtype_for, keeps_a_cache, relative, text_config

COMMON = torch.stack([torch.arange(10, 19), torch.ones(9, dtype=torch.int64)])  # ids and mask of an instruction


@pytest.mark.parametrize("common", [0, 9], ids=["", "common start"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_backbones(make_model, batch, backbone, common):
    """Each backbone's own forward pass, run by Algorithm 1, is the reference: embedding scale, soft-capping, logit
    scale, learned positions, biases by distance and sliding windows come out right, padded or not, and where texts
    start with the same tokens."""
    batch = tuple(torch.cat([start.expand(4, -1), x], 1) for start, x in zip(COMMON[:, :common], batch, strict=True))
    model = make_model(backbone, dtype=dtype_for(backbone), **attention_for(backbone))
    with torch.no_grad():
        expected = F.normalize(algorithm_1(model, *batch, 4), dim=-1)
        output = model(*batch, k=4)
        assert relative(output.step_embeddings, expected) < 1e-5
        left = torch.stack([torch.roll(row, len(row) - int(mask.sum())) for row, mask in zip(*batch, strict=True)])
        assert relative(model(left, batch[1].flip(1), k=4).step_embeddings, expected) < 1e-5


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
    decoder = model.language_model.model
    # What it is called changed in transformers 5.
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(decoder.forward).parameters)
    original, lengths = type(decoder).forward, []

    def renamed(self, input_ids=None, inputs_embeds=None, memory=None, **kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key != name}
        output = original(self, input_ids=input_ids, inputs_embeds=inputs_embeds, **kwargs, **{name: memory})
        lengths.append((input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        kept = dict.fromkeys((name, "hidden_states", "attentions"))  # the causal LM reads them
        return ModelOutput(last_hidden_state=output.last_hidden_state, memory=output.get(name), **kept)

    monkeypatch.setattr(type(decoder), "forward", renamed)
    again = make_model()  # the same weights; how its decoder is driven is tried anew
    assert relative(again.generate_embedding(*batch, k=3), expected) < 1e-6
    assert lengths[-4:] == [11, 1, 1, 1]


def test_dropout_is_as_it_was_after_the_trial_and_no_number_is_drawn(gircse):
    config = text_config("gpt2", resid_pdrop=0.5)
    model = gircse.GircseModel(gircse.GircseConfig(text_config=config)).train()
    frozen = model.language_model.transformer.h[0].eval()
    results = []
    for _ in range(2):  # the first call begins with the trial
        torch.manual_seed(3)
        results.append((model(torch.tensor([[5, 6, 7]]), k=1).embeddings, torch.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
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
        assert keeps_a_cache(model) == cached


def test_a_head_that_the_loop_does_not_reproduce_is_refused(gircse, batch, tmp_path, monkeypatch):
    """As if a new architecture, or a newer transformers, did something to its logits that the loop knows nothing of:
    by `from_causal_lm`, and at each text by a model that is made or loaded otherwise."""
    from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

    AutoModelForCausalLM.from_config(text_config("qwen2")).save_pretrained(tmp_path)
    original = Qwen2ForCausalLM.forward

    def shifted(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 1.3
        return output

    gircse.GircseModel.from_causal_lm(str(tmp_path)).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", shifted)
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is not supported: its logits"):
        gircse.GircseModel.from_causal_lm(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    made = gircse.GircseModel(gircse.GircseConfig(text_config=plain.config), plain).train()
    for model in (made, gircse.GircseModel.from_pretrained(tmp_path / "saved")):
        for _ in range(2):
            with pytest.raises(ValueError, match="Qwen2ForCausalLM is not supported: its logits"):
                model.generate_embedding(*batch)
    assert made.language_model.training


def test_a_limit_of_positions_by_another_name(make_model):
    """MPT makes a bias for as many as its `max_seq_len`."""
    model = make_model("mpt")
    assert model.text_limit(512, 4) == 124
    model.generate_embedding(torch.ones(1, 124, dtype=torch.long), k=4)
    with pytest.raises(ValueError, match=r"N \+ k = 125 \+ 4 exceeds the backbone's 128 positions"):
        model.generate_embedding(torch.ones(1, 125, dtype=torch.long), k=4)


def test_a_backbone_whose_states_are_smaller_than_its_layers(make_model, batch):
    model = make_model("opt", text_changes={"word_embed_proj_dim": 16})
    assert model.config.hidden_size == 16
    embeddings, _ = model.generate_embedding(*batch, k=3, tolerance=1e-3)
    assert embeddings.shape == (4, 16) == model.generate_embedding(*batch, k=3).shape


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


@pytest.mark.parametrize("axes", [{}, {"step_token": "none", "attention": "bidirectional"}], ids=["steps", "mean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_may_differ_by_what_the_weights_round(make_model, axes, dtype, monkeypatch):
    model = make_model(dtype=dtype, **axes)
    exact = model._tried_states
    # Of a padded row; the mean of a text's states is in float32 whatever the weights are.
    monkeypatch.setattr(model, "_tried_states", lambda ids, *rest: exact(ids, *rest) * (1.03 if len(ids) > 1 else 1))
    model._ways.clear()
    if dtype == torch.bfloat16:
        model._find_way(torch.device("cpu"))
    else:
        with pytest.raises(ValueError, match="its states depend on padding, or a later call can't"):
            model._find_way(torch.device("cpu"))
