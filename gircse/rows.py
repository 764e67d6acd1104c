"""Rows of a file, one at a time: the only reader of training pairs, corpora to embed and evaluation data.

    .jsonl .ndjson      a JSON object a line
    .json               the same, or one array of objects
    .csv .tsv           a header and records; an empty cell is None. The header tells whether a .csv has , or ; or tabs
    .parquet            text of any Arrow type

All but Parquet may end in .gz too. Files are UTF-8, with or without a byte order mark; blank lines are no rows. What is
wrong with one row, such as a line of broken JSON or a byte that is not UTF-8, is said of that row, so that the caller
can set it aside and go on.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

LINES, ARRAYS, TABLES, PARQUET = (".jsonl", ".ndjson"), ".json", (".csv", ".tsv"), ".parquet"
ENDINGS = tuple(end + gz for end in (*LINES, ARRAYS, *TABLES) for gz in ("", ".gz")) + (PARQUET,)
LONGEST_CELL = 2**31 - 1  # characters of a CSV's cell; the csv module's own limit is 131,072


def matching_files(pattern: str) -> list[Path]:
    """The files that a path or a glob pattern stands for; of a folder those that end in one of ENDINGS."""
    path = Path(pattern).expanduser()
    if pattern and path.is_dir():
        found = [file for file in path.iterdir() if file.name.endswith(ENDINGS)]
    else:
        found = [path] if path.is_file() else map(Path, glob.glob(str(path), recursive=True))
    return [file for file in found if file.is_file()]


class Row(NamedTuple):
    """A row as it was found: `number` counts from 1 (lines, in files of lines); `where` says for an error message where
    it is; `fields` is the row, or None if there is none to be had, and `error` then says why."""

    number: int
    where: str
    fields: dict[str, Any] | None
    error: str | None = None


class RowFile:
    """One file of rows. A `read` that begins where the last one ended, or after it, goes on from there, as gzip files
    and tables can only be read from their start.

    Args:
        path: a file that ends in one of ENDINGS.

    Raises:
        ValueError: from all methods, if the file can't be read to its end, or is not what its ending says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if not self.path.endswith(ENDINGS):
            raise ValueError(f"{self.path} ends in none of {', '.join(ENDINGS)}: rename it or leave it out")
        self.kind = Path(self.path.removesuffix(".gz")).suffix
        self._raw: Iterator[Any] | None = None
        self._parse: Callable[[Any], dict[str, Any]] = _parse_line
        self._position = 0

    def read(self, start: int = 0, stop: int | None = None, columns: Collection[str] | None = None) -> Iterator[Row]:
        """The rows start..stop - 1, counted from 0; of a Parquet file only `columns`, where they are given."""
        if self.kind == PARQUET:
            return self._parquet_rows(start, stop, columns)
        return self._text_rows(start, stop)

    def count(self) -> int:
        """How many rows there are; in files of lines, blank ones count."""
        if self.kind == PARQUET:
            with _readable(self.path), pyarrow.parquet.ParquetFile(self.path) as table:
                return table.metadata.num_rows
        with _readable(self.path):
            return sum(1 for _ in self._open())

    def _text_rows(self, start: int, stop: int | None) -> Iterator[Row]:
        number = 0
        try:
            with _readable(self.path, lambda: number):
                if self._raw is None or start < self._position:
                    self._raw, self._position = self._open(), 0
                number = self._position
                for _ in islice(self._raw, start - self._position):
                    number += 1
                self._position = start
                for raw in islice(self._raw, None if stop is None else stop - start):
                    number += 1
                    self._position = number
                    if isinstance(raw, bytes) and not raw.strip():
                        continue
                    try:
                        yield Row(number, self._where(number), self._parse(raw))
                    except (ValueError, RecursionError) as error:
                        yield Row(number, self._where(number), None, str(error))
        except ValueError:
            self._raw = None  # else the next `read` would take this place for the end of the file
            raise

    def _where(self, number: int) -> str:
        return f"{self.path}:{number}" if self._parse is _parse_line else f"{self.path}: row {number}"

    def _open(self) -> Iterator[Any]:
        """The file's rows before they are parsed, and how to parse them."""
        if self.kind in TABLES:
            return self._open_table()
        lines = _lines(self.path)
        if self.kind != ARRAYS:
            return lines
        start = list(islice(lines, 64))  # an array may begin below blank lines
        first = b"".join(start).lstrip()[:1]
        if first != b"[":
            return chain(start, lines)
        self._parse = _parse_object
        try:
            return iter(json.loads(b"".join(chain(start, lines))))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: broken JSON array ({error}); write one JSON object a line") from error

    def _open_table(self) -> Iterator[list[str] | csv.Error]:
        csv.field_size_limit(LONGEST_CELL)
        # Bytes that are not UTF-8 become lone surrogates, which `parse` looks for in each row.
        file = _open_text(self.path)
        header = file.readline()
        if not header.strip():
            raise ValueError(f"{self.path} has no header: the first line must name the columns")
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in header):
            raise ValueError(f"{self.path}: the header is not UTF-8 (UTF-16, perhaps): save the file in that encoding")
        delimiter = "\t" if self.kind == ".tsv" else max(",;\t", key=header.count)
        # A quoted name may hold a line break, so the header is read again as a record.
        records = csv.reader(chain([header], file), delimiter=delimiter, strict=True)
        names = [name.strip() for name in next(records)]
        if len({*names}) < len(names) or "" in names:
            remedy = "; pandas writes it so with to_csv(..., index=False)" if names[0] == "" else ""
            raise ValueError(f"{self.path}: the header must name each column once, not {names!r:.200}{remedy}")

        def parse(cells: list[str] | csv.Error) -> dict[str, Any]:
            if isinstance(cells, csv.Error):
                raise ValueError(f"{cells}; write a quote within a cell twice, and quotes around that cell")
            if len(cells) != len(names):
                raise ValueError(
                    f"{len(cells)} cells under {len(names)} column names; quote cells that hold {delimiter!r}"
                )
            if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise ValueError(
                    "a quote opens a cell that goes on over lines and tabs, in which rows may be lost; put quotes "
                    "around a text that begins with one, and write its own twice"
                )
            try:
                "".join(cells).encode()
            except UnicodeEncodeError as error:
                raise ValueError("text that is not UTF-8; save the file in that encoding") from error
            return {name: cell or None for name, cell in zip(names, cells, strict=True)}

        self._parse = parse
        return _records(records)

    def _parquet_rows(self, start: int, stop: int | None, columns: Collection[str] | None) -> Iterator[Row]:
        number = start
        with _readable(self.path, lambda: number), pyarrow.parquet.ParquetFile(self.path) as table:
            stop = table.metadata.num_rows if stop is None else stop
            counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            ends = list(accumulate(counts))
            groups = [group for group, end in enumerate(ends) if end > start and end - counts[group] < stop]
            position = ends[groups[0]] - counts[groups[0]] if groups else stop
            for batch in table.iter_batches(1000, row_groups=groups, columns=columns and sorted(columns)):
                first = max(start, position)
                part = batch[first - position : max(0, stop - position)]
                position += len(batch)
                # Text as bytes: Parquet does not make sure that it is UTF-8, and Arrow would refuse the whole batch.
                kinds = [field.type for field in part.schema]
                names = part.schema.names
                values = [part.column(i).cast(_as_bytes(kind)).to_pylist() for i, kind in enumerate(kinds)]
                for number, cells in enumerate(zip(*values, strict=True), first + 1):
                    where = f"{self.path}: row {number}"
                    try:
                        row = {n: _as_text(cell, kind) for n, cell, kind in zip(names, cells, kinds, strict=True)}
                        yield Row(number, where, row)
                    except ValueError as error:
                        yield Row(number, where, None, str(error))


