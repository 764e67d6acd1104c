"""What the remote code may do: compute. It imports nothing else, and no file trusts remote code for the user."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from helpers import REMOTE_FILES, ROOT

# What the remote code may do ----------------------------------------------------------------------------------------

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
TRANSFORMERS_MODULES = {"transformers", "transformers.utils"}
GUARDED_MODULES = {"transformers.integrations.peft"}  # in a function, where it may be missing
UNWANTED_MODULES = {"ctypes", "ftplib", "http", "importlib", "marshal", "multiprocessing", "pickle", "pty", "runpy"}
UNWANTED_MODULES |= {"shutil", "socket", "ssl", "subprocess", "tempfile", "urllib", "webbrowser"}
UNWANTED_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "input", "breakpoint"}
# All that the files may call when they are imported.
CALLS_AT_IMPORT = {"logging.get_logger", "torch.no_grad", "dataclass", "Lock"} | {
    f"{name}.register_for_auto_class" for name in ("GircseConfig", "GircseModel", "GircseProcessor")
}


def walk(node: ast.AST, in_function: bool = False, in_try: bool = False) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node, whether it runs only when a function is called, and whether it is inside `try`. Decorators and
    default values run at import."""
    yield node, in_function, in_try
    for field, value in ast.iter_fields(node):
        inside = in_function or (isinstance(node, FUNCTIONS) and field == "body")
        guarded = in_try or (isinstance(node, ast.Try) and field == "body")
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, ast.AST):
                yield from walk(item, inside, guarded)


def import_problem(module: str, names: list[str], level: int, optional: bool) -> str | None:
    package = module.partition(".")[0]
    if level:
        return None if level == 1 and f"{module}.py" in REMOTE_FILES else f"relative import of {module!r}"
    if any(part.startswith("_") for part in [*module.split("."), *names] if module != "__future__"):
        return f"private name in {module!r}: {names}"
    if package == "transformers":
        stable = module in TRANSFORMERS_MODULES or (optional and module in GUARDED_MODULES)
        return None if stable else f"{module!r} is not a stable place to import from"
    if package == "peft":
        return None if optional else "peft is imported outside of try in a function"
    if package in UNWANTED_MODULES or package not in {"torch", *sys.stdlib_module_names}:
        return f"import of {module!r}"
    return None


def problems(source: str) -> list[str]:
    """What speaks against running `source` as remote code."""
    found = []
    for node, in_function, in_try in walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [import_problem(alias.name, [], 0, in_function and in_try) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            found.append(import_problem(node.module or "", names, node.level, in_function and in_try))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNWANTED_CALLS or (not in_function and name not in CALLS_AT_IMPORT):
                found.append(f"line {node.lineno} calls {name}{'' if in_function else ' at import'}")
    return [problem for problem in found if problem]


def trusts(source: str) -> list[int]:
    """The lines that switch `trust_remote_code` on, as an argument, a default value, or an entry of a dict."""
    lines = []
    for node, *_ in walk(ast.parse(source)):
        pairs = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.arguments):
            positional = [*node.posonlyargs, *node.args]
            pairs = list(zip([a.arg for a in reversed(positional)], reversed(node.defaults), strict=False))
            pairs += list(zip([a.arg for a in node.kwonlyargs], node.kw_defaults, strict=True))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            pairs = [(getattr(getattr(target, "slice", None), "value", None), node.value) for target in targets]
            pairs += [(getattr(target, "id", getattr(target, "attr", None)), node.value) for target in targets]
        lines += [
            value.lineno
            for name, value in pairs
            if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value
        ]
    return lines


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_remote_code_only_computes(file):
    assert problems((ROOT / file).read_text()) == []


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_the_remote_loader_fetches_these_files_only(file):
    """transformers finds relative imports by a regular expression, also in docstrings and strings."""
    assert {Path(found).name for found in get_relative_import_files(ROOT / file)} <= set(REMOTE_FILES)


# The handler trusts its own folder; an entry of mteb's registry, which report.py writes for people to read and
# submit, says that the model needs it.
TRUSTING = ("handler.py", "gircse/evaluation/report.py")
CODE = [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *ROOT.glob("gircse/**/*.py"))]


@pytest.mark.parametrize("file", sorted({*CODE} - {*TRUSTING}))
def test_no_file_trusts_remote_code_for_the_user(file):
    assert trusts((ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import requests",
        "import subprocess",
        "from urllib.request import urlopen",
        "import einops",
        "import peft",
        "def f():\n    import peft",
        "try:\n    import peft\nexcept ImportError:\n    peft = None",
        "def f():\n    import sentence_transformers",
        "from transformers.cache_utils import DynamicCache",
        "from transformers import _LazyModule",
        "from transformers.utils import _prepare",
        "from .train_gircse import main",
        "from . import modeling_gircse",
        "open('x')",
        "from pathlib import Path\ntext = Path('x').read_text()",
        "class A:\n    x = open('x')",
        "def f(x=open('x')):\n    pass",
        "@open('x')\ndef f():\n    pass",
        "import os\nos.system('x')",
        "def f():\n    eval('1')",
        "def f():\n    return __import__('x')",
    ],
)
def test_the_check_itself_finds(source):
    assert problems(source)


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "def f(x, trust_remote_code=True): pass",
        "def f(*, trust_remote_code=True): pass",
        "kwargs['trust_remote_code'] = True",
        "trust_remote_code = True",
        "class A:\n    trust_remote_code: bool = True",
    ],
)
def test_the_trust_check_itself_finds(source):
    assert len(trusts(source)) == 1
    assert trusts(source.replace("True", "False")) == []


def test_module_only_computes():
    """As the other files that are loaded with the repo, but for the library that asks for it."""
    found = problems((ROOT / "sentence_gircse.py").read_text(encoding="utf-8"))
    assert {re.sub(r"'(sentence_transformers)[\w.]*'", r"\1", problem) for problem in found} == {
        "import of sentence_transformers"
    }
    assert get_relative_import_files(ROOT / "sentence_gircse.py") == []
