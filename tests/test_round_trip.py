"""Saving and loading are bit-exact in a fresh process, outside the source tree and offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from helpers import IDS, MASK, MODEL_FILES, ROOT, assert_same_weights, run_fresh, text_config

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_learned_tokens_are_saved(round_trip):
    weights = round_trip["expected"]["learned"]["weights"]
    assert weights["learned_tokens.weight"].abs().sum() > 0
    assert "learned_tokens.weight" in round_trip["second_files"]["learned"]["keys"]


@pytest.mark.slow
@pytest.mark.parametrize("times", ["once", "twice"])
def test_fresh_process_is_offline_and_outside_the_source_tree(round_trip, times):
    report = round_trip[times]
    assert str(ROOT) not in report["path"] and str(ROOT / "tests") not in report["path"]
    assert report["connections"] == []


@pytest.mark.slow
def test_without_trust_nothing_is_run_and_nothing_else_is_loaded(round_trip):
    for report in (round_trip["once"], round_trip["twice"]):
        assert len(report["untrusted"]) == 6
        for outcome in report["untrusted"]:
            assert outcome.startswith("ValueError: ") and "trust_remote_code" in outcome
        assert report["imported_untrusted"] == []


@pytest.mark.slow
def test_stock_classes_are_unchanged(round_trip):
    report = round_trip["once"]
    stock = "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM"
    assert report["stock"] == [True, True, stock, True]
    assert not report["gircse_is_stock"]


def test_model_type_is_not_a_stock_one(gircse):
    assert gircse.GircseConfig.model_type == "gircse"
    # The names that transformers ships, not the mapping of this process, to which other tests' code registers ours.
    assert "qwen2" in CONFIG_MAPPING_NAMES and "gircse" not in CONFIG_MAPPING_NAMES


@pytest.mark.slow
def test_loading_imports_no_training_code(round_trip):
    for times in ("once", "twice"):
        report = round_trip[times]
        assert report["gircse_modules"] == [file.removesuffix(".py") for file in MODEL_FILES]
        for package in ("peft", "datasets", "sentence_transformers", "trl", "mteb", "ray"):
            assert package not in report["modules"]
