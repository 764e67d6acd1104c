"""What the tests of training share: tiny trainers, single steps, and runs that are watched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from gircse.training.arguments import GircseTrainingArguments
from gircse.training.data import PairCollator
from gircse.training.losses import candidate_mask, icr_loss
from gircse.training.pairs import FEATURES
from gircse.training.trainer import GircseTrainer
from helpers import ROOT, tiny_text_config

PAIR = {"query": "q", "pos": ["p"]}


def spoil(path: str) -> None:
    """Breaks a file in a way that its size and time don't tell: whoever reads it anew fails."""
    before = Path(path).stat()
    Path(path).write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def make_pairs(rows: list[dict]) -> datasets.Dataset:
    """Pairs as reading gives them, from rows that may leave fields out."""
    empty = {"neg": [], "instruction": "", "source": "s", "symmetric": False, "label": None}
    return datasets.Dataset.from_list([{**PAIR, **empty, **row} for row in rows], features=FEATURES)


def tiny_model(*, dtype=torch.float32, text_changes=None, **axes):
    """The same weights in every process; conftest's `make_model` is a fixture, which workers don't have."""
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    torch.manual_seed(0)
    config = model_class.config_class(text_config=tiny_text_config(**(text_changes or {})), **axes)
    return model_class(config).to(dtype).eval()


def make_trainer(model, processor, folder, rows, held_out=None, callbacks=None, **settings) -> GircseTrainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "k": 3,
        "num_negatives": 2,
        "logging_steps": 1,
        "max_grad_norm": 1e9,  # gradients are compared as they are
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = GircseTrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    held_out = None if held_out is None else make_pairs(held_out)
    return GircseTrainer(model, arguments, processor, make_pairs(rows), held_out, callbacks=callbacks)


def gradients_of(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(trainer: GircseTrainer, inputs: dict) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one micro-batch, by Trainer's own training step."""
    trainer.model.zero_grad(set_to_none=True)
    trainer.current_gradient_accumulation_steps = 1  # newer transformers set it in their loop
    loss = trainer.training_step(trainer.model, inputs)
    return loss.item(), gradients_of(trainer.model)


def watch_passes(model) -> list[tuple[dict[str, Tensor], Tensor]]:
    """A list that each call of the model appends its inputs and its step embeddings to."""
    seen = []
    model.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs, output.step_embeddings)), with_kwargs=True
    )
    return seen


def joint_loss(args: GircseTrainingArguments, queries: Tensor, documents: Tensor, inputs: dict) -> Tensor:
    """The loss of a batch from its embeddings, by the functions of the losses alone."""
    mask = candidate_mask(inputs)
    chosen = {"temperature": args.temperature, "reduction": args.reduction, "dims": tuple(args.matryoshka_dims or ())}
    return icr_loss(queries, documents, mask, refinement_weight=args.refinement_weight, **chosen).total


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-7) -> None:
    """Equal up to `relative` of the largest entry of each weight's gradient, and not all zero. Qwen2's norms are in
    float32 inside, and round differently when another grouping of the texts shares another prefix."""
    assert actual.keys() == expected.keys() and expected
    assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 1e-3
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        allowed = relative * max(float(gradient.abs().max()), 1e-6 * largest)
        assert float((actual[name] - gradient).abs().max()) <= allowed, name


class Probe(TrainerCallback):
    """Keeps the gradients of every optimizer step, before it is taken."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients.append(gradients_of(model))


def train_and_watch(model, processor, folder, rows, **settings):
    """Trains, and returns the losses and document counts of the micro-batches, and the gradients of the steps."""
    probe = Probe()
    trainer = make_trainer(model, processor, folder, rows, callbacks=[probe], **settings)
    losses, documents, compute_loss = [], [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        losses.append(loss.item())
        documents.append(len(inputs["document_ids"]))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    return SimpleNamespace(trainer=trainer, losses=losses, documents=documents, gradients=probe.gradients)


def one_batch(processor, rows: list[dict]) -> dict:
    collator = PairCollator(processor)
    return collator(
        [{**row, "positive": row["pos"][0], "negatives": row["neg"], "all_positives": row["pos"]} for row in rows]
    )


def step_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def assert_same_run(actual: Path, expected: Path, steps: int) -> None:
    logs = [step_lines(folder) for folder in (actual, expected)]
    for lines in logs:
        assert [line["step"] for line in lines] == list(range(1, steps + 1))  # none missing, none twice
    for line, other in zip(*logs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4), line["step"]
        assert line["learning_rate"] == pytest.approx(other["learning_rate"], rel=1e-6)
    weights, others = (load_file(folder / "model.safetensors") for folder in (actual, expected))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
