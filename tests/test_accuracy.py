"""Held-out accuracy: by hand, at every k from one pass, and when and how it is told."""

from __future__ import annotations

import re
from types import SimpleNamespace

import datasets
import pytest
import torch

from gircse.training.accuracy import retrieval_accuracy, rows_by_tokens
from gircse.training.arguments import DataArguments, GircseTrainingArguments
from gircse.training.data import PairCollator
from helpers import make_rows
from train_gircse import held_out_size, hold_out, save
from training_helpers import make_pairs, make_trainer, tiny_model

pytestmark = pytest.mark.usefixtures("training_cache")

# Accuracy

TEXTS = ["pad", "q0", "q1", "q2", "q3", "q4", "d0", "d1", "d2", "d3", "n0"]


def lookup_processor(texts, instruction=None, max_length=None):
    """A text's number in TEXTS, once to three times: lengths differ from the order."""
    ids = [torch.full((1 + TEXTS.index(text) % 3,), TEXTS.index(text)) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


class Lookup:
    """In a model's place: at each step a text's vector is the unit vector of a chosen angle."""

    def __init__(self, step_token: str = "soft", num_steps: int = 20) -> None:
        self.config = SimpleNamespace(step_token=step_token, num_steps=num_steps)
        self.device, self.training, self.asked = torch.device("cpu"), True, set()
        right = {"q0": 0, "q1": 90, "q2": 180, "q3": 270, "q4": 90, "d0": 0, "d1": 90, "d2": 180, "d3": 270, "n0": 45}
        angles = torch.tensor([[float(right.get(text, 0))] * 20 for text in TEXTS])
        for text, step, angle in (
            # At k = 1 the hard negative beats the positive of q0. d3 beats d2 for q2, and d2 beats d3 for q3; but
            # those two rows have one label.
            ("d0", 1, 20),
            ("n0", 1, 10),
            ("d2", 1, 200),
            ("d3", 1, 185),
            # At k = 5 two queries have changed places.
            ("q0", 5, 90),
            ("q1", 5, 0),
        ):
            angles[TEXTS.index(text), step - 1] = angle
        self.vectors = torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=-1)  # (texts, 20, 2)

    def eval(self) -> None:
        self.training = False

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def __call__(self, input_ids, attention_mask, k) -> SimpleNamespace:
        assert not self.training
        self.asked.add(k)
        return SimpleNamespace(step_embeddings=self.vectors[input_ids[:, 0], : k or 1])


def accuracy_rows() -> datasets.Dataset:
    rows = [
        {"query": "q0", "pos": ["d0"], "neg": ["n0"]},
        {"query": "q1", "pos": ["d1"]},
        {"query": "q2", "pos": ["d2"], "label": "same"},
        {"query": "q3", "pos": ["d3"], "label": "same"},
        {"query": "q4", "pos": ["d1"]},  # the positive of q1, too: neither counts against the other
    ]
    return make_pairs(rows)


def test_accuracy_by_hand():
    model = Lookup()
    accuracy = retrieval_accuracy(model, accuracy_rows(), PairCollator(lookup_processor), batch_size=2)
    assert accuracy == pytest.approx({1: 4 / 5, 3: 1.0, 5: 3 / 5, 10: 1.0, 20: 1.0})
    assert model.training and model.asked == {20}  # one pass for all k, and the mode is what it was


def test_accuracy_is_measured_in_batches_of_as_many_tokens():
    """Batches of two texts of 512 tokens: 1024 tokens or 32 texts, of like length."""
    lengths = [600, 20, 512, 100, 512, 30, 500, *[10] * 40]
    side = {"attention_mask": torch.stack([(torch.arange(600) < n).long() for n in lengths])}
    batches = [[lengths[row] for row in rows.tolist()] for rows in rows_by_tokens(side, 2)]
    assert batches == [[10] * 32, [10] * 8 + [20, 30], [100, 500], [512, 512], [600]]


@pytest.mark.parametrize(
    "rows, settings, expected",
    [
        (100_000, {"num_train_epochs": 1}, 256),
        (100_000, {"max_steps": 40, "per_device_train_batch_size": 8}, 16),  # 960 texts: 48 of accuracy
        (100_000, {"max_steps": 40, "per_device_train_batch_size": 8, "num_negatives": 4}, 32),
        (100_000, {"max_steps": 40, "gradient_accumulation_steps": 2}, 64),
        (100_000, {"max_steps": 1}, 8),
        (50, {"num_train_epochs": 100}, 5),  # most are to train on
    ],
)
def test_accuracy_takes_a_twentieth_of_the_texts(tmp_path, rows, settings, expected):
    training = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert held_out_size(rows, training) == expected


