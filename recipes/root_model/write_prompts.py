"""Writes the root's files for Sentence Transformers, `modules.json` and `config_sentence_transformers.json`.

The prompts have the names by which mteb looks for them, and no other, since it warns of each that it doesn't know:

- a task's (all versions of it), followed by `-query` or `-document` where the two sides differ: the paper's
  instructions, in `instructions.json`. Those of the paper's tasks that mteb doesn't have stay there;
- a type's, for any other task whose texts are all alike, such as one of your own: those of evaluation/tasks.py;
- `query` and `document`, for any other search. Reranking is one of these: most of mteb's are of passages for a query.

    pip install -r requirements-eval.txt && python recipes/root_model/write_prompts.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import mteb

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.evaluation.tasks import INSTRUCTIONS

ROOT = Path(__file__).resolve().parents[2]
SPELLINGS = {"BIOSESSES": "BIOSSES", "SCIDOCs": "SCIDOCS"}  # the paper's and mteb's
SIDES = {"Q": "query", "C": "document"}
GENERAL_TASK = "MSMARCO-Q"  # whose instruction suits a query of any search
TYPES = {
    "BitextMining": "Retrieve parallel sentences.",
    "Classification": INSTRUCTIONS["classification"],
    "Clustering": INSTRUCTIONS["clustering"],
    "MultilabelClassification": INSTRUCTIONS["classification"],
    "PairClassification": INSTRUCTIONS["pairclass"],
    "Regression": "Predict the value of the given text.",
    "STS": INSTRUCTIONS["sts"],
    "Summarization": INSTRUCTIONS["sts"],
}


def prompt_names(tasks: list[str], known: set[str]) -> dict[str, list[str]]:
    """The names of each of the paper's tasks: of all its versions in mteb, which may be none."""
    names = {}
    for task in tasks:
        name, side = re.fullmatch(r"(.*?)(?:-([QC]))?", task).groups()
        name = SPELLINGS.get(name, name)
        versions = [other for other in known if _without_version(other) == _without_version(name)]
        names[task] = [f"{version}-{SIDES[side]}" if side else version for version in versions]
    return names


def _without_version(name: str) -> str:
    return re.sub(r"\.v\d+$", "", name)


def prompts(paper: dict[str, str], known: set[str], template: str) -> dict[str, str]:
    """Literal prefix by name.

    Args:
        paper: instruction by the paper's names of tasks.
        known: mteb's names of tasks.
        template: of a prefix, with `{instruction}`.
    """
    instructions = {}
    for task, names in prompt_names(list(paper), known).items():
        instructions |= dict.fromkeys(names, paper[task])
    for name in [name.removesuffix("-query") for name in instructions if name.endswith("-query")]:
        if instructions[f"{name}-query"] == instructions.get(f"{name}-document"):  # one name for both sides
            instructions[name] = instructions.pop(f"{name}-query")
            del instructions[f"{name}-document"]
    instructions = {"query": paper[GENERAL_TASK], **TYPES, **dict(sorted(instructions.items()))}
    return {"document": ""} | {name: template.replace("{instruction}", text) for name, text in instructions.items()}


def requirements(packages: tuple[str, ...]) -> dict[str, str]:
    """What Sentence Transformers checks before it loads a model: versions by package, as in requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {name: line.removeprefix(name) for name in packages for line in lines if line.startswith(f"{name}>")}


def write(name: str, content: Any) -> None:
    (ROOT / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    paper = json.loads((ROOT / "recipes/root_model/instructions.json").read_text(encoding="utf-8"))["mteb"]
    template = json.loads((ROOT / "processor_config.json").read_text(encoding="utf-8"))["prompt_template"]
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    write("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_gircse.SentenceGircse"}])
    write(
        "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": prompts(paper, known, template),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            "requirements": requirements(("torch", "transformers")),
        },
    )


if __name__ == "__main__":
    main()
