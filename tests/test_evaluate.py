"""The evaluation script: scores equal independent ones, all k from one pass, results that never mix, interruption, and
what is written for the card and for mteb's registry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
import huggingface_hub
import numpy as np
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from mteb.models import ModelMeta
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score

import evaluate_gircse
from conftest import ROOT
from evaluate_gircse import choose_tasks, main
from evaluation_helpers import (
    DOCUMENTS,
    FACETS,
    PAIRS,
    QUERIES,
    RELEVANT,
    SEARCH,
    TASKS,
    TRIPLETS,
    Passes,
    make_folder,
    registered,
    run,
    scores,
    write_data,
)
from gircse.evaluation import report, subjects
from gircse.evaluation.cache import Results
from gircse.evaluation.encoding import StepEncoder, Vectors
from gircse.evaluation.subjects import Subject
from gircse.evaluation.tasks import INSTRUCTIONS, LOCAL, LocalTriplets, local_tasks
from gircse.loading import load
from helpers import write_rows

sys.path.append(str(ROOT / "recipes/paper"))
import several_vectors
import unequal_steps


def result_files(out: Path) -> dict[str, Path]:
    return {f"{path.parent.name}/{path.stem}": path for path in out.rglob("*.json") if path.stem in TASKS}


@pytest.fixture(scope="module")
def evaluated(model_folder, data_folder, tmp_path_factory) -> SimpleNamespace:
    """All local tasks at k = 1 and 3."""
    out = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        passes = Passes(monkeypatch)
        report = run(model_folder, out, "--k", "3", "1", "--batch_size", "4", data=data_folder)
    return SimpleNamespace(out=out, report=report, passes=passes)


@pytest.fixture(scope="module")
def embed(model_folder):
    """(d,) of one text, embedded alone."""
    model, processor = load(model_folder)

    def embed(text: str, instruction: str | None, k: int) -> np.ndarray:
        return model.eval().generate_embedding(**processor([text], instruction=instruction), k=k)[0].numpy()

    return embed


# Scores -------------------------------------------------------------------------------------------------------------


def test_every_layout_has_its_task_and_score(evaluated):
    rows = {row["task"]: row for row in evaluated.report["tasks"]}
    assert {name: row["metric"] for name, row in rows.items()} == TASKS
    assert all(list(row["scores"]) == ["1", "3"] and -100 <= min(row["scores"].values()) for row in rows.values())
    groups = {row["group"] for row in rows.values() if row["task"].startswith("instruct")}
    assert groups == {"Instruction following"}
    assert evaluated.report["means"]["Instruction following (4)"]["3"] == pytest.approx(
        np.mean([row["scores"]["3"] for name, row in rows.items() if name.startswith("instruct")]), abs=0.01
    )
    assert "All tasks (9)" in evaluated.report["means"]


@pytest.mark.parametrize("k", [1, 3])
def test_scores_equal_an_independent_computation(evaluated, embed, k):
    found = {name: values[str(k)] for name, values in scores(evaluated.report).items()}
    instruction = INSTRUCTIONS["sts"]
    cosines = [embed(a, instruction, k) @ embed(b, instruction, k) for a, b, *_ in PAIRS]
    assert found["sts_pairs"] == pytest.approx(100 * spearmanr(cosines, [pair[2] for pair in PAIRS])[0], abs=0.01)

    file = result_files(evaluated.out)[f"k_{k}/pairclass_pairs"]
    [pairs] = json.loads(file.read_text(encoding="utf-8"))["scores"]["test"]
    precision = average_precision_score([pair[3] for pair in PAIRS], cosines)  # the two instructions are the same
    assert pairs["cosine_ap"] == pytest.approx(precision, abs=1e-5)
    assert found["pairclass_pairs"] == pytest.approx(100 * pairs["max_ap"], abs=0.01)

    texts = [("Titled " if i % 3 == 0 else "") + text for i, text in enumerate(DOCUMENTS)]
    documents = np.stack([embed(text, None, k) for text in texts])
    gains = []
    for query, relevant in RELEVANT.items():
        order = np.argsort(-documents @ embed(QUERIES[query], SEARCH, k))[:10]
        discounts = 1 / np.log2(np.arange(2, 12))
        ideal = sorted(relevant.values(), reverse=True)
        gain = sum(relevant.get(f"d{i}", 0) * discount for i, discount in zip(order, discounts, strict=True))
        gains.append(gain / sum(np.array(ideal) * discounts[: len(ideal)]))
    assert found["retrieval_little"] == pytest.approx(100 * np.mean(gains), abs=0.01)

    for facet, instruction in FACETS.items():
        triplets = [
            [embed(text, instruction, k) for text in triplet[:3]] for triplet in TRIPLETS if triplet[3] == facet
        ]
        accuracy = np.mean([anchor @ positive > anchor @ negative for anchor, positive, negative in triplets])
        assert found[f"instruct_scenes_triplets-{facet}"] == pytest.approx(100 * accuracy, abs=0.01)


def test_a_sample_has_the_same_rows_each_time_and_is_filed_apart(data_folder, model_folder, tmp_path):
    def loaded() -> dict[str, object]:
        """Two queries, and of other tasks four rows, whose labels differ."""
        found = {count: {task.metadata.name: task for task in local_tasks(data_folder, count)} for count in (2, 4)}
        tasks = found[4] | {"retrieval_little": found[2]["retrieval_little"]}
        for task in tasks.values():
            task.load_data()
        return tasks

    first, again = loaded(), loaded()
    whole = {task.metadata.name: task for task in local_tasks(data_folder)}
    search = first["retrieval_little"].dataset["default"]["test"]
    judged = {document for grades in search["relevant_docs"].values() for document in grades}
    assert len(search["queries"]) == 2 == len(search["relevant_docs"]) and len(search["corpus"]) == len(judged) + 2
    assert judged < set(search["corpus"]["id"])
    assert search["relevant_docs"] == {query: RELEVANT[query] for query in search["queries"]["id"]}
    for name, task in first.items():
        assert task.metadata.revision == f"{whole[name].metadata.revision}-sample{task.sample}"
        if name != "retrieval_little":
            rows = {split: part.to_list() for split, part in task.dataset.items()}
            to_fit = rows.get("train", [])  # as many as a classifier takes
            assert all(len(part) <= 4 or part is to_fit for part in rows.values())
            assert len(to_fit) > 4 or name != "classification_rooms"
            assert rows == {split: part.to_list() for split, part in again[name].dataset.items()}
    report = run(model_folder, tmp_path, "--k", "1", "--sample", "5", data=data_folder, tasks=["sts_pairs"])
    assert report["settings"] == {"sample": 5} and report["tasks"][0]["revision"].endswith("-sample5")
    assert "of a sample of 5 rows of each task" in (tmp_path / "results.md").read_text(encoding="utf-8")
    for tasks, sample in ((["sts_pairs"], "1"), (["sts_pairs", "STS12"], "5")):
        with pytest.raises(ValueError, match=f"sample={sample} must be at least 2, and is for local tasks alone"):
            main(["--tasks", *tasks, "--data", str(data_folder), "--sample", sample])


def test_a_tie_of_a_triplet_is_no_success(data_folder):
    [task] = [task for task in local_tasks(data_folder) if task.metadata.name == "instruct_scenes_triplets-animal"]
    assert isinstance(task, LocalTriplets)
    meta = ModelMeta.create_empty()
    constant = Subject(meta, {}, [None], lambda texts, *_: np.ones((len(texts), 1, 4)), {}, "{instruction}", None)
    with Vectors(constant, [None], 8) as vectors:
        result = mteb.evaluate(StepEncoder(vectors, None), task, cache=None, co2_tracker=False)
    assert result.task_results[0].get_score() == 0
    assert task.metadata.name == "instruct_scenes_triplets-animal"  # mteb unloads tasks, which must keep their name


# All k from one pass ------------------------------------------------------------------------------------------------


def test_scores_of_one_pass_are_those_of_an_evaluation_of_one_k(
    evaluated, model_folder, data_folder, tmp_path, monkeypatch
):
    passes = Passes(monkeypatch)
    alone = run(model_folder, tmp_path, "--k", "3", "--batch_size", "7", data=data_folder)
    assert scores(alone) == {name: {"3": values["3"]} for name, values in scores(evaluated.report).items()}
    assert passes.texts == evaluated.passes.texts  # a second k costs no pass
    assert set(evaluated.passes.largest_k) == {3}


def test_each_text_is_embedded_once(evaluated):
    """Under its prompt and in its task: SCENES 12 texts, in four tasks; pairs 14, in two; triplets 2 x 3 and 3."""
    distinct = 12 + 12 + 2 * 12 + 2 * 14 + len(DOCUMENTS) + len(QUERIES) + 4 + 3
    assert evaluated.passes.texts == distinct


def test_batches_are_of_like_length(evaluated):
    assert max(map(len, evaluated.passes.batches)) == 4
    batches = []

    def embed(texts: list[str], prompt: str, side: str | None, steps: list[int]) -> np.ndarray:
        batches.append([len(text) for text in texts])
        return np.ones((len(texts), len(steps), 2))

    with Vectors(SimpleNamespace(embed=embed), [1], 2) as vectors:
        vectors(["a" * length for length in (1, 5, 2, 4, 6, 3)], "", None, 1)
    assert batches == [[6, 5], [4, 3], [2, 1]]


def test_vectors_are_those_of_separate_calls(model_folder, embed):
    args = evaluate_gircse.parse(
        ["--model", str(model_folder), "--tasks", "STS12", "--k", "1", "2", "5", "--device", "cpu"]
    )
    subject = subjects.load_subject(args)
    texts = ["a b", "longer than the others", "a b", "c"]
    prompt = "Instruct: Compare.\nQuery: "
    with Vectors(subject, subject.steps, 2) as vectors:
        first = Path(vectors.folder.name)
        for k in subject.steps:
            expected = np.stack([embed(text, "Compare.", k) for text in texts])
            np.testing.assert_allclose(vectors(texts, prompt, None, k), expected, atol=1e-5)
        more = vectors(["new", "c"], prompt, None, 5)
        np.testing.assert_allclose(more, np.stack([embed(t, "Compare.", 5) for t in ("new", "c")]), atol=1e-5)
        other = vectors(["c"], "", None, 5)  # another prompt is another vector
        np.testing.assert_allclose(other[0], embed("c", None, 5), atol=1e-5)
        assert vectors([], prompt, None, 5).shape == (0, 32)
    assert not first.exists()


# Results that never mix ---------------------------------------------------------------------------------------------


def test_each_k_has_results_of_its_own(evaluated):
    files = result_files(evaluated.out)
    assert set(files) == {f"k_{k}/{name}" for k in (1, 3) for name in TASKS}
    values = [
        json.loads(files[f"k_{k}/retrieval_little"].read_text(encoding="utf-8"))["scores"]["test"][0] for k in (1, 3)
    ]
    assert values[0]["ndcg_at_10"] != values[1]["ndcg_at_10"]


def test_other_weights_data_and_settings_are_evaluated_anew(gircse, evaluated, model_folder, tmp_path, monkeypatch):
    """Under the same folder name, file name and k."""
    out, data, passes = tmp_path / "out", write_data(tmp_path / "data"), Passes(monkeypatch)

    def texts(model: Path, *options: str) -> int:
        before = passes.texts
        run(model, out, "--k", "3", *options, data=data, tasks=["sts_pairs"])
        return passes.texts - before

    def found() -> dict[str, dict[str, float]]:
        return scores(json.loads((out / "results.json").read_text(encoding="utf-8")))

    assert texts(model_folder) == 14
    first = found()
    assert texts(model_folder) == 0  # nothing to do
    assert texts(make_folder(gircse, tmp_path / "tiny", seed=1)) == 14
    assert found() != first
    assert texts(model_folder, "--max_length", "30") == 14
    assert texts(model_folder, "--dtype", "bfloat16") == 14
    assert texts(model_folder) == 0
    assert found() == first
    rows = [json.loads(line) for line in (data / "sts_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    write_rows(data / "sts_pairs.jsonl", [{**row, "score": 5 - row["score"]} for row in rows])
    assert texts(model_folder) == 14
    assert found()["sts_pairs"]["3"] == -first["sts_pairs"]["3"]


# Interruption -------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(evaluated, model_folder, data_folder, tmp_path, monkeypatch):
    names = ["sts_pairs", "retrieval_little", "instruct_scenes_triplets-place"]
    encode = StepEncoder.encode

    def interrupted(self, inputs, *, task_metadata, **kwargs):
        if task_metadata.name == names[1] and self.k == 3:
            raise KeyboardInterrupt
        return encode(self, inputs, task_metadata=task_metadata, **kwargs)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(StepEncoder, "encode", interrupted)
        run(model_folder, tmp_path, "--k", "1", "3", data=data_folder, tasks=names)
    done = result_files(tmp_path)
    assert set(done) == {"k_1/sts_pairs", "k_3/sts_pairs", "k_1/retrieval_little"}
    assert list(scores(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))) == names[:1]
    done["k_1/sts_pairs"].write_text(
        done["k_1/sts_pairs"].read_text(encoding="utf-8")[:100]
    )  # as if killed while writing
    kept = done["k_3/sts_pairs"].stat().st_mtime_ns

    passes = Passes(monkeypatch)
    report = run(model_folder, tmp_path, "--k", "1", "3", data=data_folder, tasks=names)
    assert scores(report) == {name: scores(evaluated.report)[name] for name in names}
    assert passes.texts == 14 + len(DOCUMENTS) + len(QUERIES) + 3
    assert done["k_3/sts_pairs"].stat().st_mtime_ns == kept


def test_a_task_that_fails_takes_no_other_along(model_folder, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    (data / "pairclass_pairs.jsonl.gz").unlink()
    write_rows(data / "pairclass_pairs.jsonl", [{"sentence1": "a"}])
    report = run(
        model_folder, tmp_path / "out", "--k", "1", data=data, tasks=["pairclass_pairs", "sts_pairs"], status=1
    )
    assert list(scores(report)) == ["sts_pairs"]
    reason = "pairclass_pairs.jsonl:1: there is no sentence2, but sentence1: add it or rename one"
    assert reason in report["not_evaluated"]["pairclass_pairs"]


def test_a_log_says_what_is_being_done(model_folder, data_folder, tmp_path, monkeypatch, capsys):
    """It is no terminal, so that it gets no bar but a line from time to time; here before every batch."""
    monkeypatch.setattr(subjects, "SECONDS_BETWEEN_LINES", -1)
    batches = ["  embedding 7 texts", "  0 of 2 batches", "  1 of 2 batches"]
    for scored in ([*["  reading its data", "  evaluating k = 1"], *batches, *batches, "  evaluating k = 3"], []):
        run(model_folder, tmp_path, "--k", "1", "3", "--batch_size", "5", data=data_folder, tasks=["sts_pairs"])
        said = capsys.readouterr()
        start = ["looking for the data of 1 tasks, here and on the Hub", "1 of 1 data sets can be had"]
        start += [f"loading {model_folder}", "[1/1] sts_pairs", *(scored or ["  has been evaluated before"])]
        assert said.out.splitlines()[: len(start) + 1] == [*start, ""]
        assert "batches:" not in said.err


# What is written ----------------------------------------------------------------------------------------------------


def test_report(evaluated, model_folder):
    text = (evaluated.out / "results.md").read_text(encoding="utf-8")
    table = scores(evaluated.report)
    for name, values in table.items():
        assert f"| {name} | {TASKS[name]} | {values['1']:.2f} | {values['3']:.2f} |" in text
    assert "| task | metric | k = 1 | k = 3 |" in text
    assert f"python evaluate_gircse.py --model {model_folder}" in text and "mteb" in evaluated.report["versions"]
    assert (evaluated.out / "k_curve.png").read_bytes()[:4] == b"\x89PNG"
    card = ModelCard((evaluated.out / "card_metadata.yaml").read_text(encoding="utf-8"))
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {n: v["3"] for n, v in table.items()}
    assert found["sts_pairs"].metric_type == "cosine_spearman" and found["sts_pairs"].metric_name.endswith("(k = 3)")


@pytest.mark.skipif(not hasattr(huggingface_hub, "EvalResultEntry"), reason="needs huggingface_hub 1.4")
def test_scores_for_the_hub(evaluated, monkeypatch):
    """In its format, of tasks that it knows: each task's main score, at the k of the card."""
    assert not (evaluated.out / ".eval_results").exists()  # all tasks were of a folder
    whole = {"splits": ["test"], "subsets": ["default"], "scores": {"1": 1.5, "3": 2.5}}
    row = {"task": "STS12", "dataset": "mteb/sts12-sts", "revision": "abc", **whole}
    rows = [row, row | {"scores": {"1": 8, "3": 9}}, row | {"task": "own", "dataset": f"{LOCAL}own"}]
    found = report.hub_entries(rows, {"dtype": "float16"}, 3)
    assert list(found) == ["STS12.yaml"]
    [entry] = huggingface_hub.parse_eval_result_entries(yaml.safe_load(found["STS12.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.dataset_revision) == ("mteb/sts12-sts", "STS12", "abc")
    assert (entry.value, entry.notes, entry.source_name) == (2.5, "k = 3, dtype = float16", f"mteb {mteb.__version__}")
    english = row | {"task": "STS17", "dataset": "mteb/sts17", "subsets": ["en-en"]}
    some = english | {"task": "STS22.v2", "subsets": ["en", "de"]}  # the Hub has no name for these together
    found = report.hub_entries([english, some], {}, 3)
    assert list(found) == ["STS17.yaml"]
    assert yaml.safe_load(found["STS17.yaml"])[0]["dataset"]["task_id"] == "STS17_en-en_test"
    static = report.hub_entries([row | {"scores": {"None": 4.5}}], {}, None)["STS12.yaml"]
    assert yaml.safe_load(static)[0]["value"] == 4.5 and "notes" not in yaml.safe_load(static)[0]
    monkeypatch.setattr(report, "huggingface_hub", SimpleNamespace())  # an older one
    assert report.hub_entries(rows, {}, 3) == {}


def test_registry_entry_of_mteb(evaluated, model_folder, data_folder, embed):
    """It is valid to mteb, and mteb's own loader makes of it the model that was evaluated."""
    meta = registered(evaluated.out)
    assert isinstance(meta, ModelMeta) and meta.name == "local/tiny" and meta.experiment_kwargs is None
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.languages) == (32, 64, "mit", ["eng-Latn"])
    assert meta.n_parameters == sum(p.numel() for p in load(model_folder)[0].parameters())
    assert ModelMeta.model_validate(meta.model_dump()) == meta
    json.dumps(meta.to_dict(), default=str)

    here = meta.model_copy(update={"name": str(model_folder), "revision": None})
    model = here.load_model(device="cpu")
    inputs = torch.utils.data.DataLoader(Dataset.from_dict({"text": ["a boat"]}))
    where = {"hf_split": "test", "hf_subset": "default"}
    found = model.encode(inputs, task_metadata=mteb.get_task("STS12").metadata, **where)
    np.testing.assert_allclose(found[0], embed("a boat", INSTRUCTIONS["sts"], 3), atol=2e-6)
    other = here.load_model(device="cpu", config_kwargs={"num_steps": 1})
    found = other.encode(inputs, task_metadata=mteb.get_task("STS12").metadata, **where)
    np.testing.assert_allclose(found[0], embed("a boat", INSTRUCTIONS["sts"], 1), atol=2e-6)
    assert other.mteb_model_meta.experiment_name != model.mteb_model_meta.experiment_name


def test_table_9_rows_of_followir(tmp_path, monkeypatch):
    """mteb's p-MRR, and the score that the paper's table has."""
    [task] = choose_tasks(["Core17InstructionRetrieval"], None)
    meta = ModelMeta.create_empty({"name": "some/model", "revision": "1"})
    subject, cache = Subject(meta, {}, [1], None, {"query": "q: "}, "{instruction}", 1), Results(tmp_path)
    values = {"main_score": 0.05, "p-MRR": 0.05, "og": {"map_at_1000": 0.21}, "changed": {"map_at_1000": 0.1}}
    result = mteb.TaskResult.from_task_results(task, {"test": {"default": values}}, evaluation_time=1)
    cache.save_to_cache(result, subject.meta_at(1))
    cache.add(task, subject, 1)
    rows = evaluate_gircse.collect(task, subject, cache)
    assert [(row["metric"], row["scores"]) for row in rows] == [("p-MRR", {"1": 5.0}), ("map_at_1000", {"1": 21.0})]
    assert report.means(rows) == {"InstructionReranking (1)": {"1": 5.0}}


def test_scores_of_other_languages_in_the_cache_are_left_out(tmp_path):
    meta = ModelMeta.create_empty({"name": "some/model", "revision": "1"})
    subject, cache = Subject(meta, {}, [1], None, {}, "{instruction}", 1), Results(tmp_path)
    [whole] = choose_tasks(["STS17"], None)
    values = {subset: {"main_score": 0.9 if subset == "en-en" else 0.1} for subset in whole.hf_subsets}
    result = mteb.TaskResult.from_task_results(whole, {"test": values}, evaluation_time=1)
    cache.save_to_cache(result, subject.meta_at(1))
    cache.add(whole, subject, 1)
    [task] = [task for task in choose_tasks(["mteb"], None) if task.metadata.name == "STS17"]
    [row] = evaluate_gircse.collect(task, subject, cache)
    assert (row["scores"], row["subsets"]) == ({"1": 90.0}, ["en-en"])
    [row] = evaluate_gircse.collect(whole, subject, cache)
    assert row["scores"]["1"] == pytest.approx(10 + 80 / len(values), abs=0.01)


def test_registry_entry_trusts_what_needs_it(evaluated, static_folder, data_folder, tmp_path):
    assert registered(evaluated.out).loader_kwargs == {"trust_remote_code": True}
    for options, expected in [((), {}), (("--trust_remote_code",), {"trust_remote_code": True})]:
        run(static_folder, tmp_path / str(len(options)), *options, data=data_folder, tasks=["sts_pairs"])
        assert registered(tmp_path / str(len(options))).loader_kwargs == expected


def test_unequal_steps_of_both_sides(evaluated, model_folder, data_folder, tmp_path, monkeypatch):
    """Equal ones have the evaluation's score; a shortlist of everything finds what the largest k does."""
    monkeypatch.setattr(unequal_steps, "STEPS", [1, 3])
    output = tmp_path / "unequal.json"
    arguments = ["--model", str(model_folder), "--tasks", "local", "--data", str(data_folder), "--batch_size", "4"]
    monkeypatch.setattr("sys.argv", ["unequal_steps.py", *arguments, "--output", str(output), "--shortlist", "100"])
    unequal_steps.main()
    (task, found), *others = json.loads(output.read_text())["tasks"].items()
    assert not others
    expected = scores(evaluated.report)[task]
    assert set(found["ndcg_at_10"]) == {"1 in 1", "3 in 1", "1 in 3", "3 in 3"}
    assert {k: found["ndcg_at_10"][f"{k} in {k}"] for k in "13"} == pytest.approx(expected)
    assert found["coarse_to_fine"]["ndcg_at_10"] == found["ndcg_at_10"]["3 in 3"]
    assert found["coarse_to_fine"]["relevant_in_shortlist"] == found["coarse_to_fine"]["documents_rescored"] == 100


def test_several_vectors_of_a_text(evaluated, model_folder, data_folder, tmp_path, monkeypatch):
    """The mean has the evaluation's score; one vector is its own mean, several are not."""
    monkeypatch.setattr(several_vectors, "STEPS", [1, 3])
    output = tmp_path / "several.json"
    arguments = ["--model", str(model_folder), "--tasks", "local", "--data", str(data_folder), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["several_vectors.py", *arguments, "--output", str(output)])
    several_vectors.main()
    [(task, found)] = json.loads(output.read_text())["ndcg_at_10"].items()
    assert found["mean"] == pytest.approx(scores(evaluated.report)[task])
    assert found["maxsim"]["1"] == found["mean"]["1"]


def test_maxsim_is_the_sum_over_the_querys_vectors_of_their_best(model_folder, embed):
    model, processor = load(model_folder)
    encoder = several_vectors.MultiVectorEncoder(modules=[several_vectors.GeneratedStates(model.eval(), processor)])
    query, document = encoder.encode(["cold", "a red thing"], k=3)
    assert query.shape == document.shape == (3, model.config.hidden_size)
    expected = (query @ document.T).max(1).values.sum()
    torch.testing.assert_close(encoder.similarity([query], [document])[0, 0], expected)
    mean = torch.nn.functional.normalize(model(**processor(["cold"]), k=3).step_states[0].mean(0), dim=0)
    torch.testing.assert_close(mean.detach(), torch.tensor(embed("cold", None, 3)))
