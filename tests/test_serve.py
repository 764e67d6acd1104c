"""The server's parts: what a request may be, and the bounded queue."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

for package in ("ray.serve", "starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is in requirements-serve.txt")

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError

from gircse.serving.front import MAX_TEXTS, Front
from gircse.serving.replica import Replica
from serve_helpers import STS, TEXTS, closest

SETTINGS = {"dtype": "float32", "device": "cpu", "k": None, "max_batch_tokens": 16_384, "batch_wait": 0.01}


@pytest.fixture(scope="module")
def replica(exported):
    return Replica(str(exported), None, "tiny", **SETTINGS)


def together(replica: Replica, *bodies: dict) -> list[tuple[int, dict]]:
    """The answers to requests that come at the same time."""

    async def ask() -> list[tuple[int, bytes]]:
        return await asyncio.gather(*(replica(body) for body in bodies))

    return [(status, json.loads(answer)) for status, answer in asyncio.run(ask())]


def vectors(answer: dict) -> torch.Tensor:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return torch.tensor([item["embedding"] for item in answer["data"]])


def test_k_of_the_command_is_for_requests_without_one(exported, embed):
    one = Replica(str(exported), None, "tiny", **SETTINGS | {"k": 1})
    for (_, answer), k in zip(together(one, {"input": TEXTS}, {"input": TEXTS, "k": 7}), (1, 7), strict=True):
        torch.testing.assert_close(vectors(answer), embed(TEXTS, k=k), rtol=0, atol=1e-4)


# Requests and answers -----------------------------------------------------------------------------------------------


def test_vectors_are_those_of_generate_embedding(replica, embed):
    """Of requests that differ in k, prompt and dimensions, all at once."""
    answers = together(
        replica,
        {"input": TEXTS},
        {"input": TEXTS, "k": 1, "model": "tiny", "user": "me"},
        {"input": TEXTS, "k": 7, "instruction": STS},
        {"input": TEXTS, "prompt_name": "STS12", "k": None},
        {"input": "rain", "dimensions": 8, "k": 7},
        {"input": "", "encoding_format": "float"},
    )
    assert [status for status, _ in answers] == [200] * 6
    found = [vectors(answer) for _, answer in answers]
    assert closest(found[0], embed(TEXTS)) > 0.9999
    assert closest(found[1], embed(TEXTS, k=1)) > 0.9999
    assert closest(found[2], embed(TEXTS, STS, k=7)) > 0.9999
    assert closest(found[3], embed(TEXTS, STS)) > 0.9999
    assert closest(found[4], F.normalize(embed(["rain"], k=7, normalize=False)[:, :8], dim=-1)) > 0.9999
    assert closest(found[5], embed([""])) > 0.9999
    for rows in found:
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)), rtol=1e-5, atol=1e-5)
    assert closest(found[0], embed(TEXTS, k=7)) < 0.9999 and closest(found[2], embed(TEXTS, k=7)) < 0.9999


def test_the_answer_is_openais(replica):
    (_, plain), (_, coded), (_, none) = together(
        replica, {"input": TEXTS}, {"input": TEXTS, "encoding_format": "base64"}, {"input": []}
    )
    tokens = sum(len(row) for row in replica.tokens(TEXTS, "", None))
    assert plain["object"] == "list" and plain["model"] == "tiny"
    assert plain["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert {item["object"] for item in plain["data"]} == {"embedding"}
    read = [struct.unpack("<32f", base64.b64decode(item["embedding"])) for item in coded["data"]]
    torch.testing.assert_close(torch.tensor(read), vectors(plain))
    assert none["data"] == [] and none["usage"]["total_tokens"] == 0


@pytest.mark.parametrize(
    "body, param, said",
    [
        ([], "input", "input is missing: send"),
        ({}, "input", "input is missing: send"),
        ({"input": 3}, "input", "input=3 must be a text or a list of texts"),
        ({"input": ["a", None]}, "input", "input[1]=None must be a text"),
        ({"input": [5, 17]}, "input", "input[0]=5 is token ids"),
        ({"input": [[5, 17], [3]]}, "input", "input[0]=[5, 17] is token ids"),
        ({"input": ["a"] * 1025}, "input", "input has 1025 texts, more than 1024: send them in several requests"),
        ({"input": ["a" * 20_001]}, "input", "input[0] has 20001 characters, prompt included, more than 20000"),
        ({"input": "a", "K": 3}, None, "K: no such parameter; there are input, model, dimensions"),
        ({"input": "a", "k": 65}, "k", "k=65 must be a whole number from 1 to 64"),
        ({"input": "a", "dimensions": 33}, "dimensions", "dimensions=33 must be a whole number from 1 to 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "encoding_format='int8' must be 'float' or"),
        ({"input": "a", "user": 3}, "user", "user=3 must be a string"),
        ({"input": "a", "model": 3}, "model", "model=3 must be a string"),
        ({"input": "a", "instruction": ["b"]}, "instruction", "instruction=['b'] must be a string"),
        ({"input": "a", "prompt_name": "STS99"}, "prompt_name", "prompt_name='STS99' is not in"),
        ({"input": "a", "prompt_name": "STS12", "instruction": "b"}, "instruction", "instruction and prompt_name"),
        ({"input": "\ud800"}, "input", "input[0]='\\ud800' holds half a character"),
    ],
)
def test_wrong_requests_are_refused(replica, body, param, said):
    [(status, answer)] = together(replica, body)
    error = answer["error"]
    assert status == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert re.match(re.escape(said), error["message"]) and len(error["message"]) < 200


def test_another_model_is_not_found(replica):
    [(status, answer)] = together(replica, {"input": "a", "model": "text-embedding-3-small"})
    assert status == 404 and answer["error"]["code"] == "model_not_found" and answer["error"]["param"] == "model"
    assert answer["error"]["message"] == "model='text-embedding-3-small' is not served here: ask for 'tiny'"


def test_a_failure_hides_what_happened(replica, monkeypatch):
    def fail(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(replica.batcher, "run", fail)
    [(status, answer)] = together(replica, {"input": "a"})
    assert status == 500 and answer["error"]["type"] == "server_error"
    assert "secret" not in str(answer) and "Traceback" not in str(answer)


@pytest.mark.parametrize(
    ("message", "lost"), [("CUDA error: an illegal memory access was encountered", True), ("CUDA out of memory", False)]
)
def test_a_replica_that_has_lost_its_gpu_is_replaced(exported, monkeypatch, message, lost):
    replica = Replica(str(exported), None, "tiny", **SETTINGS)
    replica.check_health()

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr(replica.batcher, "run", fail)
    assert together(replica, {"input": "a"})[0][0] == 500
    with pytest.raises(RuntimeError, match=message) if lost else nullcontext():
        replica.check_health()


def test_vectors_that_are_no_numbers_are_a_failure_of_their_request_alone(replica, monkeypatch):
    bad = replica.tokens(["rain"], "", 1)[0][0]

    def embed(ids, *_, **__):
        return torch.ones(len(ids), 32).masked_fill((ids == bad).any(1, keepdim=True), float("nan"))

    monkeypatch.setattr(replica.model, "generate_embedding", embed)
    answers = together(replica, {"input": "rain"}, {"input": "snow"})
    assert [status for status, _ in answers] == [500, 200]
    assert answers[0][1]["error"]["type"] == "server_error"


def test_a_k_that_the_model_cannot_do(gircse, replica, exported, monkeypatch):
    """No learned tokens for it, say: the model's own error, for this request alone."""
    monkeypatch.setattr(replica.model.config, "step_token", "learned")
    [(status, answer)] = together(replica, {"input": "a", "k": 4})
    assert status == 400 and answer["error"]["message"].startswith("k=4 exceeds the 3 learned tokens")
    assert answer["error"]["param"] == "k"


