"""Gradient caching: a contrastive batch of any size in the memory of one sub-batch.

    python benchmarks/gradient_caching.py --output benchmarks/results

One training step of `GircseTrainer` on the root model and the sample pairs, all sources mixed: batches of 16, 64 and
256 queries with a hard negative each, plain and with sub-batches of 8 texts. Every text is padded to the same length,
so that batches differ in size alone. Ratios are medians over rounds in which both routes take turns; memory is what
torch allocates, weights and gradients included; gradients are compared by |a - b| / |b| over all parameters.
"""

from __future__ import annotations

import statistics
import tempfile

import torch

from common import DEVICE, ROOT, Table, in_turns, load_root, parser, peak_bytes, ratio
from gircse.training.arguments import GircseTrainingArguments
from gircse.training.pairs import load_pairs
from gircse.training.trainer import GircseTrainer


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64, 256])
    options.add_argument("--sub_batch_size", type=int, default=8)
    options.add_argument("--tokens", type=int, default=64, help="of each text")
    args = options.parse_args()

    model, processor = load_root()
    model.train()
    pairs = load_pairs(str(ROOT / "sample_pairs.jsonl"))
    table = Table(
        batch="{}", step_s="{:.2f}", cached_MB="{:.0f}", plain_MB="{:.0f}", time="{:.2f}x", difference="{:.1e}"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            size: GircseTrainer(
                model,
                GircseTrainingArguments(output_dir=folder, report_to="none", sub_batch_size=size),
                processor,
                pairs,
            )
            for size in (args.sub_batch_size, None)
        }
    for batch in args.batch_sizes:
        trainer = trainers[None]
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(batch)])
        for side in ("query", "document"):
            texts = len(inputs[side]["input_ids"])
            inputs[side]["input_ids"] = torch.randint(1000, 8000, (texts, args.tokens), device=DEVICE)
            inputs[side]["attention_mask"] = torch.ones_like(inputs[side]["input_ids"])
        inputs = trainer._prepare_inputs(inputs)

        def step(size: int | None, inputs: dict = inputs) -> None:
            model.zero_grad()
            trainers[size].compute_loss(model, inputs).backward()

        routes = {"cached": lambda: step(args.sub_batch_size), "plain": lambda: step(None)}
        times = in_turns(routes, args.rounds)
        peaks, gradients = {}, {}
        for name, route in routes.items():
            model.zero_grad()
            peaks[name] = peak_bytes(route, model)
            gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
        table.add(
            batch=batch,
            step_s=statistics.median(times["cached"]),
            cached_MB=peaks["cached"] / 1e6,
            plain_MB=peaks["plain"] / 1e6,
            time=ratio(times, "cached", "plain"),
            difference=float((gradients["cached"] - gradients["plain"]).norm() / gradients["plain"].norm()),
            seconds=times,
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