def kept_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that a command adds to as it goes on, none if there is no file yet. Half a line at the
    end, as a killed run leaves it, is cut off. Lines are ASCII, so that no character can be half."""
    if not file.exists():
        return []
    whole, newline, half = file.read_text(encoding="ascii").rpartition("\n")
    if half:
        file.write_text(whole + newline, encoding="ascii")
    return [json.loads(line) for line in whole.split("\n") if line]


def require(row: Row) -> dict[str, Any]:
    """The fields of a row; a ValueError with its place if there are none."""
    if row.fields is None:
        raise ValueError(f"{row.where}: {row.error}")
    return row.fields


@contextmanager
def _readable(path: str, number: Callable[[], int] = lambda: 0) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, zlib.error, csv.Error, pyarrow.ArrowException) as error:
        after = f" after row {number()}" if number() else ""
        raise ValueError(f"{path} can't be read to its end{after} ({error}): write or download it again") from error


def _lines(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        for index, line in enumerate(file):
            yield line.removeprefix(b"\xef\xbb\xbf") if index == 0 else line


def _open_text(path: str) -> Any:
    how = {"mode": "rt", "encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    return gzip.open(path, **how) if path.endswith(".gz") else open(path, **how)


def _records(reader: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """The records that are not blank; for one that breaks the rules of quoting, what is wrong with it."""
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # the rest of the file was read as one cell
                raise csv.Error("a quote is never closed") from error
            cells = error
        if cells is None:
            return
        if cells:
            yield cells


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"broken JSON ({error}); write one JSON object a line, in UTF-8") from error
    return _parse_object(row)


def _parse_object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object with named fields, not {row!r:.60}")
    return row


def is_text(kind: pyarrow.DataType) -> bool:
    """Whether an Arrow type holds text: also dictionaries of it (pandas' categories) and string views (Polars)."""
    if pyarrow.types.is_dictionary(kind):
        return is_text(kind.value_type)
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    return any(test(kind) for test in tests)


def _as_bytes(kind: pyarrow.DataType) -> pyarrow.DataType:
    if is_text(kind):
        return pyarrow.large_binary()
    tests = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
    if any(test(kind) for test in tests):
        return pyarrow.large_list(_as_bytes(kind.value_type))
    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


def _as_text(value: Any, kind: pyarrow.DataType) -> Any:
    if isinstance(value, list) and not pyarrow.types.is_map(kind):
        return [_as_text(entry, kind.value_type) for entry in value]
    if isinstance(value, dict):
        return {name: _as_text(entry, kind.field(name).type) for name, entry in value.items()}
    if not (isinstance(value, bytes) and is_text(kind)):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"text that is not UTF-8 ({error})") from error
