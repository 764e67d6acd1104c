"""Training pairs: files, folders, patterns and Hub ids of any layout, read and checked row by row.

Under `instruction`, the embedding of `query` (q) belongs near each text of `pos` (d+) and far from each of `neg` (the
hard negatives d-).
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
from datasets.exceptions import DatasetGenerationError

from .. import rows as reader
from ..rows import require
from . import sources as finder
from .sources import file_rows, find_files, hub_rows, load_hub

# FlagEmbedding's types of tasks with the instruction on both sides. "symmetric_class" is none: its documents are bare
# names of classes.
SYMMETRIC_TYPES = ("symmetric_sts", "symmetric_clustering")
TEXT, TEXTS, FLAG = datasets.Value("string"), datasets.Sequence(datasets.Value("string")), datasets.Value("bool")
FEATURES = datasets.Features(
    dict(query=TEXT, pos=TEXTS, neg=TEXTS, instruction=TEXT, source=TEXT, symmetric=FLAG, label=TEXT)
)
GENERATED = datasets.Features({**FEATURES, "bad": TEXT, "unused": TEXTS})
# Columns (query, positive) whose names say that each row is a pair; any of them may have negatives beside them.
STATED_PAIRS = (("query", "pos"), ("anchor", "positive"), ("query", "positive"))
# Columns of pairs in Sentence Transformers' published data sets. Elsewhere a label or a score may stand beside them.
USUAL_PAIRS = (
    *(("question", "answer"), ("query", "answer"), ("title", "answer"), ("title", "question")),
    *(("title", "abstract"), ("title", "citation"), ("abstract", "citation"), ("comment", "code")),
    *(("title", "body"), ("title", "article"), ("title", "description"), ("title", "review")),
    *(("text", "simplified"), ("text", "summary"), ("article", "summary"), ("english", "non_english")),
    *((f"{name}1", f"{name}2") for name in ("title", "body", "post", "caption", "sentence", "question")),
)
NEGATIVES = re.compile(r"(hard_?)?neg(ative)?s?(_?\d+)?")
# Names of columns that may say that two texts are not a pair.
JUDGEMENTS = re.compile("label|score|similar|relevan|duplicate|entail|paraphrase|match|gold|target", re.IGNORECASE)

logger = logging.getLogger("gircse")


def load_pairs(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    symmetric_sources: Collection[str] = (),
    instruction: str = "",
    limit: int | None = None,
    max_bad_share: float | None = None,
    bad_rows_file: str | Path | None = None,
) -> datasets.Dataset:
    """Reads pairs, checks every row, and returns them with the columns of FEATURES.

    Each row has a query and positives (a text or list each) in columns of STATED_PAIRS or USUAL_PAIRS, or in those that
    `columns` names, and may have hard negatives in `neg`, `negatives`, `hard_negatives`, `negative_1`, ... All take
    `instruction` or `prompt`, `source` (default: the file's name without ending; on the Hub the split where there are
    several, the instruction, so that rows of one task still go together, or the id), `label`, and `symmetric`, which
    says whether documents get the instruction too. Without it, `type` (FlagEmbedding's field) or `symmetric_sources`
    does. Columns that are not used are named in a warning.

    Args:
        source: file (see ENDINGS), folder, glob pattern or Hub id.
        config: the configuration of a Hub data set that has several; local files have none.
        split: the split of a Hub data set, by default `train`, or where there is none all that aren't to test on, as
            in data sets with a split a source; local files have none.
        columns: which of the data's columns are ours, as {"query": "question", "neg": ["hard_1", "hard_2"]}; only `pos`
            and `neg` take several. Where it names `query` or `pos`, a `label` is only read if it names that too.
        instruction: of the rows that have none.
        limit: read only the first rows (a Hub data set is then streamed), of several splits in proportion to their
            sizes.
        max_bad_share: leave wrong rows out, as long as they are not more than this share (0 <= share < 1) of all that
            are read. Without it the first wrong row is an error.
        bad_rows_file: with `max_bad_share`, where the rows left out are listed, as {"file", "row", "reason"} a line;
            there is no such file if there are none.

    Raises:
        FileNotFoundError: nothing is found under `source`.
        ValueError: a wrong row, named as "{file}:{line}: ...", too many of them, a file that can't be read to its end,
            or a wrong or missing argument. A name in `columns` or `symmetric_sources` that no row has is wrong too; for
            the latter unless `limit` cuts rows off.
    """
    if limit is not None:
        check_count("limit", limit, minimum=1)
    if max_bad_share is not None and not (type(max_bad_share) in (int, float) and 0 <= max_bad_share < 1):
        raise ValueError(f"max_bad_share must be a share of the rows, 0 <= share < 1, not {max_bad_share!r}")
    files = find_files(source)
    for name, value in (("config", config), ("split", split)):
        if files and value is not None:
            raise ValueError(f"{name}={value!r} is for data sets on the Hub, and {source!r} is local: leave it out")
    arguments = {
        "name": source,
        "rows": files or load_hub(source, config, split, limit),
        "columns": _check_columns(columns or {}),
        "symmetric_sources": tuple(sorted(symmetric_sources)),
        "instruction": instruction,
        "limit": limit,
        "keeps_bad": max_bad_share is not None,
        "versions": tuple(map(_version, (__file__, finder.__file__, reader.__file__, *files))),
    }
    try:
        pairs = datasets.Dataset.from_generator(_generate, features=GENERATED, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # it names file and line; datasets' error says neither
        raise
    _warn_of_columns(pairs, source)
    good = _without_bad_rows(pairs.remove_columns("unused"), source, max_bad_share, bad_rows_file)
    _check_labels(pairs, source)
    return good


def _version(file: str) -> tuple[int, int]:
    state = os.stat(file)
    return state.st_size, state.st_mtime_ns


def _warn_of_columns(rows: datasets.Dataset, name: str) -> None:
    """Names columns that are not used, and positives that are the queries themselves."""
    unused = sorted(set(chain.from_iterable(rows.data.column("unused").drop_null().to_pylist())))
    if unused:
        found = ", ".join(map(repr, unused))
        logger.warning(f"{name}: not used: {found}; what belongs to a pair must be named, as --columns neg=..")
    first = rows[:1000]
    pairs = [(query, pos) for query, pos in zip(first["query"], first["pos"], strict=True) if pos]
    if pairs and all({query} == {*pos} for query, pos in pairs):
        logger.warning(f"{name}: the positive of each of the first {len(pairs)} rows is its query; see --columns")


def _check_labels(rows: datasets.Dataset, name: str) -> None:
    """Raises a ValueError if no text of the good rows is a negative of another, which leaves nothing to learn; warns of
    labels that may say something else than a class."""
    labels = rows.data.column("label").filter(pyarrow.compute.is_null(rows.data.column("bad")))
    if set(labels.unique().to_pylist()) == {"0", "1"}:
        logger.warning(
            f"{name}: label is 0 or 1, and taken for the class of a query: all rows are pairs. If it says whether a "
            "row's texts belong together, keep the rows of 1 alone, without the column"
        )
    if len(labels) < 2 or len(labels.unique()) > 1 or not labels[0].is_valid:
        return
    if not pyarrow.compute.sum(pyarrow.compute.list_value_length(rows.data.column("neg"))).as_py():
        raise ValueError(
            f"{name}: label is {labels[0].as_py()!r:.60} in all {len(labels)} rows, and there are no hard negatives. "
            "Texts of one label are no negatives of each other, so that nothing could be learned. If it says whether a "
            "row's texts belong together, leave the column out, or name those of the pair, by --columns query=.. pos=.."
        )


def describe(pairs: datasets.Dataset) -> str:
    """What was read, in one line, by which a column under another name than it should have shows."""
    negatives, prompted, sources = 0, 0, set()
    for rows in pairs.select_columns(["neg", "instruction", "source"]).with_format("arrow").iter(10_000):
        negatives += pyarrow.compute.sum(pyarrow.compute.list_value_length(rows["neg"])).as_py()
        prompted += pyarrow.compute.sum(pyarrow.compute.not_equal(rows["instruction"], "")).as_py()
        sources.update(rows["source"].unique().to_pylist())
    return (
        f"{len(pairs)} pairs from {len(sources)} source{'s' * (len(sources) > 1)}: {prompted / len(pairs):.0%} have an "
        f"instruction; {negatives / len(pairs):.1f} hard negatives a pair"
    )


def parse_columns(words: Sequence[str]) -> dict[str, list[str]]:
    """`load_pairs`'s `columns` from a command line's words: `query=question,pos=answer`, `neg=hard_1,hard_2`."""
    columns: dict[str, list[str]] = {}
    for part in ",".join(words).split(",") if words else ():
        ours, _, theirs = part.partition("=")
        if ours in FEATURES and theirs and ours not in columns:
            columns[ours] = [theirs]
        elif ours in FEATURES or theirs or not part or not columns:
            raise ValueError(
                f"columns: {part!r} must be ours=theirs, with each of ours once, as query=question or "
                f"neg=hard_1,hard_2; ours are {', '.join(FEATURES)}"
            )
        else:
            list(columns.values())[-1].append(part)
    return columns


def _check_columns(columns: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    checked = {ours: [theirs] if isinstance(theirs, str) else list(theirs) for ours, theirs in sorted(columns.items())}
    for ours, theirs in checked.items():
        if ours not in FEATURES:
            raise ValueError(
                f"columns: {ours!r} is none of {', '.join(FEATURES)}; give ours=theirs, as query=question pos=answer"
            )
        if not theirs or (len(theirs) > 1 and ours not in ("pos", "neg")):
            raise ValueError(f"columns: {ours!r} is one column, not {theirs!r}; only pos and neg can be several")
    return checked


def _without_bad_rows(
    rows: datasets.Dataset, name: str, max_bad_share: float | None, bad_rows_file: str | Path | None
) -> datasets.Dataset:
    """The good rows of what `_generate` yields, also when it was read from the cache; lists the others."""
    column = rows.data.column("bad")
    bad = column.drop_null().to_pylist()
    if bad_rows_file is not None:
        path = Path(bad_rows_file)
        if bad:
            path.write_text("".join(line + "\n" for line in bad), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)  # of an earlier run
    rows = rows.remove_columns("bad")
    if not bad:
        return rows
    first = "; ".join("{file}, row {row}: {reason}".format(**json.loads(line)) for line in bad[:3])
    listed = "" if bad_rows_file is None else f" (all of them in {bad_rows_file})"
    if len(bad) > max_bad_share * len(rows):
        raise ValueError(
            f"{name}: {len(bad)} of {len(rows)} rows are wrong, more than max_bad_share={max_bad_share} "
            f"(--max_bad_share) allows; repair them or allow more{listed}: {first}"
        )
    logger.warning(f"{name}: left out {len(bad)} of {len(rows)} rows, which are wrong{listed}: {first}")
    return rows.select(pyarrow.compute.indices_nonzero(column.is_null()).to_pylist())


def _generate(
    name: str,
    rows: Any,
    columns: dict[str, list[str]],
    symmetric_sources: tuple[str, ...],
    instruction: str,
    limit: int | None,
    keeps_bad: bool,
    versions: tuple[tuple[int, int], ...],
) -> Iterator[dict[str, Any]]:
    """Yields checked rows of files (a tuple of paths) or of a Hub data set's splits; with `keeps_bad` also the wrong
    ones, empty but for `bad`. In `unused` are columns that a row has and none is read from, at the first row that has
    them. `versions` is not used: datasets names its cache by a hash of all arguments, so that a changed file, or a new
    version of the code, is read again."""
    count, sources, there, unused = 0, set(), set(), set()
    found = file_rows(rows) if isinstance(rows, tuple) else hub_rows(name, rows)
    for count, (file, default_source, row) in enumerate(islice(found, limit), 1):  # noqa: B007
        try:
            if columns:
                there.update(row.fields or ())
            fields = require(row)
            pair, used = _to_pair(fields, row.where, (default_source, name), symmetric_sources, instruction, columns)
        except ValueError as error:
            if not keeps_bad:
                raise
            bad = {"file": file, "row": row.number, "reason": str(error).removeprefix(f"{row.where}: ")}
            yield dict.fromkeys((*FEATURES, "unused")) | {"bad": json.dumps(bad)}
            continue
        sources.add(pair["source"])
        new = {field for field, value in fields.items() if value not in (None, "", [])} - used - unused
        unused |= new
        yield pair | {"bad": None, "unused": sorted(new) or None}
    if count == 0:
        raise ValueError(f"{name}: no rows; give at least one training pair")
    missing = sorted({theirs for names in columns.values() for theirs in names} - there)
    if missing:
        raise ValueError(f"columns: no row of {name} has {missing}; there are {sorted(there)}")
    unknown = sorted(set(symmetric_sources) - sources)
    if unknown and count != limit:
        raise ValueError(f"symmetric_sources: no row of {name} has source {unknown}; its sources are {sorted(sources)}")


def _to_pair(
    row: dict[str, Any],
    where: str,
    default_sources: tuple[str, str],
    symmetric_sources: Collection[str],
    default_instruction: str,
    columns: Mapping[str, list[str]],
) -> tuple[dict[str, Any], set[str]]:
    """Checks one row and returns it with the columns of FEATURES, and which fields it was read from. Its source is,
    unless it says so itself, the first of `default_sources`, the instruction and the last of `default_sources` that
    isn't empty."""
    taken = {theirs for names in columns.values() for theirs in names}
    names = {name: [name] for name in row if name not in taken} | columns  # our or a known name: the row's columns
    query, pos = _pair_columns(row, where, names, columns)
    negatives = [name for name in names if NEGATIVES.fullmatch(name) and ("neg" not in columns or name == "neg")]
    own = _optional_text(row, names, "instruction", where) or _optional_text(row, names, "prompt", where)
    instruction = own or default_instruction
    source = _optional_text(row, names, "source", where) or default_sources[0] or instruction or default_sources[1]
    labelled = "label" in columns or not columns.keys() & {"query", "pos"}
    read = [query, pos, *negatives, "instruction", "prompt", "source", "symmetric", "type", *["label"][:labelled]]
    used = {field for name in read for field in names.get(name, [])}
    return {
        "query": _text(row[names[query][0]], where, names[query][0]),
        "pos": _texts(row, names[pos], where),
        "neg": [text for name in negatives for text in _texts(row, names[name], where)],
        "instruction": instruction,
        "source": source,
        "symmetric": _is_symmetric(row, names, source in symmetric_sources, where),
        "label": _optional_text(row, names, "label", where) if labelled else None,
    }, used


def _pair_columns(
    row: Mapping[str, Any], where: str, names: Mapping[str, list[str]], columns: Mapping[str, list[str]]
) -> tuple[str, str]:
    """Which of `names` are the row's query and positives.

    Raises:
        ValueError: none are, several may be, or they may not be a pair.
    """
    full = {name for name, fields in names.items() if any(row.get(field) not in (None, []) for field in fields)}
    stated, usual = (_allowed(pairs, columns) for pairs in (STATED_PAIRS, USUAL_PAIRS))
    for pair in stated:
        if full.issuperset(pair):
            return pair
    there = f"(this one has {', '.join(map(repr, row)) or 'no fields'})"
    found = [pair for pair in usual if full.issuperset(pair)]
    if not found:
        field = ", ".join(_missing_column((*stated, *usual), full, names))
        raise ValueError(
            f"{where}: field {field!r} is missing or empty; a row needs 'query' and 'pos', or 'anchor' and 'positive', "
            f"or columns that you name, as --columns query=question pos=answer {there}"
        )
    asked = [f"--columns query={names[query][0]} pos={names[pos][0]}" for query, pos in found]
    if len(found) > 1:
        raise ValueError(f"{where}: several columns may be the pair; say which, by {', or '.join(asked)} {there}")
    judgements = [name for name in sorted(full) if JUDGEMENTS.search(name) and name not in columns]
    if judgements:
        raise ValueError(
            f"{where}: {judgements[0]!r} may say that {found[0][1]!r} is no positive of {found[0][0]!r}: keep only the "
            f"rows where it is one and leave that column out, or, if it always is, say so by {asked[0]}"
        )
    return found[0]


def _allowed(pairs: Sequence[tuple[str, str]], columns: Collection[str]) -> Sequence[tuple[str, str]]:
    """Where `columns` says what the query or the positives are, nothing else is."""
    if "query" in columns:
        pairs = [pair for pair in pairs if pair[0] == "query"]
    return [pair for pair in pairs if pair[1] == "pos"] if "pos" in columns else pairs


def _missing_column(
    pairs: Sequence[tuple[str, str]], full: Collection[str], names: Mapping[str, list[str]]
) -> list[str]:
    """What the row lacks for the pair that it comes nearest to, under the data's own name."""

    def nearness(pair: tuple[str, str]) -> tuple[int, int]:
        return sum(name in full for name in pair), sum(name in names for name in pair)

    missing = next(name for name in max(pairs, key=nearness) if name not in full)
    return names.get(missing, [missing])


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} must be text, not {value!r:.60} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"{where}: field {field!r} is empty; give it a text or drop it")
    if re.search("[\ud800-\udfff]", value):  # JSON can hold half an emoji; neither Arrow nor a tokenizer takes it
        raise ValueError(f"{where}: field {field!r} holds half a character (a lone surrogate); repair the text")
    return value


