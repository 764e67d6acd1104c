"""What `gircse.rows` promises: every ending gives the same rows, a fault of one row is said of that row alone, and a
file that can't be read to its end is never taken for a shorter one."""

import gzip
import json
from pathlib import Path

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from packaging.version import Version

from gircse.rows import ENDINGS, Row, RowFile, require

ROWS = [{"id": "1", "text": "naïve 😀"}, {"id": "2", "text": "two\nlines, and a comma"}, {"id": "3", "text": None}]
JSON_ENDINGS = [ending for ending in ENDINGS if ".json" in ending or ".ndjson" in ending]
LINE_ENDINGS = [ending for ending in JSON_ENDINGS if not ending.startswith(".json.") and ending != ".json"]
TABLE_ENDINGS = [".csv", ".tsv", ".csv.gz", ".tsv.gz"]


def write(path: Path, content: str | bytes) -> str:
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def write_table(path: Path, rows: list[dict], delimiter: str) -> str:
    def quoted(cell: str | None) -> str:
        return "" if cell is None else '"' + cell.replace('"', '""') + '"'

    lines = [delimiter.join(rows[0]), *(delimiter.join(map(quoted, row.values())) for row in rows)]
    return write(path, "".join(line + "\r\n" for line in lines))


def write_text(folder: Path, texts: list[bytes], kind: pyarrow.DataType, row_group_size: int | None = None) -> str:
    """A Parquet file whose text column has these bytes, UTF-8 or not."""
    stored = pyarrow.array(texts, pyarrow.large_binary() if "large" in str(kind) else pyarrow.binary())
    column = pyarrow.Array.from_buffers(kind, len(texts), stored.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "x.parquet", row_group_size=row_group_size)
    return str(folder / "x.parquet")


def fields(path: str, **arguments) -> list:
    return [row.fields for row in RowFile(path).read(**arguments)]


def faults(path: str) -> list:
    """(number, what is wrong) of the rows that can't be had."""
    return [(row.number, row.error) for row in RowFile(path).read() if row.fields is None]


# All endings


