"""Training pairs: read and check them, batch them by source, turn a batch into token ids.

Under `instruction`, the embedding of `query` (q) belongs near each text of `pos` (d+) and far from each of `neg` (the
hard negatives d-). The path of such a row through this file:

    load_pairs       file, folder, pattern or Hub id -> checked rows, memory-mapped
    split_held_out   -> training rows and held-out rows, no query on both sides
    TrainingPairs    row i of an epoch -> q, one d+, some d-, drawn by (seed, epoch, i) alone: a resumed run agrees
    SourceBatches    which rows form a batch: of one source, so that in-batch negatives are of the same task
    PairCollator     rows -> token ids, and the ids that tell false negatives
"""

import glob
import gzip
import hashlib
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from datasets.exceptions import DatasetGenerationError

# FlagEmbedding's names for tasks with the instruction on both sides (its "symmetric_class" has bare class names there).
SYMMETRIC_TYPES = ("symmetric_sts", "symmetric_clustering")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
HELD_BACK = ("validation", "valid", "val", "dev", "test")  # splits that are never trained on unless asked for
TEXT, TEXTS, FLAG = datasets.Value("string"), datasets.Sequence(datasets.Value("string")), datasets.Value("bool")
FEATURES = datasets.Features(
    dict(query=TEXT, pos=TEXTS, neg=TEXTS, instruction=TEXT, source=TEXT, symmetric=FLAG, label=TEXT)
)


