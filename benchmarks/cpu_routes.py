"""Texts a second on a CPU of the root model by PyTorch and by ONNX, each in float32 and int8, beside a small encoder.

    pip install -r requirements-onnx.txt torchao sentence-transformers
    python benchmarks/cpu_routes.py --output benchmarks/results

The queries of the sample pairs, bare, in batches of 32 of like length. All routes of a k take turns in one process.
Int8 in PyTorch is torchao's, of weights and activations; an ONNX file is exported for each k. `--encoder` is a Sentence
Transformers model, Hub id or folder, that embeds the same texts. Ratios are over PyTorch in float32.
"""

from __future__ import annotations

import json
import statistics
import tempfile
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
from gircse.onnx.folder import FLOAT32, INT8, embed, export_onnx

BATCH = 32
PYTORCH = "PyTorch, float32"


def batches(count: int) -> list[list[str]]:
    lines = (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = sorted((json.loads(line)["query"] for line in lines[:count]), key=len)
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def by_pytorch(model: Any, processor: Any, k: int, texts: list[list[str]]) -> None:
    for batch in texts:
        model.generate_embedding(**processor(batch), k=k)


def by_onnx(folder: str, name: str, texts: list[list[str]]) -> Callable[[], None]:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(Path(folder, "onnx", name), settings)
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))

    def run() -> None:
        for batch in texts:
            embed(session, tokenizer, batch)

    return run


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2")
    options.add_argument("--encoder_name", default="all-MiniLM-L6-v2", help="as the table calls it")
    options.add_argument("--k", type=int, nargs="+", default=[1, 5, 20])
    options.add_argument("--texts", type=int, default=128)
    args = options.parse_args()

    texts = batches(args.texts)
    model, processor = load_root()
    int8 = classes()[0].from_pretrained(
        ROOT, quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), torch_dtype=torch.float32
    )
    eager, _ = load(ROOT, attn_implementation="eager")  # as the exporter wants it
    encoder = SentenceTransformer(args.encoder, device="cpu")
    table = Table(route="{}", k="{}", texts_per_second="{:.1f}", over_pytorch="{:.2f}x")
    for k in args.k:
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(eager, processor, folder, k)
            routes = {
                PYTORCH: partial(by_pytorch, model, processor, k, texts),
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