def test_the_endings_are_those_of_the_docstring():
    assert ENDINGS == (
        *(".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json", ".json.gz"),
        *(".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet"),
    )
    for name in ("x.txt", "x.parquet.gz", "x", "x.gz"):
        with pytest.raises(ValueError, match=f"{name} ends in none of .jsonl, .*: rename it or leave it out"):
            RowFile(name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_gives_the_same_rows(tmp_path, ending):
    path = tmp_path / f"some.name{ending}"
    if ending in TABLE_ENDINGS:
        write_table(path, ROWS, "\t" if "tsv" in ending else ",")
    elif ending == ".parquet":
        pandas.DataFrame(ROWS).to_parquet(path)
    else:
        write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    rows = list(RowFile(path).read())
    assert [row.fields for row in rows] == ROWS and [row.error for row in rows] == [None] * 3
    assert [row.number for row in rows] == [1, 2, 3]
    where = f"{path}:2" if ending in JSON_ENDINGS else f"{path}: row 2"
    assert rows[1].where == where and RowFile(path).count() == 3


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
@pytest.mark.parametrize("before", ["", "\n \n", "\ufeff", "\ufeff\n"])
def test_json_arrays(tmp_path, ending, before):
    path = write(tmp_path / f"x{ending}", before + json.dumps(ROWS, indent=1))
    rows = list(RowFile(path).read())
    assert [row.fields for row in rows] == ROWS and rows[2].where == f"{path}: row 3" and RowFile(path).count() == 3
    assert fields(write(tmp_path / "none.json", "[]")) == []


@pytest.mark.parametrize("ending", JSON_ENDINGS)
def test_blank_lines_are_no_rows_and_keep_their_numbers(tmp_path, ending):
    path = write(tmp_path / f"x{ending}", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": 2}')
    assert [(row.number, row.fields) for row in RowFile(path).read()] == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("ending", TABLE_ENDINGS)
def test_tables_with_byte_order_mark_and_blank_lines(tmp_path, ending):
    tab = "\t" if "tsv" in ending else ","
    path = write(tmp_path / f"x{ending}", f"\ufeffa{tab} b \r\n\r\n1{tab}2\r\n\r\n3{tab}4".encode())
    assert [(row.number, row.fields) for row in RowFile(path).read()] == [
        (1, {"a": "1", "b": "2"}),
        (2, {"a": "3", "b": "4"}),
    ]


@pytest.mark.parametrize("content", ["", "\n", "\ufeff"])
def test_a_table_without_header_is_refused(tmp_path, content):
    for ending in TABLE_ENDINGS:
        with pytest.raises(ValueError, match=rf"x{ending} has no header: the first line must name the columns"):
            fields(write(tmp_path / f"x{ending}", content))


@pytest.mark.parametrize("header", ["a,b,a", "a,,b", "a,b,"])
def test_a_header_names_each_column_once(tmp_path, header):
    with pytest.raises(ValueError, match=r"x\.csv: the header must name each column once, not \['a', "):
        fields(write(tmp_path / "x.csv", f"{header}\n1,2,3\n"))


def test_an_index_of_pandas_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"not \['', 'query'\]; pandas writes it so with to_csv\(..., index=False\)"):
        fields(write(tmp_path / "x.csv", ",query\n0,a\n"))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_of_lines_may_be_empty(tmp_path, content):
    assert all(fields(write(tmp_path / f"x{ending}", content)) == [] for ending in JSON_ENDINGS)


# Tables


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_header_tells_the_delimiter_of_a_csv(tmp_path, delimiter):
    rows = [{"a": "x, y; z\tw", "b": 'he said "no"'}, {"a": "two\r\nlines\n", "b": None}]
    assert fields(write_table(tmp_path / "x.csv", rows, delimiter)) == rows


def test_quotes_of_a_tsv_that_does_not_quote_swallow_no_rows(tmp_path):
    """As in MS MARCO's: a text that begins with a quote, and a later one that ends with one."""
    path = write(tmp_path / "x.tsv", 'id\ttext\n1\t"Hello world\n2\tplain\n3\tbye"\n4\tz\n5\t"two\nlines"\n')
    found = [(row.fields, row.error) for row in RowFile(path).read()]
    error = found[0][1]
    assert error.startswith("a quote opens a cell that goes on over lines and tabs, in which rows may be lost")
    assert found == [(None, error), ({"id": "4", "text": "z"}, None), ({"id": "5", "text": "two\nlines"}, None)]


def test_a_header_may_have_quotes_and_a_line_break(tmp_path):
    assert fields(write(tmp_path / "x.csv", '"the\nquery",pos\nq,p\n')) == [{"the\nquery": "q", "pos": "p"}]


def test_a_table_may_have_one_column(tmp_path):
    assert fields(write(tmp_path / "x.csv", "text\none\ntwo\n")) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_a_header_in_another_encoding_is_told(tmp_path, encoding):
    path = write(tmp_path / "x.csv", "Frage;Erklärung\nq;p\n".encode(encoding))
    with pytest.raises(ValueError, match=r"x\.csv: the header is not UTF-8 \(UTF-16, perhaps\): save the file in that"):
        fields(path)


def test_a_cell_may_be_longer_than_the_csv_module_takes_by_itself(tmp_path):
    path = write(tmp_path / "x.csv", f"a,b\n{'x' * 200_000},y\n")
    assert [(len(row["a"]), row["b"]) for row in fields(path)] == [(200_000, "y")]


@pytest.mark.parametrize(
    "line, error",
    [
        ("only one", "1 cells under 2 column names; quote cells that hold ','"),
        ("a, b, c", "3 cells under 2 column names; quote cells that hold ','"),
        ('"a" b,c', "',' expected after '\"'; write a quote within a cell twice, and quotes around that cell"),
        (b"caf\xe9,b", "text that is not UTF-8; save the file in that encoding"),
    ],
)
def test_a_fault_of_one_record(tmp_path, line, error):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "x.csv", b"a,b\n1,2\n" + line + b"\n3,4\n")
    assert faults(path) == [(2, error)]
    assert fields(path) == [{"a": "1", "b": "2"}, None, {"a": "3", "b": "4"}]
    last = write(tmp_path / "last.csv", b"a,b\n1,2\n" + line)
    assert faults(last) == [(2, error)]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest(tmp_path):
    path = write(tmp_path / "x.csv", 'a,b\n1,2\n"3,4\n' + "5,6\n" * 1000)
    with pytest.raises(ValueError, match=r"x\.csv can't be read to its end after row 1 \(a quote is never closed\)"):
        fields(path)


