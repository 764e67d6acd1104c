"""Soft tokens in training: chunk by chunk, made again in backward, against one softmax and one product.

    python benchmarks/soft_mix.py --output benchmarks/results

K soft tokens in a row, each fed to the next, forward and backward, for tables of the small model's size (docs/speed.md)
and of Qwen2.5-0.5B's, tied, either trained or frozen (as under LoRA). Ratios are medians over rounds in which the two
take turns; memory is what torch allocates beyond table and states; gradients are compared by |a - b| / |b|.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from common import DEVICE, Table, in_turns, parser, peak_bytes, ratio, room


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    options.add_argument("--k", type=int, default=5)
    args = options.parse_args()

    soft_embedding = room("soft_tokens").SoftEmbedding
    table = Table(
        V="{}",
        d="{}",
        batch="{}",
        table="{}",
        time="{:.2f}x",
        chunked_MB="{:.1f}",
        plain_MB="{:.1f}",
        difference="{:.1e}",
    )
    for (size, width), frozen, batch in itertools.product(
        [(8192, 256), (151936, 896)], (False, True), args.batch_sizes
    ):
        embed = nn.Embedding(size, width, device=DEVICE).requires_grad_(not frozen)
        nn.init.normal_(embed.weight, std=0.05)
        start = torch.randn(batch, width, device=DEVICE, requires_grad=True)

        def chunked(state: Tensor, weight: Tensor = embed.weight) -> Tensor:
            return soft_embedding.apply(state, weight, None, weight, lambda logits: logits)

        def plain(state: Tensor, weight: Tensor = embed.weight) -> Tensor:
            return torch.softmax(state @ weight.T, dim=-1) @ weight

        def steps(mix, start: Tensor = start, embed: nn.Embedding = embed) -> None:
            start.grad = embed.weight.grad = None
            state = start
            for _ in range(args.k):
                state = state + mix(state)
            state.square().sum().backward()

        routes = {"chunked": lambda: steps(chunked), "plain": lambda: steps(plain)}
        times = in_turns(routes, args.rounds)
        peaks, gradients = {}, {}
        for name, route in routes.items():
            start.grad = embed.weight.grad = None
            peaks[name] = peak_bytes(route, nn.Module())
            gradients[name] = torch.cat([t.grad.flatten() for t in (start, embed.weight) if t.grad is not None])
        table.add(
            V=size,
            d=width,
            batch=batch,
            table="frozen" if frozen else "trained",
            time=ratio(times, "chunked", "plain"),
            chunked_MB=peaks["chunked"] / 1e6,
            plain_MB=peaks["plain"] / 1e6,
            difference=float((gradients["chunked"] - gradients["plain"]).norm() / gradients["plain"].norm()),
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
