"""Loading: the right dtype and attention, from a plain causal LM, bad checkpoints, and the published model."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM

from helpers import DTYPE_ARGUMENTS, ROOT, assert_same_weights, edit_weights, export_tiny, run_fresh, text_config

# dtype and attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step_token", ["soft", "learned"])
def test_dtype_at_loading(gircse, make_model, ids_and_mask, tmp_path, step_token, dtype, argument):
    saved = make_model(dtype=torch.bfloat16, step_token=step_token, num_steps=3)
    saved.save_pretrained(tmp_path)
    model = gircse.GircseModel.from_pretrained(tmp_path, **{argument: dtype})
    assert_same_weights(model.state_dict(), {name: weight.to(dtype) for name, weight in saved.state_dict().items()})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    embeddings = model.generate_embedding(*ids_and_mask)
    assert embeddings.dtype == torch.float32 and torch.isfinite(embeddings).all()
    # The buffers (rotary frequencies) too are what they should be: rounded nowhere.
    expected = saved.to(dtype).generate_embedding(*ids_and_mask)
    assert F.cosine_similarity(embeddings, expected).min() > (0.99999 if dtype == torch.float32 else 0.99)


@pytest.mark.parametrize("step_token", ["soft", "learned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_default_dtype_is_one_and_finite(gircse, make_model, ids_and_mask, tmp_path, dtype, step_token):
    saved = make_model(dtype=dtype, step_token=step_token, num_steps=3)
    saved.save_pretrained(tmp_path)
    model = gircse.GircseModel.from_pretrained(tmp_path)
    # The saved dtype in transformers 5; 4.x may widen to float32.
    assert {parameter.dtype for parameter in model.parameters()} in ({dtype}, {torch.float32})
    assert torch.isfinite(model.generate_embedding(*ids_and_mask)).all()


@pytest.mark.parametrize("backbone", ["qwen2", "qwen2-tied", "gemma3_text"])
def test_new_token_rows_are_initialised_as_the_backbone_does(make_model, ids_and_mask, backbone):
    model = make_model(backbone)
    before = model.generate_embedding(*ids_and_mask, k=4)
    torch.manual_seed(0)
    embeddings = model.resize_token_embeddings(99 + 64, mean_resizing=False)
    assert embeddings is model.get_input_embeddings() and embeddings.num_embeddings == 163
    assert model.config.text_config.vocab_size == model.get_output_embeddings().weight.shape[0] == 163
    assert float(embeddings.weight[99:].std()) == pytest.approx(0.2, rel=0.1)  # their initializer_range
    model.resize_token_embeddings(99)
    torch.testing.assert_close(model.generate_embedding(*ids_and_mask, k=4), before)


def test_attn_implementation_reaches_the_backbone(gircse, make_model, ids_and_mask, tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path)
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    embeddings, counts = {}, {}
    for name in ("eager", "sdpa"):
        model = gircse.GircseModel.from_pretrained(tmp_path, attn_implementation=name)
        assert model.language_model.config._attn_implementation == name
        model.generate_embedding(*ids_and_mask, k=1)  # the first text, at which ways to drive a backbone are tried
        calls.clear()
        embeddings[name] = model.generate_embedding(*ids_and_mask, k=4, return_steps=True)
        counts[name] = len(calls)
    assert counts == {"eager": 0, "sdpa": 3 * 5}  # 3 layers, the prompt and 4 steps
    torch.testing.assert_close(embeddings["eager"], embeddings["sdpa"], rtol=1e-5, atol=1e-5)


def test_attention_of_an_accelerator_is_kept_for_later(gircse, make_plain, ids_and_mask):
    """Loading is on the CPU, where the numerics are checked and flash attention can't run."""

    def of_an_accelerator(*args, **kwargs):
        raise RuntimeError("only on the accelerator")

    AttentionInterface.register("of_an_accelerator", of_an_accelerator)
    _, folder = make_plain()
    model = gircse.GircseModel.from_causal_lm(folder, attn_implementation="of_an_accelerator")
    assert model.language_model.config._attn_implementation == "of_an_accelerator"
    with pytest.raises(RuntimeError, match="only on the accelerator"):
        model.generate_embedding(*ids_and_mask, k=2)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", None])