def load_pairs(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    symmetric_sources: Collection[str] = (),
    limit: int | None = None,
) -> datasets.Dataset:
    """Reads pairs in either of two layouts, checks every row, and returns them with the columns of FEATURES.

    The layouts are `query, pos[, neg]` (a text or list each) and `anchor, positive[, negative, negative_1, ...]`. Both
    take `instruction` or `prompt` (default ""), `source` (default: the file's name without ending; on the Hub the split
    where there are several, the instruction, so that rows of one task still go together, or the id), `label`, and
    `symmetric`, which says whether documents get the instruction too. Without it, `type` (FlagEmbedding's field) or
    `symmetric_sources` does.

    Args:
        source: file (.jsonl, .json with an object a line, either gzipped, .parquet), folder, glob pattern or Hub id.
        config: the configuration of a Hub data set that has several; local files have none.
        split: the split of a Hub data set, by default `train`, or where there is none all that aren't to test on, as
            in data sets with a split a source; local files have none.
        limit: read only the first rows (a Hub data set is then streamed), of several splits in proportion to their
            sizes.

    Raises:
        FileNotFoundError: nothing is found under `source`.
        ValueError: a wrong row, named as "{file}:{line}: ...", or a wrong or missing argument. A name in
            `symmetric_sources` that no row has is wrong too, unless `limit` cuts rows off.
    """
    if limit is not None:
        _check_count("limit", limit, minimum=1)
    files = _find_files(source)
    for name, value in (("config", config), ("split", split)):
        if files and value is not None:
            raise ValueError(f"{name}={value!r} is for data sets on the Hub, and {source!r} is local: leave it out")
    arguments = {
        "name": source,
        "rows": files or _load_hub(source, config, split, limit),
        "symmetric_sources": tuple(sorted(symmetric_sources)),
        "limit": limit,
        "versions": tuple((os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (__file__, *files)),
    }
    try:
        return datasets.Dataset.from_generator(_generate, features=FEATURES, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # ours says file and line; the wrapper only that something failed
        raise


def _find_files(source: str) -> tuple[str, ...]:
    """The absolute paths that `source` stands for, sorted; () if it can only be a Hub id."""
    path = Path(source).expanduser()
    if source and path.is_dir():
        found: Iterable[Path] = path.iterdir()
    elif path.exists():
        found = [path]
    elif re.search(r"[*?\[]", source):
        found = map(Path, glob.glob(str(path), recursive=True))
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not source.endswith(SUFFIXES):
        return ()
    else:
        raise FileNotFoundError(f"{source!r}: no such file or folder (working directory: {Path.cwd()})")
    files = sorted(str(file.absolute()) for file in found if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise FileNotFoundError(
            f"{source!r}: no file here ends in {', '.join(SUFFIXES)}; rename it, or for subfolders give a glob pattern"
        )
    return tuple(files)


def _load_hub(name: str, config: str | None, split: str | None, limit: int | None) -> dict[str, datasets.Dataset]:
    """The rows by split; under "" if one split is all that is asked for."""
    try:
        config = config or datasets.get_dataset_default_config_name(name)
        if config is None:
            several = ", ".join(datasets.get_dataset_config_names(name))
            raise ValueError(f"{name!r} has several configurations: choose one by config (--data_config), of {several}")
        if split is not None:
            return {"": _load_split(name, config, split, limit)}
        splits = datasets.get_dataset_config_info(name, config).splits
        if "train" in splits:
            return {"": _load_split(name, config, "train", limit)}
        # Sizes are unknown where the data set's card has none.
        sizes = {s: getattr(info, "num_examples", 0) or 1 for s, info in splits.items() if s not in HELD_BACK}
        if not sizes:
            raise ValueError(f"{name!r} has no split to train on, only {', '.join(splits)}; choose another data set")
        shares = {s: limit and math.ceil(limit * size / sum(sizes.values())) for s, size in sizes.items()}
        return {s: _load_split(name, config, s, share) for s, share in shares.items()}
    except (FileNotFoundError, ConnectionError) as error:
        place = f"no local file or folder (working directory: {Path.cwd()})"
        raise FileNotFoundError(f"{name!r} is {place}, and not to be had from the Hub: {error}") from error


def _load_split(name: str, config: str | None, split: str, limit: int | None) -> datasets.Dataset:
    if limit is None:
        return datasets.load_dataset(name, config, split=split)
    rows = datasets.load_dataset(name, config, split=split, streaming=True)
    return datasets.Dataset.from_list(list(rows.take(limit)))


def _generate(
    name: str, rows: Any, symmetric_sources: tuple[str, ...], limit: int | None, versions: tuple[tuple[int, int], ...]
) -> Iterator[dict[str, Any]]:
    """Yields checked rows of files (a tuple of paths) or of a Hub data set's splits. `versions` is there for the cache
    alone, which datasets names by a hash of all arguments: a changed file, or a new version of this module, is read
    again."""
    if isinstance(rows, tuple):
        located = chain.from_iterable(map(_read_file, rows))
    else:
        located = (
            (f"{where}: row {number}", split or row.get("instruction") or row.get("prompt") or name, row)
            for split, part in rows.items()
            for where in [f"{name}, {split}" if split else name]
            for number, row in enumerate(part, 1)
        )
    count, present = 0, set()
    for where, default_source, row in islice(located, limit):
        pair = _to_pair(row, where, default_source, symmetric_sources)
        count += 1
        present.add(pair["source"])
        yield pair
    unknown = sorted(set(symmetric_sources) - present)
    if count == 0:
        raise ValueError(f"{name}: no rows; give at least one training pair")
    if unknown and count != limit:
        raise ValueError(f"symmetric_sources: no row of {name} has source {unknown}; its sources are {sorted(present)}")


def _read_file(path: str) -> Iterator[tuple[str, str, Any]]:
    """Yields (place for error messages, default source, row) for each row."""
    stem = re.sub(r"\.(jsonl|json|parquet)(\.gz)?$", "", Path(path).name)
    number = 0
    try:
        if path.endswith(".parquet"):
            with pyarrow.parquet.ParquetFile(path) as table:
                for number, row in enumerate(chain.from_iterable(b.to_pylist() for b in table.iter_batches(1000)), 1):
                    yield f"{path}: row {number}", stem, row
        else:
            with (gzip.open if path.endswith(".gz") else open)(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield f"{path}:{number}", stem, json.loads(line)
    except (EOFError, OSError, zlib.error, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}:{number + 1}: unreadable ({error}); write or download the file again") from error
    except ValueError as error:  # a wrong encoding raises it as well
        raise ValueError(f"{path}:{number}: bad JSON ({error}); write one JSON object a line, in UTF-8") from error


def _to_pair(row: Any, where: str, default_source: str, symmetric_sources: Collection[str]) -> dict[str, Any]:
    """Checks one row of either layout and returns it with the columns of FEATURES."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be a JSON object with named fields, not {row!r:.60}")
    query, pos, neg = "query", "pos", ["neg"]
    if row.get("query") is None and row.get("anchor") is not None:
        query, pos, neg = "anchor", "positive", [name for name in row if re.fullmatch(r"negative(_\d+)?", name)]
    for field in (query, pos):
        if row.get(field) is None or row[field] == []:
            raise ValueError(
                f"{where}: field {field!r} is missing or empty; a row needs 'query' and 'pos', or 'anchor' and "
                f"'positive' (this one has {', '.join(map(repr, row)) or 'no fields'})"
            )
    instruction = _optional_text(row, "instruction", where) or _optional_text(row, "prompt", where) or ""
    source = _optional_text(row, "source", where) or default_source
    symmetric = row.get("symmetric")
    if symmetric is None:
        symmetric = source in symmetric_sources or row.get("type") in SYMMETRIC_TYPES
    elif not isinstance(symmetric, bool):
        raise ValueError(f"{where}: field 'symmetric' is {symmetric!r:.60}; write true or false, or leave it out")
    return {
        "query": _text(row[query], where, query),
        "pos": _texts(row[pos], where, pos),
        "neg": [text for name in neg if row.get(name) is not None for text in _texts(row[name], where, name)],
        "instruction": instruction,
        "source": source,
        "symmetric": symmetric,
        "label": str(row["label"]) if type(row.get("label")) is int else _optional_text(row, "label", where),
    }


def _text(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {field!r} must be text, not {value!r:.60} ({type(value).__name__})")
    if not value.strip():
        raise ValueError(f"{where}: field {field!r} is empty; give it a text or drop it")
    if re.search("[\ud800-\udfff]", value):  # JSON can hold half an emoji; neither Arrow nor a tokenizer takes it
        raise ValueError(f"{where}: field {field!r} holds half a character (a lone surrogate); repair the text")
    return value


def _texts(value: Any, where: str, field: str) -> list[str]:
    if isinstance(value, list):
        return [_text(entry, where, f"{field}[{index}]") for index, entry in enumerate(value)]
    return [_text(value, where, field)]


def _optional_text(row: Mapping[str, Any], field: str, where: str) -> str | None:
    return None if row.get(field) in (None, "") else _text(row[field], where, field)


def _check_count(name: str, value: int, *, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, not {value!r}")


def split_held_out(pairs: datasets.Dataset, held_out: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns (training rows, held-out rows), each in the order of `pairs`; the choice is fixed by `seed`.

    Rows with the same query stay together: where they do not add up to `held_out`, fewer are held out, never more.

    Raises:
        ValueError: `held_out` is not in 0..len(pairs) - 1, or every query repeats too often to be held out.
    """
    _check_count("held_out", held_out, minimum=0)
    if held_out >= len(pairs):
        raise ValueError(f"held_out is {held_out}, but there are {len(pairs)} pairs; hold out fewer")
    rows_of: dict[str, list[int]] = {}
    for index, query in enumerate(pairs["query"]):
        rows_of.setdefault(query, []).append(index)
    groups = list(rows_of.values())
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= held_out:
            chosen.update(group)
    if held_out and not chosen:
        raise ValueError(f"held_out is {held_out}, but every query has more pairs than that; hold out more")
    return pairs.select([i for i in range(len(pairs)) if i not in chosen]), pairs.select(sorted(chosen))


class TrainingPairs(torch.utils.data.Dataset):
    """Rows as an epoch sees them: one positive and up to `num_negatives` hard negatives, drawn anew each epoch."""

    def __init__(self, pairs: datasets.Dataset, num_negatives: int, seed: int) -> None:
        _check_count("num_negatives", num_negatives, minimum=0)
        self.pairs, self.num_negatives, self.seed = pairs, num_negatives, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see set_epoch too

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.pairs[index]
        rng = random.Random(f"{self.seed}/{self._epoch.item()}/{index}")
        return {
            "query": row["query"],
            "positive": rng.choice(row["pos"]),
            "negatives": rng.sample(row["neg"], min(self.num_negatives, len(row["neg"]))),
            "all_positives": row["pos"],
            **{name: row[name] for name in ("instruction", "symmetric", "source", "label")},
        }


class SourceBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of row numbers, shuffled by (seed, epoch); no row occurs twice in an epoch.

    A global batch is `num_processes` consecutive batches: Accelerate deals them to the processes, and negatives are
    gathered across them. With `by_source` it is of one source, and global batches come in random order. Rows left over
    from each source are pooled into mixed batches at the end; what does not fill a last global batch is dropped.

    Raises:
        ValueError: not one global batch can be filled, or a count is not an integer >= 1.
    """

    drop_last = True  # read by Accelerate: there is no short batch to fill up

    def __init__(
        self, sources: Sequence[str], batch_size: int, *, by_source: bool, seed: int, num_processes: int = 1
    ) -> None:
        _check_count("batch_size", batch_size, minimum=1)
        _check_count("num_processes", num_processes, minimum=1)
        self.batch_size, self.global_size, self.seed, self.epoch = batch_size, batch_size * num_processes, seed, 0
        groups: dict[str, list[int]] = {}
        for index, source in enumerate(sources):
            groups.setdefault(source if by_source else "", []).append(index)
        self._groups = list(groups.values())
        self._length = sum(map(len, self._groups)) // self.global_size * num_processes
        if self._length == 0:
            raise ValueError(
                f"batch_size {batch_size} x {num_processes} process(es) needs {self.global_size} pairs, but there are "
                f"{len(sources)}; lower batch_size or give more pairs"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        blocks: list[list[int]] = []
        rest: list[int] = []
        for group in self._groups:
            pieces = _cut(rng.sample(group, len(group)), self.global_size)
            rest += pieces.pop() if len(pieces[-1]) < self.global_size else []
            blocks += pieces
        rng.shuffle(blocks)
        rng.shuffle(rest)
        blocks += [piece for piece in _cut(rest, self.global_size) if len(piece) == self.global_size]
        return chain.from_iterable(_cut(block, self.batch_size) for block in blocks)


def _cut(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _text_id(*parts: str) -> int:
    """A hash in 0 .. 2^63 - 1, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1


class PairCollator:
    """Turns B rows of `TrainingPairs` into the tensors of one training step.

    `processor(texts, instruction=[str | None, ...], max_length=max_length)` returns a mapping with `input_ids` and
    `attention_mask`; `max_length` None leaves the longest input in tokens to it.
    """

    def __init__(self, processor: Callable[..., Mapping[str, torch.Tensor]], max_length: int | None = None) -> None:
        self.processor, self.max_length = processor, max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Documents are the B positives in the order of the queries, then the M - B negatives, row by row.

        Returns, all int64:
            query, document: {input_ids, attention_mask}, (B, N_q) and (M, N_d). Queries have their row's instruction,
                documents only if the row is symmetric.
            document_ids (M,): hashes of the texts.
            positive_ids (B, P): hashes of all positives of the row, drawn or not; padded with -1.
            query_ids (B,): hashes of (instruction, query).
            query_labels (B,), document_labels (M,): hashes of (source, label), -1 without one. A positive has its
                query's label, a hard negative -1.
        """
        instructions = [row["instruction"] or None for row in rows]
        sides = [row["instruction"] or None if row["symmetric"] else None for row in rows]  # of the documents
        negatives = [(text, side) for row, side in zip(rows, sides, strict=True) for text in row["negatives"]]
        documents = [row["positive"] for row in rows] + [text for text, _ in negatives]
        positive_ids = [torch.tensor([_text_id(text) for text in row["all_positives"]]) for row in rows]
        labels = [-1 if row["label"] is None else _text_id(row["source"], row["label"]) for row in rows]
        return {
            "query": self._encode([row["query"] for row in rows], instructions),
            "document": self._encode(documents, sides + [side for _, side in negatives]),
            "document_ids": torch.tensor([_text_id(text) for text in documents]),
            "positive_ids": torch.nn.utils.rnn.pad_sequence(positive_ids, batch_first=True, padding_value=-1),
            "query_ids": torch.tensor([_text_id(row["instruction"], row["query"]) for row in rows]),
            "query_labels": torch.tensor(labels),
            "document_labels": torch.tensor(labels + [-1] * len(negatives)),
        }

    def _encode(self, texts: list[str], instructions: list[str | None]) -> dict[str, torch.Tensor]:
        encoded = self.processor(texts, instruction=instructions, max_length=self.max_length)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