# Faults of one row


@pytest.mark.parametrize("ending", LINE_ENDINGS)
@pytest.mark.parametrize(
    "line, error",
    [
        (b'{"a": ', "broken JSON .*; write one JSON object a line, in UTF-8"),
        (b'{"a": "caf\xe9"}', "broken JSON .*; write one JSON object a line, in UTF-8"),
        (b'["a"]', r"a row must be a JSON object with named fields, not \['a'\]"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_a_fault_of_one_line(tmp_path, ending, line, error):
    path = write(tmp_path / f"x{ending}", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    rows = list(RowFile(path).read())
    assert [row.fields for row in rows] == [{"a": 1}, None, {"a": 2}]
    with pytest.raises(ValueError, match=f"{rows[1].where}: {error}"):
        require(rows[1])
    assert rows[1].where == f"{path}:2" and require(rows[2]) == {"a": 2}


def test_a_fault_of_one_entry_of_an_array(tmp_path):
    path = write(tmp_path / "x.json", json.dumps([{"a": 1}, "b", {"a": 2}]))
    assert fields(path) == [{"a": 1}, None, {"a": 2}]
    assert faults(path) == [(2, "a row must be a JSON object with named fields, not 'b'")]


# Parquet


def columns_of_text() -> dict[str, pyarrow.Array]:
    texts = ["x", "é", None]
    lists = [["x", None], [], None]
    return {
        "string": pyarrow.array(texts),
        "large_string": pyarrow.array(texts, pyarrow.large_string()),
        "string_view": pyarrow.array(texts, pyarrow.string_view()),
        "category": pyarrow.array(texts).dictionary_encode(),
        "list": pyarrow.array(lists, pyarrow.list_(pyarrow.string())),
        "large_list": pyarrow.array(lists, pyarrow.large_list(pyarrow.large_string())),
        "fixed_list": pyarrow.array([["x", "y"], ["z", None], None], pyarrow.list_(pyarrow.string(), 2)),
        "struct": pyarrow.array([{"text": "x", "n": 1}, {"text": None, "n": 2}, None]),
        "numbers": pyarrow.array([1, 2, None]),
    }


@pytest.mark.parametrize("name", columns_of_text())
def test_parquet_columns_of_every_type_of_text(tmp_path, name):
    if name in ("string_view", "fixed_list") and Version(pyarrow.__version__) < Version("24"):
        pytest.skip("this pyarrow can't write or read it")
    column = columns_of_text()[name]
    pyarrow.parquet.write_table(pyarrow.table({name: column}), tmp_path / "x.parquet")
    assert [row[name] for row in fields(str(tmp_path / "x.parquet"))] == column.to_pylist()


def test_pandas_categories(tmp_path):
    pandas.DataFrame({"a": pandas.Categorical(["x", "y", "x", None])}).to_parquet(tmp_path / "x.parquet")
    assert [row["a"] for row in fields(str(tmp_path / "x.parquet"))] == ["x", "y", "x", None]


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_bytes_that_are_not_utf8_are_a_fault_of_one_parquet_row(tmp_path, kind):
    path = write_text(tmp_path, [b"one", b"caf\xe9", "naïve".encode()], kind)
    assert fields(path) == [{"text": "one"}, None, {"text": "naïve"}]
    assert [(number, error[:22]) for number, error in faults(path)] == [(2, "text that is not UTF-8")]


def test_bytes_that_are_not_utf8_within_other_columns(tmp_path):
    stored = pyarrow.array([b"one", b"caf\xe9"])
    text = pyarrow.StringArray.from_buffers(2, *stored.buffers()[1:])
    nested = {
        "list": pyarrow.ListArray.from_arrays([0, 1, 2], text),
        "fixed": pyarrow.FixedSizeListArray.from_arrays(text, 1),
        "struct": pyarrow.StructArray.from_arrays([text], ["text"]),
    }
    for name, column in nested.items():
        pyarrow.parquet.write_table(pyarrow.table({name: column}), tmp_path / "x.parquet")
        rows = list(RowFile(tmp_path / "x.parquet").read())
        assert [row.fields is None for row in rows] == [False, True], name


def test_only_the_columns_that_are_asked_for(tmp_path):
    pandas.DataFrame({"a": ["x"], "b": ["y"], "c": ["z"]}).to_parquet(tmp_path / "x.parquet")
    assert fields(str(tmp_path / "x.parquet"), columns={"c", "a", "none"}) == [{"a": "x", "c": "z"}]


# Parts of a file


def many_rows(folder: Path, ending: str, count: int = 3210) -> str:
    path = folder / f"x{ending}"
    if ending == ".parquet":
        table = pyarrow.table({"n": [str(n) for n in range(count)]})
        pyarrow.parquet.write_table(table, path, row_group_size=777)
    elif ending in TABLE_ENDINGS:
        write(path, "n\n" + "".join(f"{n}\n" for n in range(count)))
    elif ending == ".json":
        write(path, json.dumps([{"n": str(n)} for n in range(count)]))
    else:
        write(path, "".join(json.dumps({"n": str(n)}) + "\n" for n in range(count)))
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv.gz", ".parquet"])
def test_parts_forwards_and_backwards(tmp_path, ending):
    file = RowFile(many_rows(tmp_path, ending))
    parts = [(0, 2), (2, 1000), (1500, 1501), (776, 778), (0, 1), (3200, None), (3210, None), (9999, 10000), (5, 5)]
    for start, stop in parts:
        rows = list(file.read(start, stop))
        assert [row.fields["n"] for row in rows] == [str(n) for n in range(3210)][start:stop]
        assert [row.number for row in rows] == list(range(start + 1, start + 1 + len(rows)))
    assert [row.number for row in file.read()] == list(range(1, 3211))


@pytest.mark.parametrize("ending", [".jsonl.gz", ".csv", ".parquet"])
def test_a_part_that_was_left_halfway(tmp_path, ending):
    file = RowFile(many_rows(tmp_path, ending))
    assert next(iter(file.read(10, 20))).fields == {"n": "10"}
    assert [row.fields["n"] for row in file.read(11, 13)] == ["11", "12"]
    assert [row.fields["n"] for row in file.read(10, 12)] == ["10", "11"]


# Files that can't be read


@pytest.mark.parametrize("ending", [ending for ending in ENDINGS if ending.endswith(".gz")])
def test_a_truncated_gz_file_is_no_shorter_file(tmp_path, ending):
    path = Path(many_rows(tmp_path, ending))
    path.write_bytes(path.read_bytes()[:-200])
    file = RowFile(path)
    for start in (0, 0, 5000):  # nor is it one when it is read again
        with pytest.raises(ValueError, match=r"can't be read to its end.*: write or download it again"):
            list(file.read(start))
    with pytest.raises(ValueError, match="can't be read to its end"):
        file.count()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".json.gz", ".csv.gz", ".parquet"])
def test_a_file_that_is_not_what_its_ending_says(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    path.write_bytes(b"plain text")
    for read in (fields, lambda path: RowFile(path).count()):
        with pytest.raises(ValueError, match=rf"x{ending} can't be read to its end"):
            read(str(path))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_that_is_not_there(tmp_path, ending):
    with pytest.raises(ValueError, match=rf"no{ending} can't be read to its end .*No such file"):
        fields(str(tmp_path / f"no{ending}"))


def test_a_broken_array_is_a_fault_of_the_file(tmp_path):
    for content in ('[{"a": 1}, {"a": 2}', '[{"a": 1}] [', b'[{"a": "caf\xe9"}]', "[" * 100_000):
        with pytest.raises(ValueError, match=r"x\.json: broken JSON array \(.*\); write one JSON object a line"):
            fields(write(tmp_path / "x.json", content))


def test_a_row_without_fields_has_a_place_and_a_reason():
    with pytest.raises(ValueError, match=r"^x\.csv: row 7: broken$"):
        require(Row(7, "x.csv: row 7", None, "broken"))
