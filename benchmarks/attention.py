"""A training step on a CPU with PyTorch's SDPA and with eager attention: time and peak memory.

    python benchmarks/attention.py --output benchmarks/results

SmolLM2-135M's shape with random weights, all of them trained, K = 5; texts of N tokens without padding or a shared
prefix, in float32 and under autocast to bfloat16. The routes take turns; ratios are medians over rounds. Memory is what
torch allocates, weights and gradients included.
"""

from __future__ import annotations

import statistics
from functools import partial

import torch

from common import DEVICE, Table, build, in_turns, parser, peak_bytes, ratio


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--batch_size", type=int, default=32)
    options.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument("--k", type=int, default=5)
    args = options.parse_args()

    model = build("smollm2-135m").train()

    def step(ids: torch.Tensor, implementation: str, dtype: torch.dtype) -> None:
        model.set_attn_implementation(implementation)
        model.zero_grad()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            embeddings = model(ids, k=args.k).step_embeddings
        embeddings.sum().backward()

    table = Table(N="{}", dtype="{}", sdpa_s="{:.2f}", eager_time="{:.2f}x", eager_memory="{:.2f}x")
    for length in args.lengths:
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, length), device=DEVICE)
        for dtype in (torch.float32, torch.bfloat16):
            routes = {name: partial(step, ids, name, dtype) for name in ("sdpa", "eager")}
            times = in_turns(routes, args.rounds)
            memory = {name: peak_bytes(route, model) for name, route in routes.items()}
            table.add(
                N=length,
                dtype=str(dtype).removeprefix("torch."),
                sdpa_s=statistics.median(times["sdpa"]),
                eager_time=ratio(times, "eager", "sdpa"),
                eager_memory=memory["eager"] / memory["sdpa"],
            )
    table.save(args.output)


if __name__ == "__main__":
    main()
