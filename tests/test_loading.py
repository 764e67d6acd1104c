"""Saving and loading: bit-exact in a fresh process, the right dtype and attention, adapters, bad checkpoints, and what
the remote code may do."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from conftest import ROOT, text_config

MODEL_FILES = [
    f"{name}_gircse.py"
    for name in (
        "adapters",
        "backbone",
        "configuration",
        "inputs",
        "modeling",
        "single_pass",
        "soft_tokens",
        "static_steps",
        "step_loop",
    )
]
REMOTE_FILES = (*MODEL_FILES, "processing_gircse.py")
# transformers took up `dtype=` in 4.56 and goes on taking `torch_dtype=`; our models take both everywhere.
DTYPE_ARGUMENTS = ["torch_dtype", "dtype"]
IDS = [[5, 17, 60, 33, 8], [0, 0, 42, 9, 77]]
MASK = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]

# Name -> backbone, changes of its configuration, whether its head is tied, axes.
ROUND_TRIPS = {
    "tied": ("qwen2-tied", {}, True, {"num_steps": 4, "logit_temperature": 1.5}),
    "untied": ("qwen2", {}, False, {"num_steps": 3}),
    "gpt2": ("gpt2", {}, True, {"num_steps": 3, "step_token": "hard"}),
    "gemma3": ("gemma3_text", {}, True, {"num_steps": 3}),
    "opt": ("opt", {}, True, {"num_steps": 3}),
    "learned": ("qwen2", {}, False, {"num_steps": 3, "step_token": "learned"}),
    "bidirectional": ("llama", {}, False, {"step_token": "none", "attention": "bidirectional"}),
}


@pytest.fixture
def ids_and_mask():
    return torch.tensor(IDS), torch.tensor(MASK)


def assert_same_weights(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype and torch.equal(found[name], weight), name


def edit_weights(file: Path, edit: Callable[[dict], dict | None]) -> None:
    """Changes a safetensors file; `edit` changes the dict in place or returns another."""
    weights = load_file(file)
    weights = edit(weights) or weights
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file, metadata={"format": "pt"})


# A fresh process, outside the source tree, offline ------------------------------------------------------------------


def child(job_file: str) -> None:
    """What the fresh process runs. It gets this source alone: nothing of the tests or the repo is importable there."""
    import json
    import sys
    from pathlib import Path

    connections: list[str] = []
    sys.addaudithook(lambda event, args: event == "socket.connect" and connections.append(str(args[1])))

    import torch
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    job = json.loads(Path(job_file).read_text())
    stock = transformers.Qwen2ForCausalLM, transformers.Qwen2Config
    report = {"models": {}, "untrusted": [], "path": sys.path}

    for kwargs in ({}, {"trust_remote_code": False}):
        for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):
            try:
                result = type(auto.from_pretrained(next(iter(job["folders"].values())), **kwargs)).__name__
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            report["untrusted"].append(result)
    report["imported_untrusted"] = [name for name in sys.modules if "gircse" in name]

    ids, mask = torch.tensor(job["ids"]), torch.tensor(job["mask"])
    for name, folder in job["folders"].items():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        report["models"][name] = {
            "classes": [type(config).__name__, type(model).__name__, type(model.config).__name__],
            "training": model.training,
            "config": {key: getattr(config, key) for key in job["axes"]},
            "weights": {key: weight.clone() for key, weight in model.state_dict().items()},
            "embeddings": model.generate_embedding(ids, mask, return_steps=True),
        }
        if job["save_to"]:
            model.save_pretrained(Path(job["save_to"]) / name)

    tiny = transformers.Qwen2Config(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    built = type(AutoModelForCausalLM.from_config(tiny))
    report["stock"] = [
        (transformers.Qwen2ForCausalLM, transformers.Qwen2Config) == stock,
        built is stock[0],
        f"{built.__module__}.{built.__qualname__}",
        type(AutoConfig.for_model("qwen2")) is stock[1],
    ]
    report["gircse_is_stock"] = "gircse" in transformers.CONFIG_MAPPING
    report["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    report["gircse_modules"] = sorted({name.rpartition(".")[2] for name in sys.modules if "_gircse" in name})
    report["connections"] = connections
    torch.save(report, job["report"])


def run_fresh(function: Callable[[str], None], folder: Path, job: dict) -> dict:
    """Runs `function(job file)` in a new process in `folder`, offline, with an empty cache and closed stdin."""
    folder.mkdir()
    job_file, report = folder / "job.json", folder / "report.pt"
    job_file.write_text(json.dumps({**job, "report": str(report)}))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules")}
    code = f"{inspect.getsource(function)}\n{function.__name__}({str(job_file)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(report)


@pytest.fixture(scope="module")
def round_trip(gircse, tmp_path_factory) -> dict:
    """Every model of ROUND_TRIPS saved here, loaded and saved in a second process, and loaded again in a third, with
    the folder of the first save deleted before."""
    work = tmp_path_factory.mktemp("round_trip")
    first, second = work / "first", work / "second"
    axes = ["num_steps", "logit_temperature", "step_token", "attention", "pooling"]
    result = {"expected": {}, "first_files": {}, "second_files": {}, "axes": axes}
    for name, (backbone, changes, _, settings) in ROUND_TRIPS.items():
        torch.manual_seed(0)
        config = gircse.GircseConfig(text_config=text_config(backbone, **changes), **settings)
        model = gircse.GircseModel(config).eval()
        model.save_pretrained(first / name)
        result["expected"][name] = {
            "config": {key: getattr(config, key) for key in axes},
            "weights": model.state_dict(),
            "embeddings": model.generate_embedding(torch.tensor(IDS), torch.tensor(MASK), return_steps=True),
        }

    def job(source: Path, save_to: Path | None) -> dict:
        folders = {name: str(source / name) for name in ROUND_TRIPS}
        return {"folders": folders, "save_to": save_to and str(save_to), "ids": IDS, "mask": MASK, "axes": axes}

    def files(source: Path) -> dict:
        return {
            name: {
                "names": {file.name for file in (source / name).iterdir()},
                "config": json.loads((source / name / "config.json").read_text()),
                "keys": set(load_file(source / name / "model.safetensors")),
            }
            for name in ROUND_TRIPS
        }

    result["once"] = run_fresh(child, work / "process_1", job(first, second))
    result["first_files"], result["second_files"] = files(first), files(second)
    shutil.rmtree(first)
    result["twice"] = run_fresh(child, work / "process_2", job(second, None))
    return result


@pytest.mark.parametrize("times", ["once", "twice"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip_is_bit_exact(round_trip, name, times):
    loaded, expected = round_trip[times]["models"][name], round_trip["expected"][name]
    assert loaded["classes"] == ["GircseConfig", "GircseModel", "GircseConfig"]
    assert loaded["config"] == expected["config"]
    assert not loaded["training"]
    assert_same_weights(loaded["weights"], expected["weights"])
    assert torch.equal(loaded["embeddings"], expected["embeddings"])
    assert torch.isfinite(loaded["embeddings"]).all()


@pytest.mark.parametrize("files", ["first_files", "second_files"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_saved_folder_holds_code_and_each_weight_once(round_trip, name, files):
    saved, tied = round_trip[files][name], ROUND_TRIPS[name][2]
    assert {*MODEL_FILES, "config.json", "model.safetensors"} <= saved["names"]
    assert saved["config"]["model_type"] == "gircse"
    assert saved["config"]["auto_map"] == {  # local: with "--" the code would come from another repo
        "AutoConfig": "configuration_gircse.GircseConfig",
        "AutoModel": "modeling_gircse.GircseModel",
    }
    left_out = {"language_model.lm_head.weight"} if tied else set()
    assert saved["keys"] == set(round_trip["expected"][name]["weights"]) - left_out


def test_learned_tokens_are_saved(round_trip):
    weights = round_trip["expected"]["learned"]["weights"]
    assert weights["learned_tokens.weight"].abs().sum() > 0
    assert "learned_tokens.weight" in round_trip["second_files"]["learned"]["keys"]


@pytest.mark.parametrize("times", ["once", "twice"])
def test_fresh_process_is_offline_and_outside_the_source_tree(round_trip, times):
    report = round_trip[times]
    assert str(ROOT) not in report["path"] and str(ROOT / "tests") not in report["path"]
    assert report["connections"] == []


def test_without_trust_nothing_is_run_and_nothing_else_is_loaded(round_trip):
    for report in (round_trip["once"], round_trip["twice"]):
        assert len(report["untrusted"]) == 6
        for outcome in report["untrusted"]:
            assert outcome.startswith("ValueError: ") and "trust_remote_code" in outcome
        assert report["imported_untrusted"] == []


def test_stock_classes_are_unchanged(round_trip):
    report = round_trip["once"]
    stock = "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM"
    assert report["stock"] == [True, True, stock, True]
    assert not report["gircse_is_stock"]


def test_model_type_is_not_a_stock_one(gircse):
    assert gircse.GircseConfig.model_type == "gircse"
    # The names that transformers ships, not the mapping of this process, to which other tests' code registers ours.
    assert "qwen2" in CONFIG_MAPPING_NAMES and "gircse" not in CONFIG_MAPPING_NAMES


def test_loading_imports_no_training_code(round_trip):
    for times in ("once", "twice"):
        report = round_trip[times]
        assert report["gircse_modules"] == [file.removesuffix(".py") for file in MODEL_FILES]
        for package in ("peft", "datasets", "sentence_transformers", "trl", "mteb", "ray"):
            assert package not in report["modules"]


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


# From a plain causal LM ---------------------------------------------------------------------------------------------


@pytest.fixture
def make_plain(tmp_path):
    """Saves a tiny plain causal LM and returns it with its folder."""

    def make(backbone: str = "qwen2", *, dtype=torch.float32, **changes) -> tuple[nn.Module, str]:
        torch.manual_seed(3)
        language_model = AutoModelForCausalLM.from_config(text_config(backbone, **changes)).to(dtype).eval()
        folder = tmp_path / f"plain-{backbone}"
        language_model.save_pretrained(folder)
        return language_model, str(folder)

    return make


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


# PEFT adapters of the plain causal LM -------------------------------------------------------------------------------

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(language_model: nn.Module, folder: Path, *, std: float = 0.1, targets=LORA_TARGETS, **settings) -> str:
    """A trained-looking LoRA of a plain causal LM, made by PEFT alone."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(language_model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std) if std else nn.init.zeros_(parameter)
    model.save_pretrained(folder)
    return str(folder)


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


