"""What an evaluation leaves behind: table, picture, the card's metadata, the Hub's and mteb's registry's entries.

A row is a task and a metric: `task`, `group`, `type`, `metric`, `scores` (k as a string to score x 100; "None" for a
model without steps), `dataset`, `revision`, `splits`, `subsets`, `prompts`.
"""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import huggingface_hub
import matplotlib
import mteb
import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import yaml_dump
from mteb.models import ModelMeta

from .tasks import LOCAL

matplotlib.use("Agg")
from matplotlib import pyplot

# The `loader_kwargs` in mteb's registry of a model whose code is in its own repo.
CODE_OF_ITS_OWN = {"trust_remote_code": True}


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of each group of tasks, and of all tasks, by each task's main score."""
    first = list({row["task"]: row for row in reversed(rows)}.values())[::-1]
    groups = {group: [r for r in first if r["group"] == group] for group in sorted({r["group"] for r in first})}
    if len(groups) > 1:
        groups["All tasks"] = first
    return {
        f"{name} ({len(members)})": {
            k: round(float(np.mean([row["scores"][k] for row in members])), 2) for k in members[0]["scores"]
        }
        for name, members in groups.items()
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of all scores; group by group, with the means below."""
    steps = list(rows[0]["scores"])
    heads = [f"k = {k}" if k != "None" else "score" for k in steps]
    lines = ["| task | metric | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(steps)]
    for row in sorted(rows, key=lambda row: row["group"]):
        lines.append(
            f"| {row['task']} | {row['metric']} | " + " | ".join(f"{row['scores'][k]:.2f}" for k in steps) + " |"
        )
    for name, scores in means(rows).items():
        lines.append(f"| **{name}** | mean | " + " | ".join(f"**{scores[k]:.2f}**" for k in steps) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The means over k, as the difference to those of the smallest k."""
    steps = [int(k) for k in rows[0]["scores"]]
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, scores in means(rows).items():
        values = np.array(list(scores.values())) - next(iter(scores.values()))
        bold = {"color": "black", "linewidth": 2.2} if name.startswith("All tasks") else {"linewidth": 1.3}
        axes.plot(steps, values, marker="o", markersize=3, label=name, **bold)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set(xlabel="k, generated tokens", ylabel=f"score x 100, against k = {steps[0]}", xticks=steps)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))  # beside the lines
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def card_metadata(rows: list[dict[str, Any]], meta: ModelMeta, shown: int | None) -> str:
    """The model card's `model-index`, YAML between its two lines of dashes, with the scores at k = `shown`."""
    k = str(shown)
    results = [
        EvalResult(
            task_type=row["type"],
            dataset_type=row["dataset"],
            dataset_name=row["task"],
            dataset_config=",".join(row["subsets"]),
            dataset_split=",".join(row["splits"]),
            dataset_revision=row["revision"],
            metric_type=row["metric"],
            metric_value=row["scores"][k],
            metric_name=row["metric"] if shown is None else f"{row['metric']} (k = {k})",
        )
        for row in rows
    ]
    name = meta.name.rpartition("/")[2]
    return f"---\n{ModelCardData(model_name=name, eval_results=results).to_yaml()}\n---\n"


def hub_task(row: dict[str, Any]) -> str | None:
    """The name of what was evaluated as mteb files it on the Hub: the task, or one split of one of its subsets."""
    metadata = mteb.get_task(row["task"]).metadata
    if {*row["subsets"]} == {*metadata.hf_subsets} and {*row["splits"]} == {*metadata.eval_splits}:
        return row["task"]
    if len(row["subsets"]) == len(row["splits"]) == 1:
        return f"{row['task']}_{row['subsets'][0]}_{row['splits'][0]}"
    return None


def hub_entries(rows: list[dict[str, Any]], settings: dict[str, Any], shown: int | None) -> dict[str, str]:
    """Names and YAML of the files that belong in a model repo's `.eval_results/`, with the scores at k = `shown`; their
    notes say k and the settings.

    Those of data sets on the Hub, each task's main score, but for tasks of which some subsets were evaluated; none
    where huggingface_hub is older than this format (1.4).
    """
    if not hasattr(huggingface_hub, "EvalResultEntry"):
        return {}
    files, notes = {}, ", ".join(f"{name} = {value}" for name, value in {"k": shown, **settings}.items() if value)
    for row in rows:
        if row["dataset"].startswith(LOCAL) or f"{row['task']}.yaml" in files:
            continue
        if (name := hub_task(row)) is None:
            continue
        entry = huggingface_hub.EvalResultEntry(
            dataset_id=row["dataset"],
            task_id=name,
            dataset_revision=row["revision"],
            value=row["scores"][str(shown)],
            source_url="https://github.com/embeddings-benchmark/mteb",
            source_name=f"mteb {mteb.__version__}",
            notes=notes or None,
        )
        content = huggingface_hub.eval_result_entries_to_yaml([entry])
        files[f"{row['task']}.yaml"] = yaml_dump(content, sort_keys=False)
    return files


def registry_entry(meta: ModelMeta) -> str:
    """Python source of a `ModelMeta` for mteb's registry."""
    infinite = "from math import inf\n\n" if meta.max_tokens == inf else ""  # as of static embeddings
    imports = "from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper\n"
    return f"{infinite}{imports}from mteb.models.model_meta import ScoringFunction\n\nmodel = {meta.to_python()}\n"


def clear_report(out: Path) -> None:
    """Removes what `write_report` has written to a folder."""
    for name in ("results.json", "results.md", "card_metadata.yaml", "model_meta.py", "k_curve.png"):
        (out / name).unlink(missing_ok=True)
    for entry in (out / ".eval_results").glob("*.yaml"):
        entry.unlink()


def write_report(
    out: Path,
    rows: list[dict[str, Any]],
    failed: dict[str, str],
    meta: ModelMeta,
    settings: dict[str, Any],
    shown: int | None,
    command: str,
) -> None:
    """Writes `results.json`, `results.md`, `card_metadata.yaml`, `model_meta.py`, for tasks of the Hub `.eval_results/`
    and, if there are several k, `k_curve.png`.

    Args:
        out: the folder.
        failed: name to reason of the tasks that were not evaluated.
        meta, settings: the model, and what else changes its embeddings or scores beside k.
        shown: the k of the model card.
        command: what was run.
    """
    versions = {"mteb": mteb.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    content = {
        "model": meta.name,
        "revision": meta.revision,
        "settings": settings,
        "command": command,
        "versions": versions,
        "tasks": rows,
        "means": means(rows),
        "not_evaluated": failed,
    }
    clear_report(out)  # of another model, it may have files that this one doesn't get
    (out / "results.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    of = f", of a sample of {settings['sample']} rows of each task" if "sample" in settings else ""
    lines = [f"`{meta.name}` at `{meta.revision}`, scores x 100{of}:", "", markdown(rows), ""]
    lines += [f"- {name} was not evaluated: {reason}" for name, reason in failed.items()]
    lines += ["", "```bash", command, "```", "", ", ".join(f"{name} {version}" for name, version in versions.items())]
    (out / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "card_metadata.yaml").write_text(card_metadata(rows, meta, shown), encoding="utf-8")
    (out / "model_meta.py").write_text(registry_entry(meta), encoding="utf-8")
    for name, content in hub_entries(rows, settings, shown).items():
        (out / ".eval_results").mkdir(exist_ok=True)
        (out / ".eval_results" / name).write_text(content, encoding="utf-8")
    if len(rows[0]["scores"]) > 1:
        plot(rows, out / "k_curve.png")
