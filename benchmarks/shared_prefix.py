"""Encoding short texts under one instruction: what running the instruction once a batch saves.

    python benchmarks/shared_prefix.py --output benchmarks/results

Qwen2.5-0.5B's shape with random weights, float32 on a CPU and bfloat16 on a GPU; N is the text's tokens, after those of
the instruction. `plain` runs the whole prompt of every text, as any encoder would; `shared` is what the model does by
itself. `prefill` is up to the first soft token. Ratios are medians over rounds in which all routes take turns.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from common import CAUSAL_EOS, DEVICE, Table, build, in_turns, parser, ratio, room, step_loop, variant


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--lengths", type=int, nargs="+", default=[8, 16, 32, 128], help="tokens after the instruction"
    )
    options.add_argument("--instruction_tokens", type=int, default=25)
    options.add_argument("--steps", type=int, nargs="+", default=[1, 5])
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    args = options.parse_args()

    model = build("qwen2.5-0.5b")
    causal_eos = variant(model, **CAUSAL_EOS).eval()
    instruction = torch.randint(1000, 2000, (args.instruction_tokens,))

    @contextmanager
    def plain() -> Iterator[None]:
        with mock.patch.object(room("step_loop"), "shared_prefix", return_value=0):
            yield

    def prefill(ids: torch.Tensor) -> None:
        with torch.no_grad():
            step_loop(model, ids, 1)

    table = Table(
        batch="{}",
        N="{}",
        k="{}",
        causal_eos_ms="{:.0f}",
        plain_ms="{:.0f}",
        shared_ms="{:.0f}",
        prefill_saving="{:.2f}x",
        whole_saving="{:.2f}x",
        plain_over_causal_eos="{:.2f}x",
        shared_over_causal_eos="{:.2f}x",
        cosine="{:.6f}",
    )
    for batch, length in itertools.product(args.batch_sizes, args.lengths):
        own = torch.randint(2000, 9000, (batch, length))
        ids = torch.cat([instruction.expand(batch, -1), own], dim=1).to(DEVICE)
        routes = {"causal_eos": lambda ids=ids: causal_eos.generate_embedding(ids)}
        for k in (0, *args.steps):
            run = (lambda ids=ids: prefill(ids)) if k == 0 else lambda ids=ids, k=k: model.generate_embedding(ids, k=k)
            routes[f"shared {k}"] = run
            routes[f"plain {k}"] = plain()(run)
        times = in_turns(routes, args.rounds)
        for k in args.steps:
            shared, unshared = routes[f"shared {k}"](), routes[f"plain {k}"]()
            table.add(
                batch=batch,
                N=length,
                k=k,
                causal_eos_ms=1000 * statistics.median(times["causal_eos"]),
                plain_ms=1000 * statistics.median(times[f"plain {k}"]),
                shared_ms=1000 * statistics.median(times[f"shared {k}"]),
                prefill_saving=ratio(times, "plain 0", "shared 0"),
                whole_saving=ratio(times, f"plain {k}", f"shared {k}"),
                plain_over_causal_eos=ratio(times, f"plain {k}", "causal_eos"),
                shared_over_causal_eos=ratio(times, f"shared {k}", "causal_eos"),
                cosine=float((shared * unshared).sum(-1).min()),
            )
    table.save(args.output)


if __name__ == "__main__":
    main()
