"""What the benchmarks share: models with random weights, timing in turns, peak memory, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config
from transformers.dynamic_module_utils import get_class_from_dynamic_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gircse.loading import load

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
QWEN_05B = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SHAPES = {"qwen2.5-0.5b": (Qwen2Config, QWEN_05B), "smollm2-135m": (LlamaConfig, SMOLLM2_135M)}
SHAPES["mistral-7b"] = (MistralConfig, {})
CAUSAL_EOS = {"step_token": "none", "pooling": "last"}
BIDIRECTIONAL_AVG = {"step_token": "none", "attention": "bidirectional"}


def classes() -> tuple[type[PreTrainedModel], type[PretrainedConfig]]:
    return (
        get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT)),
        get_class_from_dynamic_module("configuration_gircse.GircseConfig", str(ROOT)),
    )


def room(name: str) -> ModuleType:
    """A module of the remote code, such as `step_loop`."""
    package = classes()[0].__module__.rpartition(".")[0]  # that module's import has loaded it
    return sys.modules[f"{package}.{name}_gircse"]


def text_config(shape: str) -> PretrainedConfig:
    config_class, sizes = SHAPES[shape]
    return config_class(**sizes)


def load_root() -> tuple[PreTrainedModel, Any]:
    """The root model in float32, and its processor."""
    model, processor = load(ROOT)
    return model.to(DEVICE).eval(), processor


def build(shape: str) -> PreTrainedModel:
    """GIRCSE over the root's backbone (`"root"`), or over random weights of the shape named."""
    model_class, config_class = classes()
    if shape == "root":
        return load_root()[0]
    torch.manual_seed(0)
    return model_class(config_class(text_config=text_config(shape))).to(DEVICE, DTYPE).eval()


def variant(model: PreTrainedModel, **axes: str) -> PreTrainedModel:
    """Another design over the same weights, such as `CAUSAL_EOS`."""
    model_class, config_class = classes()
    return model_class(config_class(text_config=model.config.text_config, **axes), model.language_model)


def step_loop(model: PreTrainedModel, input_ids: Tensor, k: int) -> Any:
    """A `StepLoop` of a batch without padding, (B, N), after its prefill."""
    return room("step_loop").StepLoop(model, *room("inputs").check_inputs(model, input_ids, None, k))


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(routes: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each route, which take turns; the first round is a warm-up and left out."""
    times = [[seconds(route) for route in routes.values()] for _ in range(rounds + 1)][1:]
    return dict(zip(routes, map(list, zip(*times, strict=True)), strict=True))


def ratio(times: dict[str, list[float]], route: str, base: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[route], times[base], strict=True))


def peak_bytes(call: Callable[[], object], model: torch.nn.Module) -> int:
    """The most that torch has allocated during `call`, with the weights; gradients count when `call` makes them."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return weights + torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return weights + peak


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--rounds", type=int, default=rounds)
    result.add_argument("--output", type=Path, help="folder for the JSON")
    return result


def cpu_facts() -> dict[str, Any]:
    """Threads, and whether bfloat16 has instructions (None where /proc does not tell). With ONEDNN_MAX_CPU_ISA=AVX2,
    torch's matrix products do without, as they have to on most laptops."""
    listed = Path("/proc/cpuinfo")
    flags = set(listed.read_text(encoding="utf-8").split()) if listed.exists() else None
    bfloat16 = None if flags is None else bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return {
        "threads": torch.get_num_threads(),
        "bfloat16_instructions": bfloat16 and os.environ.get("ONEDNN_MAX_CPU_ISA") != "AVX2",
    }


class Table:
    """Rows that are printed in Markdown as they come, and saved with the command and the machine's facts."""

    def __init__(self, **columns: str) -> None:
        """Columns by name, each with its format, such as `"{:.2f}"`; a None is printed as a dash."""
        self.columns, self.rows = columns, []
        print("| " + " | ".join(name.replace("_", " ") for name in columns) + " |\n" + "|---" * len(columns) + "|")

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        cells = ["–" if row[name] is None else form.format(row[name]) for name, form in self.columns.items()]
        print("| " + " | ".join(cells) + " |", flush=True)

    def save(self, folder: Path | None) -> None:
        """`NAME.json` in `folder`, NAME the script's."""
        if folder is None:
            return
        name = Path(sys.argv[0]).stem
        folder.mkdir(parents=True, exist_ok=True)
        machine = {"device": DEVICE, "torch": torch.__version__, "transformers": transformers.__version__}
        machine |= {"gpu": torch.cuda.get_device_name()} if DEVICE == "cuda" else cpu_facts()
        held = [
            f"{name}={os.environ[name]} "
            for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
            if name in os.environ
        ]
        command = "".join(held) + "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        content = {"command": command, "machine": machine, "rows": self.rows}
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
