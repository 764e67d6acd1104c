"""What reading and batching pairs promises: bad rows are named by file and line, draws and batches are fixed by seed
and epoch, and the collator tells apart what the loss must tell apart."""

import csv
import gzip
import io
import json
import logging
import math
import os
import types
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from gircse.training.data import PairCollator, SourceBatches, TrainingPairs, split_held_out
from gircse.training.losses import candidate_mask, icr_loss
from gircse.training.pairs import load_pairs, parse_columns

PAIR = {"query": "q", "pos": ["p"]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list) -> str:
    """Writes rows (or raw lines, where a row is a str) as JSON lines, gzipped if the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return str(path)


def write_table(path: Path, rows: list[dict]) -> str:
    """Writes rows as a CSV, or a TSV if the name says so; None is an empty cell."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t" if "tsv" in path.name else ",")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def make_pairs(rows: list[dict]) -> datasets.Dataset:
    empty = {"query": "q", "pos": ["p"], "neg": [], "instruction": "", "source": "s", "symmetric": False, "label": None}
    return datasets.Dataset.from_list([{**empty, **row} for row in rows])


# Reading


def test_query_layout(tmp_path):
    full = {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1"], "instruction": "do", "source": "a", "label": "x"}
    bare = {"query": "q2", "pos": "p3", "neg": None, "prompt": "say", "symmetric": True, "label": 3, "unused": 1}
    pairs = load_pairs(write(tmp_path / "some.name.jsonl", [full, "", bare, PAIR]))
    assert list(pairs) == [
        {**full, "symmetric": False},
        {
            "query": "q2",
            "pos": ["p3"],
            "neg": [],
            "instruction": "say",
            "source": "some.name",
            "symmetric": True,
            "label": "3",
        },
        {
            "query": "q",
            "pos": ["p"],
            "neg": [],
            "instruction": "",
            "source": "some.name",
            "symmetric": False,
            "label": None,
        },
    ]


def test_sentence_transformers_layout(tmp_path):
    row = {"anchor": "a", "positive": "p", "negative": "n0", "negative_1": "n1", "negative_2": None, "instruction": "i"}
    pairs = load_pairs(write(tmp_path / "st.jsonl", [row, {"anchor": "b", "positive": "c"}]))
    assert (pairs[0]["query"], pairs[0]["pos"], pairs[0]["neg"]) == ("a", ["p"], ["n0", "n1"])
    assert (pairs[0]["instruction"], pairs[0]["source"]) == ("i", "st")
    assert (pairs[1]["query"], pairs[1]["pos"], pairs[1]["neg"]) == ("b", ["c"], [])


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_json_endings(tmp_path, ending, gz):
    pairs = load_pairs(write(tmp_path / f"x.{ending}{gz}", [{"query": "naïve 😀", "pos": ["p"]}]))
    assert (pairs[0]["query"], pairs[0]["source"]) == ("naïve 😀", "x")


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_array(tmp_path, name):
    rows = json.dumps([{**PAIR, "query": "a"}, {**PAIR, "query": "b"}], indent=2)
    pairs = load_pairs(write(tmp_path / name, [rows]))
    assert pairs["query"][:] == ["a", "b"] and set(pairs["source"]) == {"x"}
    with pytest.raises(ValueError, match=rf"{name}: row 2: field 'query' is empty"):
        load_pairs(write(tmp_path / name, [json.dumps([PAIR, {**PAIR, "query": ""}])]))


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.tsv", "x.tsv.gz"])
def test_tables(tmp_path, name):
    """An empty cell of an optional column isn't there; `symmetric` is text in a table, and so is a label."""
    full = {"anchor": "a, b", "positive": "two\nlines", "negative_1": "n1", "negative_2": "n2", "instruction": "do"}
    full |= {"source": "s", "label": "3", "symmetric": "True"}
    path = write_table(tmp_path / name, [full, dict.fromkeys(full) | {"anchor": "c", "positive": "p"}])
    assert list(load_pairs(path)) == [
        {
            "query": "a, b",
            "pos": ["two\nlines"],
            "neg": ["n1", "n2"],
            "instruction": "do",
            "source": "s",
            "symmetric": True,
            "label": "3",
        },
        {
            "query": "c",
            "pos": ["p"],
            "neg": [],
            "instruction": "",
            "source": "x",
            "symmetric": False,
            "label": None,
        },
    ]
    for column, cell, error in (("positive", None, "'positive' is missing or empty"), ("symmetric", "x", "true or fa")):
        with pytest.raises(ValueError, match=rf"{name}: row 2: .*{error}"):
            load_pairs(write_table(tmp_path / name, [full, full | {column: cell}]))


PUBLISHED = [  # of sentence-transformers/...
    ("anchor", "positive"),  # all-nli (pair, triplet), quora-duplicates, specter
    ("query", "positive"),  # msmarco-...
    ("question", "answer"),  # gooaq, squad, eli5
    ("query", "answer"),  # natural-questions, trivia-qa, amazon-qa, paq
    ("title", "answer"),  # yahoo-answers, each pair of three columns
    ("title", "question"),
    ("title", "abstract"),  # s2orc
    ("title", "citation"),
    ("abstract", "citation"),
    ("title", "body"),  # npr
    ("title", "article"),  # ccnews
    ("title", "description"),  # agnews
    ("title", "review"),  # amazon-reviews
    ("text", "simplified"),  # altlex, simple-wiki, sentence-compression
    ("text", "summary"),  # wikihow
    ("article", "summary"),  # xsum
    ("comment", "code"),  # codesearchnet
    ("english", "non_english"),  # parallel-sentences-...
    ("caption1", "caption2"),  # coco-captions, flickr30k-captions
    ("title1", "title2"),  # stackexchange-duplicates
    ("body1", "body2"),
    ("post1", "post2"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
]


@pytest.mark.parametrize("query, positive", PUBLISHED)
def test_columns_of_published_data_sets(tmp_path, query, positive):
    """Alone, with negatives as `mine_hard_negatives` adds them, and in the order of the pair, not of the columns."""
    rows = [
        {query: "q", positive: "p", "id": 7},
        {positive: ["p1", "p2"], query: "q", "negative": "n"},
        {query: "q", positive: "p", "negative_1": "n1", "negative_2": "n2"},
        {query: "q", positive: "p", "negatives": ["n1", "n2"]},
    ]
    pairs = load_pairs(write(tmp_path / "x.jsonl", rows))
    assert set(pairs["query"]) == {"q"} and pairs["pos"][:] == [["p"], ["p1", "p2"], ["p"], ["p"]]
    assert pairs["neg"][:] == [[], ["n"], ["n1", "n2"], ["n1", "n2"]]


def test_columns_that_are_null_are_not_there(tmp_path):
    """As in a Parquet file or a Hub data set that was put together from several."""
    rows = [{"anchor": "a", "positive": "p"}, {"question": "q", "answer": "p"}, {"query": "x", "pos": ["p"]}]
    datasets.Dataset.from_list([dict.fromkeys(r for row in rows for r in row) | row for row in rows]).to_parquet(
        tmp_path / "x.parquet"
    )
    assert load_pairs(str(tmp_path / "x.parquet"))["query"][:] == ["a", "q", "x"]


@pytest.mark.parametrize("judgement", ["label", "labels", "score", "is_duplicate", "similarity_score", "gold_label"])
@pytest.mark.parametrize("query, positive", [("sentence1", "sentence2"), ("question", "answer")])
def test_rows_that_a_label_may_make_a_non_pair_are_refused(tmp_path, query, positive, judgement):
    path = write(tmp_path / "x.jsonl", [{query: "q", positive: "p", judgement: 0}])
    remedy = (
        f"'{judgement}' may say that '{positive}' is no positive of '{query}': keep only .* by --columns query={query}"
    )
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: {remedy} pos={positive}$"):
        load_pairs(path)
    pairs = load_pairs(path, columns={"query": query, "pos": positive})
    assert (pairs["query"][0], pairs["pos"][0], pairs["label"][0]) == ("q", ["p"], None)  # 0 is no class of texts
    null = write(tmp_path / "null.jsonl", [{query: "q", positive: "p", judgement: None}])
    assert load_pairs(null)["query"][:] == ["q"]


def test_columns_with_several_pairs_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"title": "t", "question": "q", "answer": "a"}])
    with pytest.raises(
        ValueError, match=r"x\.jsonl:1: several .* --columns query=question pos=answer, or --columns query=t"
    ):
        load_pairs(path)
    pairs = load_pairs(path, columns={"query": "title", "pos": "answer"})
    assert (pairs["query"][0], pairs["pos"][0]) == ("t", ["a"])


