"""Rows of evaluation files: what each field must be, checked before any text is embedded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..rows import RowFile, require

# Each takes a field's value and returns it as the task needs it. The ValueError says what it must be, and the remedy.
Check = Callable[[Any], Any]


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text, and not empty: correct the row or remove it")
    if any("\ud800" <= letter <= "\udfff" for letter in value):  # JSON can hold one, as \ud83d
        raise ValueError("has half a character (a lone surrogate): write the text anew or remove the row")
    return value


def text_or_empty(value: Any) -> str:
    return "" if value is None or value == "" else text(value)


def name(value: Any) -> str:
    """A label or an id."""
    if isinstance(value, float) and value.is_integer():  # pandas' whole numbers, if one is missing
        value = int(value)
    if isinstance(value, bool):
        value = str(value).lower()  # as in JSON and most tables
    if not isinstance(value, (str, int)) or value == "":
        raise ValueError("must be text, a whole number, true or false: correct the row or remove it")
    return str(value)


def number(value: Any) -> float:
    """From a number or, as tables have it, the text of one."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError("must be a finite number: correct the row or remove it")
    return found


def grade(value: Any) -> int:
    """mteb's nDCG takes whole grades alone, and its other metrics count a document as relevant from grade 1 on. So
    a grade such as 0.5 is refused: to round or to scale it would be to decide whether the document is relevant, and
    that is for those who made the grades."""
    if (found := number(value)) != int(found):
        raise ValueError("must be a whole number, from 1 on for what is relevant: rewrite all of the file's grades so")
    return int(found)


def binary(value: Any) -> int:
    found = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}.get(str(value).lower())
    if found is None:
        raise ValueError("must be 0 or 1: correct the row or remove it")
    return found


def facet_labels(value: Any) -> dict[str, str]:
    """Label by facet. A null counts as no label, since Parquet has all facets in all rows."""
    if not isinstance(value, dict):
        raise ValueError("must be an object, {facet: label, ..}; a table can't hold it: write a JSON object a line")
    return {facet: name(label) for facet, label in value.items() if label is not None}


def name_in_files(value: Any) -> str:
    """Text that is part of the names of result files, so that all systems must allow its characters."""
    if re.search(r'[<>:"/\\|?*\x00-\x1f]', text(value)):
        raise ValueError("is part of a file's name, which can't hold any of < > : \" / \\ | ? *: rename it")
    return value


def read_rows(path: Path, **checks: Check) -> list[dict[str, Any]]:
    """The rows of a file with the fields that `checks` names, in its order, as the checks return them.

    Raises:
        ValueError: if the file can't be read or has no rows; for a row that can't be read, lacks a field or has a wrong
            value, with its place, field and value.
    """
    return [values for _, values in located_rows(path, checks)]


def located_rows(
    path: Path, checks: dict[str, Check], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_rows`, each row with its place for an error message. Of a field that is `optional`, a row without it has
    None to check."""
    row = None
    for row in RowFile(path).read():
        fields, values = require(row), {}
        for field, check in checks.items():
            if field not in fields and field not in optional:
                raise ValueError(f"{row.where}: there is no {field}, but {', '.join(fields)}: add it or rename one")
            try:
                values[field] = check(fields.get(field))
            except ValueError as error:
                raise ValueError(f"{row.where}: {field}={fields.get(field)!r:.80} {error}") from error
        yield row.where, values
    if row is None:
        raise ValueError(f"{path} has no rows: fill it or remove it")


def must_differ(where: Path | str, field: str, values: Sequence[Any]) -> None:
    """Raises a ValueError if all are the same, which leaves nothing to score."""
    if len({*values}) < 2:
        raise ValueError(f"{where}: {field} is {values[0]!r:.80} in all rows: at least two different ones are needed")


def columns(rows: list[dict[str, Any]], **names: str) -> Dataset:
    """A data set whose column `new` holds the field `names[new]`."""
    return Dataset.from_dict({new: [row[field] for row in rows] for new, field in names.items()})


def drawn_rows(rows: Dataset, count: int) -> Dataset:
    """Up to `count` rows, the same ones each time."""
    return rows.shuffle(seed=0).select(range(min(count, len(rows))))
