"""Sentence Transformers: saved folders and adapters load elsewhere and again, and training by the library works."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import AutoModel

from helpers import ROOT, export_tiny, loads_beside_others, run_fresh
from sentence_helpers import PROMPT, SUFFIX, TEXTS, Inputs, auto_embeddings, cosines, golden_ids, load

CODE = [f"{part}_gircse.py" for part in ("configuration", "modeling", "processing", "sentence")]
try:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.losses import MultipleNegativesRankingLoss


# Loading and saving -------------------------------------------------------------------------------------------------


def embed_and_save(job_file: str) -> None:
    """What the fresh process runs. It gets this source alone: nothing of the tests or the repo is importable there."""
    import json
    import os
    import sys
    from pathlib import Path

    connections: list[str] = []
    sys.addaudithook(lambda event, args: event == "socket.connect" and connections.append(str(args[1])))

    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoProcessor

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    report = {"embeddings": {}, "auto": {}, "prompts": {}, "files": {}}
    for name, source in job["sources"].items():
        if job["imported"]:  # the class from the folder itself, around the two that AutoModel and AutoProcessor load
            sys.path.insert(0, source)
            from sentence_gircse import SentenceGircse

            inner = AutoModel.from_pretrained(source, trust_remote_code=True)
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
            model = SentenceTransformer(modules=[SentenceGircse(inner, processor)], device="cpu")
            sys.path.remove(source)
        else:
            model = SentenceTransformer(source, trust_remote_code=True, device="cpu")
        report["embeddings"][name] = torch.tensor(model.encode(job["texts"], k=5))
        report["prompts"][name] = model.prompts
        model.save_pretrained(str(Path(job["save_to"]) / name))
        inner = AutoModel.from_pretrained(source, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        report["auto"][name] = inner.generate_embedding(**processor(job["texts"]), k=5)
    report["connections"], report["path"] = connections, [*sys.path, os.environ.get("PYTHONPATH")]
    torch.save(report, job["report"])


@pytest.fixture(scope="module")
def saved(exported, tmp_path_factory) -> dict:
    """Saved from a folder, from the Hub's cache and by an imported class, each in a process of its own; then all three
    loaded and saved in one more, with what they came from gone."""
    work = tmp_path_factory.mktemp("saved")
    sources = work / "sources"
    shutil.copytree(exported, sources / "folder")
    shutil.copytree(exported, sources / "imported")
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = work / "hub" / "models--me--gircse"
    shutil.copytree(exported, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    names = {"folder": str(sources / "folder"), "imported": str(sources / "imported"), "hub": "me/gircse"}
    reports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(work / "hub"))
        for name, source in names.items():
            job = {
                "sources": {name: source},
                "imported": name == "imported",
                "texts": TEXTS,
                "save_to": str(work / "once"),
            }
            reports[name] = run_fresh(embed_and_save, work / f"process_{name}", job)
    shutil.rmtree(sources)
    shutil.rmtree(cached)
    again = {name: str(work / "once" / name) for name in names}
    job = {"sources": again, "imported": False, "texts": TEXTS, "save_to": str(work / "twice")}
    return {"work": work, "once": reports, "twice": run_fresh(embed_and_save, work / "process_again", job)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "hub", "imported"])
def test_saved_folder_loads_elsewhere_and_again(saved, sentence_model, name):
    expected = sentence_model.encode(TEXTS, k=5)
    for report in (saved["once"][name], saved["twice"]):
        assert report["connections"] == [] and str(ROOT) not in report["path"]
        for kind in ("embeddings", "auto"):
            assert cosines(report[kind][name].numpy(), expected).min() > 0.9999
    if name != "imported":  # a model in memory has no prompts but those given to SentenceTransformer(prompts=...)
        assert saved["twice"]["prompts"][name] == sentence_model.prompts
    for folder in (saved["work"] / "once" / name, saved["work"] / "twice" / name):
        assert [entry["type"] for entry in json.loads((folder / "modules.json").read_text(encoding="utf-8"))] == [
            "sentence_gircse.SentenceGircse"
        ]
        for file in CODE:
            assert (folder / file).read_bytes() == (ROOT / file).read_bytes(), file
        for file in folder.glob("*.json"):
            if "auto_map" in (content := json.loads(file.read_text(encoding="utf-8"))):
                assert "--" not in str(content["auto_map"]), file


def test_the_weights_of_two_folders_in_one_class(exported, tmp_path):
    """Every folder makes classes of its own, and `SentenceTransformer.merge` wants models of one."""
    first = load(exported)
    with torch.no_grad():
        for weight in first.parameters():
            weight.add_(torch.ones_like(weight))
    first.save_pretrained(str(tmp_path / "other"))
    first = load(exported)
    module = type(first[0])(type(first[0].model).from_pretrained(tmp_path / "other"), first[0].processor)
    second = SentenceTransformer(modules=[module], device="cpu")
    assert type(load(tmp_path / "other")[0]) is not type(first[0])
    assert [type(part) for part in second.modules()][1:] == [type(part) for part in first.modules()][1:]
    assert second[0].get_config_dict() == first[0].get_config_dict()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one + 1, other)


def test_class_imported_from_a_package_is_refused(sentence_model):
    """It would be saved under the package's name, which is nowhere else."""
    spec = importlib.util.spec_from_file_location("package.sentence_gircse", ROOT / "sentence_gircse.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="'package.sentence_gircse' would be saved under that name"):
        module.SentenceGircse(sentence_model[0].model, sentence_model[0].processor)


def test_another_backend_is_refused(exported):
    with pytest.raises(ValueError, match="backend='onnx' .* export_gircse.py writes an ONNX graph"):
        load(exported, backend="onnx")


def test_nothing_loads_without_trust(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(exported), device="cpu", trust_remote_code=False)


# Training -----------------------------------------------------------------------------------------------------------


def test_training_with_a_loss_of_the_library(exported, tmp_path):
    model = load(exported)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(0.1)  # to the usual size of fresh weights, with which training is steady
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    anchors, positives = ["red", "cold", "round", "loud"], ["a rose", "ice", "a ball", "thunder"]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=30,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        prompts={"anchor": PROMPT},
        save_steps=30,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = Dataset.from_dict({"anchor": anchors, "positive": positives})
    trainer = SentenceTransformerTrainer(model, arguments, rows, loss=MultipleNegativesRankingLoss(model))
    with Inputs(model) as inputs:
        trainer.train()
    assert golden_ids(f"{PROMPT}red") + golden_ids(SUFFIX) in inputs.ids
    assert golden_ids("a rose") + golden_ids(SUFFIX) in inputs.ids
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    # All of them: the LM head learns through the soft tokens alone.
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])] == []
    again = load(tmp_path / "run" / "checkpoint-30")
    assert cosines(again.encode(TEXTS), model.encode(TEXTS)).min() > 0.9999


