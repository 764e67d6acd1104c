"""Leave a run of layers out of a causal LM; the training that follows has to heal what remains.

    python recipes/root_model/shorten.py SMOLLM2 runs/backbone --leave_out 18 28

writes SMOLLM2, the folder of a causal LM, without its layers 18 to 28, counted from 0.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def leave_out(model: PreTrainedModel, first: int, last: int) -> None:
    """Removes layers `first` to `last`, both included.

    Raises:
        ValueError: the model has no such layers, or no others.
    """
    layers, count = model.get_decoder().layers, model.config.num_hidden_layers
    if not 0 <= first <= last < count or last - first + 1 == count:
        raise ValueError(f"leave_out {first} {last}: must be some of layers 0 to {count - 1}, not all")
    kept = [layer for i, layer in enumerate(layers) if not first <= i <= last]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i  # its place in the KV cache
    model.get_decoder().layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [x for i, x in enumerate(model.config.layer_types) if not first <= i <= last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--leave_out", nargs=2, type=int, required=True, metavar=("FIRST", "LAST"))
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    leave_out(model, *args.leave_out)
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)


if __name__ == "__main__":
    main()
