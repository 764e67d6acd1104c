"""The evaluation script: local files as mteb tasks, all k from one pass, results that never mix, what is missing said
first, resuming, other models, and what is written for the card and for mteb's registry."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas
import pytest
import torch

mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from mteb.abstasks import AbsTaskClassification, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sklearn.metrics import average_precision_score
from transformers import AutoTokenizer

import evaluate_gircse
from conftest import ROOT, text_config
from evaluate_gircse import choose_tasks, main, unavailable
from gircse.evaluation import report, subjects
from gircse.evaluation.subjects import StepEncoder, Subject, Vectors
from gircse.evaluation.tasks import INSTRUCTIONS, LocalTriplets, local_tasks
from gircse.loading import load
from gircse.training.arguments import ModelArguments
from gircse.training.publishing import export
from test_sentence_transformers import make_processor

try:
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.models import StaticEmbedding

PAIRS = [
    ("a boat on the lake", "a ship on the water", 4.0, 1),
    ("the oven is hot", "snow falls all night", 0.2, 0),
    ("she paints a fence", "a woman paints the fence", 4.8, 1),
    ("two cats sleep", "a dog barks at the moon", 1.0, 0),
    ("he lost his keys", "his keys are gone", 4.2, 1),
    ("the train was late", "bread needs yeast", 0.0, 0),
    ("tea without sugar", "coffee with milk", 2.4, 0),
]
ANIMALS = ["cat", "horse"]
PLACES = ["kitchen", "garden"]
SCENES = [
    {"text": f"the {animal} {verb} in the {place}", "labels": {"animal": animal, "place": place}}
    for animal in ANIMALS
    for place in PLACES
    for verb in ("sleeps", "eats", "waits")
]
TRIPLETS = [
    ("the cat eats in the garden", "a cat in a kitchen", "a horse in a garden", "animal"),
    ("the cat eats in the garden", "a horse in a garden", "a cat in a kitchen", "place"),
    ("the horse sleeps in the kitchen", "a horse in a garden", "a cat in a kitchen", "animal"),
]
DOCUMENTS = [f"document {i}: {text}" for i, text in enumerate(sum(([a, b] for a, b, *_ in PAIRS), []))]
RELEVANT = {"q0": {"d0": 2, "d1": 1}, "q1": {"d3": 1}, "q2": {"d4": 1, "d9": 1}}
QUERIES = {"q0": "where do boats float", "q1": "what falls in winter", "q2": "who paints"}
FACETS = {"animal": "Identify the animal.", "place": "Identify the place."}
TASKS = {
    "classification_rooms": "accuracy",
    "clustering_rooms": "v_measure",
    "instruct_scenes-animal": "v_measure",
    "instruct_scenes-place": "v_measure",
    "instruct_scenes_triplets-animal": "accuracy",
    "instruct_scenes_triplets-place": "accuracy",
    "pairclass_pairs": "max_ap",
    "retrieval_little": "ndcg_at_10",
    "sts_pairs": "cosine_spearman",
}


def write(path: Path, rows: list[dict]) -> None:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_data(folder: Path) -> Path:
    folder.mkdir()
    rooms = [{"text": row["text"], "label": row["labels"]["place"]} for row in SCENES]
    files = {
        "sts_pairs": [{"sentence1": a, "sentence2": b, "score": score} for a, b, score, _ in PAIRS],
        "pairclass_pairs": [{"sentence1": a, "sentence2": b, "label": label} for a, b, _, label in PAIRS],
        "classification_rooms_fit": rooms[::2],
        "classification_rooms_test": rooms[1::2],
        "clustering_rooms": rooms,
        "retrieval_little_queries": [{"_id": i, "text": text} for i, text in QUERIES.items()],
        "retrieval_little_corpus": [
            {"_id": f"d{i}", "title": "Titled" if i % 3 == 0 else "", "text": text} for i, text in enumerate(DOCUMENTS)
        ],
        "retrieval_little_qrels": [
            {"query-id": q, "corpus-id": d, "score": s} for q, found in RELEVANT.items() for d, s in found.items()
        ],
        "instruct_scenes": SCENES,
        "instruct_scenes_triplets": [
            {"anchor": a, "positive": p, "negative": n, "facet": facet} for a, p, n, facet in TRIPLETS
        ],
        "instruct_instructions": [
            {"dataset": "scenes", "facet": facet, "instruction": text} for facet, text in FACETS.items()
        ],
    }
    for stem, rows in files.items():
        write(folder / (f"{stem}.jsonl" if stem == "sts_pairs" else f"{stem}.jsonl.gz"), rows)
    return folder


def make_folder(gircse, folder: Path, seed: int = 2, suffix: str = "", **axes) -> Path:
    torch.manual_seed(seed)
    processor = make_processor(suffix=suffix)
    text = text_config("qwen2", vocab_size=len(processor.tokenizer), pad_token_id=0)
    config = gircse.GircseConfig(text_config=text, num_steps=3, **axes)
    export(gircse.GircseModel(config), processor, folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")
    return folder


class Passes:
    """Counts the texts that a block's runs embed, task by task, and keeps the batches' lengths."""

    def __init__(self, monkeypatch) -> None:
        self.texts, self.batches, self.largest_k = 0, [], []
        loader = subjects.load_subject

        def load(args):
            subject = loader(args)
            embed = subject.embed

            def counted(texts, prompt, side, steps):
                self.texts += len(texts)
                self.batches.append([len(text) for text in texts])
                self.largest_k.append(steps[-1])
                return embed(texts, prompt, side, steps)

            subject.embed = counted
            return subject

        monkeypatch.setattr(evaluate_gircse, "load_subject", load)


def run(folder: Path, out: Path, *options: str, data: Path | None = None, tasks=("local",), status: int = 0) -> dict:
    argv = ["--model", str(folder), "--tasks", *tasks, "--output_dir", str(out), "--device", "cpu", *options]
    assert main([*argv, "--data", str(data)] if data else argv) == status
    return json.loads((out / "results.json").read_text(encoding="utf-8")) if (out / "results.json").exists() else {}


def scores(report: dict) -> dict[str, dict[str, float]]:
    return {row["task"]: row["scores"] for row in report["tasks"]}


def result_files(out: Path) -> dict[str, Path]:
    return {f"{path.parent.name}/{path.stem}": path for path in out.rglob("*.json") if path.stem in TASKS}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("files") / "data")


@pytest.fixture(scope="module")
def folder(gircse, tmp_path_factory) -> Path:
    return make_folder(gircse, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def evaluated(folder, data, tmp_path_factory) -> SimpleNamespace:
    """All local tasks at k = 1 and 3."""
    out = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as monkeypatch:
        passes = Passes(monkeypatch)
        report = run(folder, out, "--k", "3", "1", "--batch_size", "4", data=data)
    return SimpleNamespace(out=out, report=report, passes=passes)


@pytest.fixture(scope="module")
def embed(folder):
    """(d,) of one text, embedded alone."""
    model, processor = load(folder)

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

    pairs = json.loads(result_files(evaluated.out)[f"k_{k}/pairclass_pairs"].read_text(encoding="utf-8"))["scores"][
        "test"
    ][0]
    precision = average_precision_score([pair[3] for pair in PAIRS], cosines)  # the two instructions are the same
    assert pairs["cosine_ap"] == pytest.approx(precision, abs=1e-5)
    assert found["pairclass_pairs"] == pytest.approx(100 * pairs["max_ap"], abs=0.01)

    texts = [("Titled " if i % 3 == 0 else "") + text for i, text in enumerate(DOCUMENTS)]
    documents = np.stack([embed(text, None, k) for text in texts])
    gains = []
    for query, relevant in RELEVANT.items():
        order = np.argsort(-documents @ embed(QUERIES[query], INSTRUCTIONS["retrieval"], k))[:10]
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


def test_a_sample_has_the_same_rows_each_time_and_is_filed_apart(data, folder, tmp_path):
    def loaded() -> dict[str, object]:
        tasks = {task.metadata.name: task for task in local_tasks(data, sample=2)}
        for task in tasks.values():
            task.load_data()
        return tasks

    first, again = loaded(), loaded()
    whole = {task.metadata.name: task for task in local_tasks(data)}
    search = first["retrieval_little"].dataset["default"]["test"]
    judged = {document for grades in search["relevant_docs"].values() for document in grades}
    assert len(search["queries"]) == 2 == len(search["relevant_docs"]) and len(search["corpus"]) == len(judged) + 2
    assert judged < set(search["corpus"]["id"])
    assert search["relevant_docs"] == {query: RELEVANT[query] for query in search["queries"]["id"]}
    for name, task in first.items():
        assert task.metadata.revision == f"{whole[name].metadata.revision}-sample2"
        if name != "retrieval_little":
            rows = {split: part.to_list() for split, part in task.dataset.items()}
            to_fit = rows.get("train", [])  # as many as a classifier takes
            assert all(len(part) <= 2 or part is to_fit for part in rows.values())
            assert len(to_fit) > 2 or name != "classification_rooms"
            assert rows == {split: part.to_list() for split, part in again[name].dataset.items()}
    report = run(folder, tmp_path, "--k", "1", "--sample", "5", data=data, tasks=["sts_pairs"])
    assert report["settings"] == {"sample": 5} and report["tasks"][0]["revision"].endswith("-sample5")
    assert "of a sample of 5 rows of each task" in (tmp_path / "results.md").read_text(encoding="utf-8")
    for tasks, sample in ((["sts_pairs"], "1"), (["sts_pairs", "STS12"], "5")):
        with pytest.raises(ValueError, match=f"sample={sample} must be at least 2, and is for local tasks alone"):
            main(["--tasks", *tasks, "--data", str(data), "--sample", sample])


def test_a_tie_of_a_triplet_is_no_success(data):
    [task] = [task for task in local_tasks(data) if task.metadata.name == "instruct_scenes_triplets-animal"]
    assert isinstance(task, LocalTriplets)
    meta = ModelMeta.create_empty()
    constant = Subject(meta, {}, [None], lambda texts, *_: np.ones((len(texts), 1, 4)), {}, "{instruction}", None)
    with Vectors(constant, [None], 8) as vectors:
        result = mteb.evaluate(StepEncoder(vectors, None), task, cache=None, co2_tracker=False)
    assert result.task_results[0].get_score() == 0
    assert task.metadata.name == "instruct_scenes_triplets-animal"  # mteb unloads tasks, which must keep their name


# Files and values ---------------------------------------------------------------------------------------------------


def write_as(path: Path, rows: list[dict]) -> None:
    """In the way of the file's ending; text files as Windows' editors write them, with blank lines."""
    table, ending = pandas.DataFrame(rows), path.suffix
    if ending == ".parquet":
        table.to_parquet(path)
    elif ending == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    elif ending in (".csv", ".tsv"):
        table.to_csv(
            path, sep={".csv": ",", ".tsv": "\t"}[ending], index=False, encoding="utf-8-sig", lineterminator="\r\n"
        )
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in rows)
        path.write_text(lines, encoding="utf-8-sig", newline="")


def read_task(folder: Path, name: str):
    [task] = [task for task in local_tasks(folder) if task.metadata.name == name]
    task.load_data()
    return task.dataset


@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_a_file_of_any_ending_holds_the_same_data(data, tmp_path, ending):
    names = ["classification_rooms", "clustering_rooms", "pairclass_pairs", "retrieval_little", "sts_pairs"]
    if ending not in (".csv", ".tsv"):  # which can't hold labels by facet
        names += ["instruct_scenes-animal", "instruct_scenes_triplets-place"]
    for path in data.iterdir():
        if path.name.startswith("instruct") and ending in (".csv", ".tsv"):
            continue
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        write_as(tmp_path / f"{path.name.partition('.')[0]}{ending}", rows)
    assert [task.metadata.name for task in local_tasks(tmp_path) if task.metadata.name in names] == sorted(names)

    def plain(dataset):
        if isinstance(dataset, dict) and "default" in dataset:  # retrieval
            split = dataset["default"]["test"]
            return [split["queries"].to_list(), split["corpus"].to_list(), split["relevant_docs"]]
        return {split: rows.to_list() for split, rows in dataset.items()}

    for name in names:
        assert plain(read_task(tmp_path, name)) == plain(read_task(data, name)), name


def write_search(folder: Path, queries: list[dict], corpus: list[dict], judgements: str) -> Path:
    """BEIR's layout."""
    write(folder / "retrieval_x_queries.jsonl", queries)
    write(folder / "retrieval_x_corpus.jsonl", corpus)
    (folder / "retrieval_x_qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judgements}", encoding="utf-8")
    return folder