def test_columns_are_named_by_an_argument(tmp_path):
    row = {
        "prompt": "q",
        "good": "p1",
        "better": ["p2"],
        "hard_1": "n1",
        "hard_2": None,
        "neg": "not this",
        "task": "do",
    }
    row |= {"kind": "c", "from": "s", "both": True, "query": "nor this", "label": "nor this"}
    words = "query=prompt pos=good,better neg=hard_1,hard_2 instruction=task source=from symmetric=both".split()
    path = write(tmp_path / "x.jsonl", [row])
    expected = {
        "query": "q",
        "pos": ["p1", "p2"],
        "neg": ["n1"],
        "instruction": "do",
        "source": "s",
        "symmetric": True,
        "label": None,
    }
    assert list(load_pairs(path, columns=parse_columns(words))) == [expected]
    assert list(load_pairs(path, columns=parse_columns([*words, "label=kind"]))) == [expected | {"label": "c"}]
    without_task = load_pairs(path, columns={"query": "prompt", "pos": "good", "neg": ["hard_1"]})
    assert without_task["instruction"][0] == ""  # a column that has been given another meaning has lost its own


def test_columns_may_name_a_part(tmp_path):
    rows = [{"question": "q", "positive": "p", "task": "do", "label": "c"}]
    pairs = load_pairs(write(tmp_path / "x.jsonl", rows), columns={"query": "question"})
    assert (pairs["query"][0], pairs["pos"][0], pairs["instruction"][0]) == ("q", ["p"], "")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: field 'pos' is missing or empty"):  # not the usual pair then
        load_pairs(
            write(tmp_path / "x.jsonl", [{"title": "t", "question": "q", "body": "b"}]), columns={"query": "title"}
        )
    rows = [{**PAIR, "task": "do", "label": "c"}]
    pairs = load_pairs(write(tmp_path / "x.jsonl", rows), columns={"instruction": "task"})
    assert (pairs["query"][0], pairs["instruction"][0], pairs["label"][0]) == ("q", "do", "c")


