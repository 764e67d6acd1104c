"""What a run tells: the log, its curves, warnings of a collapse or of divergence, and the neighbours at the end."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import subprocess
import sys

import pytest
import torch

from gircse.command_line import lenient_console
from gircse.training.callbacks import Watch
from gircse.training.card import plot_curves, show_neighbours
from helpers import make_rows
from training_helpers import make_pairs, make_trainer, step_lines, tiny_model, train_and_watch

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
pytestmark = pytest.mark.usefixtures("training_cache")

# The log


@pytest.mark.parametrize("run, k", [("straight", 2), ("lora", 3)])
def test_log_lines(request, run, k):
    folder = request.getfixturevalue(run).folder
    for line in step_lines(folder):
        wanted = {"loss", "grad_norm", "learning_rate", "epoch", "L_reg", "mean_cosine", "log_candidates"}
        assert wanted | {f"L_{i}" for i in range(1, k + 1)} <= line.keys() and f"L_{k + 1}" not in line
        assert all(math.isfinite(line[name]) for name in wanted)
        total = sum(line[f"L_{i}"] for i in range(1, k + 1)) + line["L_reg"]
        assert line["loss"] == pytest.approx(total, abs=1e-3)
        assert -1 <= line["mean_cosine"] <= 1
    if run == "straight":  # 8 positives and 8 hard negatives for each query
        assert {line["log_candidates"] for line in step_lines(folder)} == {round(math.log(16), 5)}
    last = json.loads((folder / "training_log.jsonl").read_text().splitlines()[-1])
    assert "eval_accuracy_k20" in last  # the accuracy after training


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard(lora):
    assert not lora.beside  # all that is written is in the output folder
    written = b"".join(path.read_bytes() for path in lora.folder.rglob("events.out.tfevents*"))
    assert written.count(b"train/L_3") == 4 and b"train/grad_norm" in written


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_curves(straight, tmp_path):
    assert (straight.folder / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [{"step": step, "loss": 2.0, "L_1": 1.0, "L_2": 0.9} for step in range(3)]
    plot_curves(lines, tmp_path / "without_norm.png")  # transformers 4 logs no norm when it clips none
    assert (tmp_path / "without_norm.png").exists()
    plot_curves([{"step": 1, "loss": 2.0, "L_1": 1.0}, *lines], tmp_path / "more_steps.png")  # of a run with another k
    assert (tmp_path / "more_steps.png").exists()


def collapse_warnings(caplog) -> int:
    return sum("collapsed" in record.getMessage() for record in caplog.records)


def test_collapse_is_said_once(processor, tmp_path, caplog):
    """All tokens are one, so all texts are: every step loss is the log of the number of candidates."""
    model = tiny_model()
    weight = model.get_input_embeddings().weight.data
    weight.copy_(weight[5].clone().expand_as(weight))
    rows = make_rows(4, lambda i: 1)
    run = train_and_watch(model, processor, tmp_path, rows, max_steps=8, learning_rate=1e-7)
    line = run.trainer.state.log_history[0]
    assert line["L_1"] == pytest.approx(math.log(8), abs=1e-3) and line["mean_cosine"] == pytest.approx(1, abs=1e-3)
    assert collapse_warnings(caplog) == 1


def test_a_moment_at_chance_is_no_collapse(processor, tmp_path, caplog):
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(4))

    def lines(count: int, second_loss: float) -> None:
        for _ in range(count):
            trainer._metrics = [
                {
                    name: torch.tensor(value)
                    for name, value in {
                        "L_1": 2.0,
                        "L_2": second_loss,
                        "L_reg": 0.0,
                        "mean_cosine": 0.9,
                        "log_candidates": 2.0,
                    }.items()
                }
            ]
            trainer.log({"loss": 1.0})

    lines(4, 2.0)
    lines(1, 1.5)  # one step is better than chance: it learns
    lines(4, 2.0)
    assert collapse_warnings(caplog) == 0
    lines(1, 2.0)
    assert collapse_warnings(caplog) == 1
    lines(6, 2.0)
    assert collapse_warnings(caplog) == 1


def test_a_diverging_run_is_told_so_early_once_and_with_a_remedy(processor, tmp_path, caplog):
    settings = {"max_steps": 40, "learning_rate": 30.0, "warmup_steps": 1, "logging_steps": 5}
    train_and_watch(tiny_model(), processor, tmp_path, make_rows(64), **settings)
    (warning,) = [record.getMessage() for record in caplog.records if "training diverges" in record.getMessage()]
    assert "Lower the learning rate (now 30)" in warning and "--logit_temperature 2" in warning


@pytest.mark.parametrize(
    "losses, norms, expected",
    [
        ([9, 7, 5, 4, 3, 3, 2, 2], [50] * 8, None),  # starts above chance and falls
        ([9, 9, 9, 9, 9, 9], [50] * 6, "worse than by chance"),
        ([3, 2, 5, 6, 7], [50] * 5, "diverges: since step 30"),
        ([3, 3, 3, 3, 3], [50, 60, 3000, 5000, 7000], "the gradient explodes"),
        ([3, 3, 3, 3, 3], [50, 60, 3000, 60, 50], None),  # one batch
        ([3, 2, 2, 2, 2, 2], [60, 50, 1, 130, 100, 140], None),  # one batch of an easy source among hard ones
        ([3, math.nan, math.nan, math.nan], [50, math.nan, math.nan, math.nan], "diverges"),
        ([4.16] * 6, [50] * 6, "has collapsed"),
        ([9, 9, 9, 9, 9], [math.nan] * 5, "diverges"),
    ],
)
def test_watch(losses, norms, expected):
    def see(logging_steps: int, warm: bool) -> list[str]:
        watch, lines = Watch(), enumerate(zip(losses, norms, strict=True), 1)
        said = [watch.see(i * logging_steps, [loss] * 2, math.log(64), norm, 0.9, warm) for i, (loss, norm) in lines]
        return [line for line in said if line]

    found = see(10, True)
    assert len(found) == (expected is not None) and all(expected in line for line in found)
    if not math.isnan(losses[-1]):
        assert not any("diverges" in line for line in see(1, True))  # a few steps say little
    if losses[0] == 9:
        assert not see(10, False)  # it may start there, and warms up


def test_watch_sees_that_all_texts_point_one_way():
    watch = Watch()
    cosines = [0.97, 0.995, 0.995, 0.98, *[0.995] * 6]
    said = [watch.see(10 * i, [4.4, 4.3], math.log(64), 50, cosine, False) for i, cosine in enumerate(cosines)]
    assert [i for i, line in enumerate(said) if line] == [8] and "all texts are as one" in said[8]


def test_a_loss_that_is_no_number_is_told_at_once_and_nothing_is_saved(processor, tmp_path, caplog):
    model = tiny_model()
    trainer = make_trainer(model, processor, tmp_path, make_rows(4), make_rows(4), max_steps=2)
    trainer.evaluate()
    model.get_input_embeddings().weight.data[5:].fill_(math.inf)
    assert {*trainer.evaluate().values()} == {0.0}  # the first row would be right by chance
    trainer.train()
    (warning,) = [record.getMessage() for record in caplog.records if "diverges" in record.getMessage()]
    assert "at step 1 the loss is no finite number" in warning
    assert not math.isfinite(trainer.state.log_history[0]["loss"])
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight holds numbers that are not finite: training has diverged"
    ):
        trainer.export()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_healthy_run_is_not_warned(straight):
    assert not [message for message in straight.messages if "collapsed" in message or "diverges" in message]


@pytest.mark.slow
def test_neighbours_are_printed_on_any_console(workplace, straight, monkeypatch):
    """Windows' consoles often have 256 characters."""
    said = {}
    run = subprocess.run

    def watched(*args, **kwargs):
        said["result"] = run(*args, **{**kwargs, "env": {**kwargs["env"], "PYTHONUTF8": "0", "LC_ALL": "C"}}, stdout=-1)

    monkeypatch.setattr("gircse.training.card.subprocess.run", watched)
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    rows = make_rows(2)
    rows[0]["query"] = "多少钱"
    show_neighbours(str(straight.folder), make_pairs(rows))
    assert r"\u591a\u5c11\u94b1" in said["result"].stdout

    class Console(io.TextIOWrapper):
        pass

    console = Console(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    lenient_console()
    print("多")
    console.flush()
    assert console.buffer.getvalue().strip() == rb"\u591a"
