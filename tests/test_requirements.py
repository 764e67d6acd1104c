"""Whoever installs the requirements of a script can import it."""

from __future__ import annotations

import ast
import json
import sys

import pytest

from gircse.training.publishing import NEEDED_BY_ADAPTERS
from helpers import ROOT, requirements


def installed_by(name: str) -> set[str]:
    """The modules of a requirements file and of those that it includes."""
    included = [line[3:] for line in (ROOT / name).read_text().splitlines() if line.startswith("-r ")]
    return {package.replace("-", "_") for package in requirements(name)}.union(*map(installed_by, included))


def imported_by(name: str) -> set[str]:
    """Packages that a file imports, and what it imports of `gircse/` likewise."""
    packages, files, seen = set(), [ROOT / name], set()
    while files:
        file = files.pop()
        seen.add(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                packages |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                folder = file.parents[node.level - 1] if node.level else ROOT
                path = folder.joinpath(*(node.module or "").split("."))
                own = [path.with_suffix(".py"), *(path / f"{alias.name}.py" for alias in node.names)]
                files += [found for found in own if found.exists() and found not in seen]
                packages |= set() if node.level else {node.module.partition(".")[0]}
    return packages


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("evaluate_gircse.py", "requirements-eval.txt"),
        ("embed_gircse.py", "requirements-embed.txt"),
        ("train_gircse.py", "requirements-train.txt"),
        ("serve_gircse.py", "requirements-serve.txt"),
        ("export_gircse.py", "requirements-onnx.txt"),
        ("space/app.py", "space/requirements.txt"),
    ],
)
def test_requirements_have_all_that_a_script_imports(script, needed):
    own = {path.stem for path in ROOT.glob("*.py")} | {"gircse"}
    assert imported_by(script) - own - sys.stdlib_module_names <= installed_by(needed)


def test_sentence_transformers_is_told_what_loading_needs():
    told = json.loads((ROOT / "config_sentence_transformers.json").read_text(encoding="utf-8"))["requirements"]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert set(told) == {"torch", "transformers"} and {name + versions for name, versions in told.items()} <= {*lines}
    of_adapters = {name + versions for name, versions in NEEDED_BY_ADAPTERS.items()}
    assert of_adapters <= {*(ROOT / "requirements-train.txt").read_text().splitlines()}
