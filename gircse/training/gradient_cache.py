"""Gradient caching (Gao et al., 2021): the gradients of a large contrastive batch, in the memory of a small one.

A contrastive loss needs the embeddings of the whole batch, but its gradient reaches the weights through each text by
itself. So a step goes:

    1. Embed all texts, one sub-batch after the other, without gradients; before each, keep the random state.
    2. Make leaves of the embeddings, compute the loss of the whole batch, and differentiate it with respect to them.
    3. Embed each sub-batch again, in the random state that it had, now with gradients, and call backward on
       (embeddings * their gradients of 2.).sum(): by the chain rule, what the weights gather in sum is the gradient of
       the whole batch's loss.

Activations are kept for one sub-batch at a time; the price is one more forward pass. Dropout draws from the random
state, so that both passes of a sub-batch drop the same units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class RandomState:
    """The random state of CPU and accelerator at construction; inside `replay()` it holds again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [] if device.type == "cpu" else [device]
        self.type, self.module = device.type, torch.get_device_module(device)
        self.states = [torch.get_rng_state(), *(self.module.get_rng_state(device) for device in self.devices)]

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.type):
            cpu, *others = self.states
            torch.set_rng_state(cpu)
            for device, state in zip(self.devices, others, strict=True):
                self.module.set_rng_state(state, device)
            yield


def value_with_gradient_of(carrier: Tensor, value: Tensor) -> Tensor:
    """A scalar with the gradient of `carrier` and the value of `value`."""
    return carrier - (carrier - value).detach()


def joint_side(sides: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Several sides as one, their rows below each other and padded on the right to the longest."""
    longest = max(side["input_ids"].shape[1] for side in sides)
    return {
        name: torch.cat([nn.functional.pad(side[name], (0, longest - side[name].shape[1])) for side in sides])
        for name in ("input_ids", "attention_mask")
    }


def rows_of(side: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: side[name][rows] for name in ("input_ids", "attention_mask")}


def sub_batches(sides: list[dict[str, Tensor]], size: int) -> list[tuple[int, Tensor]]:
    """Sub-batches of up to `size` texts of one side: (side, row numbers)."""
    return [(side, rows) for side in range(2) for rows in rows_by_length(sides[side], size)]


def place_rows(embeddings: list[Tensor | None], side: int, rows: Tensor, found: Tensor, count: int) -> None:
    """Puts a sub-batch's embeddings (b, K, d) at their rows of the side's (count, K, d)."""
    if embeddings[side] is None:
        embeddings[side] = found.new_zeros(count, *found.shape[1:])
    embeddings[side][rows] = found


def rows_by_length(side: dict[str, Tensor], size: int) -> list[Tensor]:
    """Row numbers in groups of `size`, texts of like length together, so that a sub-batch has little padding."""
    return list(side["attention_mask"].sum(1).argsort(stable=True).split(size))
