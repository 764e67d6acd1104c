"""Held-out pairs, draws and batches: fixed by seed and epoch, and a batch is of one source."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard

from gircse.training.data import SourceBatches, TrainingPairs, split_held_out
from training_helpers import make_pairs

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
        with pytest.raises(ValueError, match=f"held_out={held_out}, but there are 10 pairs"):
            split_held_out(pairs, held_out, seed=0)
    with pytest.raises(ValueError, match="held_out=-1 must be an integer >= 0"):
        split_held_out(pairs, -1, seed=0)
    with pytest.raises(ValueError, match="every query has more pairs"):
        split_held_out(make_pairs([{"query": "same"}] * 5), 3, seed=0)


# Draws


def many_texts(rows: int = 20) -> datasets.Dataset:
    texts = [
        {"query": f"q{i}", "pos": [f"p{i}.{j}" for j in range(9)], "neg": [f"n{i}.{j}" for j in range(9)]}
        for i in range(rows)
    ]
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
        with pytest.raises(ValueError, match="num_negatives=.* must be an integer >= 0"):
            TrainingPairs(pairs, count, seed=0)


def test_draws_are_fixed_by_seed_epoch_and_row():
    pairs = TrainingPairs(many_texts(), 2, seed=3)
    first = drawn(pairs)
    torch.manual_seed(99)
    assert [(pairs[i]["positive"], pairs[i]["negatives"]) for i in reversed(range(20))][::-1] == first
    pairs.begin_epoch(1)
    second = drawn(pairs)
    assert second != first
    resumed = TrainingPairs(many_texts(), 2, seed=3)
    resumed.begin_epoch(1)
    assert drawn(resumed) == second
    assert drawn(TrainingPairs(many_texts(), 2, seed=4)) != first
    assert len({positive.split(".")[1] for positive, _ in first}) > 1  # rows draw apart


def test_begin_epoch_reaches_persistent_workers():
    pairs = TrainingPairs(many_texts(4), 1, seed=0)
    loader = torch.utils.data.DataLoader(pairs, batch_size=None, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1):
        pairs.begin_epoch(epoch)
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
    batches.begin_epoch(1)
    second = list(batches)
    assert second != first
    resumed = SourceBatches(SOURCES, 3, by_source=by_source, seed=5)
    resumed.begin_epoch(1)
    assert list(resumed) == second
    assert list(SourceBatches(SOURCES, 3, by_source=by_source, seed=6)) != first
    assert set(sum(first, [])) != set(sum(second, []))  # it is not always the same rows that are dropped


def test_every_source_takes_its_turn_in_being_dropped():
    batches = SourceBatches(list("aaabbb"), 2, by_source=True, seed=0, num_processes=2)
    dropped = set()
    for epoch in range(20):
        batches.begin_epoch(epoch)
        dropped |= set(range(6)) - set(sum(batches, []))
    assert dropped == set(range(6))


def test_too_few_pairs_for_a_batch():
    with pytest.raises(ValueError, match=r"batch_size 23 x 2 process.* needs 46 pairs, but there are 44; lower"):
        SourceBatches(SOURCES, 23, by_source=True, seed=0, num_processes=2)
    with pytest.raises(ValueError, match="batch_size=0 must be an integer >= 1"):
        SourceBatches(SOURCES, 0, by_source=True, seed=0)
    with pytest.raises(ValueError, match="num_processes=0 must be an integer >= 1"):
        SourceBatches(SOURCES, 2, by_source=True, seed=0, num_processes=0)
