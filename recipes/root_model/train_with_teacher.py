"""`train_gircse.py` with a stronger encoder's embeddings of plain texts as an extra loss.

    python recipes/root_model/train_with_teacher.py --vectors runs/aligned --model_name_or_path runs/distilled ...

with any arguments of train_gircse.py. Each step adds `--teacher_weight` x distillation_loss (distil.py) on a
batch of its own, so that what the contrastive pairs don't teach is not forgotten.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from distil import add_memory_argument, distillation_loss, draw_steps, teacher_loader
from gircse.training.trainer import GircseTrainer
from teacher_vectors import TeacherTexts
from train_gircse import main as train


class TeacherTrainer(GircseTrainer):
    """ICR, and distillation as `teaching` says: its weight, batch size, and most tokens of a batch with 10 steps."""

    def __init__(self, *args: Any, teaching: argparse.Namespace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        texts, processor = TeacherTexts(teaching.vectors), self.processing_class
        self.teacher_weight, self.most_tokens = teaching.teacher_weight, teaching.most_tokens
        loader = teacher_loader(
            texts, processor, teaching.teacher_batch_size, self.data_collator.max_length, self.args.seed
        )
        self.teacher_batches = chain.from_iterable(repeat(loader))  # epoch after epoch

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Two backward passes, so that the activations of one loss are gone before the other's are made."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        batch = {name: tensor.to(self.args.device) for name, tensor in next(self.teacher_batches).items()}
        vectors = batch.pop("vectors")
        with self.compute_loss_context_manager():
            distillation = distillation_loss(model(**batch, k=draw_steps(batch, self.most_tokens)).embeddings, vectors)
        weighted = self.teacher_weight * distillation / self.args.gradient_accumulation_steps
        self.accelerator.backward(weighted)
        return loss + weighted.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", required=True, help="folder of align_vectors.py")
    parser.add_argument("--teacher_weight", type=float, default=1.0)
    parser.add_argument("--teacher_batch_size", type=int, default=64)
    add_memory_argument(parser)
    teaching, rest = parser.parse_known_args()
    train(rest, partial(TeacherTrainer, teaching=teaching))


if __name__ == "__main__":
    main()
