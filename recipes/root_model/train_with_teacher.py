"""`train_gircse.py` with a stronger encoder's embeddings of plain texts as an extra loss.

    python recipes/root_model/train_with_teacher.py --vectors runs/aligned --model_name_or_path runs/distilled ...

with any arguments of train_gircse.py. Each step adds `--teacher_weight` x distillation_loss (distil.py) on a
batch of its own, so that what the contrastive pairs don't teach is not forgotten.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from distil import add_arguments, distillation_loss, embed, teacher_loader
from gircse.training.gradient_cache import joint_side
from gircse.training.trainer import GircseTrainer
from graphs import GraphedLoop
from teacher_vectors import TeacherTexts
from train_gircse import main as train


def freeze_others(model: Any, pattern: str) -> None:
    """Training leaves the weights as they are whose names lack `pattern`.

    Raises:
        ValueError: all would be left so.
    """
    others = [weight for name, weight in model.named_parameters() if not re.search(pattern, name)]
    if len(others) == len([*model.parameters()]):
        raise ValueError(f"--only {pattern!r} matches no weight: nothing would be trained")
    for weight in others:
        weight.requires_grad_(False)


class TeacherTrainer(GircseTrainer):
    """ICR, and distillation as distil.py's arguments say, `teaching`."""

    def __init__(self, *args: Any, teaching: argparse.Namespace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze_others(self.model, teaching.only)
        texts, processor, self.teaching = TeacherTexts(teaching.vectors), self.processing_class, teaching
        graphs, longest = teaching.graph_lengths, self.data_collator.max_length
        longest_taught = max(graphs or [longest])
        self.teacher_loader = teacher_loader(texts, processor, teaching.batch_size, longest_taught, self.args.seed)
        self.teacher_batches: Iterator[dict[str, Tensor]] | None = None  # from the first step on
        self.teacher_loop = GraphedLoop(self.model, graphs) if graphs else None
        self.loop = GraphedLoop(self.model, [*teaching.pair_graph_lengths, longest]) if graphs else None

    def _embed_both(self, model: Any, sides: list[dict[str, Tensor]]) -> Sequence[Tensor]:
        if self.loop is None:
            return super()._embed_both(model, sides)
        rows = self.args.per_device_train_batch_size * (2 + self.args.num_negatives)
        embeddings = self.loop(**joint_side(sides), k=self.args.k, rows=rows)
        return embeddings.split([len(side["input_ids"]) for side in sides])

    def _batches_from_here(self) -> Iterator[dict[str, Tensor]]:
        """The teacher's, epoch after epoch, without those of the steps before a checkpoint, whose random state is the
        present one."""
        batches, state = chain.from_iterable(repeat(self.teacher_loader)), random.getstate()
        for _ in range(self.state.global_step * self.args.gradient_accumulation_steps):
            next(batches)
        random.setstate(state)
        return batches

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Two backward passes, so that the activations of one loss are gone before the other's are made."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.teacher_batches = self.teacher_batches or self._batches_from_here()
        batch = {name: tensor.to(self.args.device) for name, tensor in next(self.teacher_batches).items()}
        vectors = batch.pop("vectors")
        with self.compute_loss_context_manager():
            distillation = distillation_loss(embed(model, batch, self.teaching, self.teacher_loop), vectors)
        weighted = self.teaching.teacher_weight * distillation / self.args.gradient_accumulation_steps
        self.accelerator.backward(weighted)
        return loss + weighted.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, "--teacher_batch_size")
    parser.add_argument("--teacher_weight", type=float, default=1.0)
    parser.add_argument("--only", default="", metavar="PATTERN", help="leave weights as they are whose names lack it")
    more = "of the pairs' texts, beside --max_length, where --graph_lengths asks for graphs"
    parser.add_argument("--pair_graph_lengths", type=int, nargs="*", default=[], help=more)
    teaching, rest = parser.parse_known_args()
    train(rest, partial(TeacherTrainer, teaching=teaching))


if __name__ == "__main__":
    main()
