"""PEFT adapters that were made for the plain causal LM are merged when a model starts from it; what does not
fit raises."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from gircse.training.publishing import save_configuration
from helpers import IDS, LORA_TARGETS, assert_same_weights, edit_weights, save_adapter, text_config


def test_adapter_is_fetched_as_the_backbone_is(gircse, make_plain, tmp_path, monkeypatch):
    peft, asked = pytest.importorskip("peft"), []
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter")

    def watched(original: Callable) -> Callable:
        return lambda *args, **kwargs: (asked.append(kwargs), original(*args, **kwargs))[1]

    monkeypatch.setattr(peft.PeftConfig, "from_pretrained", watched(peft.PeftConfig.from_pretrained))
    monkeypatch.setattr(peft.PeftModel, "load_adapter", watched(peft.PeftModel.load_adapter))
    where = {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    gircse.GircseModel.from_causal_lm(folder, adapter=adapter, revision="main", **where)
    assert asked == [where, where]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_is_merged(gircse, make_plain, ids_and_mask, tmp_path, dtype):
    peft = pytest.importorskip("peft")
    plain, folder = make_plain(dtype=dtype)
    adapter = save_adapter(plain, tmp_path / "adapter")
    keys = set(load_file(Path(adapter) / "adapter_model.safetensors"))
    assert len(keys) == 3 * 7 * 2 and all(key.startswith("base_model.model.model.layers.") for key in keys)

    model = gircse.GircseModel.from_causal_lm(folder, adapter=adapter, torch_dtype=dtype)
    assert all(weight.requires_grad for weight in model.parameters())  # to be trained further
    reloaded = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
    merged = peft.PeftModel.from_pretrained(reloaded, adapter).merge_and_unload()
    before = merged(*ids_and_mask).logits
    around = gircse.GircseModel(gircse.GircseConfig(text_config=merged.config), merged).eval()
    assert_same_weights(model.state_dict(), around.state_dict())
    embeddings = model.generate_embedding(*ids_and_mask, k=3)
    assert torch.equal(embeddings, around.generate_embedding(*ids_and_mask, k=3))

    assert torch.equal(model.language_model(*ids_and_mask).logits, before)

    unadapted = gircse.GircseModel.from_causal_lm(folder, torch_dtype=dtype)
    assert F.cosine_similarity(embeddings, unadapted.generate_embedding(*ids_and_mask, k=3)).max() < 0.99
    names = [name for name in unadapted.state_dict() if name.split(".")[-2] in LORA_TARGETS and "weight" in name]
    assert len(names) == 3 * 7
    for name in names:
        assert not torch.equal(model.state_dict()[name], unadapted.state_dict()[name]), name


def test_adapter_is_what_its_file_says(gircse, make_plain, tmp_path):
    """W + (alpha / r) B A, from the numbers in the file."""
    plain, folder = make_plain()
    before = {name: weight.clone() for name, weight in plain.state_dict().items()}
    adapter = save_adapter(plain, tmp_path / "adapter")
    low_rank = load_file(Path(adapter) / "adapter_model.safetensors")
    after = gircse.GircseModel.from_causal_lm(folder, adapter=adapter).language_model.state_dict()
    for key in (key for key in low_rank if "lora_A" in key):
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        change = 8 / 4 * low_rank[key.replace("lora_A", "lora_B")] @ low_rank[key]
        torch.testing.assert_close(after[name], before[name] + change)


def test_an_adapter_alone_of_a_backbone_without_a_head(gircse, make_plain, ids_and_mask, tmp_path):
    plain, folder = make_plain(tie_word_embeddings=False)
    plain.name_or_path = folder  # which the adapter is saved with
    adapter = save_adapter(plain, tmp_path / "alone" / "adapter")
    without = {"lm_head.weight"}
    edit_weights(Path(folder, "model.safetensors"), lambda weights: {n: weights[n] for n in weights.keys() - without})
    model = gircse.GircseModel.from_causal_lm(folder, adapter=adapter, step_token="none", pooling="last")
    expected = model.generate_embedding(*ids_and_mask)
    model.config.adapter = "adapter"
    model.config.save_pretrained(tmp_path / "alone")
    loaded = gircse.GircseModel.from_pretrained(tmp_path / "alone")
    assert torch.equal(loaded.generate_embedding(*ids_and_mask), expected)


def test_an_adapter_alone_takes_its_backbone_at_its_commit_and_none_of_its_code(
    gircse, make_plain, ids_and_mask, tmp_path
):
    plain, folder = make_plain()
    alone, cache, mark = tmp_path / "alone", tmp_path / "cache", tmp_path / "mark"
    adapter = save_adapter(plain, alone / "adapter")
    model = gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
    base = cache / "models--me--base"
    for commit, factor in (("a", 1), ("b", 3)):  # the repo has moved on to b since the adapter was trained
        snapshot = Path(shutil.copytree(folder, base / "snapshots" / (40 * commit)))
        edit_weights(snapshot / "model.safetensors", lambda weights, by=factor: {n: by * x for n, x in weights.items()})
        config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {"AutoConfig": "other.Config", "AutoModelForCausalLM": "other.Model"}
        (snapshot / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (snapshot / "other.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(40 * "b")
    file = alone / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": "me/base", "revision": 40 * "a"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    expected = model.generate_embedding(*ids_and_mask, k=3)
    save_configuration(model, alone)
    where = {"cache_dir": str(cache), "local_files_only": True}
    loaded = AutoModel.from_pretrained(alone, trust_remote_code=True, **where)
    assert torch.equal(loaded.generate_embedding(*ids_and_mask, k=3), expected) and not mark.exists()
    file.write_text(json.dumps(settings | {"revision": 40 * "b"}), encoding="utf-8")
    loaded = AutoModel.from_pretrained(alone, trust_remote_code=True, **where)
    assert F.cosine_similarity(loaded.generate_embedding(*ids_and_mask, k=3), expected).max() < 0.99


def half(weights: dict) -> dict:
    return {key: weights[key] for key in sorted(weights)[: len(weights) // 2]}


def renamed(weights: dict) -> dict:
    """The keys of an adapter of the bare decoder (AutoModel) instead of the causal LM."""
    return {key.replace("base_model.model.model.", "base_model.model."): value for key, value in weights.items()}


def extra(weights: dict) -> dict:
    return {**weights, "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}


def without_one(weights: dict) -> dict:
    return {key: weights[key] for key in sorted(weights)[1:]}


@pytest.mark.parametrize("edit", [half, without_one, renamed, extra])
def test_adapter_with_other_keys_is_refused(gircse, make_plain, tmp_path, edit):
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter")
    gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
    edit_weights(Path(adapter) / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match=re.escape(repr(adapter))):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def test_adapter_without_a_module_it_should_have_replaced_is_refused(gircse, make_plain, tmp_path):
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter", modules_to_save=["lm_head"])
    gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
    edit_weights(
        Path(adapter) / "adapter_model.safetensors",
        lambda weights: {key: value for key, value in weights.items() if "lm_head" not in key},
    )
    with pytest.raises(ValueError, match=re.escape(repr(adapter))):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def tied_with(folder: str, adapter_folder: Path, modules: list[str], **settings) -> str:
    """An adapter of the plain causal LM in `folder` that brings other weights for `modules`."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    adapter = save_adapter(plain, adapter_folder, modules_to_save=modules, **settings)

    def other(weights: dict) -> None:
        for name in weights:
            if name.rpartition(".")[0].endswith(tuple(modules)):
                weights[name] += 0.1 * torch.randn_like(weights[name])

    edit_weights(Path(adapter) / "adapter_model.safetensors", other)
    return adapter


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_adapter_that_unties_head_and_embedding(gircse, make_plain, ids_and_mask, tmp_path, modules):
    peft = pytest.importorskip("peft")
    folder = make_plain(tie_word_embeddings=True)[1]
    adapter = tied_with(folder, tmp_path / "adapter", modules)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    expected = adapted(*ids_and_mask).logits
    model = gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
    torch.testing.assert_close(model.language_model(*ids_and_mask).logits, expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = gircse.GircseModel.from_pretrained(tmp_path / "saved")
    assert_same_weights(again.state_dict(), model.state_dict())
    assert torch.equal(again.generate_embedding(*ids_and_mask), model.generate_embedding(*ids_and_mask))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapter_that_adds_to_a_tied_weight_is_refused(gircse, make_plain, tmp_path, target):
    for tied in (False, True):
        plain, folder = make_plain(tie_word_embeddings=tied)
        adapter = save_adapter(plain, tmp_path / str(tied), targets=["q_proj", target])
        if not tied:
            gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
    with pytest.raises(ValueError, match=f"{re.escape(repr(adapter))} does not fit Qwen2ForCausalLM: .* one weight"):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def test_adapter_of_single_token_embeddings(gircse, make_plain, ids_and_mask, tmp_path):
    peft = pytest.importorskip("peft")
    for tied in (False, True):
        plain, folder = make_plain(tie_word_embeddings=tied)
        adapter = save_adapter(plain, tmp_path / str(tied), trainable_token_indices=IDS[0])
        edit_weights(
            Path(adapter) / "adapter_model.safetensors",
            lambda weights: {k: v + 0.1 * torch.randn_like(v) * ("tokens" in k) for k, v in weights.items()},
        )
        adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
        expected = adapted(*ids_and_mask).logits
        model = gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
        torch.testing.assert_close(model.language_model(*ids_and_mask).logits, expected, rtol=1e-4, atol=1e-4)


def test_adapter_of_another_kind_with_missing_keys_is_refused(gircse, make_plain, ids_and_mask, tmp_path):
    """IA3, whose keys have no "lora_" in them."""
    peft = pytest.importorskip("peft")
    plain, folder = make_plain()
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(plain, config)
    for name, parameter in model.named_parameters():
        if "ia3_" in name:
            nn.init.normal_(parameter, mean=1.0)
    adapter = str(tmp_path / "adapter")
    model.save_pretrained(adapter)
    adapted = gircse.GircseModel.from_causal_lm(folder, adapter=adapter).generate_embedding(*ids_and_mask, k=2)
    unadapted = gircse.GircseModel.from_causal_lm(folder).generate_embedding(*ids_and_mask, k=2)
    assert F.cosine_similarity(adapted, unadapted).max() < 0.99
    edit_weights(Path(adapter) / "adapter_model.safetensors", half)
    with pytest.raises(ValueError, match=re.escape(repr(adapter))):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def test_adapter_that_changes_nothing_is_refused(gircse, make_plain, tmp_path):
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter", std=0)
    with pytest.raises(ValueError, match=f"{re.escape(repr(adapter))} changes nothing"):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def test_adapter_that_repeats_layers_is_refused(gircse, make_plain, tmp_path):
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter")
    file = Path(adapter) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layer_replication": [[0, 2], [1, 3]]}))
    with pytest.raises(ValueError, match=r"it repeats layers \(layer_replication\)"):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


def test_adapter_is_not_merged_into_layers_that_are_elsewhere(gircse, make_plain, tmp_path):
    plain, folder = make_plain()
    adapter = save_adapter(plain, tmp_path / "adapter")
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "model.layers.2", "lm_head")
    where = {"device_map": dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}, "offload_folder": str(tmp_path)}
    with pytest.raises(ValueError, match="put off to memory or disk: load it without, save_pretrained the merged"):
        gircse.GircseModel.from_causal_lm(folder, adapter=adapter, **where)


def test_adapter_of_another_model_is_refused(gircse, make_plain, tmp_path):
    _, folder = make_plain()
    gpt2 = save_adapter(make_plain("gpt2")[0], tmp_path / "gpt2", targets=["c_attn"])
    narrow = AutoModelForCausalLM.from_config(text_config("qwen2", hidden_size=16))
    shallow = AutoModelForCausalLM.from_config(text_config("qwen2", num_hidden_layers=2))
    narrow, shallow = save_adapter(narrow, tmp_path / "narrow"), save_adapter(shallow, tmp_path / "shallow")
    for adapter in (gpt2, narrow, shallow):
        with pytest.raises(ValueError, match=re.escape(repr(adapter))):
            gircse.GircseModel.from_causal_lm(folder, adapter=adapter)