def _texts(row: Mapping[str, Any], fields: Sequence[str], where: str) -> list[str]:
    """The texts of several columns, in which each row has a text, a list of them, or None."""
    texts = []
    for field in fields:
        value = row.get(field)
        if isinstance(value, list):
            texts += [_text(entry, where, f"{field}[{index}]") for index, entry in enumerate(value)]
        elif value is not None:
            texts.append(_text(value, where, field))
            if _is_written_list(value):
                raise ValueError(
                    f"{where}: field {field!r} is a list written as one text, {value!r:.60}: give a real list, in JSON "
                    "or Parquet, or a column for each text, as negative_1, negative_2"
                )
    return texts


def _is_written_list(text: str) -> bool:
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return False
    for parse in (json.loads, ast.literal_eval):  # as JSON, or as Python (and so pandas) prints it
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return isinstance(value, list) and (not value or any(isinstance(entry, str) for entry in value))
    return False


def _optional_text(row: Mapping[str, Any], names: Mapping[str, list[str]], name: str, where: str) -> str | None:
    field = names.get(name, [name])[0]
    value = row.get(field) if name in names else None
    if name in ("label", "source") and type(value) in (int, float) and value == value // 1:
        return str(int(value))  # pandas makes whole numbers floats where a row has none
    return None if value in (None, "") else _text(value, where, field)


def _is_symmetric(row: Mapping[str, Any], names: Mapping[str, list[str]], default: bool, where: str) -> bool:
    field = names.get("symmetric", ["symmetric"])[0]
    value = row.get(field)
    if value is None:
        return default or ("type" in names and row["type"] in SYMMETRIC_TYPES)
    if isinstance(value, str):  # all that a CSV can hold
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: field {field!r} is {value!r:.60}; write true or false, or leave it out")
    return value


def check_count(name: str, value: int, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
