"""Encoding short texts under one instruction: what running the instruction once a batch saves.

    python benchmarks/shared_prefix.py --output benchmarks/results/shared_prefix.json

Qwen2.5-0.5B's shape with random weights, float32 on a CPU and bfloat16 on a GPU. The routes take turns in one process;
the table gives medians, in milliseconds a batch. `plain` runs the whole prompt of every text, as any encoder would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from transformers import Qwen2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[1]
QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8, 16, 32, 128], help="tokens after the instruction")
    parser.add_argument("--instruction_tokens", type=int, default=25)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    config_class = get_class_from_dynamic_module("configuration_gircse.GircseConfig", str(ROOT))
    torch.manual_seed(0)
    model = model_class(config_class(text_config=Qwen2Config(**QWEN_05B))).to(device, dtype).eval()
    causal_eos = model_class(
        config_class(text_config=model.config.text_config, step_token="none", pooling="last"), model.language_model
    ).eval()
    instruction = torch.randint(1000, 2000, (args.instruction_tokens,))
    rows = []
    print(
        "| N | k | Causal-EOS, plain | GIRCSE, plain | GIRCSE, shared | plain / shared | shared / Causal-EOS | cosine |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for length in args.lengths:
        own = torch.randint(2000, 9000, (args.batch_size, length))
        ids = torch.cat([instruction.expand(args.batch_size, -1), own], dim=1).to(device)
        for k in (1, args.k):

            def shared(ids: torch.Tensor = ids, k: int = k) -> torch.Tensor:
                return model.generate_embedding(ids, k=k)

            def plain(ids: torch.Tensor = ids, k: int = k) -> torch.Tensor:
                with mock.patch.object(model_class, "_shared_prefix", return_value=0):
                    return model.generate_embedding(ids, k=k)

            routes = [lambda ids=ids: causal_eos.generate_embedding(ids), plain, shared]
            times = [[milliseconds(route) for route in routes] for _ in range(args.rounds + 1)][1:]
            medians = [statistics.median(column) for column in zip(*times, strict=True)]
            over_shared = statistics.median(line[1] / line[2] for line in times)
            over_eos = statistics.median(line[2] / line[0] for line in times)
            cosine = float((plain() * shared()).sum(-1).min())
            rows.append(
                {
                    "N": length,
                    "k": k,
                    "ms": medians,
                    "plain_over_shared": over_shared,
                    "shared_over_causal_eos": over_eos,
                }
            )
            cells = " | ".join(f"{value:.0f}" for value in medians)
            print(f"| {length} | {k} | {cells} | {over_shared:.2f} | {over_eos:.2f} | {cosine:.6f} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {**vars(args), "output": str(args.output), "device": device, "torch": torch.__version__}
        args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
