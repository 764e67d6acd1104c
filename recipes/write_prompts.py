"""Writes the root's files for Sentence Transformers, `modules.json` and `config_sentence_transformers.json`.

The prompts are the paper's instructions, in `instructions.json`, under the names by which mteb looks for them: the
task's name (of all versions of a task), followed by `-query` or `-document` where the two sides differ.

    pip install mteb && python recipes/write_prompts.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mteb

ROOT = Path(__file__).resolve().parents[1]
SPELLINGS = {"BIOSESSES": "BIOSSES", "SCIDOCs": "SCIDOCS"}  # the paper's and mteb's
SIDES = {"Q": "query", "C": "document"}
GENERAL_TASK = "MSMARCO-Q"  # whose instruction suits a query of any search


def prompt_names(tasks: list[str], known: set[str]) -> dict[str, list[str]]:
    """The names of each of the paper's tasks: of all its versions in mteb, or its own if mteb has none."""
    names = {}
    for task in tasks:
        name, side = re.fullmatch(r"(.*?)(?:-([QC]))?", task).groups()
        name = SPELLINGS.get(name, name)
        versions = [other for other in known if _without_version(other) == _without_version(name)] or [name]
        names[task] = [f"{version}-{SIDES[side]}" if side else version for version in versions]
    return names


def _without_version(name: str) -> str:
    return re.sub(r"\.v\d+$", "", name)


def write(name: str, content: Any) -> None:
    (ROOT / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    paper = json.loads((ROOT / "recipes/instructions.json").read_text(encoding="utf-8"))
    template = json.loads((ROOT / "processor_config.json").read_text(encoding="utf-8"))["prompt_template"]
    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    instructions = dict(paper["instruction_following"])
    for task, names in prompt_names(list(paper["mteb"]), known).items():
        instructions |= dict.fromkeys(names, paper["mteb"][task])
    for name in [name.removesuffix("-query") for name in instructions if name.endswith("-query")]:
        if instructions[f"{name}-query"] == instructions.get(f"{name}-document"):  # one name for both sides
            instructions[name] = instructions.pop(f"{name}-query")
            del instructions[f"{name}-document"]
    prompts = {"query": paper["mteb"][GENERAL_TASK], **dict(sorted(instructions.items()))}
    prompts = {name: template.replace("{instruction}", instruction) for name, instruction in prompts.items()}
    write("modules.json", [{"idx": 0, "name": "0", "path": "", "type": "sentence_gircse.SentenceGircse"}])
    write(
        "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"document": "", **prompts},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


if __name__ == "__main__":
    main()
