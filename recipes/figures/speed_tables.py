"""The tables of docs/speed.md from benchmarks/results/, each under the command that measured it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
# Columns by table: a row's key, the column's head and how the value is written.
COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "training_step": [
        ("batch", "batch", "{}"),
        ("N", "N", "{}"),
        ("step_s", "seconds", "{:.2f}"),
        ("Algorithm_1_time", "time of Algorithm 1 over it", "{:.2f}x"),
        ("Algorithm_1_memory", "memory over Algorithm 1", "{:.2f}x"),
        ("Causal_EOS_time", "time over Causal-EOS", "{:.2f}x"),
        ("gradient_difference", "gradient difference", "{:.1e}"),
    ],
    "profile_training": [
        ("part", "part", "{}"),
        ("forward_s", "forward, s", "{:.2f}"),
        ("backward_s", "backward, s", "{:.2f}"),
        ("share", "share", "{:.1%}"),
        ("bound_s", "bound, s", "{:.2f}"),
        ("over_causal_eos", "time over Causal-EOS", "{:.2f}x"),
    ],
    "gradient_caching": [
        ("batch", "queries", "{}"),
        ("step_s", "cached, s", "{:.2f}"),
        ("cached_MB", "cached, MB", "{:.0f}"),
        ("plain_MB", "plain, MB", "{:.0f}"),
        ("time", "time over plain", "{:.2f}x"),
        ("difference", "gradient difference", "{:.1e}"),
    ],
    "attention": [
        ("N", "N", "{}"),
        ("dtype", "dtype", "{}"),
        ("sdpa_s", "SDPA, s", "{:.2f}"),
        ("eager_time", "eager, time over SDPA", "{:.2f}x"),
        ("eager_memory", "eager, memory over SDPA", "{:.2f}x"),
    ],
    "corpus": [
        ("route", "route", "{}"),
        ("k", "k", "{}"),
        ("texts_per_second", "texts a second", "{:.1f}"),
        ("padding", "padding", "{:.0%}"),
        ("over_causal_eos", "time over Causal-EOS", "{:.2f}x"),
        ("over_naive", "time over the naive loop", "{:.2f}x"),
    ],
    "shared_prefix": [
        ("batch", "batch", "{}"),
        ("N", "N", "{}"),
        ("k", "k", "{}"),
        ("prefill_saving", "prefill, plain over shared", "{:.2f}x"),
        ("whole_saving", "all, plain over shared", "{:.2f}x"),
        ("plain_over_causal_eos", "plain over Causal-EOS", "{:.2f}x"),
        ("shared_over_causal_eos", "shared over Causal-EOS", "{:.2f}x"),
    ],
    "adaptive_depth": [
        ("tolerance", "tolerance", "{:g}"),
        ("choose_on", "development", "{:.2f}"),
        ("report_on", "test", "{:.2f}"),
        ("mean_steps", "steps a text", "{:.2f}"),
        ("most_steps", "most steps", "{}"),
        ("time", "time over all steps", "{:.2f}x"),
    ],
    "bulk_embedding": [
        ("actors", "actors", "{}"),
        ("threads", "threads of each", "{}"),
        ("texts_per_second", "texts a second", "{:.0f}"),
        ("speedup", "over the first", "{:.2f}x"),
        ("job_s", "whole job, s", "{:.0f}"),
    ],
    "growth": [
        ("what", "what grows", "{}"),
        ("sizes", "sizes", "{}"),
        ("seconds", "seconds", "{}"),
        ("time_exponent", "exponent of time", "{:.2f}"),
        ("MB_beyond_the_weights", "MB beyond the weights", "{}"),
        ("memory_exponent", "exponent of memory", "{:.2f}"),
    ],
    "loads": [
        ("load", "load", "{}"),
        ("weights_MB", "weights in memory, MB", "{:.1f}"),
        ("least_cosine", "least cosine with float32", "{:.5f}"),
        ("time", "time over float32", "{:.2f}x"),
    ],
    "serving": [
        ("route", "route", "{}"),
        ("clients", "clients", "{}"),
        ("texts_per_second", "texts a second", "{:.1f}"),
        ("median_ms", "median of a request, ms", "{:.0f}"),
        ("p95_ms", "95th percentile, ms", "{:.0f}"),
        ("speedup", "texts a second over the handler's", "{:.2f}x"),
    ],
    "soft_mix": [
        ("V", "V", "{:,}"),
        ("batch", "batch", "{}"),
        ("table", "token embeddings", "{}"),
        ("time", "chunks, time over one product", "{:.2f}x"),
        ("chunked_MB", "chunks, MB", "{:.1f}"),
        ("plain_MB", "one product, MB", "{:.1f}"),
        ("difference", "gradient difference", "{:.1e}"),
    ],
    "profile_steps": [
        ("part", "part", "{}"),
        ("seconds", "seconds", "{:.2f}"),
        ("share", "share", "{:.1%}"),
        ("bound_s", "bound, s", "{:.2f}"),
        ("times_the_bound", "times the bound", "{:.1f}"),
    ],
}


def cell(value: Any, form: str) -> str:
    if isinstance(value, list):
        return ", ".join(f"{x:g}" for x in value)
    return "–" if value is None else form.format(value).replace("%", " %")


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def plain(rows: list[dict[str, Any]], columns: list[tuple[str, str, str]]) -> str:
    """A row of the results is a row of the table."""
    lines = [[cell(row.get(key), form) for key, _, form in columns] for row in rows]
    return table([head for _, head, _ in columns], lines)


def flops(rows: list[dict[str, Any]]) -> str:
    """k down, method and length across."""
    counted = {(row["method"], row["N"], row["k"]): row["over_causal_eos"] for row in rows if row["k"]}
    across = list(dict.fromkeys((method, length) for method, length, _ in counted))
    across.sort(key=lambda column: column[0])
    steps = list(dict.fromkeys(k for _, _, k in counted))
    lines = [[str(k), *(f"{counted[(*column, k)]:.3f}x" for column in across)] for k in steps]
    return table(["k", *(f"{method}, N = {length}" for method, length in across)], lines)


def encoding(rows: list[dict[str, Any]]) -> str:
    """Batch and length down, k across; `static` where it was measured."""
    steps = list(dict.fromkeys(row["k"] for row in rows))
    found = {(row["batch"], row["N"], row["k"]): row for row in rows}
    heads = ["batch", "N", "Causal-EOS, s", *(f"k = {k}" for k in steps)]
    static = [k for k in steps if any(row["k"] == k and row["static_time"] is not None for row in rows)]
    heads += [*(f"k = {k}, static" for k in static), f"peak memory, k = {steps[-1]}"]
    lines = []
    for batch, length in dict.fromkeys((row["batch"], row["N"]) for row in rows):
        of = {k: found[batch, length, k] for k in steps}
        line = [str(batch), str(length), f"{of[steps[0]]['causal_eos_s']:.2f}"]
        line += [f"{of[k]['time']:.3f}x" for k in steps] + [cell(of[k]["static_time"], "{:.3f}x") for k in static]
        lines.append([*line, f"{of[steps[-1]]['memory']:.3f}x"])
    return table(heads, lines)


def cpu_routes(rows: list[dict[str, Any]]) -> str:
    """Routes down, k across: texts a second. One that knows no k has a single number, the median of its runs."""
    steps = list(dict.fromkeys(row["k"] for row in rows if row["k"]))
    lines = []
    for route in dict.fromkeys(row["route"] for row in rows):
        of = [row for row in rows if row["route"] == route]
        if of[0]["k"] is None:
            cells = [f"{median(row['texts_per_second'] for row in of):.0f}"] + ["–"] * (len(steps) - 1)
        else:
            cells = [f"{row['texts_per_second']:.1f} ({row['over_pytorch']:.2f}x)" for row in of]
        lines.append([route, *cells])
    return table(["texts a second (over PyTorch in float32)", *(f"k = {k}" for k in steps)], lines)


def measured(content: dict[str, Any], made: str) -> str:
    """A table under what it takes to measure it again."""
    command = re.sub(r" --output \S+", "", content["command"])
    command = re.sub(r" /\S*/", " DATA/eval/", command)  # wherever the data lay
    machine = content["machine"]
    where = machine.get("gpu") or f"CPU, threads: {machine['threads']}"
    if (bfloat16 := machine.get("bfloat16_instructions")) is not None:
        where += f", {'with' if bfloat16 else 'without'} bfloat16 instructions"
    versions = f"torch {machine['torch'].partition('+')[0]}, transformers {machine['transformers']}"
    return f"`{command}` ({where}, {versions})\n\n{made}"


COLUMNS["loads_avx2"] = COLUMNS["loads"]


PIVOTS = {"flops": flops, "encoding": encoding, "cpu_routes": cpu_routes}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def tables() -> dict[str, str]:
    """By name, as docs/speed.md names them."""
    made = {}
    for name in (*PIVOTS, *COLUMNS):
        content = read(name)
        rows = content["rows"]
        made[name] = measured(content, PIVOTS[name](rows) if name in PIVOTS else plain(rows, COLUMNS[name]))
    return made