def test_a_backbone_that_exists_keeps_its_attention(gircse, make_plain, ids_and_mask, attn_implementation):
    """transformers 5 would set it to None, under which padded or causal masks are not honoured."""
    settings = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    plain = AutoModelForCausalLM.from_pretrained(make_plain()[1], **settings)
    before, chosen = plain(*ids_and_mask).logits, plain.config._attn_implementation
    assert chosen == (attn_implementation or "sdpa")
    model = gircse.GircseModel(gircse.GircseConfig(text_config=plain.config), plain)
    assert plain.config._attn_implementation == model.config._attn_implementation == chosen
    assert torch.equal(plain(*ids_and_mask).logits, before)


def test_the_default_attention_outlives_saving(gircse, make_plain, tmp_path):
    gircse.GircseModel.from_causal_lm(make_plain()[1]).save_pretrained(tmp_path / "gircse")
    again = gircse.GircseModel.from_pretrained(tmp_path / "gircse")
    assert again.config._attn_implementation == again.language_model.config._attn_implementation == "sdpa"


def test_rope_settings_are_read_in_either_spelling(gircse):
    """transformers 5 writes `rope_parameters`, which 4.x would ignore and rotate by its default theta of 10000."""
    settings = {**text_config("qwen2").to_dict(), "model_type": "qwen2"}
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        settings.pop(name, None)
    linear = {"rope_type": "linear", "factor": 4.0}
    spellings = {
        "4": {"rope_theta": 5e5},
        "5": {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        "4 scaled": {"rope_theta": 5e5, "rope_scaling": dict(linear)},
        "5 scaled": {"rope_parameters": {"rope_theta": 5e5, **linear}},
    }
    frequencies = 5e5 ** -(torch.arange(0, 8, 2) / 8)
    for name, rope in spellings.items():
        model = gircse.GircseModel(gircse.GircseConfig(text_config={**settings, **rope}))
        expected = frequencies / 4 if "scaled" in name else frequencies
        torch.testing.assert_close(model.language_model.model.rotary_emb.inv_freq, expected, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backbone, tied", [("qwen2", True), ("qwen2", False), ("gpt2", True)])
def test_from_causal_lm_keeps_every_weight(gircse, make_plain, ids_and_mask, tmp_path, backbone, tied, dtype):
    plain, folder = make_plain(backbone, dtype=dtype, tie_word_embeddings=tied)
    axes = {"num_steps": 7, "logit_temperature": 1.5, "step_token": "hard", "pooling": "last"}
    model = gircse.GircseModel.from_causal_lm(folder, torch_dtype=dtype, attn_implementation="eager", **axes)
    assert_same_weights(model.language_model.state_dict(), plain.state_dict())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert {name: getattr(model.config, name) for name in axes} == axes
    assert model.config._attn_implementation == model.language_model.config._attn_implementation == "eager"
    assert not model.training

    model.save_pretrained(tmp_path / "gircse")
    again = gircse.GircseModel.from_pretrained(tmp_path / "gircse", torch_dtype=dtype, attn_implementation="eager")
    assert_same_weights(again.language_model.state_dict(), plain.state_dict())
    assert torch.equal(again.generate_embedding(*ids_and_mask), model.generate_embedding(*ids_and_mask))


@pytest.mark.parametrize("backbone", ["qwen2", "gpt2"])
def test_weights_that_a_checkpoint_lacks_are_not_made_up(gircse, make_plain, tmp_path, backbone):
    plain, folder = make_plain(backbone, tie_word_embeddings=False)
    plain.base_model.save_pretrained(folder)  # as embedding models are published: without a head
    for step_token in ("soft", "hard"):
        with pytest.raises(ValueError, match="lacks 1 weights of .*, such as 'lm_head.weight', which would be random"):
            gircse.GircseModel.from_causal_lm(folder, step_token=step_token)
    gircse.GircseModel.from_causal_lm(folder, step_token="learned", num_steps=2)
    gircse.GircseModel.from_causal_lm(folder, step_token="none")
    weights = load_file(Path(folder) / "model.safetensors")
    layer = next(name for name in weights if name.endswith(("mlp.down_proj.weight", "c_fc.bias")))
    del weights[layer]
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights .*" + re.escape(layer)):
        gircse.GircseModel.from_causal_lm(folder, step_token="none")


def test_learned_tokens_are_where_the_backbone_is(gircse, make_plain):
    plain = make_plain()[0].to("meta")
    model = gircse.GircseModel(gircse.GircseConfig(text_config=plain.config, step_token="learned"), plain)
    assert model.learned_tokens.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_causal_lm_makes_learned_tokens(gircse, make_plain, ids_and_mask, dtype):
    plain, folder = make_plain(dtype=dtype)
    model = gircse.GircseModel.from_causal_lm(folder, torch_dtype=dtype, step_token="learned", num_steps=3)
    assert_same_weights(model.language_model.state_dict(), plain.state_dict())
    learned = model.learned_tokens.weight
    assert learned.shape == (3, 32) and learned.dtype == dtype
    assert 0.1 < learned.float().std() < 0.3  # initializer_range is 0.2
    assert torch.isfinite(model.generate_embedding(*ids_and_mask)).all()


# Checkpoints that don't match ---------------------------------------------------------------------------------------

UP = "language_model.model.layers.1.mlp.up_proj.weight"
WRONG_WEIGHTS = {
    "missing": lambda w: {name: value for name, value in w.items() if name != UP},
    "missing head": lambda w: {name: value for name, value in w.items() if "lm_head" not in name},
    "missing learned tokens": lambda w: {name: value for name, value in w.items() if "learned" not in name},
    "unexpected": lambda w: {**w, "language_model.model.layers.9.mlp.up_proj.weight": torch.ones(48, 32)},
    "wrong shape": lambda w: {**w, UP: w[UP][:40]},
    "wrong number of learned tokens": lambda w: {**w, "learned_tokens.weight": w["learned_tokens.weight"][:2]},
    "another prefix": lambda w: {name.removeprefix("language_model."): value for name, value in w.items()},
}


@pytest.mark.parametrize("ignore_mismatched_sizes", [False, True])
@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_checkpoint_that_does_not_match_is_refused(gircse, make_model, tmp_path, wrong, ignore_mismatched_sizes):
    make_model("qwen2", step_token="learned", num_steps=3).save_pretrained(tmp_path)
    gircse.GircseModel.from_pretrained(tmp_path)
    edit_weights(tmp_path / "model.safetensors", WRONG_WEIGHTS[wrong])
    # Shapes are the library's to refuse, unless it's told to let them pass.
    error = RuntimeError if "wrong" in wrong and not ignore_mismatched_sizes else ValueError
    with pytest.raises(error, match="size|weight"):
        gircse.GircseModel.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore_mismatched_sizes)


@pytest.mark.parametrize("backbone", ["qwen2", "gpt2"])
def test_plain_causal_lm_is_refused_by_from_pretrained(gircse, make_plain, backbone):
    plain, folder = make_plain(backbone)
    with pytest.raises(ValueError, match="from_causal_lm"):
        gircse.GircseModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="from_causal_lm"):
        gircse.GircseConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match="from_causal_lm"):
        gircse.GircseModel.from_pretrained(folder, config=gircse.GircseConfig(text_config=plain.config))


