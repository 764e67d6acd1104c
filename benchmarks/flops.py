"""FLOPs of an embedding, counted on the meta device: the paper's Table 6 for the Mistral-7B shape. No weights needed.

    python benchmarks/flops.py --output benchmarks/results

Causal-EOS and Bidirectional-Avg are one pass over N tokens. Algorithm 1 is GIRCSE without a cache: K + 1 passes over
the growing sequence. Ratios are over Causal-EOS at the same N.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from common import BIDIRECTIONAL_AVG, CAUSAL_EOS, Table, classes, parser, room, text_config


def flops(length: int, k: int | None, recompute: bool = False, **axes: str) -> int:
    """FLOPs of one text of `length` tokens; `recompute` takes the model's route without a cache."""
    model_class, config_class = classes()
    with torch.device("meta"):
        model = model_class(config_class(text_config=text_config("mistral-7b"), attn_implementation="eager", **axes))
        ids = torch.zeros(1, length, dtype=torch.long)
    model.eval()
    counter = FlopCounterMode(display=False)
    without_cache = mock.patch.object(room("step_loop"), "checkpoints", return_value=recompute)
    with counter, torch.no_grad(), without_cache:
        model(ids, k=k)
    return counter.get_total_flops()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    options.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 20])
    args = options.parse_args()

    table = Table(N="{}", method="{}", k="{}", TFLOPs="{:.2f}", over_causal_eos="{:.3f}x")
    for length in args.lengths:
        base = flops(length, None, **CAUSAL_EOS)
        counts = [("Causal-EOS", None, base), ("Bidirectional-Avg", None, flops(length, None, **BIDIRECTIONAL_AVG))]
        counts += [("Algorithm 1", k, flops(length, k, recompute=True)) for k in args.steps]
        counts += [("GIRCSE, cached", k, flops(length, k)) for k in args.steps]
        for method, k, count in counts:
            table.add(method=method, N=length, k=k, TFLOPs=count / 1e12, over_causal_eos=count / base, flops=count)
    table.save(args.output)


if __name__ == "__main__":
    main()