# Adapters -----------------------------------------------------------------------------------------------------------


def add_adapter(model: SentenceTransformer, trained: bool = True, **settings) -> SentenceTransformer:
    """A LoRA by the library's method, as if it were trained."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"} | settings
    if not loads_beside_others():
        pytest.skip("this transformers needs a newer peft for it")
    model.add_adapter(peft.LoraConfig(**settings))
    for name, weight in model.named_parameters():
        if trained and "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture(scope="module")
def adapted(exported, tmp_path_factory):
    """A model with an adapter, and the folder that it was saved in."""
    model = add_adapter(load(exported))
    saved = tmp_path_factory.mktemp("adapted") / "saved"
    model.save_pretrained(str(saved))
    return model, saved


def test_a_saved_adapter_is_applied_by_all_that_load(exported, adapted, gircse):
    model, saved = adapted
    expected = model.encode(TEXTS)
    assert cosines(expected, load(exported).encode(TEXTS)).max() < 0.999  # or the lines below say nothing
    assert not list(saved.glob("*.safetensors")) and len(list((saved / "adapter").glob("*.safetensors"))) == 1
    assert json.loads((saved / "config.json").read_text(encoding="utf-8"))["adapter"] == "adapter"
    again = load(saved)
    assert again.active_adapters() == ["default"]
    np.testing.assert_array_equal(again.encode(TEXTS), expected)
    assert cosines(auto_embeddings(saved), expected).min() > 0.9999
    whole = SentenceTransformer(modules=[type(model[0])(gircse.GircseModel.from_pretrained(saved), model[0].processor)])
    assert cosines(whole.encode(TEXTS), expected).min() > 0.9999


def test_an_adapter_of_a_folder_is_told_from_one_that_loads_anywhere(exported, tmp_path, monkeypatch):
    model = add_adapter(load(exported))
    said = []
    monkeypatch.setattr(sys.modules[type(model[0]).__module__].logger, "warning", said.append)
    model.save_pretrained(str(tmp_path / "one"))
    assert len(said) == 1 and f"an adapter of the model in {exported.resolve()}, with which it loads" in said[0]
    settings = tmp_path / "one" / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text(encoding="utf-8").replace(str(exported.resolve()), "/elsewhere/base"))
    for loader in (load, functools.partial(AutoModel.from_pretrained, trust_remote_code=True)):
        with pytest.raises(OSError, match=r"one' holds an adapter of '/elsewhere/base', which can't be loaded here"):
            loader(tmp_path / "one")
    model[0].merge_adapter()
    model.save_pretrained(str(tmp_path / "two"))
    assert len(said) == 1


def test_a_saved_adapter_is_found_from_elsewhere_and_saved_again(exported, adapted, tmp_path, monkeypatch):
    monkeypatch.chdir(exported.parent)
    model = add_adapter(load(Path(exported.name)))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(str(tmp_path / "one"))
    load(Path("one")).save_pretrained("two")
    again = load(Path("two"), config_kwargs={"num_steps": 5})
    np.testing.assert_array_equal(again.encode(TEXTS), model.encode(TEXTS, k=5))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_an_adapter_that_transformers_saved_is_applied(adapted, tmp_path):
    """In its own layout, beside what only this repo saves."""
    model, saved = adapted
    shutil.copytree(saved, tmp_path / "saved", ignore=shutil.ignore_patterns("config.json", "adapter"))
    model[0].model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_config.json").exists() and not (tmp_path / "saved" / "config.json").exists()
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"language_model\..*\.(q_proj|down_proj)"},
        {"target_modules": ["language_model.model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "alpha_pattern": {r"language_model\.model\.layers\.0\.self_attn\.q_proj": 64}},
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"language_model.*\.up_proj": 2}},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r"language_model\.model\.layers\.0\..*"},
    ],
)
def test_an_adapter_of_some_layers_is_applied(exported, settings, tmp_path):
    model = add_adapter(load(exported), **settings)
    model.save_pretrained(str(tmp_path / "saved"))
    assert cosines(auto_embeddings(tmp_path / "saved"), model.encode(TEXTS)).min() > 0.9999
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS))


def test_merged_adapters_are_saved_as_weights(exported, adapted, tmp_path):
    model, saved = adapted
    merged = load(saved)
    merged[0].merge_adapter()
    merged.save_pretrained(str(tmp_path / "whole"))
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in load(exported).named_parameters()}
    assert (tmp_path / "whole" / "model.safetensors").exists() and not (tmp_path / "whole" / "adapter").exists()
    for one in (merged, load(tmp_path / "whole")):
        assert cosines(one.encode(TEXTS), model.encode(TEXTS)).min() > 0.9999
    with pytest.raises(ValueError, match="merge_adapters: the model has no adapter"):
        merged[0].merge_adapter()


def check_that_it_merges(model, folder):
    """An adapter of the model in folder/base."""
    expected = model.encode(TEXTS)
    assert cosines(expected, load(folder / "base").encode(TEXTS)).min() < 0.999
    model[0].merge_adapter()
    assert cosines(model.encode(TEXTS), expected).min() > 0.9999
    model.save_pretrained(str(folder / "saved"))
    assert cosines(auto_embeddings(folder / "saved"), expected).min() > 0.9999


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_modules_beside_an_adapter_are_merged(gircse, tmp_path, settings, tied):
    export_tiny(gircse, tmp_path / "base", text={"tie_word_embeddings": tied})
    model = add_adapter(load(tmp_path / "base"), **settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".modules_to_save.default." in name:
                weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    check_that_it_merges(model, tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_pefts_own_wrapper_is_merged(gircse, tmp_path, tied):
    """Also in what is saved, since it saves no code."""
    peft = pytest.importorskip("peft")
    export_tiny(gircse, tmp_path / "base", text={"tie_word_embeddings": tied})
    model = load(tmp_path / "base")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model[0].model = peft.get_peft_model(model[0].model, settings)
    model.save_pretrained(str(tmp_path / "wrapped"))
    assert cosines(load(tmp_path / "wrapped").encode(TEXTS), model.encode(TEXTS)).min() > 0.9999
    check_that_it_merges(model, tmp_path)


def test_an_adapter_on_the_token_embeddings_is_refused(exported):
    peft = pytest.importorskip("peft")
    model = load(exported)
    model[0].model = peft.get_peft_model(model[0].model, peft.LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="the token embeddings are wrapped as Embedding.* leave it out of the adapter"):
        model.encode(TEXTS)


def test_an_adapter_of_a_merged_model_is_saved_with_all_weights(exported, tmp_path):
    model = add_adapter(load(exported))
    model[0].merge_adapter()
    add_adapter(model).save_pretrained(str(tmp_path / "saved"))
    assert cosines(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS)).min() > 0.9999


def test_a_disabled_adapter_is_not_saved_as_an_active_one(exported, tmp_path):
    model = add_adapter(load(exported))
    model.disable_adapters()
    model.save_pretrained(str(tmp_path / "saved"))
    assert cosines(load(tmp_path / "saved").encode(TEXTS), load(exported).encode(TEXTS)).min() > 0.9999


def test_what_is_active_of_two_adapters_is_saved(exported, tmp_path):
    model = add_adapter(load(exported), target_modules=["q_proj"])
    settings = {"target_modules": ["language_model.model.layers.1.mlp.up_proj"], "init_lora_weights": False}
    model.add_adapter(pytest.importorskip("peft").LoraConfig(**settings), "other")
    for active in ("other", ["default", "other"]):
        model.set_adapter(active)
        model.save_pretrained(str(tmp_path / "saved"))
        assert cosines(load(tmp_path / "saved").encode(TEXTS), model.encode(TEXTS)).min() > 0.9999


@pytest.mark.parametrize("changed", [{"pooling": "last"}, {"step_token": "hard"}])
def test_a_saved_adapter_keeps_the_settings_of_its_model(exported, tmp_path, changed):
    model = add_adapter(load(exported, config_kwargs=changed))
    model.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved").encode(TEXTS)
    assert cosines(again, model.encode(TEXTS)).min() > 0.9999
    assert cosines(again, auto_embeddings(tmp_path / "saved")).min() > 0.9999


def test_the_code_beside_a_saved_adapter_is_of_the_commit_that_is_loaded(adapted, monkeypatch):
    module, asked, from_config = sys.modules[type(adapted[0][0]).__module__], [], AutoModel.from_config
    monkeypatch.setattr(AutoModel, "from_config", lambda *args, **kw: (asked.append(kw), from_config(*args, **kw))[1])
    where = {"subfolder": "", "revision": "main", "token": None, "cache_dir": None, "local_files_only": True}
    module._load_model(str(adapted[1]), where | {"trust_remote_code": True}, {})
    assert asked[0] == {"trust_remote_code": True, "code_revision": "main"}


@pytest.mark.parametrize("place", ["its own folder", "memory", "a folder that is gone"])
def test_an_adapter_without_another_folder_to_load_it_with_is_merged(exported, tmp_path, place):
    shutil.copytree(exported, tmp_path / "base")
    model = add_adapter(load(tmp_path / "base"))
    expected = model.encode(TEXTS)
    if place != "its own folder":
        model[0].model.config.name_or_path = "gone" * (place != "memory")
        shutil.rmtree(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "base"))
    assert cosines(load(tmp_path / "base").encode(TEXTS), expected).min() > 0.9999
    assert cosines(auto_embeddings(tmp_path / "base"), expected).min() > 0.9999
    np.testing.assert_array_equal(model.encode(TEXTS), expected)  # which keeps its adapter
    assert model.active_adapters() == ["default"]


def test_training_of_an_adapter_goes_on_from_a_checkpoint(exported, tmp_path):
    def train(resume: str | None = None, best: bool = False) -> SentenceTransformer:
        torch.manual_seed(0)
        model = add_adapter(load(exported), trained=False)
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / ("best" if best else "run")),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=best,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # after fewer steps, so that it has to be loaded
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        texts = {"anchor": ["red", "cold", "round", "loud"], "positive": ["a rose", "ice", "a ball", "thunder"]}
        rows = Dataset.from_dict(texts)
        trainer = SentenceTransformerTrainer(
            model, arguments, rows, eval_dataset=rows, loss=MultipleNegativesRankingLoss(model)
        )
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = train().encode(TEXTS)
    assert cosines(whole, load(exported).encode(TEXTS)).max() < 0.9999
    middle = tmp_path / "run" / "checkpoint-2"
    np.testing.assert_array_equal(train(resume=str(middle)).encode(TEXTS), whole)
    best = train(best=True).encode(TEXTS)
    np.testing.assert_array_equal(best, load(middle).encode(TEXTS))
    assert cosines(best, whole).min() < 0.9999