# This repo's own code -----------------------------------------------------------------------------------------------


def own_code_child(job_file: str) -> None:
    """Loads a folder by this repo's code, and then others by theirs."""
    import json
    import sys
    from pathlib import Path

    import torch
    from transformers import AutoModel

    job, found = json.loads(Path(job_file).read_text()), []
    sys.path.insert(0, job["root"])
    from gircse.loading import load

    load(job["folders"][0])
    for folder in job["folders"]:
        found.append(getattr(type(AutoModel.from_pretrained(folder, trust_remote_code=True)), "WHOSE", None))
    torch.save(found, job["report"])


def test_the_own_code_is_not_taken_for_that_of_other_folders(gircse, tmp_path):
    folders = []
    for name in ("one", "two"):
        folder = export_tiny(gircse, tmp_path / name)
        code = (folder / "modeling_gircse.py").read_text(encoding="utf-8")
        assert code.count('"""A causal LM that generates an embedding in K steps.') == 1
        changed = code.replace("    def get_input_embeddings", f"    WHOSE = {name!r}\n\n    def get_input_embeddings")
        (folder / "modeling_gircse.py").write_text(changed, encoding="utf-8")
        folders.append(str(folder))
    job = {"folders": folders, "root": str(ROOT)}
    assert run_fresh(own_code_child, tmp_path / "process", job) == ["one", "two"]


