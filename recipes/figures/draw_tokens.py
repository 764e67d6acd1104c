"""Draws the tokens that texts pass through under two instructions.

    python recipes/figures/draw_tokens.py --model . assets/tokens.png

As in the paper's Table 4: the 30 most probable tokens of each soft token, added up over steps 1-5, 6-10 and 11-20, and
of these the ones with the most probability, pieces of characters left out. In color what stands under one of the two
instructions alone.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import load

TEXTS = [
    "Why is it so hard to track down this card?",
    "I can't believe they finally gave me the job!",
    "The parcel came two days late and the lamp inside was broken.",
]
INSTRUCTIONS = {"intention": "tab:green", "emotion": "tab:red"}
SPANS = [(1, 5), (6, 10), (11, 20)]
SHOWN = 8


def tokens_of(model, processor, facet: str) -> list[list[list[str]]]:
    """For each text and span, its tokens, the most probable first."""
    inputs = processor(TEXTS, instruction=f"Represent the {facet} of this text.")
    described = model.describe_steps(**inputs, k=SPANS[-1][1], top_k=30, tokenizer=processor.tokenizer)
    found = []
    for steps in described:
        spans = []
        for first, last in SPANS:
            weight: Counter[str] = Counter()
            for step in steps[first - 1 : last]:
                for token, probability in step:
                    if token.isprintable() and "\ufffd" not in token:
                        weight[token.strip()] += probability
            spans.append([token for token, _ in weight.most_common(SHOWN)])
        found.append(spans)
    return found


def draw(found: dict[str, list[list[list[str]]]], path: str) -> None:
    rows = len(TEXTS) * (len(SPANS) + 1)
    figure, axes = pyplot.subplots(figsize=(11, 0.34 * rows + 0.4))
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.98)
    axes.set(xlim=(0, 1), ylim=(rows + 0.7, -0.3))
    axes.axis("off")
    starts = dict(zip(INSTRUCTIONS, (0.1, 0.56), strict=True))
    for facet, color in INSTRUCTIONS.items():
        axes.text(starts[facet], 0, f"Represent the {facet} of this text.", color=color, va="center", fontsize=10)
    y = 1.0
    for number, text in enumerate(TEXTS):
        axes.axhline(y - 0.5, color="0.8", linewidth=0.8)
        axes.text(0, y, text, va="center", fontsize=10, fontweight="bold")
        for span, (first, last) in enumerate(SPANS):
            y += 1
            axes.text(0, y, f"{first}–{last}", va="center", fontsize=9, color="0.4")
            lists = {facet: found[facet][number][span] for facet in INSTRUCTIONS}
            shared = set.intersection(*map(set, lists.values()))
            for facet, color in INSTRUCTIONS.items():
                x = starts[facet]
                for token in lists[facet]:
                    drawn = axes.text(x, y, token, va="center", fontsize=9, color="0.45" if token in shared else color)
                    box = drawn.get_window_extent(figure.canvas.get_renderer())
                    x = axes.transData.inverted().transform((box.x1, 0))[0] + 0.01
        y += 1
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("output")
    args = parser.parse_args()
    model, processor = load(args.model)
    model.eval()
    draw({facet: tokens_of(model, processor, facet) for facet in INSTRUCTIONS}, args.output)


if __name__ == "__main__":
    main()
