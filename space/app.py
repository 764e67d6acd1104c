"""A page to try a GIRCSE model: similarities of sentences under an instruction, by number of steps, and its tokens.

    python space/app.py --trust_remote_code

`--model` is a Hub id or folder, by default the repo that this file is in. On Spaces, the variables `GIRCSE_MODEL` and
`GIRCSE_TRUST_REMOTE_CODE` take the arguments' place.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio
import matplotlib
import pandas
import torch
from torch import Tensor
from transformers import AutoModel, AutoProcessor

matplotlib.use("Agg")
from matplotlib.figure import Figure

MOST_TEXTS, MOST_STEPS, TOKENS_SHOWN = 8, 20, 5
TEXTS = (
    "The plot is thin, but I laughed the whole way through.",
    "A gripping story, and yet I was glad when it was over.",
    "My card was swallowed by the cash machine.",
    "How do I get a new bank card?",
)
INSTRUCTIONS = (
    "Retrieve semantically similar text.",
    "Identify the topic or theme of the given text.",
    "Classify the sentiment expressed in the given text.",
)


def read(lines: str) -> list[str]:
    """The texts of a box, one a line.

    Raises:
        gradio.Error: there are too few or too many; shown on the page.
    """
    texts = [line.strip() for line in lines.splitlines() if line.strip()]
    if not 2 <= len(texts) <= MOST_TEXTS:
        raise gradio.Error(f"{len(texts)} sentences: give 2 to {MOST_TEXTS}, one a line")
    return texts


def similarity_map(texts: list[str], embeddings: Tensor) -> Figure:
    """Cosines of all pairs, from (B, d) of unit norm."""
    similarities = (embeddings @ embeddings.T).numpy()
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(similarities, vmin=0, vmax=1, cmap="Blues")
    numbers = [str(number) for number in range(1, len(texts) + 1)]
    axes.set(xticks=range(len(texts)), yticks=range(len(texts)), xticklabels=numbers)
    names = [f"{n}  {t if len(t) < 30 else t[:28] + '…'}" for n, t in zip(numbers, texts, strict=True)]
    axes.set_yticklabels(names, parse_math=False)
    for row in range(len(texts)):
        for column in range(row + 1):
            value = similarities[row, column]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    return figure


def curves(steps: Tensor, k: int) -> Figure:
    """How near each text is to the first one after each step, from z_1..z_K, (B, K, d) of unit norm."""
    near = (steps[1:] * steps[:1]).sum(-1).numpy()
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(near, start=2):
        axes.plot(range(1, len(line) + 1), line, marker="o", markersize=3, label=f"1 and {number}")
    axes.axvline(k, color="0.8", zorder=0)
    ticks = [1, *range(5, steps.shape[1] + 1, 5)]
    axes.set(xlabel="k, generated tokens", ylabel="cosine", xticks=ticks, title=" ")  # below the page's label
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def token_table(described: list[list[list[tuple[str, float]]]], k: int) -> pandas.DataFrame:
    """The most probable tokens of each step up to k, a column for each text."""
    columns = {
        f"sentence {number}": [" ".join(token.strip() or repr(token) for token, _ in step) for step in steps[:k]]
        for number, steps in enumerate(described, start=1)
    }
    return pandas.DataFrame({"step": range(1, k + 1), **columns})


def embedder(model: Any, processor: Any) -> Callable[[str, str, int], tuple[Figure, Figure, pandas.DataFrame]]:
    """What the button does."""

    @torch.no_grad()
    def embed(lines: str, instruction: str | None, k: int) -> tuple[Figure, Figure, pandas.DataFrame]:
        texts = read(lines)
        try:
            longest = model.text_limit(processor.max_length, MOST_STEPS)
            inputs = processor(texts, instruction=(instruction or "").strip() or None, max_length=longest)
        except (TypeError, ValueError) as error:  # shown on the page only as a gradio.Error
            raise gradio.Error(str(error)) from error
        steps = model.generate_embedding(**inputs, k=MOST_STEPS, return_steps=True).float()
        described = model.describe_steps(**inputs, k=int(k), top_k=TOKENS_SHOWN, tokenizer=processor.tokenizer)
        return similarity_map(texts, steps[:, int(k) - 1]), curves(steps, int(k)), token_table(described, int(k))

    return embed


def page(model: Any, processor: Any) -> gradio.Blocks:
    """The page.

    Raises:
        ValueError: the model generates no tokens.
    """
    if model.config.step_token not in ("soft", "hard"):
        raise ValueError(f"step_token={model.config.step_token!r}: this page is for models that generate tokens")
    with gradio.Blocks(title="GIRCSE") as blocks:
        gradio.Markdown(
            "# GIRCSE\nEmbeddings that are generated: each step adds a token, and the mean is the embedding."
        )
        with gradio.Row():
            with gradio.Column():
                lines = gradio.Textbox("\n".join(TEXTS), label=f"Sentences, 2 to {MOST_TEXTS}, one a line", lines=6)
                instruction = gradio.Dropdown(
                    INSTRUCTIONS, value=INSTRUCTIONS[0], label="Instruction (any, or none)", allow_custom_value=True
                )
                k = gradio.Slider(
                    1, MOST_STEPS, value=min(model.config.num_steps, MOST_STEPS), step=1, label="k, generated tokens"
                )
                button = gradio.Button("Embed", variant="primary")
            similarities = gradio.Plot(label="Similarities after k steps")
        over_steps = gradio.Plot(label="Similarity to the first sentence, step by step")
        tokens = gradio.Dataframe(label="The most probable tokens of each step", wrap=True)
        embed = embedder(model, processor)
        for event in (button.click, blocks.load):
            event(embed, inputs=[lines, instruction, k], outputs=[similarities, over_steps, tokens])
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parents[1]
    model = os.environ.get("GIRCSE_MODEL") or (str(here) if (here / "config.json").exists() else None)
    parser.add_argument("--model", default=model, help="Hub id or folder (this repo)")
    trust = os.environ.get("GIRCSE_TRUST_REMOTE_CODE") == "1"
    parser.add_argument("--trust_remote_code", action="store_true", default=trust, help="run the model's code")
    parser.add_argument("--port", type=int, help="7860, or the next that is free")
    args = parser.parse_args()
    if args.model is None:
        parser.error("there is no model beside this page: give --model, or set the variable GIRCSE_MODEL")
    settings = {"trust_remote_code": args.trust_remote_code}
    model = AutoModel.from_pretrained(args.model, **settings).eval()
    page(model, AutoProcessor.from_pretrained(args.model, **settings)).launch(server_port=args.port)


if __name__ == "__main__":
    main()