def test_the_package_finds_its_repo_from_the_hubs_cache(tmp_path):
    """Where a file is a link to one of another folder."""
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes((ROOT / "gircse" / "__init__.py").read_bytes())
    package = tmp_path / "snapshots" / "abc" / "gircse"
    package.mkdir(parents=True)
    (package / "__init__.py").symlink_to(blob)
    (tmp_path / "link").symlink_to(tmp_path / "snapshots" / "abc")
    assert runpy.run_path(str(tmp_path / "link" / "gircse" / "__init__.py"))["ROOT"] == package.parent


# The published model ------------------------------------------------------------------------------------------------


def root_child(job_file: str) -> None:
    import json
    from pathlib import Path

    import torch
    from transformers import AutoModel, AutoProcessor

    job = json.loads(Path(job_file).read_text())
    processor = AutoProcessor.from_pretrained(job["root"], trust_remote_code=True)
    report = {"embeddings": {}}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(job["root"], trust_remote_code=True, torch_dtype=dtype)
        together = model.generate_embedding(**processor(job["texts"], instruction=job["instructions"]), k=20)
        alone = [
            model.generate_embedding(**processor(text, instruction=instruction), k=20)
            for text, instruction in zip(job["texts"], job["instructions"], strict=True)
        ]
        report["embeddings"][str(dtype)] = together, torch.cat(alone)
        if dtype == torch.float32:
            inputs = processor(job["texts"][:4], instruction=job["instructions"][:4])
            report["described"] = model.describe_steps(**inputs, k=5, top_k=3, tokenizer=processor.tokenizer)
    torch.save(report, job["report"])


@pytest.fixture(scope="module")
def root_report(tmp_path_factory) -> dict:
    rows = [json.loads(line) for line in (ROOT / "sample_pairs.jsonl").read_text().splitlines()]
    rows = rows[:: len(rows) // 16][:16]
    texts = [row["query"] for row in rows] + [row["pos"][0] for row in rows]
    instructions = [row["instruction"] for row in rows] + [None] * 16
    job = {"root": str(ROOT), "texts": texts, "instructions": instructions}
    return run_fresh(root_child, tmp_path_factory.mktemp("root") / "process", job)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, least", [("torch.float32", 0.99999), ("torch.bfloat16", 0.999)])
def test_root_model_gives_a_text_its_vector_whatever_its_batch(root_report, dtype, least):
    """Trained weights, K = 20: 32 texts of different lengths in one batch, and one by one. Seen: no cosine below
    0.9999999 in float32 and 0.99999 in bfloat16."""
    together, alone = root_report["embeddings"][dtype]
    assert together.shape == alone.shape and len(together) == 32
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(32), rtol=1e-5, atol=1e-5)
    cosines = F.cosine_similarity(together, alone)
    print(f"{dtype}: least cosine {cosines.min():.7f}, mean {cosines.mean():.7f}")
    assert cosines.min() > least
    # Other texts have other vectors, so that the line above says something.
    assert F.cosine_similarity(together, alone.roll(1, 0)).mean() < 0.95


@pytest.mark.slow
def test_root_model_describes_its_steps_in_words(root_report):
    described = root_report["described"]
    assert [len(described), len(described[0]), len(described[0][0])] == [4, 5, 3]
    tokens = []
    for step in (step for text in described for step in text):
        probabilities = [probability for _, probability in step]
        assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1.0001
        tokens += [token for token, _ in step]
    assert all(isinstance(token, str) for token in tokens)
    print(tokens)
    # Text, not the byte-level alphabet of the vocabulary ("Ġ" for a space); words as well as commas.
    assert not any(set("ĠĊ") & set(token) for token in tokens)
    assert sum(any(map(str.isalpha, token)) for token in tokens) > len(tokens) / 4
