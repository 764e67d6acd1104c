"""Accumulation and several processes give the gradients of the joint batch; every epoch is drawn anew."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import environment, make_rows, outputs_of, processor_class
from training_helpers import assert_same_gradients, make_trainer, step, tiny_model, train_and_watch

pytestmark = pytest.mark.usefixtures("training_cache")

# Accumulation and processes


@pytest.mark.parametrize("sub_batch_size", [None, 3])
def test_accumulation_is_the_mean_of_the_micro_batches(processor, tmp_path, sub_batch_size):
    rows = make_rows(8)
    model = tiny_model(dtype=torch.float64)
    trainer = make_trainer(model, processor, tmp_path, rows)
    alone = [step(trainer, inputs) for inputs in trainer.get_train_dataloader()]
    assert len(alone) == 2
    settings = {"max_steps": 1, "gradient_accumulation_steps": 2, "sub_batch_size": sub_batch_size}
    run = train_and_watch(tiny_model(dtype=torch.float64), processor, tmp_path, rows, **settings)
    mean = {name: (gradient + alone[1][1][name]) / 2 for name, gradient in alone[0][1].items()}
    assert run.losses == pytest.approx([loss for loss, _ in alone], rel=1e-10)
    assert len(run.gradients) == 1
    assert_same_gradients(run.gradients[0], mean)
    assert run.trainer.state.log_history[0]["loss"] == pytest.approx(sum(run.losses) / 2, abs=1e-4)


def test_short_last_accumulation_is_the_same_cached(processor, tmp_path):
    """Three micro-batches by twos: Trainer's versions scale the last step in different ways; caching follows."""
    settings = {"max_steps": 2, "gradient_accumulation_steps": 2}
    plain, cached = (
        train_and_watch(
            tiny_model(dtype=torch.float64), processor, tmp_path, make_rows(12), sub_batch_size=size, **settings
        )
        for size in (None, 3)
    )
    assert len(plain.losses) == 3 and len(plain.gradients) == len(cached.gradients) == 2
    for actual, expected in zip(cached.gradients, plain.gradients, strict=True):
        assert_same_gradients(actual, expected)


def test_every_epoch_is_drawn_anew(processor, tmp_path):
    """Another order and other hard negatives, and each pair once an epoch."""
    rows = make_rows(8, lambda i: 6)
    trainer = make_trainer(tiny_model(), processor, tmp_path, rows, num_train_epochs=2, num_negatives=1, k=1)
    seen, compute_loss = [], trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        seen.append(inputs["document_ids"].tolist()) or compute_loss(model, inputs, *args, **kwargs)
    )
    trainer.train()
    positives = [[ids for batch in epoch for ids in batch[:4]] for epoch in (seen[:2], seen[2:])]
    negatives = [{ids for batch in epoch for ids in batch[4:]} for epoch in (seen[:2], seen[2:])]
    assert len(seen) == 4 and sorted(positives[0]) == sorted(positives[1]) and len(set(positives[0])) == 8
    assert positives[0] != positives[1] and negatives[0] != negatives[1]


def test_epoch_reaches_order_and_draws(processor, tmp_path):
    """Accelerate hands the epoch on too, but not to the order of batches that it deals to several processes."""
    trainer = make_trainer(tiny_model(), processor, tmp_path, make_rows(8, lambda i: 6), num_negatives=1)
    trainer.get_train_dataloader()
    setter, seen = trainer._epoch_setter, []
    for epoch in (None, 1.0, 1.5, 0.5):
        setter.on_epoch_begin(trainer.args, SimpleNamespace(epoch=epoch), None)
        seen.append((list(setter.batches), [trainer.train_dataset[i]["negatives"] for i in range(8)]))
    assert seen[0] == seen[3] and seen[1] == seen[2]
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


# How many negatives row i has, and the settings; in the last case one process alone has any.
CASES = {
    "plain": (lambda i: i % 4, {}),
    "cached": (lambda i: i % 4, {"sub_batch_size": 3}),
    "accumulated": (lambda i: i % 4, {"sub_batch_size": 3, "gradient_accumulation_steps": 2}),
    "lonely": (lambda i: 2 * (i == 0), {"sub_batch_size": 3}),
}


def run_case(name: str, processor, folder: Path, processes: int) -> SimpleNamespace:
    negatives, settings = CASES[name]
    rows = make_rows(6 * settings.get("gradient_accumulation_steps", 1), negatives)
    return train_and_watch(
        tiny_model(dtype=torch.float64),
        processor,
        folder,
        rows,
        max_steps=1,
        num_negatives=3,
        per_device_train_batch_size=6 // processes,
        ddp_backend="gloo" if processes > 1 else None,
        **settings,
    )


def run_without_a_head(processor, folder: Path, processes: int) -> list[float]:
    """Losses of two steps of a model that asks nothing of its LM head, which thus gets no gradient."""
    model = tiny_model(
        dtype=torch.float64, step_token="none", pooling="last", text_changes={"tie_word_embeddings": False}
    )
    settings = {"max_steps": 2, "gradient_checkpointing": True, "per_device_train_batch_size": 4 // processes}
    backend = "gloo" if processes > 1 else None
    return train_and_watch(model, processor, folder, make_rows(8), ddp_backend=backend, **settings).losses


def worker(folder: str) -> None:
    """One of two processes: runs all cases and writes what it saw."""
    folder = Path(folder)
    processor = processor_class().from_pretrained(folder / "processor")
    rank = int(os.environ["RANK"])
    seen = {}
    for name in CASES:
        run = run_case(name, processor, folder / f"{name}-{rank}", processes=2)
        assert run.trainer.accelerator.num_processes == 2
        seen[name] = {"losses": run.losses, "documents": run.documents, "gradients": run.gradients}
    seen["without a head"] = run_without_a_head(processor, folder / f"headless-{rank}", processes=2)
    torch.save(seen, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    processor.save_pretrained(folder / "processor")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=environment(
                folder,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs_of(processes)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joint_batch(processor, tmp_path, two_processes, name):
    alone = run_case(name, processor, tmp_path, processes=1)
    ranks = [seen[name] for seen in two_processes]
    documents = [rank["documents"] for rank in ranks]
    assert [sum(pair) for pair in zip(*documents, strict=True)] == alone.documents
    assert documents[0] != documents[1]  # uneven numbers of negatives
    if name == "lonely":
        assert [3] in documents
    for rank in ranks:
        assert rank["losses"] == pytest.approx(alone.losses, rel=1e-10)
        assert len(rank["gradients"]) == len(alone.gradients) == 1
        assert_same_gradients(rank["gradients"][0], alone.gradients[0])


@pytest.mark.slow
def test_two_processes_of_a_model_that_does_not_use_its_head(processor, tmp_path, two_processes):
    alone = run_without_a_head(processor, tmp_path, processes=1)
    for seen in two_processes:
        assert seen["without a head"] == pytest.approx(alone, rel=1e-10)


if __name__ == "__main__":
    worker(sys.argv[1])
