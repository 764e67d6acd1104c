"""What the tests of the server share: texts, a server as a process of its own, its replicas, and the openai client."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import torch.nn.functional as F

from helpers import ROOT, environment

TEXTS = ["a red fox", "", "how do I renew the card that was stolen from me last week?", "rain", "Füchse 狐 🦊 \x00"]
STS = "Retrieve semantically similar text."


def closest(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return F.cosine_similarity(found, expected, dim=-1).min().item()


@contextmanager
def running(model: Path, folder: Path, *more: str) -> Iterator[SimpleNamespace]:
    """A server as a process of its own: its address, and the process."""
    log = folder / "server.log"
    command = [sys.executable, str(ROOT / "serve_gircse.py"), "--model", str(model), "--port", "0"]
    variables = environment(folder, OMP_NUM_THREADS="1", HF_MODULES_CACHE=str(folder / "modules"))
    variables.pop("RAY_ADDRESS", None)
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--num_gpus", "0", *more], cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 240
        while not (found := re.search(r"on (http://127.0.0.1:\d+)/v1", log.read_text(errors="replace"))):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        yield SimpleNamespace(url=found[1], process=process, log=log)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            for child in children:
                if child.is_running():
                    child.kill()


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.status() != psutil.STATUS_ZOMBIE and "".join(child.cmdline()[:1]).startswith("ray::ServeReplica"):
            found.append(child)
    return found


def client(server: SimpleNamespace, **settings):
    import openai  # which the tests of the parts do without

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **settings)
