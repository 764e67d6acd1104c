"""Reading pairs from files: layouts, formats and columns; a bad row is named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path

import datasets
import pytest

from gircse.training.pairs import load_pairs
from helpers import write_rows
from train_gircse import parse, read_pairs
from training_helpers import PAIR, spoil

pytestmark = pytest.mark.usefixtures("own_cache")


def write_table(path: Path, rows: list[dict]) -> str:
    """Writes rows as a CSV, or a TSV if the name says so; None is an empty cell."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t" if "tsv" in path.name else ",")
    table.writeheader()
    table.writerows(rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


# Reading


def test_query_layout(tmp_path):
    full = {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1"], "instruction": "do", "source": "a", "label": "x"}
    bare = {"query": "q2", "pos": "p3", "neg": None, "prompt": "say", "symmetric": True, "label": 3, "unused": 1}
    pairs = load_pairs(write_rows(tmp_path / "some.name.jsonl", [full, "", bare, PAIR]))
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
    pairs = load_pairs(write_rows(tmp_path / "st.jsonl", [row, {"anchor": "b", "positive": "c"}]))
    assert (pairs[0]["query"], pairs[0]["pos"], pairs[0]["neg"]) == ("a", ["p"], ["n0", "n1"])
    assert (pairs[0]["instruction"], pairs[0]["source"]) == ("i", "st")
    assert (pairs[1]["query"], pairs[1]["pos"], pairs[1]["neg"]) == ("b", ["c"], [])


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json"])
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_json_endings(tmp_path, ending, gz):
    pairs = load_pairs(write_rows(tmp_path / f"x.{ending}{gz}", [{"query": "naïve 😀", "pos": ["p"]}]))
    assert (pairs[0]["query"], pairs[0]["source"]) == ("naïve 😀", "x")


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_json_array(tmp_path, name):
    rows = json.dumps([{**PAIR, "query": "a"}, {**PAIR, "query": "b"}], indent=2)
    pairs = load_pairs(write_rows(tmp_path / name, [rows]))
    assert pairs["query"][:] == ["a", "b"] and set(pairs["source"]) == {"x"}
    with pytest.raises(ValueError, match=rf"{name}: row 2: field 'query' is empty"):
        load_pairs(write_rows(tmp_path / name, [json.dumps([PAIR, {**PAIR, "query": ""}])]))


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


@pytest.mark.parametrize("cell", ['["b", "c"]', "['b', 'c']", "['b'\n 'c']", "[]", ' ["b", 1] '])
@pytest.mark.parametrize("column", ["pos", "neg"])
def test_a_list_written_as_a_text_is_refused(tmp_path, column, cell):
    row = {"query": "q", "pos": "p", "neg": "n", column: cell}
    paths = write_table(tmp_path / "x.csv", [row]), write_rows(tmp_path / "x.jsonl", [row])
    for path, where in zip(paths, (r"x\.csv: row 1", r"x\.jsonl:1"), strict=True):
        with pytest.raises(
            ValueError, match=f"{where}: field '{column}' is a list written as one text, .*give a real list"
        ):
            load_pairs(path)


@pytest.mark.parametrize("text", ["[citation needed]", "[1]", "[b, c]", "['b', 'c'] is a list", "['b', 'c'"])
def test_a_text_in_brackets_is_a_text(tmp_path, text):
    assert load_pairs(write_table(tmp_path / "x.csv", [{"query": "q", "pos": text}]))["pos"][0] == [text]
    assert load_pairs(write_rows(tmp_path / "x.jsonl", [{"query": "q", "pos": [text, '["b"]']}]))["pos"][0] == [
        text,
        '["b"]',
    ]


def test_parquet(tmp_path):
    rows = [{"query": "q1", "pos": ["p"], "neg": ["n"], "symmetric": None}, {**PAIR, "neg": None, "symmetric": True}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    pairs = load_pairs(str(tmp_path / "x.parquet"))
    assert pairs["neg"][:] == [["n"], []] and pairs["symmetric"][:] == [False, True] and pairs["source"][0] == "x"


def test_folder_and_pattern(tmp_path):
    write_rows(tmp_path / "data" / "b.jsonl.gz", [PAIR, PAIR])
    write_rows(tmp_path / "data" / "a.jsonl", [PAIR])
    write_rows(tmp_path / "data" / "README.md", ["not read"])
    write_rows(tmp_path / "data" / "deep" / "c.jsonl", [PAIR])
    write_rows(tmp_path / "data" / "0.jsonl", [PAIR])
    assert load_pairs(str(tmp_path / "data"))["source"][:] == ["0", "a", "b", "b"]
    assert load_pairs(str(tmp_path / "data" / "b*"))["source"][:] == ["b", "b"]
    assert load_pairs(str(tmp_path / "data" / "**" / "*.jsonl"))["source"][:] == ["0", "a", "c"]


def test_files_of_one_name_are_sources_by_their_folders(tmp_path):
    """Labels are compared within a source, and batches are of one."""
    for name in ("nq/train.jsonl", "banking/deep/train.csv", "banking/deep/train.jsonl.gz", "other.jsonl"):
        if name.endswith("csv"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("query,pos\na,b\n")
        else:
            write_rows(tmp_path / name, [PAIR])
    assert load_pairs(str(tmp_path / "**/*.*"))["source"][:] == ["banking/deep/train"] * 2 + ["nq/train", "other"]
    assert load_pairs(str(tmp_path / "banking/deep"))["source"][:] == ["train", "train"]


def test_nothing_to_read(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for source in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileNotFoundError, match=r"no file here ends in \.jsonl"):
            load_pairs(str(source))
    with pytest.raises(ValueError, match=r"e\.jsonl: no rows"):
        load_pairs(write_rows(tmp_path / "e.jsonl", [""]))


def test_instruction_of_rows_that_have_none(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [PAIR, {**PAIR, "instruction": "own"}, {**PAIR, "prompt": None}])
    arguments = ["--train_data", path, "--output_dir", str(tmp_path), "--report_to", "none"]
    for given, expected in (["--instruction", "ask"], ["ask", "own", "ask"]), ([], ["", "own", ""]):
        _, data, training = parse(arguments + given)
        assert read_pairs(data, training)["instruction"][:] == expected


def test_symmetric_by_field_then_by_source(tmp_path):
    rows = [{**PAIR, "source": "a"}, {**PAIR, "source": "b"}, {**PAIR, "source": "a", "symmetric": False}]
    rows.append({**PAIR, "source": "b", "instruction": "Retrieve semantically similar text", "symmetric": True})
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert load_pairs(path)["symmetric"][:] == [False, False, False, True]
    assert load_pairs(path, symmetric_sources=["a"])["symmetric"][:] == [True, False, False, True]
    with pytest.raises(ValueError, match=r"no row of .*x\.jsonl has source \['c'\]; its sources are \['a', 'b'\]"):
        load_pairs(path, symmetric_sources={"a", "c"})
    assert len(load_pairs(path, symmetric_sources=["b"], limit=1)) == 1  # "b" comes later


def test_limit_reads_no_further(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{**PAIR, "query": f"q{i}"} for i in range(3)] + ["not JSON"])
    assert load_pairs(path, limit=3)["query"][:] == ["q0", "q1", "q2"]
    with pytest.raises(ValueError, match=r"x\.jsonl:4: broken JSON"):
        load_pairs(path, limit=4)
    for limit in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="limit=.* must be an integer >= 1"):
            load_pairs(path, limit=limit)


def test_changed_file_is_read_again(tmp_path):
    path = Path(write_rows(tmp_path / "x.jsonl", [{**PAIR, "query": "old"}]))
    assert load_pairs(str(path))["query"][0] == "old"
    before = path.stat()
    write_rows(path, [{**PAIR, "query": "new"}])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert load_pairs(str(path))["query"][0] == "new"


def test_unchanged_file_is_read_once(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [PAIR])
    first = load_pairs(path)
    spoil(path)
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
    '{"query": "q", "pos": ["p"], "source": 1.5}': "'source' must be text",
    '{"query": "q", "pos": ["p"], "label": 0.5}': "'label' must be text",
    '{"query": "q", "pos": ["p"], "label": true}': "'label' must be text",
    '{"query": "q", "pos": ["p"], "symmetric": "yes"}': "'symmetric' is 'yes'; write true or false",
    '{"query": "q", "pos": ["p"], "negative": ""}': "'negative' is empty",
    '{"query": "q \\ud83d", "pos": ["p"]}': "'query' holds half a character",
}


@pytest.mark.parametrize("line", BAD_ROWS)
def test_bad_row_names_file_and_line(tmp_path, line):
    path = write_rows(tmp_path / "bad.jsonl.gz", [PAIR, "", line, PAIR])
    with pytest.raises(ValueError, match=BAD_ROWS[line]) as error:
        load_pairs(path)
    assert type(error.value) is ValueError and str(error.value).startswith(f"{path}:3: ")


def test_unreadable_files(tmp_path):
    path = Path(write_rows(tmp_path / "cut.jsonl.gz", [{**PAIR, "query": f"q{i * 7919}"} for i in range(200)]))
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


def test_reading_is_shown_unless_progress_bars_are_off(tmp_path, capfd):
    datasets.enable_progress_bars()
    load_pairs(write_rows(tmp_path / "x.jsonl", [PAIR]))
    assert "1 examples" in capfd.readouterr().err
    datasets.disable_progress_bars()
    try:
        load_pairs(write_rows(tmp_path / "y.jsonl", [PAIR]))
    finally:
        datasets.enable_progress_bars()
    assert capfd.readouterr().err == ""
