"""The house: short files and functions, and imports that go one way."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_imports

from helpers import ROOT

MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 40
PROGRAMS = [*ROOT.glob("*.py"), *(ROOT / "gircse").rglob("*.py")]
SOURCES = [
    path for folder in ("gircse", "recipes", "benchmarks", "space", "tests") for path in (ROOT / folder).rglob("*.py")
]
SOURCES += ROOT.glob("*.py")
# From the ones that nothing here stands on to those that stand on all others; a room imports from rooms before it.
REMOTE_ORDER = (
    "configuration backbone soft_tokens adapters inputs single_pass step_loop static_steps modeling".split(),
    "processing".split(),
)
PACKAGE_ORDER = """
    gircse gircse.command_line gircse.cluster gircse.rows gircse.loading gircse.locking
    gircse.training gircse.training.sources gircse.training.pairs gircse.training.data gircse.training.losses
    gircse.training.gradient_cache gircse.training.arguments gircse.training.card gircse.training.publishing
    gircse.training.accuracy gircse.training.callbacks gircse.training.trainer
    gircse.embedding gircse.embedding.shards gircse.embedding.plan gircse.embedding.actors
    gircse.evaluation gircse.evaluation.fields gircse.evaluation.tasks gircse.evaluation.report
    gircse.evaluation.comparison gircse.evaluation.expansion gircse.evaluation.subjects
    gircse.evaluation.encoding gircse.evaluation.cache
    handler gircse.serving gircse.serving.protocol gircse.serving.batcher gircse.serving.replica gircse.serving.front
    gircse.onnx gircse.onnx.assemble gircse.onnx.graph gircse.onnx.formats gircse.onnx.folder
    gircse.training.conditional gircse.training.autoregembed
    train_gircse train_autoregembed embed_gircse evaluate_gircse serve_gircse export_gircse convert_gircse
""".split()


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def lines_of_code(source: str) -> set[int]:
    """The lines that are more than comment or blank."""
    nothing = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in nothing]
    return {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of code of each function, its docstring aside."""
    code = lines_of_code(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = code & set(range(node.lineno, node.end_lineno + 1))
            if ast.get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            yield node.name, len(lines)


@pytest.mark.parametrize("path", PROGRAMS, ids=named)
def test_a_function_has_at_most_40_lines_of_code(path):
    found = functions(path.read_text(encoding="utf-8"))
    assert [(name, lines) for name, lines in found if lines > MOST_LINES_OF_A_FUNCTION] == []


def test_lines_of_code_are_counted():
    source = 'def f(\n    x,\n):\n    """Two\n    lines."""\n\n    # why\n    return [\n        x,\n    ]\n'
    assert list(functions(source)) == [("f", 6)]


def remote_imports(name: str) -> set[str]:
    return set(get_relative_imports(str(ROOT / f"{name}_gircse.py")))


@pytest.mark.parametrize("order", REMOTE_ORDER, ids=lambda order: order[-1])
def test_remote_code_imports_one_way(order):
    """By the pattern that transformers searches the text for, so that docstrings count."""
    for index, name in enumerate(order):
        assert remote_imports(name) <= {f"{earlier}_gircse" for earlier in order[:index]}, name


@pytest.mark.parametrize("entry", ["modeling", "processing"])
def test_an_entry_imports_all_that_its_imports_import(entry):
    """transformers 4.51 copies what the entry file itself imports from a local folder, and nothing else."""
    direct = remote_imports(entry)
    assert {needed for name in direct for needed in remote_imports(name.removesuffix("_gircse"))} <= direct


def package_imports(path: Path, module: str) -> set[str]:
    """The modules of this repo that a file imports, anywhere in it."""
    found, package = set(), module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parent, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found & {*PACKAGE_ORDER}


def test_the_package_imports_one_way():
    commands = [name for name in PACKAGE_ORDER if not name.startswith("gircse")]
    paths = [*(ROOT / "gircse").rglob("*.py"), *(ROOT / f"{name}.py" for name in commands)]
    modules = {re.sub(r"/__init__|\.py$", "", named(path)).replace("/", "."): path for path in paths}
    modules = {name.removesuffix(".py"): path for name, path in modules.items()}
    assert sorted(modules) == sorted(PACKAGE_ORDER)
    for index, name in enumerate(PACKAGE_ORDER):
        wrong = package_imports(modules[name], name) - {*PACKAGE_ORDER[:index]} - {name}
        assert not wrong, f"{name} imports {wrong}"