SEARCHED = [{"_id": i, "text": text} for i, text in enumerate(("first", "second", "third", "fourth"))]


def scored(folder: Path, vectors: dict[str, tuple[float, float]]) -> dict[str, float]:
    """mteb's scores of `retrieval_x` if each text has the given vector."""
    [task] = local_tasks(folder)
    embed = lambda texts, *_: np.array([[vectors[text]] for text in texts], np.float32)  # noqa: E731
    subject = Subject(ModelMeta.create_empty(), {}, [None], embed, {}, "{instruction}", None)
    with Vectors(subject, [None], 8) as made:
        result = mteb.evaluate(StepEncoder(made, None), task, cache=None, co2_tracker=False)
    return result.task_results[0].scores["test"][0]


def test_beirs_layout_has_the_score_that_it_has_by_hand(tmp_path, capsys):
    """Ids are numbers in one file and text in the other. Ranked for `ask`: first (0), second (1), third (2)."""
    queries = [{"_id": "7", "text": "ask"}, {"_id": 8, "text": "all are wrong"}, {"_id": 9, "text": "not judged"}]
    folder = write_search(tmp_path, queries, SEARCHED, "7\t1\t1\n7\t2\t2\n7\t0\t0\n8\t3\t0\n")
    vectors = {"ask": (1, 0), "first": (1, 0), "second": (0.8, 0.6), "third": (0.6, 0.8), "fourth": (0, 1)}
    gain, ideal = 0 + 1 / np.log2(3) + 2 / np.log2(4), 2 + 1 / np.log2(3)
    assert scored(folder, vectors)["ndcg_at_10"] == pytest.approx(
        gain / ideal, abs=1e-5
    )  # 0.6199, not halved or a third
    assert "2 of 3 queries have no relevant document and are left out: '8', '9'\n" in capsys.readouterr().out