def test_adapter_of_another_model_is_refused(gircse, make_plain, tmp_path):
    _, folder = make_plain()
    gpt2 = save_adapter(make_plain("gpt2")[0], tmp_path / "gpt2", targets=["c_attn"])
    narrow = AutoModelForCausalLM.from_config(text_config("qwen2", hidden_size=16))
    shallow = AutoModelForCausalLM.from_config(text_config("qwen2", num_hidden_layers=2))
    narrow, shallow = save_adapter(narrow, tmp_path / "narrow"), save_adapter(shallow, tmp_path / "shallow")
    for adapter in (gpt2, narrow, shallow):
        with pytest.raises(ValueError, match=re.escape(repr(adapter))):
            gircse.GircseModel.from_causal_lm(folder, adapter=adapter)


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


# What the remote code may do ----------------------------------------------------------------------------------------

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
TRANSFORMERS_MODULES = {"transformers", "transformers.utils"}
GUARDED_MODULES = {"transformers.integrations.peft"}  # in a function, where it may be missing
UNWANTED_MODULES = {"ctypes", "ftplib", "http", "importlib", "marshal", "multiprocessing", "pickle", "pty", "runpy"}
UNWANTED_MODULES |= {"shutil", "socket", "ssl", "subprocess", "tempfile", "urllib", "webbrowser"}
UNWANTED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "input", "breakpoint"}
# All that the files may call when they are imported.
CALLS_AT_IMPORT = {"logging.get_logger", "torch.no_grad", "dataclass"} | {
    f"{name}.register_for_auto_class" for name in ("GircseConfig", "GircseModel", "GircseProcessor")
}


