"""The collator tells apart what the loss must tell apart."""

from __future__ import annotations

import math

import pytest
import torch

from gircse.training.data import PairCollator, SourceBatches, TrainingPairs, split_held_out
from gircse.training.losses import candidate_mask, icr_loss
from gircse.training.pairs import load_pairs
from helpers import write_rows
from training_helpers import make_pairs

pytestmark = pytest.mark.usefixtures("own_cache")

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
    return icr_loss(queries, documents, candidate_mask(batch), temperature=0.02).total.item()


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


def test_rows_of_one_query_share_their_positives_also_in_other_batches():
    rows = [{"query": "q", "pos": [text], "neg": ["n"], "instruction": ask} for text, ask in ("ax", "bx", "by", "ax")]
    pairs = TrainingPairs(make_pairs([*rows, {"query": "r", "pos": ["b"]}]), 1, seed=0)
    assert [pairs[i]["all_positives"] for i in range(5)] == [["a", "b"], ["a", "b"], ["b"], ["a", "b"], ["b"]]
    # The first row beside the last: b is right for both queries.
    batch = PairCollator(FakeProcessor())([pairs[0] | {"negatives": ["b"]}, pairs[4]])
    assert candidate_mask(batch).tolist() == [[True, False, False], [True, True, False]]


def test_ids_are_the_same_in_every_process():
    batch = PairCollator(FakeProcessor())([training_row("q", "naïve 😀", source="s", label="l")])
    assert batch["document_ids"].tolist() == batch["positive_ids"][0].tolist() == [8063037927972956648]
    assert batch["query_labels"].tolist() == [8086197922565933603]
    many = PairCollator(FakeProcessor())([training_row("q", str(i)) for i in range(300)])["document_ids"]
    assert len(many.unique()) == 300 and many.min() >= 0 and many.max() > 2**62  # 63 bits


def test_end_to_end_through_a_loader(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"], "neg": [f"n{i}"], "source": "ab"[i % 2]} for i in range(12)]
    pairs = load_pairs(write_rows(tmp_path / "x.jsonl", rows), symmetric_sources=["a"])
    train, held_out = split_held_out(pairs, 4, seed=0)
    batches = SourceBatches(train["source"], 2, by_source=True, seed=0)
    loader = torch.utils.data.DataLoader(
        TrainingPairs(train, 1, seed=0), batch_sampler=batches, collate_fn=PairCollator(FakeProcessor())
    )
    shapes = [(batch["query"]["input_ids"].shape[0], batch["document_ids"].shape[0]) for batch in loader]
    assert shapes == [(2, 4)] * len(batches) and len(batches) == 4 and len(held_out) == 4
