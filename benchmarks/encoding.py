"""Encoding with k generated tokens, over Causal-EOS on the same backbone: wall time and peak memory.

    python benchmarks/encoding.py --output benchmarks/results

Qwen2.5-0.5B's shape with random weights, float32 on a CPU and bfloat16 on a GPU; texts of N tokens without a shared
prefix. `static` is `cache_implementation="static"`, for GPUs. Ratios are medians over rounds in which all routes take
turns. Memory is what torch allocates, weights included.
"""

from __future__ import annotations

import statistics

import torch

from common import CAUSAL_EOS, DEVICE, Table, build, in_turns, parser, peak_bytes, ratio, variant


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    options.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20])
    options.add_argument("--static", action="store_true", default=DEVICE == "cuda")
    options.add_argument("--shape", default="qwen2.5-0.5b", choices=["qwen2.5-0.5b", "root"])
    args = options.parse_args()

    model = build(args.shape)
    causal_eos = variant(model, **CAUSAL_EOS).eval()
    table = Table(
        batch="{}", N="{}", k="{}", causal_eos_s="{:.3f}", time="{:.3f}x", static_time="{:.3f}x", memory="{:.3f}x"
    )
    for batch in args.batch_sizes:
        for length in args.lengths:
            ids = torch.randint(1000, 8000, (batch, length), device=DEVICE)
            routes = {"causal_eos": lambda ids=ids: causal_eos.generate_embedding(ids)}
            for k in args.steps:
                routes[f"{k}"] = lambda ids=ids, k=k: model.generate_embedding(ids, k=k)
                if args.static:
                    routes[f"{k} static"] = lambda ids=ids, k=k: model.generate_embedding(
                        ids, k=k, cache_implementation="static"
                    )
            times = in_turns(routes, args.rounds)
            base = peak_bytes(routes["causal_eos"], model)
            for k in args.steps:
                table.add(
                    batch=batch,
                    N=length,
                    k=k,
                    causal_eos_s=statistics.median(times["causal_eos"]),
                    time=ratio(times, f"{k}", "causal_eos"),
                    static_time=ratio(times, f"{k} static", "causal_eos") if args.static else None,
                    memory=peak_bytes(routes[f"{k}"], model) / base,
                    seconds=times,
                )
    table.save(args.output)


if __name__ == "__main__":
    main()
