"""One process of a machine at a time, where several would disturb each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from transformers.utils import HF_MODULES_CACHE


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Among the processes of a machine: transformers copies a model's code to a folder when it loads it, and another
    process must not import half a file."""
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / "gircse.lock"):
        yield
