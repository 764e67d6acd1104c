"""Texts a second on a CPU of the root model by PyTorch and by ONNX, in float32 and int8, beside a small encoder.

    pip install -r requirements-onnx.txt torchao sentence-transformers
    for k in 1 5 20; do python export_gircse.py --output_dir onnx-$k --k $k; done
    python benchmarks/cpu_routes.py --onnx onnx-1 onnx-5 onnx-20 --output benchmarks/results

The queries of the sample pairs, bare, in batches of 32 of like length. All routes of a k take turns in one process.
Int8 in PyTorch is torchao's, of weights and activations; bfloat16 is slow on CPUs without instructions for it.
`--encoder` is a Sentence Transformers model, Hub id or folder, that embeds the same texts. Ratios are over PyTorch in
float32.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import TorchAoConfig

from common import ROOT, Table, classes, in_turns, load_root, parser, ratio
from gircse.loading import load
from gircse.onnx.folder import FLOAT32, INT8, embed

BATCH = 32
PYTORCH = "PyTorch, float32"


def batches(count: int) -> list[list[str]]:
    lines = (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = sorted((json.loads(line)["query"] for line in lines[:count]), key=len)
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def by_pytorch(model: Any, processor: Any, k: int, texts: list[list[str]]) -> None:
    for batch in texts:
        model.generate_embedding(**processor(batch), k=k)


def by_onnx(folder: Path, name: str, texts: list[list[str]]) -> Callable[[], None]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "onnx" / name, settings)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def run() -> None:
        for batch in texts:
            embed(session, tokenizer, batch)

    return run


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    options.add_argument("--encoder_name", default="all-MiniLM-L6-v2", help="as the table calls it")
    options.add_argument("--onnx", type=Path, nargs="+", required=True, help="what export_gircse.py wrote, one for a k")
    options.add_argument("--texts", type=int, default=64)
    args = options.parse_args()

    texts = batches(args.texts)
    k_of = {path: json.loads((path / "config.json").read_text(encoding="utf-8"))["num_steps"] for path in args.onnx}
    model, processor = load_root()
    half, _ = load(ROOT, dtype="bfloat16")
    int8 = classes()[0].from_pretrained(
        ROOT, quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), torch_dtype=torch.float32
    )
    encoder = SentenceTransformer(args.encoder, device="cpu")
    table = Table(route="{}", k="{}", texts_per_second="{:.1f}", over_pytorch="{:.2f}x")
    for folder, k in k_of.items():
        routes = {
            PYTORCH: partial(by_pytorch, model, processor, k, texts),
            "PyTorch, bfloat16": partial(by_pytorch, half, processor, k, texts),
            "PyTorch, int8": partial(by_pytorch, int8, processor, k, texts),
            "ONNX, float32": by_onnx(folder, FLOAT32, texts),
            "ONNX, int8": by_onnx(folder, INT8, texts),
            args.encoder_name: lambda: [encoder.encode(batch) for batch in texts],
        }
        times = in_turns(routes, args.rounds)
        for route in routes:
            speed = sum(map(len, texts)) / statistics.median(times[route])
            steps = None if route == args.encoder_name else k
            table.add(route=route, k=steps, texts_per_second=speed, over_pytorch=1 / ratio(times, route, PYTORCH))
    table.save(args.output)


if __name__ == "__main__":
    main()