def test_concurrent_requests_share_a_batch(replica, monkeypatch):
    shapes = []
    hook = replica.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((*args, *kwargs.values())[0].shape)), with_kwargs=True
    )
    together(replica, *({"input": text, "instruction": text or None, "dimensions": 8} for text in TEXTS * 3))
    hook.remove()
    assert [rows for rows, _ in shapes] == [15]


# The front ----------------------------------------------------------------------------------------------------------


def http(
    front: Front, method: str, path: str, body: bytes = b"", stays: float | None = None, more: bool = False
) -> Callable:
    """A request, by ASGI: status, headers and what the JSON holds. The client leaves after `stays` seconds; with `more`
    it has not sent its whole body by then."""

    async def ask() -> tuple[int, dict, dict]:
        sent, parts = [], [{"type": "http.request", "body": body, "more_body": more}]

        async def receive() -> dict:
            if parts:
                return parts.pop()
            await (asyncio.Event().wait() if stays is None else asyncio.sleep(stays))
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        scope = {"type": "http", "method": method, "path": path, "headers": [], "query_string": b""}
        await front.app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], headers, json.loads(content or b"null")

    return ask


def post(front: Front, body) -> Callable:
    return http(front, "POST", "/v1/embeddings", body if isinstance(body, bytes) else json.dumps(body).encode())


async def echo(body) -> tuple[int, bytes]:
    return 200, json.dumps(body).encode()


def front_of(embed=echo, running=1, max_queue=10, timeout=5.0) -> Front:
    return Front(embed, lambda: running, max_queue, timeout)


