"""Whoever installs the requirements of a script can import it."""

from __future__ import annotations

import ast
import sys

import pytest

from conftest import ROOT
from test_handler import requirements


def installed_by(name: str) -> set[str]:
    """The modules of a requirements file and of those that it includes."""
    included = [line[3:] for line in (ROOT / name).read_text().splitlines() if line.startswith("-r ")]
    return {package.replace("-", "_") for package in requirements(name)}.union(*map(installed_by, included))


def imported_by(name: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module)
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize(
    ("script", "needed"),
    [
        ("evaluate_gircse.py", "requirements-eval.txt"),
        ("report_gircse.py", "requirements-eval.txt"),
        ("tasks_gircse.py", "requirements-eval.txt"),
        ("embed_gircse.py", "requirements-embed.txt"),
        ("train_gircse.py", "requirements-train.txt"),
        ("data_gircse.py", "requirements-train.txt"),
        *(("rows_gircse.py", f"requirements-{use}.txt") for use in ("embed", "eval", "train")),
    ],
)
def test_requirements_have_all_that_a_script_imports(script, needed):
    own = {path.stem for path in ROOT.glob("*.py")}
    assert imported_by(script) - own - sys.stdlib_module_names <= installed_by(needed)
