"""The whole server under the openai client: many clients at once, a replica that is killed, a full queue, and a
shutdown in the middle of a request."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import torch.nn.functional as F

for package in ("ray.serve", "starlette", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f"{package} is in requirements-serve.txt or requirements-dev.txt")

import openai

from serve_helpers import STS, TEXTS, client, closest, replicas, running


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory):
    arguments = "--num_cpus 1 --min_replicas 2 --max_queue 2600".split()
    with running(exported, tmp_path_factory.mktemp("server"), *arguments) as found:
        yield found


@pytest.mark.slow
def test_the_openai_client(server, embed):
    own = client(server)
    answer = own.embeddings.create(model="tiny", input=TEXTS)  # in base64, as this client asks by itself
    assert closest(torch.tensor([item.embedding for item in answer.data]), embed(TEXTS)) > 0.9999
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > 0
    answer = own.embeddings.create(
        model="tiny",
        input="rain",
        dimensions=8,
        encoding_format="float",
        user="me",
        extra_body={"k": 7, "prompt_name": "STS12"},
    )
    short = F.normalize(embed(["rain"], STS, k=7, normalize=False)[:, :8], dim=-1)
    assert closest(torch.tensor([answer.data[0].embedding]), short) > 0.9999
    with pytest.raises(openai.BadRequestError, match="dimensions=33 must be a whole number from 1 to 32") as error:
        own.embeddings.create(model="tiny", input="rain", dimensions=33)
    assert error.value.param == "dimensions"
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
        own.embeddings.create(model="ada", input="rain")
    with urllib.request.urlopen(f"{server.url}/health") as health:
        assert json.load(health) == {"status": "ok"}


@pytest.mark.slow
def test_16_clients_at_once(server, embed):
    """Whose requests are unlike each other."""
    own = client(server)

    def ask(number: int) -> float:
        settings = {"k": 1 + number % 3} | ({"instruction": STS} if number % 2 else {})
        texts = [f"{number} {text}" for text in TEXTS[: 1 + number % 4]]
        answer = own.embeddings.create(model="tiny", input=texts, extra_body=settings)
        expected = embed(texts, settings.get("instruction"), k=settings["k"])
        return closest(torch.tensor([item.embedding for item in answer.data]), expected)

    with ThreadPoolExecutor(16) as pool:
        assert min(pool.map(ask, range(96))) > 0.9999


@pytest.mark.slow
def test_a_killed_replica_costs_no_answered_request(server, embed):
    """What it had gets 503, which clients send again; all else is answered by the other one, and it is replaced."""
    own, patient = client(server, max_retries=0), client(server, max_retries=20)
    texts = [f"{text} {number}" for number in range(30) for text in TEXTS]  # a batch takes a while
    expected = embed(texts, k=2)
    statuses, over = [], time.monotonic() + 8

    def ask(number: int) -> None:
        while time.monotonic() < over:
            try:
                answer = own.embeddings.create(model="tiny", input=texts, extra_body={"k": 2})
            except openai.APIStatusError as error:
                assert error.response.headers["retry-after"] == "1"
                statuses.append(error.status_code)
                answer = patient.embeddings.create(model="tiny", input=texts, extra_body={"k": 2})
            statuses.append(200)
            assert closest(torch.tensor([item.embedding for item in answer.data]), expected) > 0.9999

    before = replicas(server.process)
    assert len(before) == 2
    with ThreadPoolExecutor(16) as pool:
        clients = [pool.submit(ask, number) for number in range(16)]
        time.sleep(2)
        os.kill(before[0].pid, signal.SIGKILL)
        for one in clients:
            one.result()
    assert set(statuses) == {200, 503} and statuses.count(503) <= 16
    deadline = time.monotonic() + 60
    while len(replicas(server.process)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.slow
def test_a_full_queue_is_said(server):
    """In HTTP, and a client that tries again gets its answer."""
    own = client(server, max_retries=50)
    texts, refused = ["rain"] * 1000, []

    def ask(number: int) -> int:
        request = urllib.request.Request(f"{server.url}/v1/embeddings", json.dumps({"input": texts, "k": 20}).encode())
        try:
            urllib.request.urlopen(request).close()
        except urllib.error.HTTPError as error:
            refused.append((error.code, error.headers["Retry-After"]))
        return len(own.embeddings.create(model="tiny", input=texts, extra_body={"k": 20}).data)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [1000] * 4
    assert refused and set(refused) == {(429, "1")}


@pytest.mark.slow
def test_replicas_do_not_work_for_clients_that_have_left(server):
    own, hasty = (client(server, max_retries=0, timeout=timeout) for timeout in (300, 1))
    texts = [" ".join(TEXTS * 4)] * 1000

    def seconds(own: openai.OpenAI, texts: str | list[str]) -> float:
        began = time.monotonic()
        own.embeddings.create(model="tiny", input=texts, extra_body={"k": 64})
        return time.monotonic() - began

    def leave(_: int) -> None:
        with pytest.raises(openai.APITimeoutError):
            seconds(hasty, texts)

    whole = seconds(own, texts)
    with ThreadPoolExecutor(2) as pool:  # one for each replica
        list(pool.map(leave, range(2)))
    assert seconds(own, "rain") < whole / 3


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_finishes_what_it_has_begun(exported, tmp_path, end):
    with running(exported, tmp_path, "--num_cpus", "1") as server, ThreadPoolExecutor(1) as pool:
        own = client(server, max_retries=0, timeout=60)
        own.embeddings.create(model="tiny", input="rain")
        children = psutil.Process(server.process.pid).children(recursive=True)
        texts = [" ".join(TEXTS)] * 1024
        begun = pool.submit(own.embeddings.create, model="tiny", input=texts, extra_body={"k": 64})
        time.sleep(0.7)
        server.process.send_signal(end)
        time.sleep(0.5)
        assert not begun.done()
        with pytest.raises(openai.APIConnectionError):  # which clients send again, to another server
            client(server, max_retries=0).embeddings.create(model="tiny", input="rain")
        assert len(begun.result().data) == 1024
        assert server.process.wait(60) == 0, server.log.read_text()[-3000:]
        assert psutil.wait_procs(children, timeout=20)[1] == []
    assert "Traceback" not in server.log.read_text()
