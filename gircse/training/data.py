"""Batches of training pairs. The path of a row of `pairs.load_pairs` through this file:

split_held_out   training rows and held-out rows, no query and no pair on both sides
TrainingPairs    row i of an epoch -> q, one d+, some d-, drawn by (seed, epoch, i) alone: a resumed run draws the same
SourceBatches    which rows form a batch: of one source, so that in-batch negatives are of the same task
PairCollator     rows -> token ids, and the ids that tell false negatives
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import datasets
import torch

from .pairs import check_count


def split_held_out(pairs: datasets.Dataset, held_out: int, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns (training rows, held-out rows), each in the order of `pairs`; the choice is fixed by `seed`.

    Rows with the same query stay together, and so do rows with the same two texts, be it the other way round: where
    they do not add up to `held_out`, fewer are held out, never more.

    Raises:
        ValueError: `held_out` is not in 0..len(pairs) - 1, or every query repeats too often to be held out.
    """
    check_count("held_out", held_out, minimum=0)
    if held_out >= len(pairs):
        raise ValueError(f"held_out={held_out}, but there are {len(pairs)} pairs: hold out fewer")
    groups = _rows_together(pairs)
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= held_out:
            chosen.update(group)
    if held_out and not chosen:
        raise ValueError(f"held_out={held_out}, but every query has more pairs than that: hold out more")
    return pairs.select([i for i in range(len(pairs)) if i not in chosen]), pairs.select(sorted(chosen))


def _rows_together(pairs: datasets.Dataset) -> list[list[int]]:
    """The rows by query, where two queries are one if each is a positive of the other."""
    queries = pairs["query"][:]
    leader = {query: query for query in queries}

    def find(query: str) -> str:
        while leader[query] != query:
            leader[query] = query = leader[leader[query]]
        return query

    directed = {(q, text) for q, texts in zip(queries, pairs["pos"], strict=True) for text in texts if text in leader}
    for query, text in sorted(directed):
        if (text, query) in directed:
            leader[find(text)] = find(query)
    rows_of: dict[str, list[int]] = {}
    for index, query in enumerate(queries):
        rows_of.setdefault(find(query), []).append(index)
    return list(rows_of.values())


class TrainingPairs(torch.utils.data.Dataset):
    """Rows as an epoch sees them: one positive and up to `num_negatives` hard negatives, drawn anew each epoch."""

    def __init__(self, pairs: datasets.Dataset, num_negatives: int, seed: int) -> None:
        check_count("num_negatives", num_negatives, minimum=0)
        self.pairs, self.num_negatives, self.seed = pairs, num_negatives, seed
        self._shared = _positives_of_repeated(pairs)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: persistent workers see begin_epoch

    def begin_epoch(self, epoch: int) -> None:
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
            "all_positives": self._shared.get(_text_id(row["instruction"], row["query"]), row["pos"]),
            **{name: row[name] for name in ("instruction", "symmetric", "source", "label")},
        }


def _positives_of_repeated(pairs: datasets.Dataset) -> dict[int, list[str]]:
    """By the hash of (instruction, query): all positives of each query that several rows have. They seldom meet in a
    batch, where one row's positive may be another one's document or hard negative all the same."""
    columns = pairs.select_columns(["instruction", "query"]).iter(10_000)
    keys = (key for rows in columns for key in zip(rows["instruction"], rows["query"], strict=True))
    ids = torch.tensor(array("q", (_text_id(*key) for key in keys)), dtype=torch.int64)
    found, counts = ids.unique(return_counts=True)
    shared: dict[int, list[str]] = {}
    for index in torch.isin(ids, found[counts > 1]).nonzero()[:, 0].tolist():
        shared.setdefault(ids[index].item(), []).extend(pairs[index]["pos"])
    return {key: list(dict.fromkeys(texts)) for key, texts in shared.items()}


def check_count_of_pairs(count: int, batch_size: int, num_processes: int) -> None:
    """Raises a ValueError unless there are enough pairs for a batch of each process."""
    if count < (needed := batch_size * num_processes):
        given = f"per_device_train_batch_size {batch_size} x {num_processes} process(es)"
        raise ValueError(f"{given} needs {needed} pairs, but there are {count}; lower it or give more pairs")


def check_negatives(pairs: datasets.Dataset, num_negatives: int) -> None:
    """Raises a ValueError if a batch of one row would have nothing to learn from."""
    if not num_negatives or not any(pairs["neg"]):
        raise ValueError(
            "per_device_train_batch_size=1 without hard negatives leaves a query nothing to be told from: raise it, "
            "with --sub_batch_size 1 if memory is short"
        )