def test_the_queue_is_bounded():
    async def ask():
        opened, count = asyncio.Event(), [0]

        async def embed(body):
            count[0] += 1
            await opened.wait()
            return await echo(body)

        front = front_of(embed)
        first = asyncio.create_task(post(front, {"input": ["a"] * 50})())  # more than the queue, but alone
        await asyncio.sleep(0.01)
        assert (await post(front, {"input": "a"})())[0] == 429
        # What no waiting would mend goes to a replica, which says what is wrong.
        wrong = [asyncio.create_task(post(front, {"input": it})()) for it in ([7] * 9, ["a"] * (MAX_TEXTS + 1), None)]
        await asyncio.sleep(0.01)
        assert front.texts == 50
        opened.set()
        assert [found[0] for found in await asyncio.gather(first, *wrong)] == [200] * 4
        opened.clear()
        some = [asyncio.create_task(post(front, {"input": ["a"] * 4})()) for _ in range(2)]
        await asyncio.sleep(0.01)
        status, headers, answer = await post(front, {"input": ["a"] * 3})()
        last = asyncio.create_task(post(front, {"input": ["a"] * 2})())
        await asyncio.sleep(0.01)
        opened.set()
        assert [found[0] for found in await asyncio.gather(*some, last)] == [200] * 3
        assert front.texts == 0 and count == [7]
        return status, headers, answer

    status, headers, answer = asyncio.run(ask())
    assert status == 429 and headers["retry-after"] == "1"
    assert answer["error"]["code"] == "rate_limit_exceeded" and answer["error"]["type"] == "rate_limit_error"
    assert answer["error"]["message"] == "8 texts wait, and the queue holds 10: try again"


@pytest.mark.parametrize(
    "error, status",
    [
        (RayActorError(), 503),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 503),
        (RayTaskError("f", "Traceback: secret", RuntimeError("secret")), 500),
        (KeyError("secret"), 500),
    ],
)
def test_errors_that_a_client_tries_again_after(error, status):
    async def fail(body):
        raise error

    front = front_of(fail)
    found, headers, answer = asyncio.run(post(front, {"input": "a"})())
    assert found == status and answer["error"]["type"] == "server_error"
    assert ("retry-after" in headers) == (status == 503)
    assert "secret" not in str(answer) and "Traceback" not in str(answer) and front.texts == 0


def endless():
    """A replica that never answers, and the requests that it was told to give up."""
    ended = []

    async def never(body):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(body)

    return never, ended


def test_a_request_does_not_wait_for_ever():
    never, ended = endless()
    front = front_of(never, timeout=0.05)
    status, headers, answer = asyncio.run(post(front, {"input": "a"})())
    assert status == 503 and headers["retry-after"] == "1" and front.texts == 0
    assert answer["error"]["message"].startswith("not embedded within 0.05 seconds: try again")
    assert ended == [{"input": "a"}]  # given up in the replica, too


@pytest.mark.parametrize("more", [False, True])
def test_nothing_is_done_for_a_client_that_has_left(more):
    never, ended = endless()
    front = front_of(never)
    body = b'{"input": "a"}'
    answer = asyncio.run(asyncio.wait_for(http(front, "POST", "/v1/embeddings", body, 0.05, more)(), 2))
    assert answer[2] is None and front.texts == 0
    assert ended == ([] if more else [{"input": "a"}])


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json(body):
    status, _, answer = asyncio.run(post(front_of(), body)())
    assert status == 400 and answer["error"]["message"].startswith("the request is not JSON (")


def test_a_request_of_too_many_bytes(monkeypatch):
    monkeypatch.setattr("gircse.serving.front.MAX_BYTES", 100)
    status, _, answer = asyncio.run(post(front_of(), {"input": "a" * 100})())
    assert status == 413 and answer["error"]["message"].startswith("the request has more than 100 bytes: send fewer")


@pytest.mark.parametrize("error", [RayActorError(), KeyError("gircse-host-8000")])
def test_health_while_ray_does_not_answer_or_knows_of_no_app(error):
    def lost():
        raise error

    status, headers, _ = asyncio.run(http(Front(echo, lost, 10, 5.0), "GET", "/health")())
    assert status == 503 and headers["retry-after"] == "1"


def test_health_and_other_places():
    assert asyncio.run(http(front_of(), "GET", "/health")())[::2] == (200, {"status": "ok"})
    status, headers, _ = asyncio.run(http(front_of(running=0), "GET", "/health")())
    assert status == 503 and headers["retry-after"] == "1"
    for method, path, expected in (("GET", "/v1/embeddings", 405), ("POST", "/v1/chat/completions", 404)):
        status, _, answer = asyncio.run(http(front_of(), method, path)())
        assert status == expected
        assert answer["error"]["message"].startswith(f"there is no {method} {path} here, only POST /v1/embeddings")
