"""What each way of loading the root model in less memory costs: weights in memory, time, agreement with float32.

    python benchmarks/loads.py --output benchmarks/results

Weights are megabytes that stay in memory; "offload" gives them three quarters of what float32 takes and keeps the rest
on disk. Cosines are the least over the queries of the sample pairs at k = 5. Time is over float32 on batches of 32
texts, the median of rounds in which the ways take turns. bitsandbytes is measured where it is installed.
"""

from __future__ import annotations

import importlib.util
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

from common import DEVICE, ROOT, Table, in_turns, parser, ratio
from gircse.training.pairs import load_pairs

K = 5


def bytes_of(tensor: Tensor) -> int:
    """Bytes in memory; those of its parts for a quantised tensor, 0 for one on disk."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return 0 if tensor.is_meta else tensor.nbytes


def main() -> None:
    args = parser(__doc__).parse_args()
    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    plain = {"torch_dtype": torch.float32}
    with tempfile.TemporaryDirectory() as offload:
        room = {"cpu": AutoModel.from_pretrained(ROOT, trust_remote_code=True, **plain).get_memory_footprint() * 3 // 4}
        ways = {
            "float32": plain,
            "bfloat16": {"torch_dtype": torch.bfloat16},
            "offload": {"device_map": "auto", "max_memory": room, "offload_folder": offload, **plain},
            "int8 (torchao), float32": {"quantization_config": int8, **plain},
            "int8 (torchao), bfloat16": {"quantization_config": int8, "torch_dtype": torch.bfloat16},
        }
        if importlib.util.find_spec("bitsandbytes"):
            for bits in (8, 4):
                quantized = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
                ways[f"{bits} bits (bitsandbytes)"] = {"quantization_config": quantized, **plain}
        models: dict[str, nn.Module] = {}
        for name, settings in ways.items():
            model = AutoModel.from_pretrained(ROOT, trust_remote_code=True, **settings)
            models[name] = model if "device_map" in settings or "bits" in name else model.to(DEVICE)

        processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        pairs = load_pairs(str(ROOT / "sample_pairs.jsonl"))
        batches = [processor(pairs["query"][i : i + 32]) for i in range(0, len(pairs), 32)]

        def embed(model: nn.Module, batches: list = batches) -> Tensor:
            return torch.cat([model.generate_embedding(**b.to(model.device), k=K).cpu() for b in batches])

        exact = embed(models["float32"])
        times = in_turns({name: lambda m=model: embed(m, batches[:2]) for name, model in models.items()}, args.rounds)
        table = Table(load="{}", weights_MB="{:.1f}", least_cosine="{:.5f}", time="{:.2f}x")
        for name, model in models.items():
            table.add(
                load=name,
                weights_MB=sum(map(bytes_of, (*model.parameters(), *model.buffers()))) / 1e6,
                least_cosine=float(F.cosine_similarity(embed(model), exact).min()),
                time=ratio(times, name, "float32"),
            )
    table.save(args.output)


if __name__ == "__main__":
    main()
