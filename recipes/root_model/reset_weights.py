"""Give some weights of a trained model the values that they had in its backbone.

    python recipes/root_model/reset_weights.py runs/gircse SMOLLM2 runs/reset --weights 'layers[.]2[89][.]'

writes the model of runs/gircse to runs/reset, with the weights of SMOLLM2, the causal LM that it came from, where
a weight's name matches the pattern.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import load
from gircse.training.publishing import export


@torch.no_grad()
def reset(model: torch.nn.Module, backbone: torch.nn.Module, pattern: str) -> int:
    """Copies the weights of `backbone` whose names match into `model`; how many there were.

    Raises:
        ValueError: no name matches, or the backbone lacks such a weight of that shape.
    """
    theirs = dict(backbone.named_parameters())
    chosen = {name: weight for name, weight in model.named_parameters() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"--weights {pattern!r} matches no weight, such as {next(iter(theirs))}")
    for name, weight in chosen.items():
        if name not in theirs or theirs[name].shape != weight.shape:
            raise ValueError(f"{name}, {tuple(weight.shape)}, is not in the backbone: give what the model came from")
        weight.copy_(theirs[name])
    return len(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GIRCSE model")
    parser.add_argument("backbone", help="the causal LM")
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", required=True, metavar="PATTERN")
    args = parser.parse_args()
    model, processor = load(args.model)
    backbone, _ = load(args.backbone)
    print(f"{reset(model, backbone, args.weights)} weights are the backbone's again")
    export(model, processor, args.output)


if __name__ == "__main__":
    main()