def test_nothing_is_held_out_by_default_of_queries_with_many_pairs(tmp_path):
    training = GircseTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    pairs = make_pairs([{**row, "query": f"q{i // 20}"} for i, row in enumerate(make_rows(100))])
    assert [len(part) for part in hold_out(pairs, DataArguments(), training, None)] == [100, 0]
    with pytest.raises(ValueError, match="held_out=8, but every query has more pairs than that"):
        hold_out(pairs, DataArguments(held_out=8), training, None)


def test_accuracy_masks_false_negatives():
    rows = [{**row, "label": None} for row in accuracy_rows()]
    accuracy = retrieval_accuracy(Lookup(), make_pairs(rows), PairCollator(lookup_processor), batch_size=2)
    assert accuracy == pytest.approx({1: 2 / 5, 3: 1.0, 5: 3 / 5, 10: 1.0, 20: 1.0})


def test_accuracy_of_other_step_tokens():
    collator = PairCollator(lookup_processor)
    none, learned = Lookup("none"), Lookup("learned", num_steps=4)
    assert retrieval_accuracy(none, accuracy_rows(), collator, batch_size=2) == pytest.approx({1: 4 / 5})
    assert retrieval_accuracy(learned, accuracy_rows(), collator, batch_size=2) == pytest.approx({1: 4 / 5, 3: 1.0})
    assert none.asked == {None} and learned.asked == {3}


def test_accuracy_before_training_is_measured_on_the_accelerator(processor, tmp_path, monkeypatch):
    """Also where Trainer leaves the model on the CPU until it shards it."""
    trainer, moves = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), held_out=make_rows(6)), []
    monkeypatch.setattr(GircseTrainingArguments, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(trainer.model, "to", lambda device: moves.append(str(device)))
    trainer.evaluate()
    assert moves == ["cuda:0", "cpu"]
    trainer.state.max_steps = 1  # as in training, when the model is where it should be
    trainer.evaluate()
    assert len(moves) == 2


def test_evaluate_reports_each_k(processor, tmp_path):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), held_out=make_rows(6))
    metrics = trainer.evaluate()
    assert set(metrics) == {"eval_accuracy"} | {f"eval_accuracy_k{k}" for k in (1, 3, 5, 10, 20)}
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_k3"]


def test_accuracy_is_measured_at_the_trained_k_too(processor, tmp_path):
    for model, settings, trained in (
        (tiny_model(), {"k": 4}, 4),
        (tiny_model(step_token="none", pooling="last"), {}, 1),
    ):
        metrics = make_trainer(model, processor, tmp_path, make_rows(4), make_rows(6), **settings).evaluate()
        assert metrics["eval_accuracy"] == metrics[f"eval_accuracy_k{trained}"]


def test_accuracy_before_and_after_is_told(processor, tmp_path, capsys):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(24), make_rows(16), learning_rate=0.05)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    steps = (1, 3, 5, 10, 20)
    assert trainer.scores == {k: tuple(found[f"eval_accuracy_k{k}"] for found in (before, after)) for k in steps}
    assert any(one != other for one, other in trainer.scores.values())
    save(trainer)
    said, card = capsys.readouterr().out, (tmp_path / "README.md").read_text(encoding="utf-8")
    for k, (one, other) in trainer.scores.items():
        assert f"\n  {k:2d}  {one:6.3f} {other:6.3f}\n" in said
        assert re.search(rf"^\| {k} \| {one:.3f} +\| {other:.3f} +\|$", card, re.MULTILINE), card


def test_accuracy_before_training_is_said_when_it_is_known_and_what_is_done_meanwhile(processor, tmp_path, capsys):
    rows = (make_rows(4), make_rows(6))
    make_trainer(tiny_model(), processor, tmp_path, *rows, disable_tqdm=False).evaluate()
    said = capsys.readouterr()
    assert said.out.startswith("Held-out accuracy before training (6 pairs): ") and " at k = 20" in said.out
    assert "held-out accuracy:   0%" in said.err  # of a bar that is gone when it is done
    for disable_tqdm in (True, None):  # None where there is no terminal
        make_trainer(tiny_model(), processor, tmp_path, *rows, disable_tqdm=disable_tqdm).evaluate()
        said = capsys.readouterr()
        assert said.out.startswith("Measuring held-out accuracy, 2 batches\nHeld-out accuracy before training")
        assert said.err == ""


def test_the_cards_scores_are_of_the_held_out_pairs_alone(processor, tmp_path):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4), make_rows(6))
    trainer.evaluate()
    scores = dict(trainer.scores)
    others = make_pairs([{"query": f"red {i}", "pos": ["cold"]} for i in range(3)])
    assert "test_accuracy_k5" in trainer.evaluate(others, metric_key_prefix="test")
    assert scores and trainer.scores == scores
    without = make_trainer(tiny_model(), processor, tmp_path, make_rows(4))
    with pytest.raises(ValueError, match="there are no held-out pairs to evaluate on: give the trainer held_out"):
        without.evaluate()
