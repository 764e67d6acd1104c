"""Reading pairs from the Hub: configurations, splits as sources, and what is said of an id that is not there."""

from __future__ import annotations

import json
import types

import datasets
import pytest

from gircse.training.pairs import load_pairs
from helpers import write_rows
from train_gircse import parse, read_pairs
from training_helpers import PAIR

pytestmark = pytest.mark.usefixtures("own_cache")


def hub_info(*splits, sizes=None):
    """What datasets.get_dataset_config_info returns of a data set with these splits; `sizes` as its card has them."""
    infos = {s: datasets.SplitInfo(s, num_examples=n) for s, n in (sizes or {}).items()} or {s: {} for s in splits}
    return lambda name, config: types.SimpleNamespace(splits=infos)


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch):
    """What datasets says of most data sets on the Hub."""
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda name: "default")


def test_hub_id(tmp_path, monkeypatch):
    asked = []
    hub = datasets.Dataset.from_list([{"anchor": f"a{i}", "positive": "p"} for i in range(5)])

    def load_dataset(name, config, *, split, streaming=False):
        asked.append((name, config, split, streaming))
        return hub.to_iterable_dataset() if streaming else hub

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info("train", "dev"))
    argv = f"--train_data someone/some-pairs --data_split dev --output_dir {tmp_path} --use_cpu True --report_to none"
    pairs = read_pairs(*parse(argv.split())[1:])
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
    write_rows(tmp_path / "pair.jsonl", [{"anchor": "a pair", "positive": "p"}])
    write_rows(tmp_path / "triplet.jsonl", [{"anchor": "a triplet", "positive": "p", "negative": "n"}] * 2)
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
        load_pairs(write_rows(tmp_path / "x.jsonl", [PAIR]), **{argument: "train"})


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


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train_r1", "dev_r1", "test_r1", "train_r2"], ["train_r1", "train_r2"]),
        (["validation_matched", "test_en", "eval", "Dev", "titles", "contest"], ["titles", "contest"]),
        (["train.en", "extra"], ["train.en"]),
    ],
)
def test_splits_to_test_on_are_told_by_a_word_of_their_name(monkeypatch, names, read):
    def load_dataset(name, config, *, split):
        return datasets.Dataset.from_list([{"query": f"of {split}", "pos": ["p"]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_info", hub_info(*names))
    assert load_pairs("someone/many-splits")["source"][:] == read


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
    write_rows(tmp_path / "x.jsonl", [PAIR])
    monkeypatch.chdir(tmp_path)
    for name in ("load_dataset", "get_dataset_config_info", "get_dataset_default_config_name"):
        monkeypatch.setattr(datasets, name, lambda *args, **kwargs: pytest.fail("asked the Hub"))
    with pytest.raises(FileNotFoundError) as error:
        load_pairs(source)
    assert repr(source) in str(error.value)


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