def walk(node: ast.AST, in_function: bool = False, in_try: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node, whether it runs only when a function is called, and whether it is inside `try`. Decorators and
    default values run at import."""
    yield node, in_function, in_try
    for field, value in ast.iter_fields(node):
        inside = in_function or (isinstance(node, FUNCTIONS) and field == "body")
        guarded = in_try or (isinstance(node, ast.Try) and field == "body")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from walk(item, inside, guarded)


def import_problem(module: str, names: list[str], level: int, optional: bool) -> str | None:
    package = module.partition(".")[0]
    if level:
        return None if level == 1 and f"{module}.py" in REMOTE_FILES else f"relative import of {module!r}"
    if any(part.startswith("_") for part in [*module.split("."), *names] if module != "__future__"):
        return f"private name in {module!r}: {names}"
    if package == "transformers":
        stable = module in TRANSFORMERS_MODULES or (optional and module in GUARDED_MODULES)
        return None if stable else f"{module!r} is not a stable place to import from"
    if package == "peft":
        return None if optional else "peft is imported outside of try in a function"
    if package in UNWANTED_MODULES or package not in {"torch", *sys.stdlib_module_names}:
        return f"import of {module!r}"
    return None


def problems(source: str) -> list[str]:
    """What speaks against running `source` as remote code."""
    found = []
    for node, in_function, in_try in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [import_problem(alias.name, [], 0, in_function and in_try) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            found.append(import_problem(node.module or "", names, node.level, in_function and in_try))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNWANTED_CALLS or (not in_function and name not in CALLS_AT_IMPORT):
                found.append(f"line {node.lineno} calls {name}{'' if in_function else ' at import'}")
    return [problem for problem in found if problem]


def trusts(source: str) -> list[int]:
    """The lines that switch `trust_remote_code` on, as an argument, a default value, or an entry of a dict."""
    lines = []
    for node, *_ in walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = list(zip([a.arg for a in reversed(positional)], reversed(node.defaults), strict=False))
            pairs += list(zip([a.arg for a in node.kwonlyargs], node.kw_defaults, strict=True))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(getattr(getattr(target, "slice", None), "value", None), node.value) for target in targets]
            pairs += [(getattr(target, "id", getattr(target, "attr", None)), node.value) for target in targets]
        lines += [
            value.lineno
            for name, value in pairs
            if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value
        ]
    return lines


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_remote_code_only_computes(file):
    assert problems((ROOT / file).read_text()) == []


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_the_remote_loader_fetches_these_files_only(file):
    """transformers finds relative imports by a regular expression, also in docstrings and strings."""
    assert {Path(found).name for found in get_relative_import_files(ROOT / file)} <= set(REMOTE_FILES)


# The handler trusts its own folder; an entry of mteb's registry, which report.py writes for people to read and
# submit, says that the model needs it.
TRUSTING = ("handler.py", "gircse/evaluation/report.py")


CODE = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *ROOT.glob("gircse/**/*.py"))]


@pytest.mark.parametrize("file", sorted({*CODE} - {*TRUSTING}))
def test_no_file_trusts_remote_code_for_the_user(file):
    assert trusts((ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import requests",
        "import subprocess",
        "from urllib.request import urlopen",
        "import einops",
        "import peft",
        "def f():\n    import peft",
        "try:\n    import peft\nexcept ImportError:\n    peft = None",
        "def f():\n    import sentence_transformers",
        "from transformers.cache_utils import DynamicCache",
        "from transformers import _LazyModule",
        "from transformers.utils import _prepare",
        "from .train_gircse import main",
        "from . import modeling_gircse",
        "open('x')",
        "from pathlib import Path\ntext = Path('x').read_text()",
        "class A:\n    x = open('x')",
        "def f(x=open('x')):\n    pass",
        "@open('x')\ndef f():\n    pass",
        "import os\nos.system('x')",
        "def f():\n    eval('1')",
        "def f():\n    return __import__('x')",
    ],
)
def test_the_check_itself_finds(source):
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "def f(x, trust_remote_code=True): pass",
        "def f(*, trust_remote_code=True): pass",
        "kwargs['trust_remote_code'] = True",
        "trust_remote_code = True",
        "class A:\n    trust_remote_code: bool = True",
    ],
)
def test_the_trust_check_itself_finds(source):
    assert len(trusts(source)) == 1
    assert trusts(source.replace("True", "False")) == []


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
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the repo root holds no model.safetensors, so there is no published model to load")
    rows = [json.loads(line) for line in (ROOT / "sample_pairs.jsonl").read_text().splitlines()]
    rows = rows[:: len(rows) // 16][:16]
    texts = [row["query"] for row in rows] + [row["pos"][0] for row in rows]
    instructions = [row["instruction"] for row in rows] + [None] * 16
    job = {"root": str(ROOT), "texts": texts, "instructions": instructions}
    return run_fresh(root_child, tmp_path_factory.mktemp("root") / "process", job)


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
