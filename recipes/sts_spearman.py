"""Spearman correlation on a semantic-similarity file at every k, from one pass, as a table and a picture.

    python recipes/sts_spearman.py --model before=runs/backbone after=. --data sts_stsbenchmark_test.jsonl.gz

The file holds `sentence1`, `sentence2` and `score` a line. Both sides get the paper's instruction for STS tasks. A
model may also be a plain causal LM: that is where a model was before training.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import pandas
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gircse import ModelArguments, load_model

INSTRUCTION = "Retrieve semantically similar text."
STEPS = 20


def embed(model, processor, texts: list[str], batch_size: int) -> torch.Tensor:
    """(n, STEPS, d): z_1..z_20 of each text; texts of like length go together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    for start in range(0, len(order), batch_size):
        batch = [texts[i] for i in order[start : start + batch_size]]
        parts.append(model.generate_embedding(**processor(batch, instruction=INSTRUCTION), k=STEPS, return_steps=True))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def spearman(path: str, data: pandas.DataFrame, batch_size: int) -> list[float]:
    """100 x Spearman correlation of cosine and score at k = 1..20."""
    model, processor = load_model(ModelArguments(model_name_or_path=path))
    model.eval()
    left, right = (embed(model, processor, data[side].tolist(), batch_size) for side in ("sentence1", "sentence2"))
    cosines = F.cosine_similarity(left, right, dim=-1)  # (n, STEPS)
    ranks = data["score"].rank()
    return [100 * pandas.Series(cosines[:, k].tolist()).rank().corr(ranks) for k in range(STEPS)]


def plot(curves: dict[str, list[float]], path: str) -> None:
    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, values), color in zip(curves.items(), ("tab:gray", "tab:green", "tab:blue", "tab:orange"), strict=False):
        axes.plot(range(1, STEPS + 1), values, color=color, marker="o", markersize=3, linewidth=1.4)
        axes.annotate(name, (STEPS, values[-1]), xytext=(0, 6), textcoords="offset points", ha="right", color=color)
    axes.axvspan(5.5, STEPS + 0.5, color="0.95", zorder=0)
    axes.text(5.8, axes.get_ylim()[0], " beyond the K = 5 of training", va="bottom", fontsize=8, color="0.4")
    axes.set(xlabel="k, generated tokens", ylabel="STS-Benchmark, Spearman x 100", xlim=(0.5, STEPS + 0.5))
    axes.set_xticks([1, 3, 5, 10, 15, 20])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="NAME=PATH, or PATH alone; Hub ids work too")
    parser.add_argument("--data", required=True)
    parser.add_argument("--plot", help="write the picture here")
    parser.add_argument("--batch_size", type=int, default=64)
    args = parser.parse_args()

    data = pandas.read_json(args.data, lines=True)
    named = (entry.rpartition("=")[::2] for entry in args.model)
    curves = {name or path: spearman(path, data, args.batch_size) for name, path in named}
    print("| k | " + " | ".join(curves) + " |\n|---" + "|---" * len(curves) + "|")
    for k in (1, 3, 5, 10, 15, 20):
        print(f"| {k} | " + " | ".join(f"{values[k - 1]:.2f}" for values in curves.values()) + " |")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
