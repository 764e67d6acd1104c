"""The evaluation of other models, the prompts of the tasks, and what a revision is."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
import huggingface_hub
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import evaluate_gircse
from evaluate_gircse import choose_tasks
from evaluation_helpers import (
    DOCUMENTS,
    FACETS,
    PAIRS,
    QUERIES,
    SCENES,
    SEARCH,
    Passes,
    make_folder,
    registered,
    run,
    scores,
)
from gircse.evaluation import subjects
from gircse.evaluation.subjects import Subject
from gircse.evaluation.tasks import INSTRUCTIONS
from gircse.loading import load
from gircse.training.arguments import ModelArguments
from helpers import ROOT


def test_any_sentence_transformers_model(static_folder, data_folder, tmp_path):
    names = ["sts_pairs", "retrieval_little", "clustering_rooms"]
    report = run(static_folder, tmp_path, data=data_folder, tasks=names)
    model = SentenceTransformer(str(static_folder), device="cpu")
    left, right = (model.encode([pair[i] for pair in PAIRS], prompt="compare: ") for i in (0, 1))
    cosines = model.similarity_pairwise(left, right)
    expected = 100 * spearmanr(cosines, [pair[2] for pair in PAIRS])[0]
    assert scores(report)["sts_pairs"] == {"None": pytest.approx(expected, abs=0.01)}
    prompts = {row["task"]: row["prompts"] for row in report["tasks"]}
    assert prompts["sts_pairs"] == {"both": "compare: "} and prompts["clustering_rooms"] == {"both": ""}
    assert prompts["retrieval_little"] == {"query": "query: ", "document": "passage: "}
    assert not (tmp_path / "k_curve.png").exists()
    assert "| task | metric | score |" in (tmp_path / "results.md").read_text(encoding="utf-8")

    template = "Task: {instruction}\\nText: "
    report = run(static_folder, tmp_path, "--prompt_template", template, data=data_folder, tasks=names)
    prompts = {row["task"]: row["prompts"] for row in report["tasks"]}
    assert prompts["sts_pairs"] == {"both": f"Task: {INSTRUCTIONS['sts']}\nText: "}
    assert scores(report)["sts_pairs"]["None"] != pytest.approx(expected, abs=0.01)


def test_a_template_is_read_as_training_reads_it():
    """A shell's quotes leave a line break, a tab and a backslash as two characters each."""
    typed = r"Instruct: {instruction}\n\tQuery\\: "
    args = evaluate_gircse.parse(["--tasks", "STS12", "--prompt_template", typed])
    assert args.prompt_template == "Instruct: {instruction}\n\tQuery\\: "
    assert args.prompt_template == ModelArguments(prompt_template=typed).prompt_template


def test_prompts_that_only_the_registry_of_mteb_has(static_folder, data_folder, tmp_path, monkeypatch, capsys):
    """As it has those of E5; a model's own go before them, and having none at all is said."""
    name, own = (
        "intfloat/e5-base-v2",
        json.loads((static_folder / "config_sentence_transformers.json").read_text(encoding="utf-8")),
    )
    bare = shutil.copytree(static_folder, tmp_path / "bare")
    empty = {**own, "prompts": {"query": "", "document": ""}}
    (bare / "config_sentence_transformers.json").write_text(json.dumps(empty))

    def prompts(model: Path, *options: str) -> tuple[dict, bool]:
        report = run(model, tmp_path / "out", *options, data=data_folder, tasks=["retrieval_little"])
        [row] = report["tasks"]
        return row["prompts"], "has no prompts, nor has mteb's registry any" in capsys.readouterr().out

    passes = Passes(monkeypatch)
    assert prompts(bare) == ({"query": "", "document": ""}, True)
    assert prompts(bare, "--model_name", name) == ({"query": "query: ", "document": "passage: "}, False)
    assert registered(tmp_path / "out").loader_kwargs["model_prompts"] == {"query": "query: ", "document": "passage: "}
    assert passes.texts == 2 * (len(DOCUMENTS) + len(QUERIES))
    assert prompts(bare, "--prompt_template", "{instruction} ")[0]["query"] == SEARCH + " "
    assert subjects.registry_prompts("jinaai/jina-embeddings-v3") == {}  # there they are names, not prefixes
    own["prompts"]["query"] = "ask: "
    (bare / "config_sentence_transformers.json").write_text(json.dumps(own))
    assert prompts(bare, "--model_name", name) == ({"query": "ask: ", "document": "passage: "}, False)


