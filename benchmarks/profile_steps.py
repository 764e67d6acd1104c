"""Where the time of one call goes, and how far each part is from what this machine can do.

    python benchmarks/profile_steps.py --output benchmarks/results

Qwen2.5-0.5B's shape with random weights. Parts: prefill, the decoder of the k steps (its matrix products, and the
rest: attention, norms, cache, Python), LM head, soft mix (softmax, and the product with E). A part's bound is the
larger of its FLOPs over the rate of a large matrix product and its bytes over the rate of a copy, both measured here.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from unittest import mock

import torch

from common import DEVICE, Table, build, parser, seconds, step_loop


def machine() -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s read and written by a copy."""
    model_dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    size = 16384 if DEVICE == "cuda" else 4096
    a, b = (torch.randn(size, size, device=DEVICE, dtype=model_dtype) for _ in range(2))
    flops = 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(4))
    c = torch.empty_like(a)
    moved = 2 * a.numel() * a.element_size() / min(seconds(lambda: c.copy_(a)) for _ in range(6))
    return flops, moved


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--batch_size", type=int, default=8)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--k", type=int, default=20)
    args = options.parse_args()

    flops, moved = machine()
    model = build("qwen2.5-0.5b")
    ids = torch.randint(1000, 8000, (args.batch_size, args.length), device=DEVICE)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, call):
        def run(*inputs, **kwargs):
            result = []
            spent[name] += seconds(lambda: result.append(call(*inputs, **kwargs)))
            return result[0]

        return run

    decoder, head = model.language_model.model, model.get_output_embeddings()
    linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    rounds = []
    for _ in range(args.rounds + 1):
        spent.clear()
        with torch.no_grad():
            loop = timed("prefill", step_loop)(model, ids, args.k)
            for name, part in [("decoder", decoder), ("head", head), *(("products", part) for part in linears)]:
                part.forward = timed(name, part.forward)
            with mock.patch.object(model, "_next_token", timed("next token", model._next_token)):
                timed("steps", lambda loop=loop: [loop.step() for _ in range(args.k)])()
        for part in (decoder, head, *linears):
            del part.forward
        rounds.append(dict(spent))
    middle = {name: statistics.median(line[name] for line in rounds[1:]) for name in rounds[0]}

    size = next(model.parameters()).element_size()
    weights, table = sum(m.weight.numel() for m in linears), head.weight.numel()
    tokens, rows = args.batch_size * args.length, args.batch_size * args.k
    cached = args.k * 2 * tokens * model.config.text_config.num_key_value_heads * 64 * len(decoder.layers)
    parts = {
        "prefill": (middle["prefill"], 2 * tokens * weights, weights),
        "steps: decoder's products": (middle["products"], 2 * rows * weights, args.k * weights),
        "steps: attention, norms, cache, Python": (middle["decoder"] - middle["products"], 0, 3 * cached),
        "steps: LM head": (middle["head"], 2 * rows * table, args.k * table),
        "steps: softmax and mix": (middle["next token"] - middle["head"], 2 * rows * table, args.k * table),
    }
    whole = middle["prefill"] + middle["steps"]
    parts["steps: rest"] = (whole - sum(part[0] for part in parts.values()), 0, 0)
    print(f"matrix products reach {flops / 1e9:.0f} GFLOP/s, copies {moved / 1e9:.1f} GB/s\n")
    out = Table(part="{}", seconds="{:.3f}", share="{:.1%}", bound_s="{:.3f}", times_the_bound="{:.1f}")
    for part, (time, work, values) in parts.items():
        bound = max(work / flops, values * size / moved)
        out.add(
            part=part,
            seconds=time,
            share=time / whole,
            bound_s=bound or None,
            times_the_bound=time / bound if bound else None,
        )
    out.save(args.output)


if __name__ == "__main__":
    main()
