"""What a trained folder says of itself: its card, the curves of its training, and a search with it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers.utils import logging

from ..loading import card_of, is_hub_id
from .arguments import GircseTrainingArguments

logger = logging.get_logger("gircse")
# The code files of a published folder, and what loads and runs them.
REMOTE_CODE = {
    "configuration_gircse.py": "all of them",
    "modeling_gircse.py": "`AutoModel`",
    "inputs_gircse.py": "`AutoModel`",
    "step_loop_gircse.py": "`AutoModel`",
    "single_pass_gircse.py": "`AutoModel`",
    "soft_tokens_gircse.py": "`AutoModel`",
    "backbone_gircse.py": "`AutoModel`",
    "adapters_gircse.py": "`AutoModel`",
    "static_steps_gircse.py": "`AutoModel`",
    "processing_gircse.py": "`AutoProcessor`",
    "sentence_gircse.py": "`SentenceTransformer`",
    "handler.py": "Inference Endpoints",
}
METHODS = {
    "soft": "it generates K soft tokens after a text and averages their last hidden states "
    "([GIRCSE](https://arxiv.org/abs/2509.24291))",
    "hard": "it generates K tokens after a text and averages their last hidden states",
    "learned": "it appends K learned tokens to a text and averages their last hidden states",
    "none": "it pools the last hidden states of a text and generates nothing",
}
EXAMPLE = "Given a question, retrieve a passage that answers it."
CARD = """---
{metadata}
---

# {name}

