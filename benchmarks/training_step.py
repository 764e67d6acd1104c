"""A training step, over the paper's Algorithm 1 as its released code runs it, and over Causal-EOS.

    python benchmarks/training_step.py --output benchmarks/results
    python benchmarks/training_step.py --shape qwen2.5-0.5b --tuning lora --batch_sizes 8 --algorithm_1_limit 512

Algorithm 1 runs the causal LM over the whole sequence K + 1 times, with the logits of all positions and the hidden
states of all layers kept. Its gradients are compared with those through the KV cache: |a - b| / |b| over all trained
parameters. The routes take turns; ratios are medians over rounds. Memory is what torch allocates, weights and
gradients included. Algorithm 1 is left out above `--algorithm_1_limit` tokens a batch, where it would not fit.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import CAUSAL_EOS, DEVICE, Table, build, in_turns, parser, peak_bytes, ratio, variant
from gircse.training.arguments import ModelArguments
from train_gircse import add_lora


def algorithm_1(model: nn.Module, ids: Tensor, k: int) -> Tensor:
    """z_1..z_K, (B, K, d), unit norm; texts without padding."""
    language_model = model.language_model
    table = language_model.get_input_embeddings().weight
    sequence = language_model.get_input_embeddings()(ids)
    for step in range(k + 1):
        output = language_model(
            inputs_embeds=sequence,
            attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long, device=ids.device),
            use_cache=False,
            output_hidden_states=True,
        )
        if step < k:
            soft = torch.softmax(output.logits[:, -1].float() / model.config.logit_temperature, dim=-1)
            sequence = torch.cat([sequence, (soft.to(table.dtype) @ table)[:, None]], dim=1)
    states = output.hidden_states[-1][:, -k:].float()
    means = states.cumsum(1) / torch.arange(1, k + 1, device=states.device)[:, None]
    return F.normalize(means, dim=-1)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", default="root", choices=["root", "qwen2.5-0.5b"])
    options.add_argument("--tuning", default="full", choices=["full", "lora"])
    options.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 500])
    options.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32])
    options.add_argument("--k", type=int, default=5)
    options.add_argument("--algorithm_1_limit", type=int, default=4096)
    args = options.parse_args()

    model = build(args.shape)
    causal_eos = variant(model, **CAUSAL_EOS)
    if args.tuning == "lora":
        model = add_lora(model, ModelArguments()).get_base_model()
        for name, parameter in model.named_parameters():  # LoRA's B starts at 0, which gives A no gradient
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    model.train(), causal_eos.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = torch.randn(model.config.hidden_size, device=DEVICE)

    def step(embeddings: Tensor) -> None:
        (embeddings @ direction).sum().backward()

    def gradients() -> Tensor:
        return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])

    def clean(call):
        def run() -> None:
            model.zero_grad()
            call()

        return run

    table = Table(
        batch="{}",
        N="{}",
        step_s="{:.3f}",
        Algorithm_1_time="{:.2f}x",
        Causal_EOS_time="{:.2f}x",
        Algorithm_1_memory="{:.2f}x",
        gradient_difference="{:.1e}",
    )
    for batch in args.batch_sizes:
        for length in args.lengths:
            ids = torch.randint(model.get_input_embeddings().num_embeddings, (batch, length), device=DEVICE)
            routes = {
                "ours": clean(lambda ids=ids: step(model(ids, k=args.k).step_embeddings)),
                "causal_eos": clean(lambda ids=ids: step(causal_eos(ids).step_embeddings)),
            }
            both = batch * length <= args.algorithm_1_limit
            if both:
                routes["algorithm_1"] = clean(lambda ids=ids: step(algorithm_1(model, ids, args.k)))
            times = in_turns(routes, args.rounds)
            peaks, found = {}, {}
            for name, route in routes.items():
                model.zero_grad()
                peaks[name] = peak_bytes(route, model)
                found[name] = gradients()
            difference = (found["ours"] - found["algorithm_1"]).norm() / found["algorithm_1"].norm() if both else None
            table.add(
                batch=batch,
                N=length,
                step_s=statistics.median(times["ours"]),
                Algorithm_1_time=ratio(times, "algorithm_1", "ours") if both else None,
                Causal_EOS_time=ratio(times, "ours", "causal_eos"),
                Algorithm_1_memory=peaks["ours"] / peaks["algorithm_1"] if both else None,
                gradient_difference=None if difference is None else float(difference),
                seconds=times,
                bytes=peaks,
            )
    table.save(args.output)


if __name__ == "__main__":
    main()
