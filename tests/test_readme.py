"""The README's Python blocks run as they are written, one after the other, offline and in a copy of the repo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

# A block under this comment needs the Hub or a GPU.
NOT_RUN = "<!-- needs the Hub -->\n"


def blocks(text: str) -> list[str]:
    return re.findall(
        r"^```python\n(.*?)^```", re.sub(NOT_RUN + r"```python\n.*?```", "", text, flags=re.S), re.S | re.M
    )


def test_python_blocks_of_the_readme_run(tmp_path):
    folder = tmp_path / "repo"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "runs", "gircse-*", "__pycache__"))
    code = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(code) >= 3
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    (folder / "blocks.py").write_text("\n".join(code), encoding="utf-8")  # later ones use what earlier ones made
    result = subprocess.run([sys.executable, "blocks.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_broken_block_would_be_seen():
    text = f"```python\na = 1\n```\n\n{NOT_RUN}```python\npush()\n```\n\n```bash\nls\n```\n```python\nb\n```\n"
    assert blocks(text) == ["a = 1\n", "b\n"]
    with pytest.raises(NameError):
        exec("".join(blocks(text)))
