"""Draws the method's picture: python recipes/figures/draw_method.py assets/method.png"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TEXT, TOKEN, STATE, BACKBONE = "#dfe7ee", "#f6e3c5", "#cfe6d4", "#f4f4f2"
INK = "#333333"
STEPS_AT = (6.75, 8.45, 11.05)  # x of steps 1, 2 and K


def box(axes, x, y, width, height, label, color, size=10):
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color, edgecolor=INK)
    )
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes, start, end, bend=0.0, style="-"):
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=10,
            color=INK,
            linestyle=style,
        )
    )


def note(axes, x, y, text, size=9, align="center"):
    axes.text(x, y, text, ha=align, va="center", fontsize=size, color=INK)


def draw_prefill(axes) -> None:
    """The backbone, and the prompt and text that it reads once, up to h'_0."""
    box(axes, 0.2, 1.7, 12.0, 1.0, "", BACKBONE)
    note(axes, 2.6, 2.2, "causal LM, prefill (once)", 10)
    note(axes, 10.25, 2.2, "same LM over its KV cache, a position a step", 10)
    for i, word in enumerate(("Instruct: …", "Query:", "why", "…", "card?")):
        box(axes, 0.3 + 1.12 * i, 0.35, 1.0, 0.6, word, TEXT, 9)
        arrow(axes, (0.8 + 1.12 * i, 0.95), (0.8 + 1.12 * i, 1.7))
    note(axes, 3.0, 0.14, "prompt and text, N tokens")
    box(axes, 4.93, 3.25, 0.7, 0.55, "$h'_0$", BACKBONE)
    arrow(axes, (5.28, 2.7), (5.28, 3.25))


def draw_steps(axes) -> None:
    """d_k in, g_k out, for steps 1, 2 and K."""
    previous = 5.63
    for k, x in enumerate(STEPS_AT, start=1):
        name = "K" if k == 3 else str(k)
        box(axes, x - 0.45, 0.35, 1.1, 0.6, f"$d_{name} = s_{name}E$", TOKEN, 9)
        arrow(axes, (x, 0.95), (x, 1.7))
        box(axes, x - 0.35, 3.25, 0.7, 0.55, f"$g_{name}$", STATE)
        arrow(axes, (x, 2.7), (x, 3.25))
        if k < 3:
            arrow(axes, (previous, 3.45), (x - 0.47, 0.7), bend=-0.18, style="--")
        previous = x + 0.35
    note(axes, 9.75, 0.65, "…", 14)
    note(axes, 9.75, 3.52, "…", 14)
    note(axes, 9.1, 0.14, "$s_k$ = softmax of the last state's logits, $d_k$ = mix of all token embeddings")


def draw_embedding(axes) -> None:
    """z_k, and what training does with all of them."""
    box(axes, 6.85, 4.55, 4.3, 0.6, "$z_k$ = mean($g_1 … g_k$), for every k in one pass", STATE, 10)
    for x, end in zip(STEPS_AT, (8.0, 8.7, 9.9), strict=True):
        arrow(axes, (x, 3.8), (end, 4.55))
    training = "ICR training: InfoNCE on $z_1 … z_K$,\nand a penalty where $z_{k+1}$ does worse than $z_k$"
    note(axes, 0.3, 4.85, training, 10, align="left")
    arrow(axes, (5.2, 4.85), (6.8, 4.85), style="--")


def draw(path: str) -> None:
    figure, axes = pyplot.subplots(figsize=(10, 4.3), layout="constrained")
    axes.set(xlim=(0, 12.4), ylim=(0, 5.5))
    axes.axis("off")
    draw_prefill(axes)
    draw_steps(axes)
    draw_embedding(axes)
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    draw(sys.argv[1] if len(sys.argv) > 1 else "assets/method.png")