A text embedding model: {method}. Made from {base}{adapter}.

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", {pin}trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", {pin}trust_remote_code=True)
inputs = processor(["how do I renew a card"]{instruction})
embeddings = model.generate_embedding(**inputs)  # (1, d), unit norm
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{repo}", {pin}trust_remote_code=True)
embeddings = model.encode_query(["how do I renew a card"]{k})
```

Inference Endpoints serve merged weights by `handler.py`; Text Embeddings Inference and vLLM can't.

## What `trust_remote_code=True` runs

Only these files, by who loads the model. Read them, and pin the commit that you have read.
The code is under Apache-2.0 (`LICENSE`).

| file | loaded by | SHA-256 |
|---|---|---|
{files}

## Training
{accuracy}
Trained with {objective}, {settings}.
"""
ACCURACY = """
Held-out retrieval accuracy before and after this training, by the number of generated tokens:

| k | before | after |
|---|---|---|
{rows}
"""


def model_card(
    folder: Path,
    training: GircseTrainingArguments,
    base_models: Sequence[str] = (),
    train_data: str = "",
    scores: dict[int, tuple[float, float]] | None = None,
    repo_id: str | None = None,
    commit: str | None = None,
    objective: str | None = None,
    query_instruction: str | None = None,
) -> str:
    """The card of the exported `folder`, filled from the run.

    Args:
        folder: its `config.json` says what the model does; its code files are listed with their hashes.
        training: the run's settings.
        base_models, train_data: see [`GircseTrainer`]. In the place of a folder stand the models that its card says it
            was made from; the licence is that of the first base that states one.
        scores: held-out accuracy before and after training by k.
        repo_id, commit: where the folder is published, by default `training.hub_model_id`; without them the card speaks
            of the folder itself.
        objective: what was trained, with its settings; ICR by default.
        query_instruction: of all training queries, "" for none; None, for an example, where they have several.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    bases, origin = lineage(base_models, "adapter" if config["adapter"] else "finetune")
    repo_id = repo_id or training.hub_model_id
    results = held_out_results(train_data, scores or {})
    name = (repo_id or str(folder.resolve())).rpartition("/")[2]
    metadata = ModelCardData(
        **origin,
        datasets=[train_data] if is_hub_id(train_data) else None,
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["gircse", "sentence-transformers", "sentence-similarity", "text-embeddings", "custom_code"],
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    rows = [f"| {k} | {before:.3f} | {after:.3f} |" for k, (before, after) in (scores or {}).items()]
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        base=", ".join(bases) or "a local model",
        adapter=", as an adapter: loading it needs `pip install peft`" if config["adapter"] else "",
        method=METHODS[config["step_token"]],
        k=", k=5" if config["step_token"] in ("soft", "hard") else "",
        repo=repo_id if repo_id and "/" in repo_id else ".",
        pin="" if commit is None else f'revision="{commit}", ',
        instruction=instruction_argument(EXAMPLE if query_instruction is None else query_instruction),
        files="\n".join(code_rows(folder)),
        accuracy=ACCURACY.format(rows="\n".join(rows)) if rows else "",
        objective=objective or icr(training),
        settings=rate_and_batch(training),
    )


def lineage(base_models: Sequence[str], relation: str) -> tuple[list[str], dict[str, Any]]:
    """The models on the Hub that these are or were made from, and the metadata of that: the models, without whose
    `relation` several would be taken for the parts of a merge, and the licence."""
    bases, licence = [], {}
    for name in base_models:
        card = card_of(name)
        named = name if is_hub_id(name) else card.get("base_model") or []
        bases += [named] if isinstance(named, str) else named
        stated = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
        link = str(stated.get("license_link", ""))
        if is_hub_id(name) and link and not link.startswith("http"):  # a file of that repo
            stated["license_link"] = f"https://huggingface.co/{name}/blob/main/{link}"
        licence = licence or stated
    if not licence:
        bases_given = ", ".join(base_models) or "the model"
        logger.warning_once(f"no card states a licence of {bases_given}, so that README.md has none: add it there")
    named = {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": relation} if bases else {}
    return bases, named | licence


def code_rows(folder: Path) -> Iterator[str]:
    """The rows of the table of code files."""
    for name, loader in REMOTE_CODE.items():
        if (folder / name).exists():
            yield f"| `{name}` | {loader} | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |"


def instruction_argument(instruction: str) -> str:
    """How a call of the processor gives it."""
    return f", instruction={json.dumps(instruction, ensure_ascii=False)}" if instruction else ""


def icr(training: GircseTrainingArguments) -> str:
    """ICR and its settings."""
    settings = f"K = {training.k}, temperature {training.temperature}, lambda {training.refinement_weight}"
    return f"iterative contrastive refinement: {settings}, reduction {training.reduction}"


def rate_and_batch(training: GircseTrainingArguments) -> str:
    """The settings of any objective."""
    batch = (training.per_device_train_batch_size, training.gradient_accumulation_steps, training.world_size)
    sizes = " x ".join(map(str, batch))
    return f"learning rate {training.learning_rate:g}, batch {sizes} (queries, accumulation, processes)"


def held_out_results(train_data: str, scores: dict[int, tuple[float, float]]) -> list[EvalResult]:
    """The accuracy after training, a result for each k, as the Hub shows them."""
    on_hub = is_hub_id(train_data)
    return [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=train_data if on_hub else "local",
            dataset_name=f"{train_data if on_hub else 'training pairs'}, held out",
            metric_type="accuracy",
            metric_name=f"accuracy at k = {k}",
            metric_value=round(after, 5),
        )
        for k, (_, after) in scores.items()
    ]


def plot_curves(history: list[dict[str, Any]], path: Path) -> None:
    """The loss and the gradient norm over the steps (the paper's Figures 4 and 5)."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("matplotlib is not installed: no picture of the training curves")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in history if "loss" in line and "L_1" in line]
    if not lines:
        return
    steps = [line["step"] for line in lines]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = {name for line in lines for name in line if name.startswith("L_") and name != "L_reg"}
    names = sorted(names, key=lambda name: int(name[2:]))
    labelled = {round(sixth * (len(names) - 1) / 5) for sixth in range(6)}  # more names would cover the curves
    for index, name in enumerate(names):
        shade = pyplot.cm.viridis(0.85 * index / max(len(names) - 1, 1))
        label = f"$L_{{{name[2:]}}}$" if index in labelled else None
        left.plot(steps, [line.get(name, math.nan) for line in lines], color=shade, linewidth=1.2, label=label)
    left.set(xlabel="step", ylabel="contrastive loss of step k")
    left.legend(frameon=False)
    norms = [float(line.get("grad_norm", "nan")) for line in lines]
    right.plot(steps, norms, color="tab:gray", linewidth=1.2)
    right.set(xlabel="step", ylabel="gradient norm (L2)", ylim=(0, None))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


SEARCH = """
import json, sys
from transformers import AutoModel, AutoProcessor
folder, rows = sys.argv[1], json.load(sys.stdin)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
def embed(texts, instructions):
    return model.generate_embedding(**processor(texts, instruction=instructions))
queries = embed([r["query"] for r in rows[:4]], [r["instruction"] for r in rows[:4]])
for row, query in zip(rows, queries):
    same = [r for r in rows if r["source"] == row["source"]]
    documents = embed([r["pos"][0] for r in same], [r["instruction"] if r["symmetric"] else None for r in same])
    print(f"\\n{row['instruction']}\\n  {row['query']}")
    for score, index in zip(*map(list, (query @ documents.T).topk(min(3, len(same))))):
        print(f"    {score:.3f}  {same[index]['pos'][0]}")
"""


def show_neighbours(folder: str, pairs: Any) -> None:
    """Loads `folder` in a new process, as a user would, and prints a few held-out queries with their nearest texts."""
    print(f"\nLoading {folder} in a new process:", flush=True)
    rows = json.dumps([dict(row) for row in pairs])
    call = [sys.executable, "-c", SEARCH, str(Path(folder).resolve())]
    subprocess.run(call, input=rows, text=True, check=True, env={**os.environ, "PYTHONIOENCODING": ":backslashreplace"})
