"""Adapters: an adapter-only folder loads as a whole model does and gives the same vectors; PEFT alone loads its file on
the plain causal LM; adapters from elsewhere are switched on one backbone; what does not fit raises."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from helpers import (
    DTYPE_ARGUMENTS,
    LORA_TARGETS,
    assert_same_weights,
    loads_beside_others,
    make_rows,
    make_tokenizer,
    save_adapter,
    text_config,
    tiny_text_config,
)
from train_gircse import main

peft = pytest.importorskip("peft")
DROPS_MODULES = transformers.__version__.startswith("5.0.")
unmerged = pytest.mark.skipif(not loads_beside_others(), reason="this transformers needs a newer peft for it")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A plain causal LM with its tokenizer."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=True)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def train(base: Path, folder: Path, *more: str) -> Path:
    """A LoRA run of two steps, saved both ways: below `merged` and `adapter_only`."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in make_rows(12)))
    argv = f"--model_name_or_path {base} --train_data {pairs} --lora_r 2 --max_steps 2 --learning_rate 0.05 "
    argv += "--warmup_steps 1 --per_device_train_batch_size 4 --k 2 --held_out 0 --save_strategy no --report_to none "
    argv += "--use_cpu True --disable_tqdm True --dataloader_pin_memory False --num_steps 3"
    for name, option in (("merged", []), ("adapter_only", ["--save_adapter"])):
        main([*argv.split(), *option, "--output_dir", str(folder / name), *more])
    return folder


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory) -> Path:
    return train(plain, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def inputs(trained) -> dict:
    processor = AutoProcessor.from_pretrained(trained / "merged", trust_remote_code=True)
    return dict(processor(["a red thing", "cold"], instruction="find the answer"))


def embed(model, inputs: dict) -> torch.Tensor:
    return model.generate_embedding(**inputs, k=3)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


# Adapter-only folders


def test_adapter_only_folder_loads_in_one_call(plain, trained, inputs, gircse):
    folder = trained / "adapter_only"
    assert not list(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").exists()
    assert (folder / "sentence_gircse.py").exists() and (folder / "README.md").exists()
    expected = embed(AutoModel.from_pretrained(trained / "merged", trust_remote_code=True), inputs)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert not model.training and model.config.adapter is None
    torch.testing.assert_close(embed(model, inputs), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(embed(gircse.GircseModel.from_pretrained(folder), inputs), expected, rtol=0, atol=1e-6)
    assert distance(expected, embed(gircse.GircseModel.from_causal_lm(str(plain)), inputs)) > 1e-3
    assert model.config.num_steps == 3


@pytest.mark.parametrize("chosen", [None, "sdpa", "eager"])
def test_adapter_only_folder_takes_arguments(trained, gircse, chosen):
    settings = {"num_steps": 1} if chosen is None else {"num_steps": 1, "attn_implementation": chosen}
    for few in (
        AutoModel.from_pretrained(trained / "adapter_only", trust_remote_code=True, **settings),
        gircse.GircseModel.from_pretrained(trained / "adapter_only", **settings),
    ):
        assert few.config.num_steps == 1
        found = {part._attn_implementation for part in (few.config, few.config.text_config, few.language_model.config)}
        assert found == {chosen or "sdpa"}


@pytest.mark.parametrize("argument", DTYPE_ARGUMENTS)
@pytest.mark.parametrize("dtype, other", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_adapter_only_folder_loads_in_the_dtype_asked_for(trained, inputs, gircse, tmp_path, dtype, other, argument):
    """Whatever the backbone was saved in."""
    adapter = json.loads((trained / "adapter_only" / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"]).to(other)
    base.save_pretrained(tmp_path / "base")
    folder = edited(tmp_path, trained / "adapter_only", lambda weights: weights)
    (folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({**adapter, "base_model_name_or_path": str(tmp_path / "base")})
    )
    for model in (
        gircse.GircseModel.from_pretrained(folder, **{argument: dtype}),
        AutoModel.from_pretrained(folder, trust_remote_code=True, **{argument: dtype}),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
        assert torch.isfinite(embed(model, inputs)).all()


def test_sentence_transformers_is_told_who_needs_peft(trained):
    for name, needed in (("merged", {"torch", "transformers"}), ("adapter_only", {"torch", "transformers", "peft"})):
        settings = json.loads((trained / name / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        assert set(settings["requirements"]) == needed


def test_adapter_of_a_relative_path_loads_from_anywhere(plain, trained, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(plain.parent)
    train(Path(plain.name), tmp_path)
    monkeypatch.chdir(tmp_path)
    found, expected = (
        embed(AutoModel.from_pretrained(folder / "adapter_only", trust_remote_code=True), inputs)
        for folder in (tmp_path, trained)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_adapter_only_folder_becomes_a_whole_one(trained, inputs, tmp_path):
    model = AutoModel.from_pretrained(trained / "adapter_only", trust_remote_code=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert str(trained.parent) not in (tmp_path / "config.json").read_text(encoding="utf-8")  # no path of this machine
    again = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(embed(again, inputs), embed(model, inputs))


def test_adapter_only_folder_loads_in_sentence_transformers(trained, inputs):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(
        str(trained / "adapter_only"), trust_remote_code=True, device="cpu"
    )
    found = model.encode(
        ["a red thing", "cold"], prompt="Instruct: find the answer\nQuery: ", k=3, convert_to_tensor=True
    )
    expected = embed(AutoModel.from_pretrained(trained / "merged", trust_remote_code=True), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_adapter_file_is_one_of_the_plain_causal_lm(plain, trained, inputs, gircse):
    """In the documented layout: PEFT alone loads it, and so does `from_causal_lm`."""
    adapter = str(trained / "adapter_only" / "adapter")
    keys = load_file(f"{adapter}/adapter_model.safetensors").keys()
    assert len(keys) == 2 * 7 * 2
    assert all(re.match(r"base_model\.model\.model\.layers\.\d\.\w+\.\w+\.lora_[AB]\.weight$", key) for key in keys)
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(plain), adapter).merge_and_unload()
    merged = AutoModel.from_pretrained(trained / "merged", trust_remote_code=True)
    for name, weight in merged.language_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=1e-6)
    settings = {"logit_temperature": merged.config.logit_temperature}  # which an adapter's file can't tell
    ours = gircse.GircseModel.from_causal_lm(str(plain), adapter=adapter, **settings)
    torch.testing.assert_close(embed(ours, inputs), embed(merged, inputs), rtol=0, atol=1e-6)


def test_adapter_of_a_gircse_model(trained, inputs, tmp_path):
    """Training that starts from a GIRCSE model: that one is the adapter's backbone."""
    folder = train(trained / "merged", tmp_path)
    found, expected, start = (
        embed(AutoModel.from_pretrained(path, trust_remote_code=True), inputs)
        for path in (folder / "adapter_only", folder / "merged", trained / "merged")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert distance(expected, start) > 1e-3


def edited(folder: Path, source: Path, edit) -> Path:
    """A copy of an adapter-only folder's files, with its adapter's weights edited."""
    (folder / "adapter").mkdir()
    for path in [*source.glob("*.json"), *source.glob("*.py"), source / "adapter" / "adapter_config.json"]:
        (folder / path.relative_to(source)).write_bytes(path.read_bytes())
    weights = load_file(source / "adapter" / "adapter_model.safetensors")
    save_file(edit(weights), folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


EDITS = {
    "changes nothing": lambda weights: {key: torch.zeros_like(weight) for key, weight in weights.items()},
    "does not fit": lambda weights: {key: weight.repeat(1, 2) for key, weight in weights.items()},
    "unmatched": lambda weights: {key.replace("layers.1", "layers.7"): weight for key, weight in weights.items()},
}


@pytest.mark.parametrize("reason", EDITS)
def test_adapter_only_folder_that_does_not_fit_raises(trained, tmp_path, reason):
    folder = edited(tmp_path, trained / "adapter_only", EDITS[reason])
    with pytest.raises(ValueError, match=f"adapter=.*{reason}"):
        AutoModel.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--tuning", "full"], "full tuning"),
        (["--step_token", "learned", "--num_steps", "2"], "learned tokens"),
        (["--adapter", "ADAPTER"], "the one model"),
        (["--push_to_hub"], "not on the Hub"),
    ],
)
def test_adapter_that_would_not_load_is_refused_before_training(plain, trained, tmp_path, options, reason):
    options = [str(trained / "adapter_only" / "adapter") if name == "ADAPTER" else name for name in options]
    argv = f"--model_name_or_path {plain} --train_data {trained / 'pairs.jsonl'} --save_adapter --k 2 --held_out 0 "
    argv += f"--output_dir {tmp_path / 'out'} --use_cpu True --report_to none --per_device_train_batch_size 4"
    with pytest.raises(ValueError, match=f"save_adapter=True.*{reason}"):
        main([*argv.split(), *options])


# Several adapters on one backbone


@pytest.fixture(scope="module")
def adapters(plain, tmp_path_factory) -> SimpleNamespace:
    """Two adapters by PEFT alone: one of all linear layers, and one of two kinds, named by a regular expression."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = {"first": (LORA_TARGETS, 0.1), "second": (r"model\.layers\.\d\..*\.(q_proj|v_proj)", 0.4)}
    found = {}
    for name, (targets, std) in settings.items():
        found[name] = save_adapter(AutoModelForCausalLM.from_pretrained(plain), folder / name, std=std, targets=targets)
    return SimpleNamespace(**found)


def test_a_peft_that_is_too_old_to_load_beside_others_still_merges(plain, adapters, inputs, gircse, monkeypatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "99.0")
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    with pytest.raises(ImportError, match=rf"needs peft >= 99.0 .* this is peft {peft.__version__}: install"):
        model.load_adapter(adapters.first, "first")
    assert torch.equal(embed(model, inputs), start)
    merged = gircse.GircseModel.from_causal_lm(str(plain), adapter=adapters.first)
    assert distance(embed(merged, inputs), start) > 1e-2


@unmerged
def test_adapters_are_switched(plain, adapters, inputs, gircse):
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    model.load_adapter(adapters.first, "first")
    model.load_adapter(adapters.second, "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        merged = gircse.GircseModel.from_causal_lm(str(plain), adapter=getattr(adapters, name))
        torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-5)
        assert distance(embed(model, inputs), start) > 1e-2
    model.disable_adapters()
    torch.testing.assert_close(embed(model, inputs), start, rtol=0, atol=1e-6)
    model.enable_adapters()
    model.merge_adapters()
    assert_same_weights(model.state_dict(), merged.state_dict())


@unmerged
@pytest.mark.parametrize(
    "settings",
    [
        {"targets": r"^model\.layers\.\d\..*\.(q_proj|v_proj)"},
        {"exclude_modules": r"model\.layers\.1\..*"},
        {"alpha_pattern": {r"^model\.layers\.0\..*": 64, "v_proj": 32}},
        {"rank_pattern": {r"^model\.layers\.0\..*": 2, r"model\.layers\.1\.self_attn\.q_proj": 3}},
    ],
    ids=["target_modules", "exclude_modules", "alpha_pattern", "rank_pattern"],
)
def test_adapter_with_patterns_of_names(plain, inputs, gircse, tmp_path, settings):
    adapter = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path, **settings)
    merged = gircse.GircseModel.from_causal_lm(str(plain), adapter=adapter)
    model = gircse.GircseModel.from_causal_lm(str(plain))
    model.load_adapter(adapter)
    torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-4)


@unmerged
def test_own_adapters_and_checkpoints_are_loaded(plain, trained, inputs, gircse, tmp_path):
    """An adapter-only repo's adapter, and PEFT's layout of a `GircseModel`, as checkpoints have it."""
    merged = AutoModel.from_pretrained(trained / "merged", trust_remote_code=True)
    expected, temperature = embed(merged, inputs), merged.config.logit_temperature
    model = gircse.GircseModel.from_causal_lm(str(plain), logit_temperature=temperature)
    model.load_adapter(str(trained / "adapter_only"), "own", adapter_kwargs={"subfolder": "adapter"})
    torch.testing.assert_close(embed(model, inputs), expected, rtol=0, atol=1e-5)

    other = peft.get_peft_model(
        gircse.GircseModel.from_causal_lm(str(plain), logit_temperature=temperature),
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="FEATURE_EXTRACTION"),
    ).eval()
    other.save_pretrained(tmp_path)
    assert any("language_model" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model.load_adapter(str(tmp_path), "other")
    model.set_adapter("other")
    torch.testing.assert_close(embed(model, inputs), embed(other.get_base_model(), inputs), rtol=0, atol=1e-5)


def assert_plain(model, start: torch.Tensor, inputs: dict, folder: Path) -> None:
    """No trace of an adapter: what is saved loads, and gives the vectors from before."""
    assert not any("base_layer" in key or "original_module" in key for key in model.state_dict())
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert torch.equal(embed(model, inputs), start) and torch.equal(embed(again, inputs), start)


@unmerged
@pytest.mark.parametrize("reason", EDITS)
def test_adapter_that_does_not_fit_is_not_kept(plain, trained, adapters, inputs, gircse, tmp_path, reason):
    folder = edited(tmp_path, trained / "adapter_only", EDITS[reason])
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    with pytest.raises(ValueError, match=f"adapter=.*{reason}"):
        model.load_adapter(str(folder / "adapter"), "wrong")
    assert_plain(model, start, inputs, tmp_path / "saved")
    model.load_adapter(adapters.first, "wrong")  # the name is free
    with pytest.raises(ValueError, match="'wrong' is taken"):
        model.load_adapter(adapters.second, "wrong")
    merged = gircse.GircseModel.from_causal_lm(str(plain), adapter=adapters.first)
    torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-5)
    model.load_adapter(adapters.second, "second")
    model.set_adapter("wrong")
    with pytest.raises(ValueError, match=f"adapter=.*{reason}"):
        model.load_adapter(str(folder / "adapter"), "third")
    assert model.active_adapters() == ["wrong"]
    torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-5)


@unmerged
def test_adapter_of_another_architecture_is_not_kept(plain, inputs, gircse, tmp_path):
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    gpt2 = save_adapter(AutoModelForCausalLM.from_config(text_config("gpt2")), tmp_path / "gpt2", targets=["c_attn"])
    with pytest.raises(ValueError, match="adapter=.*c_attn"):
        model.load_adapter(gpt2)
    assert_plain(model, start, inputs, tmp_path / "saved")


@unmerged
def test_deleted_adapters_leave_the_model_plain(plain, adapters, inputs, gircse, tmp_path):
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    saves = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "saves", modules_to_save=["norm"])
    for name, adapter in {"first": adapters.first, "second": adapters.second, "saves": saves}.items():
        model.load_adapter(adapter, name)
    model.delete_adapter("second")
    model.delete_adapter(["first", "saves"])
    assert_plain(model, start, inputs, tmp_path / "saved")


@unmerged
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dora", "norm"])
def test_adapter_is_loaded_in_every_part_or_refused(plain, inputs, gircse, tmp_path, kind, dtype):
    """transformers 5 drops what DoRA multiplies by, and 5.0 modules saved whole, without an error."""
    settings = {"use_dora": True} if kind == "dora" else {"modules_to_save": ["norm"]}
    adapter = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path / "adapter", **settings)
    file = Path(adapter) / "adapter_model.safetensors"
    weights = {k: v * 1.5 if "magnitude" in k or "norm" in k else v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    model = gircse.GircseModel.from_causal_lm(str(plain), torch_dtype=dtype)
    start = embed(model, inputs)
    try:
        model.load_adapter(adapter)
    except ValueError as error:
        assert DROPS_MODULES or (kind == "dora" and not transformers.__version__.startswith("4."))
        assert ("magnitude" if kind == "dora" else "norm") in str(error) and "from_causal_lm" in str(error)
        assert torch.equal(embed(model, inputs), start)
    else:
        kept = [*model.get_adapter_state_dict().values()]
        assert all(any(torch.equal(w.to(k), k) for k in kept if k.shape == w.shape) for w in weights.values())
        if dtype == torch.float32:
            merged = gircse.GircseModel.from_causal_lm(str(plain), adapter=adapter)
            torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-4)


@unmerged
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings", [{"targets": ["q_proj", "embed_tokens"]}, {"trainable_token_indices": [5, 6]}], ids=["lora", "tokens"]
)
def test_adapter_that_adds_to_the_token_embeddings_is_not_kept(
    plain, adapters, inputs, gircse, tmp_path, settings, tied
):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(tiny_text_config(tie_word_embeddings=tied))
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", **settings)
    model = gircse.GircseModel.from_causal_lm(str(tmp_path / "base"))
    start = embed(model, inputs)
    with pytest.raises(ValueError, match=r"adapter=.*(token embeddings|embed_tokens).*from_causal_lm\(adapter=...\)"):
        model.load_adapter(adapter)
    assert_plain(model, start, inputs, tmp_path / "saved")
    model.load_adapter(adapters.first, "first")
    expected = embed(model, inputs)
    with pytest.raises(ValueError, match="adapter=.*(token embeddings|embed_tokens)"):
        model.load_adapter(adapter)
    assert torch.equal(embed(model, inputs), expected)


@unmerged
def test_adapter_with_token_embeddings_of_its_own(inputs, gircse, tmp_path):
    base = AutoModelForCausalLM.from_config(tiny_text_config())
    base.save_pretrained(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    file = Path(adapter) / "adapter_model.safetensors"
    save_file({k: v * 1.1 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    model = gircse.GircseModel.from_causal_lm(str(tmp_path / "base"))
    if DROPS_MODULES:
        with pytest.raises(ValueError, match="embed_tokens.*from_causal_lm"):
            model.load_adapter(adapter)
        return
    model.load_adapter(adapter)
    merged = gircse.GircseModel.from_causal_lm(str(tmp_path / "base"), adapter=adapter)
    torch.testing.assert_close(embed(model, inputs), embed(merged, inputs), rtol=0, atol=1e-5)


@unmerged
def test_an_adapter_that_would_leave_anothers_modules_in_use_is_not_set(plain, adapters, inputs, gircse, tmp_path):
    norms = save_adapter(AutoModelForCausalLM.from_pretrained(plain), tmp_path, modules_to_save=["norm"])
    model = gircse.GircseModel.from_causal_lm(str(plain))
    model.load_adapter(adapters.first, "first")
    model.load_adapter(norms, "norms")
    expected = embed(model, inputs)
    with pytest.raises(ValueError, match="adapter_name='first': .*norm is of norms .*'first' has none of its own"):
        model.set_adapter("first")
    assert torch.equal(embed(model, inputs), expected)


@unmerged
def test_an_own_adapter_of_the_token_embeddings_is_not_added(plain, inputs, gircse):
    model = gircse.GircseModel.from_causal_lm(str(plain))
    start = embed(model, inputs)
    with pytest.raises(ValueError, match="adapter_config: it adds to the token embeddings"):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]))
    assert torch.equal(embed(model, inputs), start) and not getattr(model, "peft_config", None)
