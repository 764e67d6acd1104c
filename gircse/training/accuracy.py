"""Retrieval accuracy on held-out pairs, at each k from one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from .data import PairCollator, TrainingPairs
from .gradient_cache import place_rows, rows_of
from .losses import candidate_mask

ACCURACY_STEPS = (1, 3, 5, 10, 20)
# A batch holds at most --per_device_eval_batch_size times so many tokens, so that of short texts there are more.
TOKENS_OF_A_TEXT = 512


@torch.no_grad()
def retrieval_accuracy(
    model: Any,
    pairs: Any,
    collator: PairCollator,
    batch_size: int = 32,
    steps: Sequence[int] | None = None,
    bar: bool | None = None,
) -> dict[int, float]:
    """How often the positive is a query's nearest document, among all positives and one hard negative each of `pairs`
    less false negatives, for each k of `steps` (`accuracy_steps` by default): {k: share}. One pass gives all k; {1:
    share} for a model without generation. Its progress is shown by a bar, or by one line for `bar=False`; not at
    all by default."""
    generates, steps = model.config.step_token != "none", steps or accuracy_steps(model.config)
    rows = TrainingPairs(pairs, num_negatives=1, seed=0)
    batch = collator([rows[i] for i in range(len(rows))])
    was_training = model.training
    model.eval()
    sides = batch["query"], batch["document"]
    parts = [(side, rows) for side in range(2) for rows in rows_by_tokens(sides[side], batch_size)]
    embeddings: list[Tensor | None] = [None, None]
    if bar is False:
        print(f"Measuring held-out accuracy, {len(parts)} batches", flush=True)
    for side, part in tqdm(parts, desc="held-out accuracy", leave=False, disable=not bar):
        inputs = {name: value.to(model.device) for name, value in rows_of(sides[side], part).items()}
        found = model(**inputs, k=max(steps) if generates else None).step_embeddings.cpu()
        place_rows(embeddings, side, part, found, len(sides[side]["input_ids"]))
    model.train(was_training)
    candidates = candidate_mask(batch)
    accuracy = {}
    for k in steps:
        queries, documents = (side[:, k - 1] for side in embeddings)
        scores = (queries @ documents.T).masked_fill(~candidates, -2.0)
        found = (scores.argmax(1) == torch.arange(len(queries))) & scores.isfinite().all(1)  # of NaN it takes the first
        accuracy[k] = found.float().mean().item()
    return accuracy


def accuracy_steps(config: PretrainedConfig) -> tuple[int, ...]:
    """The k's at which accuracy is measured."""
    if config.step_token == "none":
        return (1,)
    return tuple(k for k in ACCURACY_STEPS if config.step_token != "learned" or k <= config.num_steps)


def measured_steps(config: PretrainedConfig, trained: int) -> list[int]:
    """These, and the one that is trained."""
    return sorted({*accuracy_steps(config), 1 if config.step_token == "none" else trained})


def check_metric(name: str | None, config: PretrainedConfig, trained: int) -> None:
    """Raises a ValueError for a `metric_for_best_model` that is not measured."""
    there = ["accuracy", *(f"accuracy_k{k}" for k in measured_steps(config, trained))]
    if name is not None and name.removeprefix("eval_") not in there:
        raise ValueError(f"metric_for_best_model={name!r} is not measured: choose one of {', '.join(there)}")


def rows_by_tokens(side: dict[str, Tensor], size: int) -> list[Tensor]:
    """Row numbers in batches of like length that have no more tokens than `size` texts of TOKENS_OF_A_TEXT, and no more
    than 16 `size` texts."""
    lengths = side["attention_mask"].sum(1)
    batches: list[list[int]] = [[]]
    for row in lengths.argsort(stable=True).tolist():  # in rising order: the row is the longest of its batch
        count = len(batches[-1]) + 1
        if count > 1 and (count * lengths[row] > TOKENS_OF_A_TEXT * size or count > 16 * size):
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]
