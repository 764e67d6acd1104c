"""`train_gircse.py` with another objective, for ablations.

    python recipes/train_objective.py --objective last_step ...

`last_step` is InfoNCE on z_K alone; `mixed_steps` contrasts z_i of the queries with z_j of the documents, the order of
the j's drawn anew for each batch; `icr` is the objective as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gircse import GircseTrainer, main


class LastStep(GircseTrainer):
    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        return super()._joint_loss(queries[:, -1:], documents[:, -1:], inputs)


class MixedSteps(GircseTrainer):
    def _joint_loss(self, queries: Tensor, documents: Tensor, inputs: dict[str, Any]) -> Tensor:
        return super()._joint_loss(queries, documents[:, torch.randperm(documents.shape[1])], inputs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trainers = {"icr": GircseTrainer, "last_step": LastStep, "mixed_steps": MixedSteps}
    parser.add_argument("--objective", choices=trainers, default="icr")
    chosen, rest = parser.parse_known_args()
    main(rest, trainers[chosen.objective])
