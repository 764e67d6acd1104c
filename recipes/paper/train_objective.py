"""`train_gircse.py` with another objective or another way back through the soft tokens, for ablations.

    python recipes/paper/train_objective.py --objective last_step ...
    python recipes/paper/train_objective.py --soft_token_gradient 0.1 ...

`last_step` is InfoNCE on z_K alone, `icr` the objective as it is. `--soft_token_gradient a` multiplies the gradient
that reaches h'_{k-1} through d_k by a: 0 truncates back-propagation there, so that steps learn through the KV cache
alone. `--objective answers` is the instruction tuning of models that embed by the tokens they would answer with
(InBedder's paradigm, `--step_token hard`): the next token of a row's positive, and its end, after the query's prompt.
`--learn_temperature` trains T as one number, in logarithms, from `--logit_temperature` on. `--contrast 2`
contrasts each two queries of a batch with their documents alone: the loss of batches of two whose gradients accumulate,
at the speed of the whole batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import base_of
from gircse.training.autoregembed import TargetCollator
from gircse.training.data import PairCollator
from gircse.training.trainer import GircseTrainer
from train_gircse import main

LONGEST_ANSWER = 32  # tokens, its end included
TEMPERATURE_RATE = 200  # times the learning rate of the weights, by which a single number would hardly move


class LastStep(GircseTrainer):
    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        return super()._joint_loss(queries[:, -1:], documents[:, -1:], inputs)


class Answers(GircseTrainer):
    """For one process, without gradient caching."""

    objective = "next-token prediction of the positives"
    contrasts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_alone(self)
        self.data_collator = TargetCollator(self.processing_class, self.data_collator.max_length, LONGEST_ANSWER)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        sides = [(rows["input_ids"], rows["attention_mask"].bool()) for rows in (inputs["query"], inputs["targets"])]
        (queries, seen), (answers, said) = sides
        whole = [torch.cat(parts) for parts in zip(unpadded(queries, seen), unpadded(answers, said), strict=False)]
        labels = [ids.clone() for ids in whole]
        for row, start in zip(labels, seen.sum(1).tolist(), strict=True):
            row[:start] = -100
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad([torch.ones_like(ids) for ids in whole])
        with self.accelerator.autocast():  # which a call of a part of the model would go without
            language_model = self._base_model().language_model
            return language_model(pad(whole), attention_mask=mask, labels=pad(labels, padding_value=-100)).loss


def check_alone(trainer: GircseTrainer) -> None:
    """Raises a ValueError for several processes, or gradient caching."""
    processes, size = trainer.args.world_size, trainer.args.sub_batch_size
    if processes > 1 or size:
        raise ValueError(f"{type(trainer).__name__} is for one process without sub_batch_size, not {processes}, {size}")


def unpadded(ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[kept] for row, kept in zip(ids, mask, strict=True)]


class CollatorWithOwners(PairCollator):
    """`owners`, (M,) int64: the row of the batch that each document belongs to."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        negatives = [number for number, row in enumerate(rows) for _ in row["negatives"]]
        return {**super().__call__(rows), "owners": torch.tensor([*range(len(rows)), *negatives])}


class Apart(GircseTrainer):
    """The mean of the losses of `contrast` queries each; for one process, without gradient caching."""

    def __init__(self, *args: Any, contrast: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_alone(self)
        self.contrast, collator = contrast, self.data_collator
        self.data_collator = CollatorWithOwners(collator.processor, collator.max_length)

    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        of_queries = ("positive_ids", "query_ids", "query_labels")
        of_documents = ("document_ids", "document_labels", "prompted_ids")
        losses = []
        for rows in torch.arange(len(queries), device=queries.device).split(self.contrast):
            theirs = torch.isin(inputs["owners"], rows)
            part = {name: inputs[name][rows] for name in of_queries}
            part |= {name: inputs[name][theirs] for name in of_documents}
            losses.append(super()._joint_loss(queries[rows], documents[theirs], part))
        return torch.stack(losses).mean()


def scale_gradient(model: nn.Module, factor: float) -> None:
    """Has d_k pass `factor` of its gradient on; its value stays."""
    next_token = model._next_token

    def scaled(state: Tensor) -> tuple[Tensor | None, Tensor]:
        probabilities, mixed = next_token(state)
        return probabilities, mixed.detach() + factor * (mixed - mixed.detach())

    model._next_token = scaled


class LearnedTemperature(GircseTrainer):
    """T = T_0 exp(r x) with one trained number x, 0 at first. Without bias and soft cap, W(h / T) = (W h) / T, so that
    the states are divided."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if hasattr(model, "get_base_model"):
            raise ValueError("--learn_temperature needs --tuning full: a checkpoint of a LoRA holds no temperature")
        next_token, model.temperature_shift = model._next_token, nn.Parameter(torch.zeros(()))
        model._next_token = lambda state: next_token(state * torch.exp(-TEMPERATURE_RATE * model.temperature_shift))
        super().__init__(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        base = self._base_model()
        shift = TEMPERATURE_RATE * base.temperature_shift.item() if hasattr(base, "temperature_shift") else 0.0
        super().log({**logs, "temperature": base.config.logit_temperature * math.exp(shift)}, *args, **kwargs)

    def export(self) -> None:
        base = self._base_model()
        base.config.logit_temperature *= math.exp(TEMPERATURE_RATE * base.temperature_shift.item())
        del base.temperature_shift, base._next_token
        super().export()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainers = {"icr": GircseTrainer, "last_step": LastStep, "answers": Answers}
    parser.add_argument("--objective", choices=trainers, default="icr")
    parser.add_argument("--soft_token_gradient", type=float)
    parser.add_argument("--learn_temperature", action="store_true")
    parser.add_argument("--contrast", type=int, help="queries (the whole batch)")
    chosen, rest = parser.parse_known_args()
    if chosen.contrast is not None and (chosen.contrast < 1 or chosen.objective != "icr" or chosen.learn_temperature):
        parser.error(f"--contrast {chosen.contrast} must be at least 1, and is for the objective icr alone")
    if chosen.learn_temperature and chosen.objective != "icr":
        parser.error(f"--learn_temperature is for the objective icr alone, not {chosen.objective}")
    trainer: Callable[..., GircseTrainer] = (
        LearnedTemperature if chosen.learn_temperature else trainers[chosen.objective]
    )
    trainer = partial(Apart, contrast=chosen.contrast) if chosen.contrast else trainer

    def make_trainer(model: nn.Module, *args: Any, **kwargs: Any) -> GircseTrainer:
        if chosen.soft_token_gradient is not None:
            scale_gradient(base_of(model), chosen.soft_token_gradient)
        return trainer(model, *args, **kwargs)

    main(rest, make_trainer)
