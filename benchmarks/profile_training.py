"""Where the time of a training step goes, forward and backward, and its ratio over Causal-EOS on the same batch.

    python benchmarks/profile_training.py --output benchmarks/results

SmolLM2-135M's shape with random weights, all of them trained; 16 queries x 3 texts x 64 tokens without padding in one
pass, K = 5. Parts are differences between routes that take turns: the prompt alone; with K positions more, whose
embeddings are constant; with soft tokens, as training runs. The first is Causal-EOS. A part's bound is its FLOPs, 2 a
weight and position forward and 4 backward, over the rate of a large matrix product, measured here.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from common import CAUSAL_EOS, DEVICE, Table, build, parser, ratio, seconds, step_loop, variant


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch_size", type=int, default=48)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--k", type=int, default=5)
    args = options.parse_args()

    model = build("smollm2-135m").train()
    causal_eos = variant(model, **CAUSAL_EOS).train()
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, args.length), device=DEVICE)
    constant = model.get_input_embeddings().weight[: args.batch_size].detach()

    def steps_after(token: Tensor) -> Tensor:
        loop = step_loop(model, ids, args.k)
        return [loop.advance(token) for _ in range(args.k)][-1]

    routes: dict[str, Callable[[], Tensor]] = {
        "prompt": lambda: causal_eos(ids).step_embeddings,
        "constant": lambda: steps_after(constant),
        "whole": lambda: model(ids, k=args.k).step_embeddings,
    }
    times: dict[tuple[str, str], list[float]] = {(name, way): [] for name in routes for way in ("forward", "backward")}
    for _ in range(args.rounds + 1):
        for name, route in routes.items():
            model.zero_grad()
            made: list[Tensor] = []
            times[name, "forward"].append(seconds(lambda route=route, made=made: made.append(route())))
            times[name, "backward"].append(seconds(made[0].sum().backward))
    times = {name: values[1:] for name, values in times.items()}  # the first round is a warm-up

    a, b = (torch.randn(4096, 4096, device=DEVICE) for _ in range(2))
    rate = 2 * 4096**3 / min(seconds(lambda: a @ b) for _ in range(4))
    decoder = sum(m.weight.numel() for m in model.language_model.model.modules() if isinstance(m, torch.nn.Linear))
    positions = {"prompt": args.batch_size * args.length, "steps": args.batch_size * args.k}
    work = {
        "prompt": positions["prompt"] * decoder,
        "steps: decoder": positions["steps"] * decoder,
        "steps: head, softmax and mix": positions["steps"] * 2 * model.get_input_embeddings().weight.numel(),
    }
    middle = {name: statistics.median(values) for name, values in times.items()}
    whole = middle["whole", "forward"] + middle["whole", "backward"]
    print(f"matrix products reach {rate / 1e9:.0f} GFLOP/s\n")
    table = Table(part="{}", forward_s="{:.2f}", backward_s="{:.2f}", share="{:.1%}", bound_s="{:.2f}")
    for (part, weights), route, less in zip(work.items(), routes, [None, "prompt", "constant"], strict=True):
        spent = [middle[route, way] - (middle[less, way] if less else 0) for way in ("forward", "backward")]
        bound = 6 * weights / rate
        table.add(part=part, forward_s=spent[0], backward_s=spent[1], share=sum(spent) / whole, bound_s=bound)
    sums = {
        name: [sum(x) for x in zip(times[name, "forward"], times[name, "backward"], strict=True)] for name in routes
    }
    table.add(
        part="whole",
        forward_s=middle["whole", "forward"],
        backward_s=middle["whole", "backward"],
        share=1,
        bound_s=sum(6 * w / rate for w in work.values()),
        over_causal_eos=ratio(sums, "whole", "prompt"),
    )
    print(f"\n{table.rows[-1]['over_causal_eos']:.2f}x the time of Causal-EOS")
    table.save(args.output)


if __name__ == "__main__":
    main()