def test_wrong_columns(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": "q", "answer": "p"}])
    for columns, error in (
        (
            {"question": "query"},
            "columns: 'question' is none of query, pos, neg, .*; give ours=theirs, as query=question",
        ),
        (
            {"query": ["question", "answer"]},
            r"columns: 'query' is one column, not \['question', 'answer'\]; only pos and",
        ),
        ({"neg": []}, r"columns: 'neg' is one column, not \[\]"),
        ({"query": "qestion"}, r"x.jsonl:1: field 'qestion' is missing .*this one has 'question', 'answer'"),
        ({"instruction": "task"}, r"columns: no row of .*x.jsonl has \['task'\]; there are \['answer', 'question'\]"),
    ):
        with pytest.raises(ValueError, match=error):
            load_pairs(path, columns=columns)
    for words, wrong in (
        (["query"], "query"),
        (["query="], "query="),
        (["neg=a,,b"], ""),
        (["query=a", "query=b"], "query=b"),
        (["qery=a,pos=b"], "qery=a"),
    ):
        with pytest.raises(ValueError, match=f"columns: '{wrong}' must be ours=theirs, with each of ours once"):
            parse_columns(words)
    assert parse_columns(["query=question,pos=answer"]) == {"query": ["question"], "pos": ["answer"]}
    assert parse_columns(["query=a b", "pos=c=d", "neg=e,f"]) == {"query": ["a b"], "pos": ["c=d"], "neg": ["e", "f"]}


@pytest.mark.parametrize("cell", ['["b", "c"]', "['b', 'c']", "['b'\n 'c']", "[]", ' ["b", 1] '])
@pytest.mark.parametrize("column", ["pos", "neg"])
def test_a_list_written_as_a_text_is_refused(tmp_path, column, cell):
    row = {"query": "q", "pos": "p", "neg": "n", column: cell}
    paths = write_table(tmp_path / "x.csv", [row]), write(tmp_path / "x.jsonl", [row])
    for path, where in zip(paths, (r"x\.csv: row 1", r"x\.jsonl:1"), strict=True):
        with pytest.raises(
            ValueError, match=f"{where}: field '{column}' is a list written as one text, .*give a real list"
        ):
            load_pairs(path)


@pytest.mark.parametrize("text", ["[citation needed]", "[1]", "[b, c]", "['b', 'c'] is a list", "['b', 'c'"])
def test_a_text_in_brackets_is_a_text(tmp_path, text):
    assert load_pairs(write_table(tmp_path / "x.csv", [{"query": "q", "pos": text}]))["pos"][0] == [text]
    assert load_pairs(write(tmp_path / "x.jsonl", [{"query": "q", "pos": [text, '["b"]']}]))["pos"][0] == [
        text,
        '["b"]',
    ]


def test_parquet(tmp_path):
    rows = [{"query": "q1", "pos": ["p"], "neg": ["n"], "symmetric": None}, {**PAIR, "neg": None, "symmetric": True}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    pairs = load_pairs(str(tmp_path / "x.parquet"))
    assert pairs["neg"][:] == [["n"], []] and pairs["symmetric"][:] == [False, True] and pairs["source"][0] == "x"


def test_folder_and_pattern(tmp_path):
    write(tmp_path / "data" / "b.jsonl.gz", [PAIR, PAIR])
    write(tmp_path / "data" / "a.jsonl", [PAIR])
    write(tmp_path / "data" / "README.md", ["not read"])
    write(tmp_path / "data" / "deep" / "c.jsonl", [PAIR])
    write(tmp_path / "data" / "0.jsonl", [PAIR])
    assert load_pairs(str(tmp_path / "data"))["source"][:] == ["0", "a", "b", "b"]
    assert load_pairs(str(tmp_path / "data" / "b*"))["source"][:] == ["b", "b"]
    assert load_pairs(str(tmp_path / "data" / "**" / "*.jsonl"))["source"][:] == ["0", "a", "c"]


def hub_info(*splits, sizes=None):
    """What datasets.get_dataset_config_info returns of a data set with these splits; `sizes` as its card has them."""
    infos = {s: datasets.SplitInfo(s, num_examples=n) for s, n in (sizes or {}).items()} or {s: {} for s in splits}
    return lambda name, config: types.SimpleNamespace(splits=infos)


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch):
    """What datasets says of most data sets on the Hub."""
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda name: "default")


def test_hub_id(monkeypatch):
    asked = []
    hub = datasets.Dataset.from_list([{"anchor": f"a{i}", "positive": "p"} for i in range(5)])

    def load_dataset(name, config, *, split, streaming=False):
        asked.append((name, config, split, streaming))
        return hub.to_iterable_dataset() if streaming else hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("train", "dev"))
    pairs = load_pairs("someone/some-pairs", split="dev")
    assert pairs["query"][:] == ["a0", "a1", "a2", "a3", "a4"] and set(pairs["source"]) == {"someone/some-pairs"}
    assert load_pairs("someone/some-pairs", limit=2)["query"][:] == ["a0", "a1"]
    whole, some = ("default", "dev", False), ("default", "train", True)
    assert asked == [("someone/some-pairs", *whole), ("someone/some-pairs", *some)]
    hub = datasets.Dataset.from_list([{"anchor": "a", "positive": "p"}, {"anchor": "a", "positive": ""}])
    with pytest.raises(ValueError, match="someone/some-pairs: row 2: field 'positive' is empty"):
        load_pairs("someone/some-pairs")


def test_hub_data_set_with_other_columns(monkeypatch):
    hub = datasets.Dataset.from_list([{"question": "q", "answer": "p", "task": f"Do {i}."} for i in range(3)])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: hub)
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("train"))
    assert load_pairs("someone/some-questions")["pos"][:] == [["p"]] * 3
    pairs = load_pairs("someone/some-questions", columns={"query": "answer", "pos": "question", "instruction": "task"})
    assert (pairs["query"][0], pairs["pos"][0]) == ("p", ["q"])
    assert pairs["source"][:] == ["Do 0.", "Do 1.", "Do 2."] == pairs["instruction"][:]


