"""Several models beside each other, laid out as the paper's Table 2: means by kind of task, and ranks.

Rows of tasks are those of report.py. A line is a model: `model`, `k` (None without steps), `groups` (kind of task to
the mean of its tasks), `mean` and `rank` over all tasks but those of instruction following, `following` and
`following_rank` over these, `overall`, the mean of the two ranks. What there are no tasks for is None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

FOLLOWING = "Instruction following"


def compare(models: dict[str, tuple[list[dict[str, Any]], int | None]]) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A line for each model, the best overall rank first, and the number of tasks of each kind.

    Only tasks count that all models have, of the same data, each by its main score. Means are rounded as they are
    shown, and equal ones share the better rank.

    Args:
        models: name to its rows and the k that stands for it.

    Raises:
        ValueError: no task is common to all.
    """
    scores = {name: _main_scores(rows, k) for name, (rows, k) in models.items()}
    common = sorted(set.intersection(*map(set, scores.values())))
    if not common:
        raise ValueError(f"no task was evaluated for all of {', '.join(models)}")
    kinds = [kind for _, _, kind in common]
    counts = {kind: kinds.count(kind) for kind in sorted(kinds)}
    lines = []
    for name, found in scores.items():
        groups = {kind: _mean([found[task] for task in common if task[2] == kind]) for kind in counts}
        general, following = (_mean([found[t] for t in common if follows(t[2]) == side]) for side in (False, True))
        line = {"model": name, "k": models[name][1], "groups": groups, "mean": general, "following": following}
        lines.append(line)
    for score, rank in (("mean", "rank"), ("following", "following_rank")):
        values = [line[score] for line in lines]
        for line, value in zip(lines, values, strict=True):
            line[rank] = None if value is None else 1 + sum(other > value for other in values)
    for line in lines:
        line["overall"] = mean(line[rank] for rank in ("rank", "following_rank") if line[rank] is not None)
    return sorted(lines, key=lambda line: line["overall"]), counts


def _mean(values: Sequence[float]) -> float | None:
    return round(mean(values), 2) if values else None


def follows(kind: str) -> bool:
    """Whether tasks of this kind ask for what an instruction names: local ones, and mteb's such as FollowIR."""
    return kind.startswith("Instruction")


def _main_scores(rows: Sequence[dict[str, Any]], k: int | None) -> dict[tuple[str, str, str], float]:
    """(task, revision, kind) to the first, main score."""
    found: dict[tuple[str, str, str], float] = {}
    for row in rows:
        found.setdefault((row["task"], row["revision"], row["group"]), row["scores"][str(k)])
    return found


def markdown(lines: Sequence[dict[str, Any]], counts: dict[str, int], beside: dict[str, Any] | None = None) -> str:
    """The table. `beside` are lines of other numbers, `{"source": where they are from, "lines": [...]}`, which are not
    ranked with these: their ranks are of where they come from, and so are their tasks."""
    general = [kind for kind in counts if not follows(kind)]
    tasks, asked = (sum(n for kind, n in counts.items() if follows(kind) == side) for side in (False, True))
    head = ["model", "k", *(f"{kind} ({counts[kind]})" for kind in general)]
    head += [f"mean ({tasks})", "rank", f"{FOLLOWING} ({asked})", "rank", "overall rank"]
    table = [head, ["---"] * len(head)]
    for line in lines:
        table.append(_cells(line, general, line["model"]))
    source = beside["source"] if beside else ""
    for line in beside["lines"] if beside else ():
        table.append(_cells(line, general, f"{line['model']} ({source})"))
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _cells(line: dict[str, Any], kinds: Sequence[str], name: str) -> list[str]:
    groups = [_shown(line["groups"].get(kind), ".2f") for kind in kinds]
    forms = {"mean": ".2f", "rank": "d", "following": ".2f", "following_rank": "d", "overall": ".1f"}
    return [name, _shown(line["k"], "d"), *groups, *(_shown(line[key], form) for key, form in forms.items())]


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def write_comparison(
    out: Path,
    models: dict[str, tuple[list[dict[str, Any]], int | None]],
    beside: dict[str, Any] | None,
    command: str,
    lacking: dict[str, list[str]],
) -> str:
    """Writes `comparison.json` and `comparison.md`; returns the table. `beside` is what `markdown` takes, `lacking` the
    tasks that a model has no score of: others' scores of these don't count either, unless it has none at all."""
    lines, counts = compare(models)
    table = markdown(lines, counts, beside)
    content = {"command": command, "tasks": counts, "models": lines, "not_evaluated": lacking}
    (out / "comparison.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    parts = [f"Scores x 100 and ranks, of the tasks that all models have:\n\n{table}", f"```bash\n{command}\n```"]
    for name, tasks in lacking.items():
        parts.append(f"{name}: " + (f"no score of {', '.join(tasks)}" if name in models else "not evaluated"))
    text = "\n\n".join(parts) + "\n"
    (out / "comparison.md").write_text(text, encoding="utf-8")
    return table
