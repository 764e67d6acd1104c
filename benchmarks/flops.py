"""FLOPs of an embedding, counted on the meta device: the paper's Table 6 for the Mistral-7B shape. No weights needed.

    python benchmarks/flops.py --output benchmarks/results/flops.json

Causal-EOS and Bidirectional-Avg are one pass over N tokens. Algorithm 1 is GIRCSE without a cache: K + 1 passes over
the growing sequence. Ratios are over Causal-EOS at the same N.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]


def flops(model_class, config_class, length: int, k: int | None, recompute: bool = False, **axes: str) -> int:
    """FLOPs of one text of `length` tokens; `recompute` takes the model's route without a cache."""
    with torch.device("meta"):
        model = model_class(config_class(text_config=MistralConfig(), attn_implementation="eager", **axes))
        ids = torch.zeros(1, length, dtype=torch.long)
        mask = torch.ones_like(ids)
    model.eval()
    if recompute:
        model._checkpointing = lambda: True
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(ids, mask, k=k)
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 20])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    config_class = get_class_from_dynamic_module("configuration_gircse.GircseConfig", str(ROOT))
    runs: list[tuple[str, int | None, dict]] = [
        ("Causal-EOS", None, {"step_token": "none", "pooling": "last"}),
        ("Bidirectional-Avg", None, {"step_token": "none", "attention": "bidirectional"}),
    ]
    runs += [("Algorithm 1", k, {"recompute": True}) for k in args.steps]
    runs += [("GIRCSE, cached", k, {}) for k in args.steps]
    rows = []
    print(
        "| method | k | "
        + " | ".join(f"N = {n}, TFLOPs" for n in args.lengths)
        + " |\n|---|---"
        + "|---" * len(args.lengths)
        + "|"
    )
    for name, k, settings in runs:
        counts = [flops(model_class, config_class, length, k, **settings) for length in args.lengths]
        rows.append({"method": name, "k": k, "flops": dict(zip(args.lengths, counts, strict=True))})
        base = rows[0]["flops"].values()
        cells = (f"{count / 1e12:.2f} ({count / first:.3f}x)" for count, first in zip(counts, base, strict=True))
        print(f"| {name} | {k or ''} | " + " | ".join(cells) + " |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