def check_pairs(pairs: datasets.Dataset, batch_size: int, num_processes: int) -> None:
    """Raises a ValueError unless there are enough pairs for a batch of each process, and more than one document."""
    check_count_of_pairs(len(pairs), batch_size, num_processes)
    texts: set[str] = set()
    for rows in pairs.select_columns(["pos", "neg"]).iter(1000):
        texts.update(chain.from_iterable(chain(rows["pos"], rows["neg"])))
        if len(texts) > 1:
            return
    raise ValueError(f"all {len(pairs)} pairs have the document {texts.pop()!r:.60}: no query can be told from another")


def check_prompts(
    sides: Sequence[datasets.Dataset | None], processor: Callable[..., Any], max_length: int | None
) -> None:
    """Raises the processor's ValueError if the prompt of an instruction leaves no token of `max_length` for a text.
    Called before training, as its row may come up late."""
    settings = {"max_length": max_length, "padding": False, "return_tensors": None}
    columns = (pairs["instruction"][:] for pairs in sides if pairs)  # Dataset.unique would write all columns anew
    instructions = list(dict.fromkeys(chain.from_iterable(columns)))
    for start in range(0, len(instructions), 1000):
        part = instructions[start : start + 1000]
        processor(["a text"] * len(part), instruction=part, **settings)


class SourceBatches(torch.utils.data.Sampler[list[int]]):
    """Batches of row numbers, shuffled by (seed, epoch); no row occurs twice in an epoch.

    A global batch is `num_processes` consecutive batches: Accelerate deals them to the processes, and negatives are
    gathered across them. With `by_source` it is of one source, and global batches come in random order. Rows left over
    from each source are pooled into mixed batches at the end; what does not fill a last global batch is dropped.

    Raises:
        ValueError: not one global batch can be filled, or a count is not an integer >= 1.
    """

    drop_last = True  # read by Accelerate, which would fill up a short last batch; there is none

    def __init__(
        self, sources: Sequence[str], batch_size: int, *, by_source: bool, seed: int, num_processes: int = 1
    ) -> None:
        check_count("batch_size", batch_size, minimum=1)
        check_count("num_processes", num_processes, minimum=1)
        self.batch_size, self.global_size, self.seed, self.epoch = batch_size, batch_size * num_processes, seed, 0
        groups: dict[str, list[int]] = {}
        for index, source in enumerate(sources):
            groups.setdefault(source if by_source else "", []).append(index)
        self._groups = list(groups.values())
        self._length = sum(map(len, self._groups)) // self.global_size * num_processes
        check_count_of_pairs(len(sources), batch_size, num_processes)

    def begin_epoch(self, epoch: int) -> None:
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
            prompted_ids (M,): hashes of (instruction, text) of the documents, "" where they are embedded bare: what has
                a query's id is the very input of that query.
            query_labels (B,), document_labels (M,): hashes of (source, label), -1 without one. A positive has its
                query's label, a hard negative -1.
        """
        instructions = [row["instruction"] or None for row in rows]
        sides = [row["instruction"] or None if row["symmetric"] else None for row in rows]  # documents' instructions
        negatives = [(text, side) for row, side in zip(rows, sides, strict=True) for text in row["negatives"]]
        documents = [row["positive"] for row in rows] + [text for text, _ in negatives]
        sides += [side for _, side in negatives]
        positive_ids = [torch.tensor([_text_id(text) for text in row["all_positives"]]) for row in rows]
        labels = [-1 if row["label"] is None else _text_id(row["source"], row["label"]) for row in rows]
        return {
            "query": self._encode([row["query"] for row in rows], instructions),
            "document": self._encode(documents, sides),
            "document_ids": torch.tensor([_text_id(text) for text in documents]),
            "positive_ids": torch.nn.utils.rnn.pad_sequence(positive_ids, batch_first=True, padding_value=-1),
            "query_ids": torch.tensor([_text_id(row["instruction"], row["query"]) for row in rows]),
            "prompted_ids": torch.tensor([_text_id(s or "", t) for s, t in zip(sides, documents, strict=True)]),
            "query_labels": torch.tensor(labels),
            "document_labels": torch.tensor(labels + [-1] * len(negatives)),
        }

    def _encode(self, texts: list[str], instructions: list[str | None]) -> dict[str, torch.Tensor]:
        encoded = self.processor(texts, instruction=instructions, max_length=self.max_length)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