def test_a_model_for_which_mteb_has_a_loader_of_its_own(registry, static_folder, data_folder, tmp_path, monkeypatch):
    """Its prompts are the loader's: here an instruction for queries alone, which its folder knows nothing of."""
    template = "Instruct: {instruction}\nQuery: "
    name = registry("seven", instruction_template=template, apply_instruction_to_passages=False)
    model, encode, asked = SentenceTransformer(str(static_folder), device="cpu"), SentenceTransformer.encode, {}

    def recorded(self, texts, *args, prompt=None, **kwargs):
        asked.update(dict.fromkeys(texts, prompt))
        return encode(self, texts, *args, prompt=prompt, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "encode", recorded)
        options = {"data": data_folder, "tasks": ["sts_pairs", "retrieval_little"]}
        report = run(name, tmp_path / "out", "--dtype", "bfloat16", **options)
    query = template.format(instruction="Retrieve text based on user query.")  # mteb's of any search
    assert {text: asked[text] for text in QUERIES.values()} == dict.fromkeys(QUERIES.values(), query)
    assert {prompt for text, prompt in asked.items() if "document " in text} == {None}
    prompt = template.format(instruction=INSTRUCTIONS["sts"])
    left, right = (model.encode([pair[i] for pair in PAIRS], prompt=prompt) for i in (0, 1))
    expected = 100 * spearmanr(model.similarity_pairwise(left, right), [pair[2] for pair in PAIRS])[0]
    assert scores(report)["sts_pairs"] == {"None": pytest.approx(expected, abs=0.01)}
    assert (report["model"], report["revision"], report["settings"]) == (name, "1", {})
    given = {"both": "as mteb's loader writes it", "both, instruction": INSTRUCTIONS["sts"]}
    assert report["tasks"][0]["prompts"] == given
    monkeypatch.setitem(INSTRUCTIONS, "sts", "Which is like it?")
    again = run(name, tmp_path / "out", **options)
    assert scores(again)["sts_pairs"] != scores(report)["sts_pairs"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tensors_of_a_loader_are_taken(registry, static_folder, data_folder, tmp_path, monkeypatch, dtype):
    name, encode = registry("tensors"), SentenceTransformer.encode
    tasks = {"data": data_folder, "tasks": ["sts_pairs", "instruct_scenes_triplets-animal", "retrieval_little"]}
    expected = scores(run(name, tmp_path / "arrays", **tasks))
    monkeypatch.setattr(
        SentenceTransformer, "encode", lambda *args, **kw: torch.as_tensor(encode(*args, **kw)).to(dtype)
    )
    found = scores(run(name, tmp_path / "tensors", **tasks))
    assert found.keys() == expected.keys() and (dtype == torch.bfloat16 or found == expected)


def test_what_mteb_would_load_is_checked(registry, data_folder, tmp_path):
    name = registry("coded", trust_remote_code=True)
    with pytest.raises(ValueError, match=f"model='{name}' runs code of its own, .* give --trust_remote_code"):
        run(name, tmp_path, data=data_folder, tasks=["sts_pairs"])
    name = registry("reranker", lambda *_, **options: SimpleNamespace(predict=None))
    with pytest.raises(ValueError, match=f"model='{name}' is a SimpleNamespace in mteb's registry, which embeds no"):
        run(name, tmp_path, data=data_folder, tasks=["sts_pairs"])


@pytest.mark.parametrize(
    ("axes", "suffix"),
    [({"pooling": "last"}, "<|endoftext|>"), ({"attention": "bidirectional"}, "")],
    ids=["Causal-EOS", "Bidirectional-Avg"],
)
def test_baselines(gircse, data_folder, tmp_path, axes, suffix):
    folder = make_folder(gircse, tmp_path / "baseline", suffix=suffix, step_token="none", **axes)
    report = run(folder, tmp_path / "out", data=data_folder, tasks=["sts_pairs"])
    model, processor = load(folder)
    left, right = (
        model.generate_embedding(**processor([pair[i] for pair in PAIRS], instruction=INSTRUCTIONS["sts"]))
        for i in (0, 1)
    )
    expected = 100 * spearmanr((left * right).sum(-1), [pair[2] for pair in PAIRS])[0]
    assert scores(report)["sts_pairs"] == {"None": pytest.approx(expected, abs=0.01)}


def test_learned_tokens_have_no_more_k_than_they_were_trained_with(gircse, data_folder, tmp_path):
    folder = make_folder(gircse, tmp_path / "learned", step_token="learned")
    assert list(scores(run(folder, tmp_path / "out", data=data_folder, tasks=["sts_pairs"]))["sts_pairs"]) == ["1", "3"]
    with pytest.raises(ValueError, match="from 1 to 3"):
        run(folder, tmp_path / "out", "--k", "5", data=data_folder, tasks=["sts_pairs"])


def test_a_models_own_number_of_steps_is_among_those_measured(gircse, model_folder, data_folder, tmp_path, capsys):
    """The card and a comparison show it."""
    folder = make_folder(gircse, tmp_path / "four", num_steps=4)
    run(folder, tmp_path / "out", data=data_folder, tasks=["sts_pairs"])
    assert "(k = 4)" in (tmp_path / "out/card_metadata.yaml").read_text(encoding="utf-8")
    run(folder, tmp_path / "other", "--k", "2", data=data_folder, tasks=["sts_pairs"])
    assert "--k has no 4, the model's num_steps: its card and a comparison show k = 2" in capsys.readouterr().out


def test_a_models_default_prompt_is_that_of_tasks_without_one(static_folder, data_folder, tmp_path):
    """As mteb, and the library itself, embed these."""
    folder = shutil.copytree(static_folder, tmp_path / "model")
    file = folder / "config_sentence_transformers.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    prompts = {"plain": "boat on the lake: ", "query": "", "document": ""}
    settings |= {"prompts": prompts, "default_prompt_name": "plain"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    [row] = run(folder, tmp_path / "out", data=data_folder, tasks=["sts_pairs"])["tasks"]
    assert row["prompts"] == {"both": "boat on the lake: "}
    model, [task] = SentenceTransformer(str(folder), device="cpu"), choose_tasks(["sts_pairs"], str(data_folder))
    with warnings.catch_warnings(action="ignore"):
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    assert row["scores"]["None"] == pytest.approx(100 * result.task_results[0].get_score(), abs=0.01)
    [row] = run(folder, tmp_path / "out", data=data_folder, tasks=["retrieval_little"])["tasks"]
    assert row["prompts"] == {"query": "", "document": ""}  # these are prompts too


@pytest.mark.parametrize("loaded", [False, True], ids=["", "loaded by mteb"])
def test_vectors_that_are_no_numbers_get_no_score(static_folder, data_folder, tmp_path, monkeypatch, capsys, loaded):
    """A ranking would make one of them like any other."""

    class Overflowing(AbsEncoder):
        def encode(self, inputs, **kwargs):
            return np.full((sum(len(batch["text"]) for batch in inputs), 2), np.nan, np.float32)

    load = subjects.load_subject

    def overflowing(args):
        subject = load(args)
        subject.embed = lambda texts, *rest: np.full((len(texts), 1, 8), np.inf)
        subject.loaded = Overflowing() if loaded else None
        return subject

    monkeypatch.setattr(evaluate_gircse, "load_subject", overflowing)
    tasks = ["retrieval_little", "sts_pairs"]
    assert not run(static_folder, tmp_path, "--dtype", "float16", data=data_folder, tasks=tasks, status=1)
    said = capsys.readouterr()
    reason = "vectors are not finite in float16: evaluate in another --dtype, as bfloat16"
    assert (said.out + said.err).count(reason) >= len(tasks)


def test_k_below_one_is_refused(model_folder, data_folder, tmp_path):
    with pytest.raises(ValueError, match=r"k=\[0, 1\] must be from 1"):
        run(model_folder, tmp_path, "--k", "0", "1", data=data_folder, tasks=["sts_pairs"])


def test_a_large_k_truncates_long_texts(model_folder):
    """They and the steps share the backbone's 128 positions; results of such a k are filed under that length."""

    def load_with(*k: str) -> Subject:
        return subjects.load_subject(
            evaluate_gircse.parse(["--model", str(model_folder), "--tasks", "STS12", "--device", "cpu", "--k", *k])
        )

    assert load_with("1", "64").settings == {}  # the processor's 64 tokens fit
    subject = load_with("1", "100")
    assert subject.settings == {"max_length": 28} and subject.meta.max_tokens == 28
    vectors = subject.embed(["x " * 500, "short"], "", None, subject.steps)
    model, processor = load(model_folder)
    for column, k in enumerate((1, 100)):
        expected = model.eval().generate_embedding(**processor(["x " * 500, "short"], max_length=28), k=k)
        np.testing.assert_allclose(vectors[:, column], expected.numpy(), atol=2e-6)
    with pytest.raises(ValueError, match="k=128 takes all positions of the backbone: choose k below 128"):
        load_with("128")


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_of_the_tasks(model_folder, data_folder):
    args = evaluate_gircse.parse(["--model", str(model_folder), "--tasks", "mteb", "--device", "cpu"])
    subject = subjects.load_subject(args)
    paper = json.loads((ROOT / "recipes/root_model/instructions.json").read_text(encoding="utf-8"))["mteb"]

    def prompt(name: str, side: str | None = None) -> str:
        [task] = choose_tasks([name], str(data_folder))
        text = subject.prompt(task.metadata, side)
        return text.removeprefix("Instruct: ").removesuffix("\nQuery: ") if text else ""

    assert prompt("STS12") == paper["STS12"]
    assert prompt("SciFact", "query") == paper["SciFact-Q"] and prompt("SciFact", "document") == ""
    for side in ("query", "document"):
        assert prompt("AskUbuntuDupQuestions", side) == paper["AskUbuntuDupQuestions-Q"]
    assert prompt("CQADupstackUnixRetrieval", "document") == paper["CQADupstackUnixRetrieval-C"]
    assert prompt("NanoTouche2020Retrieval", "query") == paper["Touche2020-Q"]  # the task it was made from
    assert prompt("NanoTouche2020Retrieval", "document") == ""
    assert prompt("News21InstructionRetrieval", "query") == paper["MSMARCO-Q"]  # it has no instruction of its own
    assert prompt("News21InstructionRetrieval", "document") == ""
    assert prompt("instruct_scenes-place") == FACETS["place"]
    assert prompt("retrieval_little", "query") == SEARCH and prompt("retrieval_little", "document") == ""
    for task in choose_tasks(["mteb", "nanobeir"], None):
        retrieval = isinstance(task, AbsTaskRetrieval)
        text = subject.prompt(task.metadata, "query" if retrieval else None)
        instruction = text.removeprefix("Instruct: ").removesuffix("\nQuery: ")
        assert instruction in paper.values(), task.metadata.name


def made_up(layout: type, metric: str, rows: list[dict]):
    """A task of one's own, as mteb has them, without an instruction."""
    kind = layout.__name__.removeprefix("AbsTask")
    metadata = TaskMetadata(
        name=f"Own{kind}",
        description="made up",
        dataset={"path": "local/own", "revision": "1"},
        type=kind,
        category="t2t",
        eval_langs=["eng-Latn"],
        main_score=metric,
    )

    def load_data(self, num_proc=None, **kwargs):
        self.dataset = DatasetDict(dict.fromkeys(("train", "test"), Dataset.from_list(rows)))
        self.data_loaded = True

    return type(metadata.name, (layout,), {"metadata": metadata, "load_data": load_data})()


OWN_TASKS = [
    (AbsTaskSTS, "cosine_spearman", [{"sentence1": a, "sentence2": b, "score": s} for a, b, s, _ in PAIRS], "sts"),
    (
        AbsTaskPairClassification,
        "max_ap",
        [{"sentence1": a, "sentence2": b, "labels": s} for a, b, _, s in PAIRS],
        "pairclass",
    ),
    (
        AbsTaskClassification,
        "accuracy",
        [{"text": r["text"], "label": i % 2} for i, r in enumerate(SCENES)],
        "classification",
    ),
]


@pytest.mark.parametrize(("layout", "metric", "rows", "instruction"), OWN_TASKS)
def test_mteb_embeds_a_task_of_ones_own_under_its_types_instruction(
    model_folder, monkeypatch, caplog, layout, metric, rows, instruction
):
    """And has no complaint about our prompts. Ours is the same."""
    expected = f"Instruct: {INSTRUCTIONS[instruction]}\nQuery: "
    task, prompts = made_up(layout, metric, rows), set()
    model = SentenceTransformer(str(model_folder), trust_remote_code=True, device="cpu")
    preprocess = model[0].preprocess
    monkeypatch.setattr(
        model[0], "preprocess", lambda texts, prompt=None, **k: prompts.add(prompt) or preprocess(texts, prompt, **k)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mteb.evaluate(model, task, cache=None, co2_tracker=False)
    assert prompts == {expected}
    said = [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
    assert [line for line in said if "prompt" in line.lower() or "not valid" in line] == []
    args = evaluate_gircse.parse(["--model", str(model_folder), "--tasks", "mteb", "--device", "cpu"])
    assert subjects.load_subject(args).prompt(task.metadata, None) == expected


def test_all_published_prompts_have_names_that_mteb_takes(caplog):
    prompts = json.loads((ROOT / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AbsEncoder.validate_task_to_prompt_name(prompts) == prompts
    assert caplog.records == []
    assert {"Banking77Classification", "STSBenchmark", "NQ-query", "query", "document"} <= set(prompts)  # of the README


def test_prompts_of_the_published_scores_are_those_of_today(data_folder):
    """Those of the folders' tasks come from INSTRUCTIONS, whatever the model's prompts have for their types."""
    args = evaluate_gircse.parse(["--model", str(ROOT), "--tasks", "local", "--k", "1", "--device", "cpu"])
    subject = subjects.load_subject(args)
    for row in json.loads((ROOT / "results" / "root.json").read_text(encoding="utf-8"))["tasks"]:
        if not row["task"].startswith("instruct"):
            instruction = INSTRUCTIONS.get(row["task"]) or INSTRUCTIONS[row["task"].partition("_")[0]]
            prompt = instruction if "both" in row["prompts"] else {"query": instruction}
            metadata = SimpleNamespace(name=row["task"], type=row["type"], prompt=prompt, adapted_from=None)
            sides = {side: subject.prompt(metadata, None if side == "both" else side) for side in row["prompts"]}
            assert sides == row["prompts"], row["task"]


@pytest.mark.parametrize("loader", [subjects.gircse_subject, subjects.sentence_transformers_subject])
def test_weights_have_the_dtype_that_is_asked_for(loader, model_folder):
    found = {}
    for dtype in ("float32", "bfloat16"):
        model, processor = load(str(model_folder), dtype=dtype)
        k, options = model.config.num_steps, ["--dtype", dtype, "--trust_remote_code"]
        args = evaluate_gircse.parse(["--model", str(model_folder), "--tasks", "STS12", "--k", str(k), *options])
        found[dtype] = loader(args, "cpu").embed(["a b", "c d"], "", None, [k])[:, 0]
        expected = model.generate_embedding(**processor(["a b", "c d"]), k=k)
        np.testing.assert_allclose(found[dtype], expected.numpy(), atol=1e-6)
    assert np.abs(found["float32"] - found["bfloat16"]).max() > 1e-4


def test_nothing_is_trusted_unasked():
    for path in (ROOT / "evaluate_gircse.py", *(ROOT / "gircse/evaluation").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert re.findall(r"trust_remote_code=(?!args\.)\S+", source) == []


@pytest.mark.parametrize("file", ["config.json", "modules.json"])
def test_revision_of_a_hub_model_is_its_commit(tmp_path, monkeypatch, file):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--you--some"
    (repo / "refs").mkdir(parents=True)
    args = SimpleNamespace(model="you/some", model_name=None)
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / file).write_text("{}")
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr(subjects, "card_of", lambda _: {})
        assert subjects.model_meta(args, {}).revision == commit


def test_revision_of_a_folder_is_its_content(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    assert subjects.content_hash(copy) == subjects.content_hash(model_folder)
    (copy / "README.md").write_text("another card")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))  # evaluations name theirs
    assert subjects.content_hash(copy) == subjects.content_hash(model_folder)
    settings = json.loads((copy / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert settings.pop("requirements")
    plain = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (copy / "config_sentence_transformers.json").write_text(plain, encoding="utf-8")
    assert subjects.content_hash(copy) == subjects.content_hash(model_folder)
    (copy / "config.json").write_text(json.dumps({**config, "num_steps": config["num_steps"] + 1}))
    assert subjects.content_hash(copy) != subjects.content_hash(model_folder)
    (copy / "config.json").write_text(json.dumps(config))
    settings["prompts"]["STS12"] = "other"
    (copy / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert subjects.content_hash(copy) != subjects.content_hash(model_folder)


def test_published_scores_are_of_the_published_weights():
    results = json.loads((ROOT / "results" / "root.json").read_text(encoding="utf-8"))
    assert results["revision"] == subjects.content_hash(ROOT)


def test_shards_count_once_an_index_names_them(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    before = subjects.content_hash(copy)
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"one")
    assert subjects.content_hash(copy) == before
    (copy / "model.safetensors.index.json").write_text("{}")
    named = subjects.content_hash(copy)
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"two")
    assert len({before, named, subjects.content_hash(copy)}) == 3


def test_revision_of_an_adapter_only_folder_is_its_adapter_too(model_folder, tmp_path):
    copy = shutil.copytree(model_folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "adapter": "lora"}))
    (copy / "lora").mkdir()
    (tmp_path / "base").mkdir()
    hashes = set()
    for base, files in ((str(tmp_path / "base"), ["lora/adapter_model", "../base/model"]), ("us/lm", ["lora/adapter"])):
        (copy / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": "v1"}))
        for name in files:
            for weights in (b"one", b"two"):
                (copy / f"{name}.safetensors").write_bytes(weights)
                hashes.add(subjects.content_hash(copy))
    (copy / "lora/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "revision": "v2"}))
    assert len(hashes | {subjects.content_hash(copy)}) == 7