def test_a_document_may_be_a_title_alone(tmp_path):
    corpus = [{"_id": "d0", "title": "Titled", "text": ""}, {"_id": "d1", "title": None, "text": "texted"}]
    folder = write_search(tmp_path, [{"_id": "q", "text": "ask"}], corpus, "q\td0\t1\n")
    texts = [(row["title"], row["text"]) for row in read_task(folder, "retrieval_x")["default"]["test"]["corpus"]]
    assert texts == [("Titled", ""), ("", "texted")]
    write(folder / "retrieval_x_corpus.jsonl", [*corpus, {"_id": "d2", "title": "", "text": ""}])
    with pytest.raises(ValueError, match=r"corpus.jsonl:3: text and title are empty: write one or remove the row"):
        read_task(folder, "retrieval_x")


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        (
            "q\t0\t0.5\n",
            "qrels.tsv: row 1: score='0.5' must be a whole number, from 1 on for what is relevant: rewrite",
        ),
        ("q\t0\t1\nq\t1\tnan\n", "qrels.tsv: row 2: score='nan' must be a finite number: correct the row or remove it"),
        ("q\t0\t\n", "qrels.tsv: row 1: score=None must be a finite number"),
        ("q\t0\thigh\n", "qrels.tsv: row 1: score='high' must be a finite number"),
        ("p\t0\t1\n", "row 1: query-id='p' is no _id of retrieval_x_queries.jsonl: add it there or remove the judg"),
        ("q\t0\t1\nq\t00\t1\n", "row 2: corpus-id='00' is no _id of retrieval_x_corpus.jsonl: add it there or remove"),
        ("q\t0\t1\nq\t0\t2\n", "row 2: query-id='q', corpus-id='0' has been judged before, with score=1: keep one of"),
        ("q\t0\t0\nq\t1\t-1\n", "qrels.tsv: no score is 1 or more, so that no document is relevant"),
        ("", "qrels.tsv has no rows"),
    ],
)
def test_wrong_judgements_are_refused(tmp_path, judgements, message):
    folder = write_search(tmp_path, [{"_id": "q", "text": "ask"}], SEARCHED, judgements)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_task(folder, "retrieval_x")


@pytest.mark.parametrize("role", ["queries", "corpus"])
def test_an_id_that_comes_twice_is_refused_also_as_a_number(tmp_path, role):
    rows = {"queries": [{"_id": "1", "text": "ask"}], "corpus": SEARCHED[1:]}
    rows[role].append({"_id": 1, "text": "other"})
    folder = write_search(tmp_path, rows["queries"], rows["corpus"], "1\t1\t1\n")
    with pytest.raises(
        ValueError, match=rf"retrieval_x_{role}.jsonl:\d: _id='1' has been given before: each row needs"
    ):
        read_task(folder, "retrieval_x")


GOOD = {
    "sts_x": {"sentence1": "a", "sentence2": "b", "score": 1},
    "pairclass_x": {"sentence1": "a", "sentence2": "b", "label": 1},
    "clustering_x": {"text": "a", "label": "l"},
    "classification_x_fit": {"text": "a", "label": "l"},
}


