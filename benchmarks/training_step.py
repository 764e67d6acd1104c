"""Time and gradients of a training step: through the KV cache, against the paper's Algorithm 1 as its code runs it.

    python benchmarks/training_step.py --lengths 64 128 --k 5

Algorithm 1 runs the causal LM over the whole sequence K + 1 times, with the logits of all positions and the hidden
states of all layers kept. The two take turns in one process; the table gives the medians and their ratio, and how far
the gradients are apart, |a - b| / |b| over all parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gircse import ModelArguments, load_model


def algorithm_1(model, input_ids: Tensor, attention_mask: Tensor, k: int) -> Tensor:
    """z_1..z_K, (B, K, d), unit norm, with every step's whole sequence run again; rows are not padded here."""
    language_model = model.language_model
    table = language_model.get_input_embeddings().weight
    sequence = language_model.get_input_embeddings()(input_ids)
    for step in range(k + 1):
        output = language_model(
            inputs_embeds=sequence,
            attention_mask=F.pad(attention_mask, (0, step), value=1),
            use_cache=False,
            output_hidden_states=True,
        )
        if step < k:
            soft = torch.softmax(output.logits[:, -1].float() / model.config.logit_temperature, dim=-1)
            sequence = torch.cat([sequence, (soft.to(table.dtype) @ table)[:, None]], dim=1)
    states = output.hidden_states[-1][:, -k:].float()
    means = states.cumsum(1) / torch.arange(1, k + 1, device=states.device)[:, None]
    return F.normalize(means, dim=-1)


def timed_step(model, embed: Callable[[], Tensor], direction: Tensor) -> tuple[float, Tensor]:
    model.zero_grad()
    started = time.perf_counter()
    (embed() @ direction).sum().backward()
    if direction.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - started
    return elapsed, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parents[1]))
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(ModelArguments(model_name_or_path=args.model))[0].to(device).train()
    torch.manual_seed(0)
    direction = torch.randn(model.config.hidden_size, device=device)
    print("| N | K | cached, s | Algorithm 1, s | ratio | gradient difference |\n|---|---|---|---|---|---|")
    for length in args.lengths:
        ids = torch.randint(model.get_input_embeddings().num_embeddings, (args.batch_size, length), device=device)
        mask = torch.ones_like(ids)
        routes = {
            "cached": lambda ids=ids, mask=mask: model(ids, mask, k=args.k).step_embeddings,
            "algorithm 1": lambda ids=ids, mask=mask: algorithm_1(model, ids, mask, args.k),
        }
        times: dict[str, list[float]] = {name: [] for name in routes}
        gradients = {}
        for round_number in range(args.rounds + 1):  # the first is a warm-up
            for name, embed in routes.items():
                elapsed, gradients[name] = timed_step(model, embed, direction)
                if round_number:
                    times[name].append(elapsed)
        cached, full = (statistics.median(times[name]) for name in routes)
        ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
        difference = (gradients["cached"] - gradients["algorithm 1"]).norm() / gradients["algorithm 1"].norm()
        print(f"| {length} | {args.k} | {cached:.3f} | {full:.3f} | {ratio:.1f} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
