"""Gradient caching: sub-batches of a contrastive batch, and the random state in which each was embedded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Sub-batches that go together in gradient caching's first pass, which keeps no activations.
WIDER_WITHOUT_GRADIENTS = 4


class RandomState:
    """The random state of CPU and accelerator at construction; inside `replay()` it holds again (dropout draws the
    same)."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [] if device.type == "cpu" else [device]
        self.type, self.module = device.type, torch.get_device_module(device)
        self.states = self._now()

    def _now(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(self.module.get_rng_state(device) for device in self.devices)]

    def restore(self) -> None:
        cpu, *others = self.states
        torch.set_rng_state(cpu)
        for device, state in zip(self.devices, others, strict=True):
            self.module.set_rng_state(state, device)

    def holds(self) -> bool:
        """Whether no random number has been drawn since."""
        return all(map(torch.equal, self.states, self._now()))

    @contextmanager
    def replay(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices, device_type=self.type):
            self.restore()
            yield


def value_with_gradient_of(carrier: Tensor, value: Tensor) -> Tensor:
    """A scalar with the gradient of `carrier` and the value of `value`."""
    return carrier - (carrier - value).detach()


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
