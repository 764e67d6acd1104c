"""The evaluation's local files: every ending and layout, wrong values named with their place, and what is missing said
first."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

mteb = pytest.importorskip("mteb", reason="mteb is in requirements-eval.txt")
import numpy as np
import pandas
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from mteb.models import ModelMeta

import evaluate_gircse
from evaluate_gircse import choose_tasks, unavailable
from evaluation_helpers import SCENES, TASKS, run, scores, write_data
from gircse.evaluation import subjects
from gircse.evaluation.encoding import StepEncoder, Vectors
from gircse.evaluation.subjects import Subject
from gircse.evaluation.tasks import local_tasks
from helpers import write_rows

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
def test_a_file_of_any_ending_holds_the_same_data(data_folder, tmp_path, ending):
    names = ["classification_rooms", "clustering_rooms", "pairclass_pairs", "retrieval_little", "sts_pairs"]
    if ending not in (".csv", ".tsv"):  # which can't hold labels by facet
        names += ["instruct_scenes-animal", "instruct_scenes_triplets-place"]
    for path in data_folder.iterdir():
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
        assert plain(read_task(tmp_path, name)) == plain(read_task(data_folder, name)), name


def write_search(folder: Path, queries: list[dict], corpus: list[dict], judgements: str) -> Path:
    """BEIR's layout."""
    write_rows(folder / "retrieval_x_queries.jsonl", queries)
    write_rows(folder / "retrieval_x_corpus.jsonl", corpus)
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
    write_rows(folder / "retrieval_x_corpus.jsonl", [*corpus, {"_id": "d2", "title": "", "text": ""}])
    with pytest.raises(ValueError, match=r"corpus.jsonl:3: text and title are empty: write one or remove the row"):
        read_task(folder, "retrieval_x")
    write_rows(folder / "retrieval_x_corpus.jsonl", [{"_id": "d0", "title": "Titled", "body": "its text"}])
    with pytest.raises(ValueError, match=r"corpus.jsonl:1: there is no text, but _id, title, body: add it or rename"):
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
    write_rows(tmp_path / f"{stem}.jsonl", [GOOD[stem], {**GOOD[stem], field: value}])
    write_rows(tmp_path / "classification_x_test.jsonl", [GOOD["classification_x_fit"]])
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
    write_rows(tmp_path / "pairclass_x.jsonl", [{**GOOD["pairclass_x"], "label": label} for label in labels])
    assert read_task(tmp_path, "pairclass_x")["test"]["labels"] == [0] * 5 + [1] * 5
    write_rows(
        tmp_path / "classification_x_fit.jsonl", [{"text": "a", "label": label} for label in (7, "8", True, 9.0)]
    )
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


def test_facets(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    (data / "instruct_scenes.jsonl.gz").unlink()
    rows = [*SCENES, {"text": "a dog", "labels": {"animal": "dog", "place": None}}]
    write_rows(data / "instruct_scenes.jsonl", rows)
    assert read_task(data, "instruct_scenes-animal")["test"]["labels"][-1] == "dog"
    assert len(read_task(data, "instruct_scenes-place")["test"]) == len(
        SCENES
    )  # no label of this facet: not in its task
    assert "left out" not in capsys.readouterr().out
    write_rows(data / "instruct_scenes.jsonl", [*rows, *[{"text": "a cow", "labels": {"Animal": "cow"}}] * 2])
    assert len(read_task(data, "instruct_scenes-animal")["test"]) == len(rows)
    assert "1 facets are not in instruct_instructions and are left out: 'Animal' (2)" in capsys.readouterr().out
    write_rows(data / "instruct_scenes.jsonl", [{**row, "labels": str(row["labels"])} for row in rows])
    with pytest.raises(
        ValueError, match=r"scenes.jsonl:1: labels=.+ must be an object, \{facet: label, ..\}; a table can"
    ):
        read_task(data, "instruct_scenes-place")
    write_rows(data / "instruct_scenes.jsonl", [{"text": "a", "labels": {"animal": "cat"}}])
    with pytest.raises(ValueError, match="no row has a label of facet 'place', which instruct_instructions names"):
        read_task(data, "instruct_scenes-place")
    (data / "instruct_instructions.jsonl.gz").unlink()
    given = {"dataset": "scenes", "facet": "place", "instruction": "Identify the place."}
    for second, message in [
        (given, ":2: dataset='scenes' has an instruction for facet='place' before: keep one"),
        ({**given, "facet": "in/out"}, ":2: facet='in/out' is part of a file's name, which can't hold any of"),
    ]:
        write_rows(data / "instruct_instructions.jsonl", [given, second])
        with pytest.raises(ValueError, match=re.escape(f"instruct_instructions.jsonl{message}")):
            local_tasks(data)


# What is missing ----------------------------------------------------------------------------------------------------


def test_missing_data_is_named_before_the_model_loads(model_folder, tmp_path, monkeypatch, capsys):
    data = write_data(tmp_path / "data")
    (data / "retrieval_little_qrels.jsonl.gz").unlink()
    (data / "classification_rooms_fit.jsonl.gz").unlink()
    loader, said = subjects.load_subject, []
    monkeypatch.setattr(
        evaluate_gircse, "load_subject", lambda args: said.append(capsys.readouterr().out) or loader(args)
    )
    names = ["sts_pairs", "retrieval_little", "classification_rooms", "STS12"]
    report = run(model_folder, tmp_path / "out", "--k", "1", data=data, tasks=names)
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


def test_no_data_at_all_is_an_error(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_gircse, "load_subject", lambda args: pytest.fail("no data, no model"))
    run(model_folder, tmp_path, tasks=["STS12"], status=1)
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


def test_names_of_tasks(data_folder):
    def names(*chosen):
        return [task.metadata.name for task in choose_tasks(chosen, data_folder)]

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
    with pytest.raises(ValueError, match="'local' needs data.*: no data"):
        choose_tasks(["local"], None)
    with pytest.raises(ValueError, match="no folder"):
        choose_tasks(["local"], str(data_folder / "nowhere"))


def test_files_that_no_task_reads_are_named(data_folder, tmp_path, capsys):
    choose_tasks(["local"], str(data_folder))
    assert "no task reads" not in capsys.readouterr().out
    names = ["classification_rooms.csv", "retrieval_qrels.tsv", "rooms_test.jsonl"]
    for name in (*names, "README.md"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"no file of .* is named as one, but {', '.join(names)}$"):
        choose_tasks(["local"], str(tmp_path))
    (data := write_data(tmp_path / "data")).joinpath(names[-1]).touch()
    assert len(choose_tasks(["local"], str(data))) == len(TASKS)
    assert f"no task reads {names[-1]}: the names" in capsys.readouterr().out


def test_a_data_set_without_instruction_is_named(tmp_path):
    data = write_data(tmp_path / "data")
    write_rows(data / "instruct_others.jsonl", SCENES)
    with pytest.raises(ValueError, match="instruct_others.jsonl: instruct_instructions has no instruction"):
        local_tasks(data)