@pytest.mark.parametrize(
    ("stem", "field", "value", "message"),
    [
        ("sts_x", "score", None, "must be a finite number: correct the row or remove it"),
        ("sts_x", "score", float("nan"), "must be a finite number"),
        ("sts_x", "score", float("inf"), "must be a finite number"),
        ("sts_x", "score", "4,2", "must be a finite number"),
        ("sts_x", "score", True, "must be a finite number"),
        ("sts_x", "sentence1", " ", "must be text, and not empty: correct the row or remove it"),
        ("sts_x", "sentence2", 3, "must be text, and not empty"),
        ("sts_x", "sentence2", "half \ud83d", "has half a character (a lone surrogate): write the text anew or remove"),
        ("pairclass_x", "label", None, "must be 0 or 1: correct the row or remove it"),
        ("pairclass_x", "label", 2, "must be 0 or 1"),
        ("pairclass_x", "label", "yes", "must be 0 or 1"),
        ("pairclass_x", "sentence1", None, "must be text, and not empty"),
        ("clustering_x", "label", None, "must be text, a whole number, true or false: correct the row or remove it"),
        ("clustering_x", "label", ["l"], "must be text, a whole number, true or false"),
        ("clustering_x", "label", 0.5, "must be text, a whole number, true or false"),
        ("classification_x_fit", "label", None, "must be text, a whole number, true or false"),
        ("classification_x_fit", "text", "", "must be text, and not empty"),
    ],
)
def test_wrong_values_are_refused_with_their_place(tmp_path, stem, field, value, message):
    write(tmp_path / f"{stem}.jsonl", [GOOD[stem], {**GOOD[stem], field: value}])
    write(tmp_path / "classification_x_test.jsonl", [GOOD["classification_x_fit"]])
    expected = f"{tmp_path / stem}.jsonl:2: {field}={value!r} {message}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        read_task(tmp_path, stem.removesuffix("_fit"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{no json", ":3: broken JSON"),
        ("3", ":3: a row must be a JSON object with named fields, not 3"),
        ('{"text": "a"}', ":3: there is no label, but text: add it or rename one"),
        ('{"text": "b", "label": "l"}', ": label is 'l' in all rows: at least two different ones are needed"),
    ],
)
def test_broken_rows_and_nothing_to_score_are_named(tmp_path, line, message):
    (tmp_path / "clustering_x.jsonl").write_text('{"text": "a", "label": "l"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"clustering_x.jsonl{message}")):
        read_task(tmp_path, "clustering_x")


def test_labels_are_compared_as_text(tmp_path):
    """And those of pairs may be numbers, text or booleans."""
    labels = [0, "0", False, "False", 0.0, 1, "1", True, "true", 1.0]
    write(tmp_path / "pairclass_x.jsonl", [{**GOOD["pairclass_x"], "label": label} for label in labels])
    assert read_task(tmp_path, "pairclass_x")["test"]["labels"] == [0] * 5 + [1] * 5
    write(tmp_path / "classification_x_fit.jsonl", [{"text": "a", "label": label} for label in (7, "8", True, 9.0)])
    (tmp_path / "classification_x_test.csv").write_text("text;label\na;7\nb;8\nc;true\nd;9\n")
    dataset = read_task(tmp_path, "classification_x")
    assert dataset["train"]["label"] == dataset["test"]["label"] == [0, 1, 3, 2]
    (tmp_path / "classification_x_test.csv").write_text("text;label\na;7\nb;eight\n")
    message = "classification_x_test.csv: row 2: label='eight' is on no text of classification_x_fit.jsonl, so no class"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_task(tmp_path, "classification_x")


def test_two_files_of_one_part_of_a_task_are_refused(tmp_path):
    for name in ("sts_x.jsonl", "sts_x.csv.gz", "notes.json", "notes.csv"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        ValueError, match=re.escape("has both sts_x.csv.gz and sts_x.jsonl: remove or rename one of them")
    ):
        local_tasks(tmp_path)
    (tmp_path / "sts_x.csv.gz").unlink()
    assert [task.metadata.name for task in local_tasks(tmp_path)] == ["sts_x"]


def test_facets(tmp_path):
    data = write_data(tmp_path / "data")
    (data / "instruct_scenes.jsonl.gz").unlink()
    rows = [*SCENES, {"text": "a dog", "labels": {"animal": "dog", "place": None}}]
    write(data / "instruct_scenes.jsonl", rows)
    assert read_task(data, "instruct_scenes-animal")["test"]["labels"][-1] == "dog"
    assert len(read_task(data, "instruct_scenes-place")["test"]) == len(
        SCENES
    )  # no label of this facet: not in its task
    write(data / "instruct_scenes.jsonl", [{**row, "labels": str(row["labels"])} for row in rows])
    with pytest.raises(
        ValueError, match=r"scenes.jsonl:1: labels=.+ must be an object, \{facet: label, ..\}; a table can"
    ):
        read_task(data, "instruct_scenes-place")
    write(data / "instruct_scenes.jsonl", [{"text": "a", "labels": {"animal": "cat"}}])
    with pytest.raises(ValueError, match="no row has a label of facet 'place', which instruct_instructions names"):
        read_task(data, "instruct_scenes-place")
    (data / "instruct_instructions.jsonl.gz").unlink()
    given = {"dataset": "scenes", "facet": "place", "instruction": "Identify the place."}
    for second, message in [
        (given, ":2: dataset='scenes' has an instruction for facet='place' before: keep one"),
        ({**given, "facet": "in/out"}, ":2: facet='in/out' is part of a file's name, which can't hold any of"),
    ]:
        write(data / "instruct_instructions.jsonl", [given, second])
        with pytest.raises(ValueError, match=re.escape(f"instruct_instructions.jsonl{message}")):
            local_tasks(data)


# All k from one pass ------------------------------------------------------------------------------------------------


def test_scores_of_one_pass_are_those_of_an_evaluation_of_one_k(evaluated, folder, data, tmp_path, monkeypatch):
    passes = Passes(monkeypatch)
    alone = run(folder, tmp_path, "--k", "3", "--batch_size", "7", data=data)
    assert scores(alone) == {name: {"3": values["3"]} for name, values in scores(evaluated.report).items()}
    assert passes.texts == evaluated.passes.texts  # a second k costs no pass
    assert set(evaluated.passes.largest_k) == {3}


def test_each_text_is_embedded_once(evaluated):
    """Under its prompt and in its task: SCENES 12 texts, in four tasks; pairs 14, in two; triplets 2 x 3 and 3."""
    distinct = 12 + 12 + 2 * 12 + 2 * 14 + len(DOCUMENTS) + len(QUERIES) + 4 + 3
    assert evaluated.passes.texts == distinct


def test_batches_are_of_like_length(evaluated):
    assert max(map(len, evaluated.passes.batches)) == 4
    assert all(lengths == sorted(lengths, reverse=True) for lengths in evaluated.passes.batches)


def test_vectors_are_those_of_separate_calls(folder, embed):
    args = evaluate_gircse.parse(["--model", str(folder), "--tasks", "STS12", "--k", "1", "2", "5", "--device", "cpu"])
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


def test_other_weights_data_and_settings_are_evaluated_anew(gircse, evaluated, folder, tmp_path, monkeypatch):
    """Under the same folder name, file name and k."""
    out, data = tmp_path / "out", write_data(tmp_path / "data")
    passes = Passes(monkeypatch)

    def texts(model: Path, *options: str) -> int:
        before = passes.texts
        run(model, out, "--k", "3", *options, data=data, tasks=["sts_pairs"])
        return passes.texts - before

    assert texts(folder) == 14
    first = scores(json.loads((out / "results.json").read_text(encoding="utf-8")))
    assert texts(folder) == 0  # nothing to do
    other = make_folder(gircse, tmp_path / "tiny", seed=1)
    assert texts(other) == 14
    assert scores(json.loads((out / "results.json").read_text(encoding="utf-8"))) != first
    assert texts(folder, "--max_length", "8") == 14
    assert texts(folder) == 0
    assert scores(json.loads((out / "results.json").read_text(encoding="utf-8"))) == first
    rows = [json.loads(line) for line in (data / "sts_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    write(data / "sts_pairs.jsonl", [{**row, "score": 5 - row["score"]} for row in rows])
    assert texts(folder) == 14
    assert (
        scores(json.loads((out / "results.json").read_text(encoding="utf-8")))["sts_pairs"]["3"]
        == -first["sts_pairs"]["3"]
    )


# What is missing ----------------------------------------------------------------------------------------------------


def test_missing_data_is_named_before_the_model_loads(folder, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data")
    (data / "retrieval_little_qrels.jsonl.gz").unlink()
    (data / "classification_rooms_fit.jsonl.gz").unlink()
    loader, said = subjects.load_subject, []
    monkeypatch.setattr(
        evaluate_gircse, "load_subject", lambda args: said.append(capsys.readouterr().out) or loader(args)
    )
    names = ["sts_pairs", "retrieval_little", "classification_rooms", "STS12"]
    report = run(folder, tmp_path / "out", "--k", "1", data=data, tasks=names)
    assert "1 of 4 data sets can be had" in said[0]
    for line in (
        "not retrieval_little: there is no retrieval_little_qrels that ends in one of .jsonl .ndjson .json .csv .tsv ",
        "not classification_rooms: there is no classification_rooms_fit that ends in one of ",
        "not STS12: mteb/sts12-sts: ",
    ):
        assert line in said[0]
    assert list(scores(report)) == ["sts_pairs"]
    assert set(report["not_evaluated"]) == set(names[1:])
    assert "STS12 was not evaluated" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_no_data_at_all_is_an_error(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_gircse, "load_subject", lambda args: pytest.fail("no data, no model"))
    run(folder, tmp_path, tasks=["STS12"], status=1)
    assert "0 of 1 data sets" in capsys.readouterr().out


def test_data_of_the_hub(monkeypatch, tmp_path):
    """Had if the Hub says so and lets this user in, or if it is in the cache."""
    task = mteb.get_task("STS12")

    def gone(self, path, **kwargs):
        raise HfHubHTTPError("404, no such thing", response=SimpleNamespace(headers={}, request=None, status_code=404))

    monkeypatch.setattr(evaluate_gircse.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "dataset_info", gone)
    assert list(unavailable([task])) == ["STS12"]
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, path, revision, timeout: SimpleNamespace(gated=False))
    assert unavailable([task]) == {}
    monkeypatch.setattr(HfApi, "dataset_info", lambda self, path, revision, timeout: SimpleNamespace(gated="manual"))
    monkeypatch.setattr(HfApi, "auth_check", gone)
    assert list(unavailable([task])) == ["STS12"]
    metadata = task.metadata.dataset
    snapshot = tmp_path / f"datasets--{metadata['path'].replace('/', '--')}" / "snapshots" / metadata["revision"]
    snapshot.mkdir(parents=True)
    assert unavailable([task]) == {}


def test_names_of_tasks(data):
    def names(*chosen):
        return [task.metadata.name for task in choose_tasks(chosen, data)]

    assert names("local") == sorted(TASKS)
    assert names("sts_pairs", "local", "STS12")[-1] == "STS12" and len(names("sts_pairs", "local")) == len(TASKS)
    assert len(names("mteb")) == 41 and len(names("nanobeir")) == 13
    assert set(names("followir")) == set(evaluate_gircse.TABLE_9)
    assert len(names("CQADupstackRetrieval")) == 12  # the parts of a task that only gathers others
    for chosen in (["mteb", "STS17"], ["mteb"]):  # the languages are those of what comes first
        [task] = [task for task in choose_tasks(chosen, None) if task.metadata.name == "STS17"]
        assert task.hf_subsets == ["en-en"]
    with pytest.raises(ValueError, match="'STS99' is none of mteb's or of"):
        names("STS99")
    with pytest.raises(ValueError, match="'local' needs data"):
        choose_tasks(["local"], None)
    with pytest.raises(ValueError, match="no folder"):
        choose_tasks(["local"], str(data / "nowhere"))


def test_a_data_set_without_instruction_is_named(tmp_path):
    data = write_data(tmp_path / "data")
    write(data / "instruct_others.jsonl", SCENES)
    with pytest.raises(ValueError, match="instruct_others.jsonl: instruct_instructions has no instruction"):
        local_tasks(data)


# Interruption -------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(evaluated, folder, data, tmp_path, monkeypatch):
    names = ["sts_pairs", "retrieval_little", "instruct_scenes_triplets-place"]
    encode = StepEncoder.encode

    def interrupted(self, inputs, *, task_metadata, **kwargs):
        if task_metadata.name == names[1] and self.k == 3:
            raise KeyboardInterrupt
        return encode(self, inputs, task_metadata=task_metadata, **kwargs)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(StepEncoder, "encode", interrupted)
        run(folder, tmp_path, "--k", "1", "3", data=data, tasks=names)
    done = result_files(tmp_path)
    assert set(done) == {"k_1/sts_pairs", "k_3/sts_pairs", "k_1/retrieval_little"}
    assert list(scores(json.loads((tmp_path / "results.json").read_text(encoding="utf-8")))) == names[:1]
    done["k_1/sts_pairs"].write_text(
        done["k_1/sts_pairs"].read_text(encoding="utf-8")[:100]
    )  # as if killed while writing
    kept = done["k_3/sts_pairs"].stat().st_mtime_ns

    passes = Passes(monkeypatch)
    report = run(folder, tmp_path, "--k", "1", "3", data=data, tasks=names)
    assert scores(report) == {name: scores(evaluated.report)[name] for name in names}
    assert passes.texts == 14 + len(DOCUMENTS) + len(QUERIES) + 3
    assert done["k_3/sts_pairs"].stat().st_mtime_ns == kept


def test_a_task_that_fails_takes_no_other_along(folder, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    (data / "pairclass_pairs.jsonl.gz").unlink()
    write(data / "pairclass_pairs.jsonl", [{"sentence1": "a"}])
    report = run(folder, tmp_path / "out", "--k", "1", data=data, tasks=["pairclass_pairs", "sts_pairs"], status=1)
    assert list(scores(report)) == ["sts_pairs"]
    reason = "pairclass_pairs.jsonl:1: there is no sentence2, but sentence1: add it or rename one"
    assert reason in report["not_evaluated"]["pairclass_pairs"]


def test_a_log_says_what_is_being_done(folder, data, tmp_path, monkeypatch, capsys):
    """It is no terminal, so that it gets no bar but a line from time to time; here before every batch."""
    monkeypatch.setattr(subjects, "SECONDS_BETWEEN_LINES", -1)
    batches = ["  embedding 7 texts", "  0 of 2 batches", "  1 of 2 batches"]
    for scored in ([*["  reading its data", "  evaluating k = 1"], *batches, *batches, "  evaluating k = 3"], []):
        run(folder, tmp_path, "--k", "1", "3", "--batch_size", "5", data=data, tasks=["sts_pairs"])
        said = capsys.readouterr()
        start = ["looking for the data of 1 tasks, here and on the Hub", "1 of 1 data sets can be had"]
        start += [f"loading {folder}", "[1/1] sts_pairs", *(scored or ["  has been evaluated before"])]
        assert said.out.splitlines()[: len(start) + 1] == [*start, ""]
        assert "batches:" not in said.err


# Other models -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def static(tmp_path_factory) -> Path:
    """A Sentence Transformers model of another kind."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True).backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.prompts = {"STS": "compare: ", "query": "query: ", "document": "passage: "}
    path = tmp_path_factory.mktemp("static") / "model"
    model.save_pretrained(str(path))
    return path


def test_any_sentence_transformers_model(static, data, tmp_path):
    names = ["sts_pairs", "retrieval_little", "clustering_rooms"]
    report = run(static, tmp_path, data=data, tasks=names)
    model = SentenceTransformer(str(static), device="cpu")
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
    report = run(static, tmp_path, "--prompt_template", template, data=data, tasks=names)
    prompts = {row["task"]: row["prompts"] for row in report["tasks"]}
    assert prompts["sts_pairs"] == {"both": f"Task: {INSTRUCTIONS['sts']}\nText: "}
    assert scores(report)["sts_pairs"]["None"] != pytest.approx(expected, abs=0.01)


def test_a_template_is_read_as_training_reads_it():
    """A shell's quotes leave a line break, a tab and a backslash as two characters each."""
    typed = r"Instruct: {instruction}\n\tQuery\\: "
    args = evaluate_gircse.parse(["--tasks", "STS12", "--prompt_template", typed])
    assert args.prompt_template == "Instruct: {instruction}\n\tQuery\\: "
    assert args.prompt_template == ModelArguments(prompt_template=typed).prompt_template


def test_prompts_that_only_the_registry_of_mteb_has(static, data, tmp_path, monkeypatch, capsys):
    """As it has those of E5; a model's own go before them, and having none at all is said."""
    name, own = (
        "intfloat/e5-base-v2",
        json.loads((static / "config_sentence_transformers.json").read_text(encoding="utf-8")),
    )
    bare = shutil.copytree(static, tmp_path / "bare")
    empty = {**own, "prompts": {"query": "", "document": ""}}
    (bare / "config_sentence_transformers.json").write_text(json.dumps(empty))

    def prompts(model: Path, *options: str) -> tuple[dict, bool]:
        report = run(model, tmp_path / "out", *options, data=data, tasks=["retrieval_little"])
        [row] = report["tasks"]
        return row["prompts"], "has no prompts, nor has mteb's registry any" in capsys.readouterr().out

    passes = Passes(monkeypatch)
    assert prompts(bare) == ({"query": "", "document": ""}, True)
    assert prompts(bare, "--model_name", name) == ({"query": "query: ", "document": "passage: "}, False)
    assert registered(tmp_path / "out").loader_kwargs["model_prompts"] == {"query": "query: ", "document": "passage: "}
    assert passes.texts == 2 * (len(DOCUMENTS) + len(QUERIES))
    assert prompts(bare, "--prompt_template", "{instruction} ")[0]["query"] == INSTRUCTIONS["retrieval"] + " "
    assert subjects.registry_prompts("jinaai/jina-embeddings-v3") == {}  # there they are names, not prefixes
    own["prompts"]["query"] = "ask: "
    (bare / "config_sentence_transformers.json").write_text(json.dumps(own))
    assert prompts(bare, "--model_name", name) == ({"query": "ask: ", "document": "passage: "}, False)


@pytest.mark.parametrize(
    ("axes", "suffix"),
    [({"pooling": "last"}, "<|endoftext|>"), ({"attention": "bidirectional"}, "")],
    ids=["Causal-EOS", "Bidirectional-Avg"],
)
def test_baselines(gircse, data, tmp_path, axes, suffix):
    folder = make_folder(gircse, tmp_path / "baseline", suffix=suffix, step_token="none", **axes)
    report = run(folder, tmp_path / "out", data=data, tasks=["sts_pairs"])
    model, processor = load(folder)
    left, right = (
        model.generate_embedding(**processor([pair[i] for pair in PAIRS], instruction=INSTRUCTIONS["sts"]))
        for i in (0, 1)
    )
    expected = 100 * spearmanr((left * right).sum(-1), [pair[2] for pair in PAIRS])[0]
    assert scores(report)["sts_pairs"] == {"None": pytest.approx(expected, abs=0.01)}


def test_learned_tokens_have_no_more_k_than_they_were_trained_with(gircse, data, tmp_path):
    folder = make_folder(gircse, tmp_path / "learned", step_token="learned")
    assert list(scores(run(folder, tmp_path / "out", data=data, tasks=["sts_pairs"]))["sts_pairs"]) == ["1", "3"]
    with pytest.raises(ValueError, match="from 1 to 3"):
        run(folder, tmp_path / "out", "--k", "5", data=data, tasks=["sts_pairs"])


def test_k_below_one_is_refused(folder, data, tmp_path):
    with pytest.raises(ValueError, match=r"k=\[0, 1\] must be from 1"):
        run(folder, tmp_path, "--k", "0", "1", data=data, tasks=["sts_pairs"])


def test_a_large_k_truncates_long_texts(folder):
    """They and the steps share the backbone's 128 positions; results of such a k are filed under that length."""

    def load_with(*k: str) -> Subject:
        return subjects.load_subject(
            evaluate_gircse.parse(["--model", str(folder), "--tasks", "STS12", "--device", "cpu", "--k", *k])
        )

    assert load_with("1", "64").settings == {}  # the processor's 64 tokens fit
    subject = load_with("1", "100")
    assert subject.settings == {"max_length": 28} and subject.meta.max_tokens == 28
    vectors = subject.embed(["x " * 500, "short"], "", None, subject.steps)
    model, processor = load(folder)
    for column, k in enumerate((1, 100)):
        expected = model.eval().generate_embedding(**processor(["x " * 500, "short"], max_length=28), k=k)
        np.testing.assert_allclose(vectors[:, column], expected.numpy(), atol=2e-6)
    with pytest.raises(ValueError, match="k=128 takes all positions of the backbone: choose k below 128"):
        load_with("128")


# Prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_of_the_tasks(folder, data):
    args = evaluate_gircse.parse(["--model", str(folder), "--tasks", "mteb", "--device", "cpu"])
    subject = subjects.load_subject(args)
    paper = json.loads((ROOT / "recipes/root_model/instructions.json").read_text(encoding="utf-8"))["mteb"]

    def prompt(name: str, side: str | None = None) -> str:
        [task] = choose_tasks([name], str(data))
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
    assert (
        prompt("retrieval_little", "query") == INSTRUCTIONS["retrieval"]
        and prompt("retrieval_little", "document") == ""
    )
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
    folder, monkeypatch, caplog, layout, metric, rows, instruction
):
    """And has no complaint about our prompts. Ours is the same."""
    expected = f"Instruct: {INSTRUCTIONS[instruction]}\nQuery: "
    task, prompts = made_up(layout, metric, rows), set()
    model = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
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
    args = evaluate_gircse.parse(["--model", str(folder), "--tasks", "mteb", "--device", "cpu"])
    assert subjects.load_subject(args).prompt(task.metadata, None) == expected


def test_all_published_prompts_have_names_that_mteb_takes(caplog):
    prompts = json.loads((ROOT / "config_sentence_transformers.json").read_text(encoding="utf-8"))["prompts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AbsEncoder.validate_task_to_prompt_name(prompts) == prompts
    assert caplog.records == []
    assert {"Banking77Classification", "STSBenchmark", "NQ-query", "query", "document"} <= set(prompts)  # of the README


def test_prompts_of_the_published_scores_are_those_of_today(data):
    """Those of the folders' tasks come from INSTRUCTIONS, whatever the model's prompts have for their types."""
    args = evaluate_gircse.parse(["--model", str(ROOT), "--tasks", "local", "--k", "1", "--device", "cpu"])
    subject = subjects.load_subject(args)
    for row in json.loads((ROOT / "results" / "root.json").read_text(encoding="utf-8"))["tasks"]:
        if not row["task"].startswith("instruct"):
            instruction = INSTRUCTIONS.get(row["task"], INSTRUCTIONS[row["task"].partition("_")[0]])
            prompt = instruction if "both" in row["prompts"] else {"query": instruction}
            metadata = SimpleNamespace(name=row["task"], type=row["type"], prompt=prompt, adapted_from=None)
            sides = {side: subject.prompt(metadata, None if side == "both" else side) for side in row["prompts"]}
            assert sides == row["prompts"], row["task"]


# What is written ----------------------------------------------------------------------------------------------------


def test_report(evaluated, folder):
    text = (evaluated.out / "results.md").read_text(encoding="utf-8")
    table = scores(evaluated.report)
    for name, values in table.items():
        assert f"| {name} | {TASKS[name]} | {values['1']:.2f} | {values['3']:.2f} |" in text
    assert "| task | metric | k = 1 | k = 3 |" in text
    assert f"python evaluate_gircse.py --model {folder}" in text and "mteb" in evaluated.report["versions"]
    assert (evaluated.out / "k_curve.png").read_bytes()[:4] == b"\x89PNG"
    card = ModelCard((evaluated.out / "card_metadata.yaml").read_text(encoding="utf-8"))
    found = {result.dataset_name: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {n: v["3"] for n, v in table.items()}
    assert found["sts_pairs"].metric_type == "cosine_spearman" and found["sts_pairs"].metric_name.endswith("(k = 3)")


def test_registry_entry_of_mteb(evaluated, folder, data, embed):
    """It is valid to mteb, and mteb's own loader makes of it the model that was evaluated."""
    meta = registered(evaluated.out)
    assert isinstance(meta, ModelMeta) and meta.name == "local/tiny" and meta.experiment_kwargs is None
    assert (meta.embed_dim, meta.max_tokens, meta.license, meta.languages) == (32, 64, "mit", ["eng-Latn"])
    assert meta.n_parameters == sum(p.numel() for p in load(folder)[0].parameters())
    assert ModelMeta.model_validate(meta.model_dump()) == meta
    json.dumps(meta.to_dict(), default=str)

    here = meta.model_copy(update={"name": str(folder), "revision": None})
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
    subject = Subject(meta, {}, [1], None, {"query": "q: "}, "{instruction}", 1)
    cache = mteb.ResultCache(tmp_path)
    values = {"main_score": 0.05, "p-MRR": 0.05, "og": {"map_at_1000": 0.21}, "changed": {"map_at_1000": 0.1}}
    result = mteb.TaskResult.from_task_results(task, {"test": {"default": values}}, evaluation_time=1)
    cache.save_to_cache(result, subject.meta_at(1))
    rows = evaluate_gircse.collect([task], subject, cache)
    assert [(row["metric"], row["scores"]) for row in rows] == [("p-MRR", {"1": 5.0}), ("map_at_1000", {"1": 21.0})]
    assert report.means(rows) == {"InstructionReranking (1)": {"1": 5.0}}


def test_scores_of_other_languages_in_the_cache_are_left_out(tmp_path):
    meta = ModelMeta.create_empty({"name": "some/model", "revision": "1"})
    subject, cache = Subject(meta, {}, [1], None, {}, "{instruction}", 1), mteb.ResultCache(tmp_path)
    [whole] = choose_tasks(["STS17"], None)
    values = {subset: {"main_score": 0.9 if subset == "en-en" else 0.1} for subset in whole.hf_subsets}
    result = mteb.TaskResult.from_task_results(whole, {"test": values}, evaluation_time=1)
    cache.save_to_cache(result, subject.meta_at(1))
    [task] = [task for task in choose_tasks(["mteb"], None) if task.metadata.name == "STS17"]
    [row] = evaluate_gircse.collect([task], subject, cache)
    assert (row["scores"], row["subsets"]) == ({"1": 90.0}, ["en-en"])
    [row] = evaluate_gircse.collect([whole], subject, cache)
    assert row["scores"]["1"] == pytest.approx(10 + 80 / len(values), abs=0.01)


def registered(out: Path) -> ModelMeta:
    names = {}
    exec((out / "model_meta.py").read_text(encoding="utf-8"), names)
    return names["model"]


def test_registry_entry_trusts_what_needs_it(evaluated, static, data, tmp_path):
    assert registered(evaluated.out).loader_kwargs == {"trust_remote_code": True}
    for options, expected in [((), {}), (("--trust_remote_code",), {"trust_remote_code": True})]:
        run(static, tmp_path / str(len(options)), *options, data=data, tasks=["sts_pairs"])
        assert registered(tmp_path / str(len(options))).loader_kwargs == expected


def test_nothing_is_trusted_unasked():
    for name in ("evaluate_gircse.py", "gircse/evaluation/tasks.py", "gircse/evaluation/report.py"):
        source = (ROOT / name).read_text(encoding="utf-8")
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
        monkeypatch.setattr(subjects, "file_of", lambda *_: None)
        assert subjects.model_meta(args, {}).revision == commit


def test_revision_of_a_folder_is_its_content(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert subjects.content_hash(copy) == subjects.content_hash(folder)
    (copy / "README.md").write_text("another card")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))  # evaluations name theirs
    assert subjects.content_hash(copy) == subjects.content_hash(folder)
    (copy / "config.json").write_text(json.dumps({**config, "num_steps": config["num_steps"] + 1}))
    assert subjects.content_hash(copy) != subjects.content_hash(folder)
    (copy / "config.json").write_text(json.dumps(config))
    settings = json.loads((copy / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    settings["prompts"]["STS12"] = "other"
    (copy / "config_sentence_transformers.json").write_text(json.dumps(settings))
    assert subjects.content_hash(copy) != subjects.content_hash(folder)


def test_published_scores_are_of_the_published_weights():
    if not (ROOT / "model.safetensors").exists():
        pytest.skip("the repo root holds no model.safetensors, so there is no published model")
    results = json.loads((ROOT / "results" / "root.json").read_text(encoding="utf-8"))
    assert results["revision"] == subjects.content_hash(ROOT)


def test_revision_of_an_adapter_only_folder_is_its_adapter_too(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "adapter": "lora"}))
    (copy / "lora").mkdir()
    hashes = set()
    for weights in (b"one", b"two"):
        (copy / "lora" / "adapter_model.safetensors").write_bytes(weights)
        hashes.add(subjects.content_hash(copy))
    assert len(hashes) == 2