def test_hub_data_set_of_several_configurations(monkeypatch, tmp_path):
    """By datasets' own reader; a folder stands in for the Hub."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: pair\n  data_files: pair.jsonl\n- config_name: triplet\n"
        "  data_files: triplet.jsonl\n---\n"
    )
    write(tmp_path / "pair.jsonl", [{"anchor": "a pair", "positive": "p"}])
    write(tmp_path / "triplet.jsonl", [{"anchor": "a triplet", "positive": "p", "negative": "n"}] * 2)
    monkeypatch.undo()
    for name in ("get_dataset_default_config_name", "get_dataset_config_names", "get_dataset_config_info"):
        original = getattr(datasets, name)
        monkeypatch.setattr(datasets, name, lambda _, *args, original=original: original(str(tmp_path), *args))
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *args, **kwargs: load(str(tmp_path), *args, **kwargs))
    for limit in (None, 1):
        pairs = load_pairs("someone/all-pairs", config="triplet", limit=limit)
        assert pairs["query"][:] == ["a triplet"] * (limit or 2) and pairs["neg"][0] == ["n"]
    with pytest.raises(ValueError, match=r"configurations: choose one by config \(--data_config\), of pair, tri"):
        load_pairs("someone/all-pairs")
    with pytest.raises(ValueError, match="nowhere"):
        load_pairs("someone/all-pairs", config="nowhere")


@pytest.mark.parametrize("argument", ["config", "split"])
def test_local_files_have_no_configurations_or_splits(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{argument}='train' is for data sets on the Hub, and .* is local"):
        load_pairs(write(tmp_path / "x.jsonl", [PAIR]), **{argument: "train"})


def test_hub_rows_of_flag_embedding(monkeypatch):
    """`prompt` and `type`, no `source`: tasks are told apart by their prompt, and `type` says which are symmetric."""
    kinds = ("normal", "symmetric_class", "symmetric_clustering", "symmetric_sts")
    rows = [{"query": f"q {kind}", "pos": ["p"], "neg": ["n"], "prompt": f"Do {kind}.", "type": kind} for kind in kinds]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("train"))
    pairs = load_pairs("someone/flag-pairs")
    assert pairs["source"][:] == [f"Do {kind}." for kind in kinds] == pairs["instruction"][:]
    assert pairs["symmetric"][:] == [False, False, True, True]


@pytest.mark.parametrize(
    ("limit", "sizes", "read"),
    [(None, None, [6, 2]), (4, {"title": 6, "abstract": 2, "test": 90}, [3, 1]), (3, None, [2, 1])],
)
def test_hub_data_set_with_a_split_a_source(monkeypatch, limit, sizes, read):
    """Without `train`, all splits but those to test on, each a source; of a limit each gives its share."""
    rows = {"title": 6, "abstract": 2, "test": 90}
    rows = {s: [{"query": f"{s} {i}", "pos": ["p"], "prompt": "Find."} for i in range(n)] for s, n in rows.items()}

    def load_dataset(name, config, *, split, streaming=False):
        hub = datasets.Dataset.from_list(rows[split])
        return hub.to_iterable_dataset() if streaming else hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info(*rows, sizes=sizes))
    pairs = load_pairs("someone/split-pairs", limit=limit)
    assert [pairs["source"][:].count(s) for s in ("title", "abstract", "test")] == [*read, 0]
    assert pairs["query"][0] == "title 0" and set(pairs["instruction"]) == {"Find."}
    rows["abstract"][0]["pos"] = [""]
    with pytest.raises(ValueError, match="someone/split-pairs, abstract: row 1: field 'pos.0.' is empty"):
        load_pairs("someone/split-pairs", limit=limit)


def test_hub_data_set_with_nothing_to_train_on_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("validation", "test"))
    with pytest.raises(ValueError, match="no split to train on, only validation, test"):
        load_pairs("someone/some-benchmark")


def test_unknown_hub_id_says_that_nothing_local_was_found(monkeypatch):
    def not_found(name):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_default_config_name", not_found)
    with pytest.raises(FileNotFoundError, match=r"'data/trian' is no local file or folder .*doesn't exist on the Hub"):
        load_pairs("data/trian")


@pytest.mark.parametrize("source", ["no.jsonl", "a/no.parquet", "./no", "/no/such", "~/no/such", "no/such/*", ""])
def test_missing_path_is_not_looked_up_on_the_hub(source, tmp_path, monkeypatch):
    write(tmp_path / "x.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for name in ("load_dataset", "get_dataset_config_info", "get_dataset_default_config_name"):
        monkeypatch.setattr(datasets, name, lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError) as error:
        load_pairs(source)
    assert repr(source) in str(error.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for source in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileNotFoundError, match=r"no file here ends in \.jsonl"):
            load_pairs(str(source))
    with pytest.raises(ValueError, match=r"e\.jsonl: no rows"):
        load_pairs(write(tmp_path / "e.jsonl", [""]))


def test_symmetric_by_field_then_by_source(tmp_path):
    rows = [{**PAIR, "source": "a"}, {**PAIR, "source": "b"}, {**PAIR, "source": "a", "symmetric": False}]
    rows.append({**PAIR, "source": "b", "instruction": "Retrieve semantically similar text", "symmetric": True})
    path = write(tmp_path / "x.jsonl", rows)
    assert load_pairs(path)["symmetric"][:] == [False, False, False, True]
    assert load_pairs(path, symmetric_sources=["a"])["symmetric"][:] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"no row of .*x\.jsonl has source \['c'\]; its sources are \['a', 'b'\]"):
        load_pairs(path, symmetric_sources={"a", "c"})
    assert len(load_pairs(path, symmetric_sources=["b"], limit=1)) == 1  # "b" comes later


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "x.jsonl", [{**PAIR, "query": f"q{i}"} for i in range(3)] + ["not JSON"])
    assert load_pairs(path, limit=3)["query"][:] == ["q0", "q1", "q2"]
    with pytest.raises(ValueError, match=r"x\.jsonl:4: broken JSON"):
        load_pairs(path, limit=4)
    for limit in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="limit must be an integer >= 1"):
            load_pairs(path, limit=limit)


def test_changed_file_is_read_again(tmp_path):
    path = Path(write(tmp_path / "x.jsonl", [{**PAIR, "query": "old"}]))
    assert load_pairs(str(path))["query"][0] == "old"
    before = path.stat()
    write(path, [{**PAIR, "query": "new"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert load_pairs(str(path))["query"][0] == "new"


def test_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "x.jsonl", [PAIR])
    first = load_pairs(path)
    monkeypatch.setattr("gircse.training.pairs._to_pair", lambda *args: pytest.fail("read again"))
    assert list(load_pairs(path)) == list(first)


BAD_ROWS = {
    "{'query': 1": "broken JSON",
    '{"query": "q", "pos": ["p"]': "broken JSON",
    '["q", "p"]': r"must be a JSON object with named fields, not \['q', 'p'\]",
    '{"pos": ["p"]}': r"'query' is missing or empty; a row needs 'query' and 'pos', or .* \(this one has 'pos'\)",
    "{}": r"'query' is missing .*no fields",
    '{"query": "q"}': "'pos' is missing",
    '{"query": "q", "pos": []}': "'pos' is missing or empty",
    '{"query": "q", "positive": null}': "'positive' is missing",
    '{"question": null, "answer": "p"}': r"'question' is missing .*, as --columns query=question pos=answer",
    '{"premise": "a", "hypothesis": "b", "label": 2}': r"'query' is missing .*has 'premise', 'hypothesis', 'label'",
    '{"query": 1, "positive": 2, "negative": 3}': r"'query' must be text, not 1 \(int\)",
    '{"anchor": "q"}': "'positive' is missing",
    '{"query": " ", "pos": ["p"]}': "'query' is empty",
    '{"query": 7, "pos": ["p"]}': r"'query' must be text, not 7 \(int\)",
    '{"query": "q", "pos": ["p", ""]}': r"'pos\[1\]' is empty",
    '{"query": "q", "pos": {"a": 1}}': "'pos' must be text",
    '{"query": "q", "pos": ["p"], "neg": ["n", null]}': r"'neg\[1\]' must be text, not None",
    '{"query": "q", "pos": ["p"], "neg": [""]}': r"'neg\[0\]' is empty",
    '{"anchor": "q", "positive": "p", "negative_3": ""}': "'negative_3' is empty",
    '{"query": "q", "pos": ["p"], "instruction": ["i"]}': "'instruction' must be text",
    '{"query": "q", "pos": ["p"], "prompt": 1}': "'prompt' must be text",
    '{"query": "q", "pos": ["p"], "source": 1}': "'source' must be text",
    '{"query": "q", "pos": ["p"], "label": 0.5}': "'label' must be text",
    '{"query": "q", "pos": ["p"], "label": true}': "'label' must be text",
    '{"query": "q", "pos": ["p"], "symmetric": "yes"}': "'symmetric' is 'yes'; write true or false",
    '{"query": "q", "pos": ["p"], "negative": ""}': "'negative' is empty",
    '{"query": "q \\ud83d", "pos": ["p"]}': "'query' holds half a character",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_row_names_file_and_line(tmp_path, line):
    path = write(tmp_path / "bad.jsonl.gz", [PAIR, "", line, PAIR])
    with pytest.raises(ValueError, match=BAD_ROWS[line]) as error:
        load_pairs(path)
    assert type(error.value) is ValueError and str(error.value).startswith(f"{path}:3: ")


def test_unreadable_files(tmp_path):
    path = Path(write(tmp_path / "cut.jsonl.gz", [{**PAIR, "query": f"q{i * 7919}"} for i in range(200)]))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        ValueError, match=r"cut\.jsonl\.gz can't be read to its end after row 1\d\d .*download it again"
    ):
        load_pairs(str(path), max_bad_share=0.9)  # rows that can't be counted are not left out
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"not\.jsonl\.gz can't be read to its end"):
        load_pairs(str(tmp_path / "not.jsonl.gz"))
    (tmp_path / "not.parquet").write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"not\.parquet can't be read to its end"):
        load_pairs(str(tmp_path / "not.parquet"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"query": "q", "pos": ["p"]}\n{"query": "caf\xe9", "pos": ["p"]}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: broken JSON .* in UTF-8"):
        load_pairs(str(tmp_path / "latin.jsonl"))


def test_bad_parquet_row_is_numbered(tmp_path):
    datasets.Dataset.from_list([PAIR, {"query": "", "pos": ["p"]}]).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: row 2: field 'query' is empty"):
        load_pairs(str(tmp_path / "x.parquet"))


# Leaving bad rows out

MIXED = [PAIR, '{"query": "cut', {**PAIR, "query": "q2"}, "", {"query": "q3", "pos": []}, {**PAIR, "query": "q4"}]


def test_bad_rows_are_left_out_and_listed(tmp_path, caplog):
    path, listed = write(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    with caplog.at_level(logging.WARNING, "gircse"):
        pairs = load_pairs(path, max_bad_share=0.4, bad_rows_file=listed)
    assert pairs["query"][:] == ["q", "q2", "q4"] and pairs.column_names == list(make_pairs([PAIR]).column_names)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in rows] == [(path, 2), (path, 5)]
    assert rows[0]["reason"].startswith("broken JSON (Invalid control character at: line 1")
    assert rows[1]["reason"].startswith("field 'pos' is missing or empty; a row needs")
    (record,) = caplog.records
    assert (
        f"{path}: left out 2 of 5 rows, which are wrong (all of them in {listed}): {path}, row 2: bro" in record.message
    )


def test_bad_rows_are_left_out_of_what_the_cache_has(tmp_path, monkeypatch):
    path, listed = write(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    first = load_pairs(path, max_bad_share=0.4)
    monkeypatch.setattr("gircse.training.pairs._to_pair", lambda *args: pytest.fail("read again"))
    assert list(load_pairs(path, max_bad_share=0.5, bad_rows_file=listed)) == list(first)
    assert len(listed.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="2 of 5 rows are wrong"):
        load_pairs(path, max_bad_share=0.39)


def test_too_many_bad_rows(tmp_path):
    path, listed = write(tmp_path / "x.jsonl", MIXED), tmp_path / "bad_rows.jsonl"
    reasons = rf"\(all of them in {listed}\): {path}, row 2: broken JSON .*; {path}, row 5: field 'pos' is missing"
    for share in (0, 0.1, 0.39):
        with pytest.raises(
            ValueError, match=rf"2 of 5 rows are wrong, more than max_bad_share={share} .* more {reasons}"
        ):
            load_pairs(path, max_bad_share=share, bad_rows_file=listed)
        assert len(listed.read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="1 of 2 rows are wrong"):  # of the rows that are read
        load_pairs(path, max_bad_share=0.4, limit=2)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: broken JSON"):
        load_pairs(path)
    everything = write(tmp_path / "y.jsonl", ["no JSON"] * 9)
    with pytest.raises(ValueError, match=r"y\.jsonl: 9 of 9 rows are wrong"):
        load_pairs(everything, max_bad_share=0.99)


def test_without_bad_rows_none_are_listed(tmp_path):
    path, listed = write(tmp_path / "x.jsonl", [PAIR]), tmp_path / "bad_rows.jsonl"
    listed.write_text("of an earlier run")
    assert list(load_pairs(path, max_bad_share=0, bad_rows_file=listed)) == list(load_pairs(path))
    assert not listed.exists()


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, True, "0.1", float("nan")])
def test_max_bad_share_is_a_share(tmp_path, share):
    with pytest.raises(ValueError, match="max_bad_share must be a share of the rows, 0 <= share < 1, not "):
        load_pairs(write(tmp_path / "x.jsonl", [PAIR]), max_bad_share=share)


def test_bad_rows_of_the_hub(monkeypatch, tmp_path):
    rows = {"a": ["q", "", "q2"], "b": ["q3", "q4", ""]}
    rows = {s: datasets.Dataset.from_list([{"query": q, "pos": ["p"]} for q in queries]) for s, queries in rows.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: rows[split])
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("a", "b"))
    listed = tmp_path / "bad_rows.jsonl"
    pairs = load_pairs("someone/split-pairs", max_bad_share=0.5, bad_rows_file=listed)
    assert pairs["query"][:] == ["q", "q2", "q3", "q4"] and pairs["source"][:] == ["a", "a", "b", "b"]
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(line["file"], line["row"]) for line in lines] == [
        ("someone/split-pairs, a", 2),
        ("someone/split-pairs, b", 3),
    ]


def test_reading_is_shown_unless_progress_bars_are_off(tmp_path, capfd):
    datasets.enable_progress_bars()
    load_pairs(write(tmp_path / "x.jsonl", [PAIR]))
    assert "1 examples" in capfd.readouterr().err
    datasets.disable_progress_bars()
    try:
        load_pairs(write(tmp_path / "y.jsonl", [PAIR]))
    finally:
        datasets.enable_progress_bars()
    assert capfd.readouterr().err == ""


# Held-out rows


def test_held_out_keeps_pairs_in_both_directions_together():
    both = [(f"a{i}", f"b{i}") for i in range(20)]
    rows = [{"query": q, "pos": [p], "symmetric": True} for q, p in both] + [{"query": p, "pos": [q]} for q, p in both]
    train, held_out = split_held_out(make_pairs(rows), 11, seed=0)
    assert len(held_out) == 10  # five pairs in both directions; a sixth would be too many

    def texts(part: datasets.Dataset) -> set[str]:
        return {text for row in part for text in (row["query"], *row["pos"])}

    assert not texts(train) & texts(held_out)


def test_held_out_follows_chains_of_pairs_in_both_directions():
    chain = [("a", "b"), ("b", "a"), ("b", "c"), ("c", "b"), ("c", "d"), ("d", "c")]
    others = [{"query": f"q{i}", "pos": ["a"]} for i in range(4)]  # many queries may have one positive
    pairs = make_pairs([{"query": q, "pos": [p]} for q, p in chain] + others)
    for seed in range(10):
        train, held_out = split_held_out(pairs, 6, seed=seed)
        assert len({*"abcd"} & {*held_out["query"]}) in (0, 4) and not {*train["query"]} & {*held_out["query"]}


def test_a_pair_in_one_direction_holds_no_queries_together():
    pairs = make_pairs([{"query": f"q{i}", "pos": [f"q{i + 1}"]} for i in range(9)])
    assert len(split_held_out(pairs, 3, seed=0)[1]) == 3


def test_held_out_keeps_equal_queries_together():
    pairs = make_pairs([{"query": f"q{i // 3}", "pos": [str(i)]} for i in range(90)])
    train, held_out = split_held_out(pairs, 20, seed=0)
    assert len(held_out) == 18 and len(train) == 72  # six queries of three pairs; a seventh would be too many
    assert not set(train["query"]) & set(held_out["query"])
    assert sorted([*train["pos"], *held_out["pos"]]) == sorted(pairs["pos"])
    assert list(split_held_out(pairs, 20, seed=0)[1]) == list(held_out)
    assert list(split_held_out(pairs, 20, seed=1)[1]) != list(held_out)


def test_held_out_count():
    pairs = make_pairs([{"query": f"q{i}"} for i in range(10)])
    assert [len(part) for part in split_held_out(pairs, 3, seed=0)] == [7, 3]
    assert [len(part) for part in split_held_out(pairs, 0, seed=0)] == [10, 0]
    for held_out in (10, 11):
        with pytest.raises(ValueError, match=f"held_out is {held_out}, but there are 10 pairs"):
            split_held_out(pairs, held_out, seed=0)
    with pytest.raises(ValueError, match="held_out must be an integer >= 0, not -1"):
        split_held_out(pairs, -1, seed=0)
    with pytest.raises(ValueError, match="every query has more pairs"):
        split_held_out(make_pairs([{"query": "same"}] * 5), 3, seed=0)


# Draws


def many_texts(rows: int = 20) -> datasets.Dataset:
    texts = [{"pos": [f"p{i}.{j}" for j in range(9)], "neg": [f"n{i}.{j}" for j in range(9)]} for i in range(rows)]
    return make_pairs(texts)


def drawn(pairs: TrainingPairs) -> list:
    return [(pairs[i]["positive"], pairs[i]["negatives"]) for i in range(len(pairs))]


def test_row_of_an_epoch():
    pairs = many_texts()
    row = TrainingPairs(pairs, 4, seed=0)[7]
    assert list(row) == [
        "query",
        "positive",
        "negatives",
        "all_positives",
        "instruction",
        "symmetric",
        "source",
        "label",
    ]
    assert row["positive"] in pairs[7]["pos"] and row["all_positives"] == pairs[7]["pos"]
    assert len(set(row["negatives"])) == 4 and set(row["negatives"]) <= set(pairs[7]["neg"])
    assert TrainingPairs(pairs, 0, seed=0)[7]["negatives"] == []
    assert sorted(TrainingPairs(pairs, 99, seed=0)[7]["negatives"]) == pairs[7]["neg"]
    for count in (-1, 1.0, None):
        with pytest.raises(ValueError, match="num_negatives must be an integer >= 0"):
            TrainingPairs(pairs, count, seed=0)


def test_draws_are_fixed_by_seed_epoch_and_row():
    pairs = TrainingPairs(many_texts(), 2, seed=3)
    first = drawn(pairs)
    torch.manual_seed(99)
    assert [(pairs[i]["positive"], pairs[i]["negatives"]) for i in reversed(range(20))][::-1] == first
    pairs.set_epoch(1)
    second = drawn(pairs)
    assert second != first
    resumed = TrainingPairs(many_texts(), 2, seed=3)
    resumed.set_epoch(1)
    assert drawn(resumed) == second
    assert drawn(TrainingPairs(many_texts(), 2, seed=4)) != first
    assert len({positive.split(".")[1] for positive, _ in first}) > 1  # rows draw apart


def test_set_epoch_reaches_persistent_workers():
    pairs = TrainingPairs(many_texts(4), 1, seed=0)
    loader = torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1):
        pairs.set_epoch(epoch)
        seen.append([(row["positive"], row["negatives"]) for row in loader])
        assert seen[-1] == drawn(pairs)
    assert seen[0] != seen[1]


# Batches

SOURCES = ["a"] * 21 + ["b"] * 10 + ["c"] * 3 + ["a"] * 10  # 31 of a, 10 of b, 3 of c


def sources_of(batch: list[int]) -> set[str]:
    return {SOURCES[i] for i in batch}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_batches_are_of_one_source(num_processes):
    batches = SourceBatches(SOURCES, 2, by_source=True, seed=0, num_processes=num_processes)
    chosen = list(batches)
    rows = [i for batch in chosen for i in batch]
    assert all(len(batch) == 2 for batch in chosen) and len(set(rows)) == len(rows)
    assert len(chosen) == len(batches) == {1: 22, 2: 22}[num_processes]  # 44 rows: nothing left over
    blocks = [sum(chosen[i : i + num_processes], []) for i in range(0, len(chosen), num_processes)]
    pure = {1: 15 + 5 + 1, 2: 7 + 2 + 0}[num_processes]
    assert all(len(sources_of(block)) == 1 for block in blocks[:pure])
    assert Counter(SOURCES[block[0]] for block in blocks[:pure])["b"] == {1: 5, 2: 2}[num_processes]
    assert {1: {"a", "c"}, 2: {"a", "b", "c"}}[num_processes] == set().union(*map(sources_of, blocks[pure:]))
    order = [SOURCES[block[0]] for block in blocks[:pure]]
    assert order != sorted(order)  # sources take turns


def test_order_of_sources_changes_over_seeds():
    firsts = {SOURCES[next(iter(SourceBatches(SOURCES, 2, by_source=True, seed=seed)))[0]] for seed in range(30)}
    assert firsts == {"a", "b", "c"}


def test_accelerate_deals_a_global_batch_of_one_source():
    sources = ["a"] * 12 + ["b"] * 12
    batches = SourceBatches(sources, 2, by_source=True, seed=0, num_processes=2)
    shares = [list(BatchSamplerShard(batches, num_processes=2, process_index=i)) for i in range(2)]
    assert len(shares[0]) == len(shares[1]) == 6
    assert (batches.batch_size, batches.drop_last) == (2, True)  # what Accelerate reads
    for pair in zip(*shares, strict=True):
        assert len({sources[i] for i in sum(pair, [])}) == 1


def test_mixed_batches_without_by_source():
    chosen = list(SourceBatches(SOURCES, 4, by_source=False, seed=0))
    assert len(chosen) == 11 and sorted(sum(chosen, [])) == list(range(44))
    assert sum(len(sources_of(batch)) > 1 for batch in chosen) > 3  # three at most could be pooled leftovers


@pytest.mark.parametrize("by_source", [True, False])
def test_order_is_fixed_by_seed_and_epoch(by_source):
    batches = SourceBatches(SOURCES, 3, by_source=by_source, seed=5)
    first = list(batches)
    assert list(batches) == first and len(first) == len(batches) == 14  # two rows dropped
    batches.set_epoch(1)
    second = list(batches)
    assert second != first
    resumed = SourceBatches(SOURCES, 3, by_source=by_source, seed=5)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(SourceBatches(SOURCES, 3, by_source=by_source, seed=6)) != first
    assert set(sum(first, [])) != set(sum(second, []))  # it is not always the same rows that are dropped


def test_every_source_takes_its_turn_in_being_dropped():
    batches = SourceBatches(list("aaabbb"), 2, by_source=True, seed=0, num_processes=2)
    dropped = set()
    for epoch in range(20):
        batches.set_epoch(epoch)
        dropped |= set(range(6)) - set(sum(batches, []))
    assert dropped == set(range(6))


def test_too_few_pairs_for_a_batch():
    with pytest.raises(ValueError, match=r"batch_size 23 x 2 process.* needs 46 pairs, but there are 44; lower"):
        SourceBatches(SOURCES, 23, by_source=True, seed=0, num_processes=2)
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1, not 0"):
        SourceBatches(SOURCES, 0, by_source=True, seed=0)
    with pytest.raises(ValueError, match="num_processes must be an integer >= 1, not 0"):
        SourceBatches(SOURCES, 2, by_source=True, seed=0, num_processes=0)


# Collator


class FakeProcessor:
    """One token a character, and a memory of what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts, *, instruction, max_length):
        self.calls.append((texts, instruction, max_length))
        rows = [torch.tensor([ord(char) for char in text]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "extra": None}


def training_row(query, positive, negatives=(), **fields):
    return {
        "query": query,
        "positive": positive,
        "negatives": list(negatives),
        "all_positives": [positive],
        "instruction": "",
        "symmetric": False,
        "source": "s",
        "label": None,
        **fields,
    }


def test_collator_order_and_instruction_sides():
    rows = [
        training_row("q1", "p1", ["n1", "n2"], instruction="find"),
        training_row("q2", "p2", ["n3"], instruction="same", symmetric=True),
        training_row("q3", "p3", symmetric=True),
    ]
    processor = FakeProcessor()
    batch = PairCollator(processor, max_length=12)(rows)
    assert processor.calls == [
        (["q1", "q2", "q3"], ["find", "same", None], 12),
        (["p1", "p2", "p3", "n1", "n2", "n3"], [None, "same", None, None, None, "same"], 12),
    ]
    for side, count in (("query", 3), ("document", 6)):
        assert set(batch[side]) == {"input_ids", "attention_mask"}
        assert all(tensor.shape == (count, 2) and tensor.dtype == torch.int64 for tensor in batch[side].values())
    assert batch["document"]["input_ids"][4].tolist() == [ord("n"), ord("2")]


def test_collator_ids_tell_equal_texts():
    rows = [
        training_row("q1", "x", ["y"], all_positives=["x", "y", "z"], label="l"),
        training_row("q2", "y", ["x", "w"], all_positives=["y"], label="l"),
        training_row("q3", "v", source="other", label="l"),
        training_row("q4", "u"),
    ]
    batch = PairCollator(FakeProcessor())(rows)
    x, y, v, u, *negatives = batch["document_ids"].tolist()
    assert negatives[:2] == [y, x] and len({x, y, v, u, negatives[2]}) == 5
    assert batch["positive_ids"].shape == (4, 3)
    assert batch["positive_ids"][0, :2].tolist() == [x, y] and batch["positive_ids"][0, 2] not in (-1, x, y)
    assert batch["positive_ids"][1:].tolist() == [[y, -1, -1], [v, -1, -1], [u, -1, -1]]
    assert len(batch["query_ids"].unique()) == 4 and batch["query_ids"].min() >= 0
    labels = batch["query_labels"].tolist()
    assert labels[0] == labels[1] >= 0 and labels[2] not in (-1, labels[0]) and labels[3] == -1
    assert batch["document_labels"].tolist() == labels + [-1, -1, -1]
    names = ("document_ids", "positive_ids", "query_ids", "prompted_ids", "query_labels", "document_labels")
    assert all(batch[name].dtype == torch.int64 for name in names)
    assert (batch["document_ids"] >= 0).all()


def test_prompted_ids_tell_the_input_of_a_query():
    """Symmetric documents have the query's prompt; others are bare, which is the same input for a bare query alone."""
    rows = [
        training_row("a", "b", ["a"], instruction="same", symmetric=True),
        training_row("b", "a", instruction="same", symmetric=True),
        training_row("a", "c", ["a"], instruction="find"),
        training_row("a", "d", ["a"]),
    ]
    batch = PairCollator(FakeProcessor())(rows)
    same, query_ids = batch["prompted_ids"][None] == batch["query_ids"][:, None], batch["query_ids"]
    documents = ["b", "a", "c", "d", "a", "a", "a"]  # the last: of rows 0, 2 and 3
    assert [[documents[i] for i in row.nonzero()] for row in same] == [["a", "a"], ["b"], [], ["a", "a"]]
    assert same[0].nonzero().flatten().tolist() == [1, 4] and same[3].nonzero().flatten().tolist() == [5, 6]
    assert batch["prompted_ids"].dtype == torch.int64 and len(query_ids.unique()) == 4
    assert (batch["document_ids"][[1, 4, 5, 6]] == batch["document_ids"][1]).all()  # the texts alone are the same


def loss_of(rows: list[dict], alike: str) -> float:
    """The loss of a model that embeds the texts of `alike` as one vector, whatever their prompt, and all other texts at
    right angles to it and to each other."""
    texts = {text for row in rows for text in (row["query"], row["positive"], *row["negatives"])}
    axes = {text: 0 if text in alike else 1 + i for i, text in enumerate(sorted(texts))}
    axes_of_ids = {ord(text): axis for text, axis in axes.items()}
    batch = PairCollator(FakeProcessor())(rows)
    vectors = torch.eye(len(texts) + 1)
    queries, documents = (
        vectors[[axes_of_ids[int(token)] for token in batch[side]["input_ids"][:, 0]]][:, None]
        for side in ("query", "document")
    )
    names = ("document_ids", "positive_ids", "document_labels", "query_labels", "query_ids", "prompted_ids")
    return icr_loss(queries, documents, candidate_mask(*(batch[name] for name in names)), temperature=0.02).total.item()


def symmetric(query: str, positive: str, negatives: str = "") -> dict:
    return training_row(query, positive, negatives, instruction="same", symmetric=True)


def test_a_perfect_model_has_no_loss_on_pairs_in_both_directions():
    assert loss_of([symmetric("a", "b"), symmetric("b", "a")], alike="ab") == pytest.approx(0, abs=1e-6)
    assert loss_of([symmetric("a", "b"), symmetric("b", "a"), symmetric("x", "x")], alike="ab") == pytest.approx(
        0, abs=1e-6
    )


def test_a_hard_negative_with_the_text_of_the_query_is_no_candidate():
    assert loss_of([symmetric("a", "b", "ac"), symmetric("c", "c")], alike="ab") == pytest.approx(0, abs=1e-6)
    bare = [training_row("a", "b", "ac"), training_row("c", "c")]  # neither side has an instruction
    assert loss_of(bare, alike="ab") == pytest.approx(0, abs=1e-6)


def test_the_link_of_a_chain_is_no_negative_of_itself():
    # Document b, the positive of a, is the second query. That c is right for a, too, no row says.
    for rows in ([symmetric("a", "b"), symmetric("b", "c")], [symmetric("b", "c"), symmetric("a", "b")]):
        assert loss_of(rows, alike="abc") == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_a_bare_document_with_the_text_of_a_prompted_query_stays_a_candidate():
    rows = [training_row("a", "b", instruction="find"), training_row("c", "a", instruction="find")]
    assert loss_of(rows, alike="abc") == pytest.approx(math.log(2), abs=1e-5)  # both documents for both queries
    assert loss_of([{**row, "instruction": ""} for row in rows], alike="abc") == pytest.approx(
        math.log(2) / 2, abs=1e-5
    )


def test_a_query_is_the_same_under_the_same_instruction():
    rows = [training_row("q", str(i), instruction=instruction) for i, instruction in enumerate(("a", "a", "b", ""))]
    ids = PairCollator(FakeProcessor())(rows)["query_ids"].tolist()
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_ids_are_the_same_in_every_process():
    batch = PairCollator(FakeProcessor())([training_row("q", "naïve 😀", source="s", label="l")])
    assert batch["document_ids"].tolist() == batch["positive_ids"][0].tolist() == [8063037927972956648]
    assert batch["query_labels"].tolist() == [8086197922565933603]
    many = PairCollator(FakeProcessor())([training_row("q", str(i)) for i in range(300)])["document_ids"]
    assert len(many.unique()) == 300 and many.min() >= 0 and many.max() > 2**62  # 63 bits


def test_end_to_end_through_a_loader(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"], "source": "ab"[i % 2]} for i in range(12)]
    pairs = load_pairs(write(tmp_path / "x.jsonl", rows), symmetric_sources=["a"])
    train, held_out = split_held_out(pairs, 4, seed=0)
    batches = SourceBatches(train["source"], 2, by_source=True, seed=0)
    loader = torch.utils.data.DataLoader(
        TrainingPairs(train, 1, seed=0), batch_sampler=batches, collate_fn=PairCollator(FakeProcessor())
    )
    shapes = [(batch["query"]["input_ids"].shape[0], batch["document_ids"].shape[0]) for batch in loader]
    assert shapes == [(2, 4)] * len(batches) and len(batches) == 4 and len(held_out) == 4
