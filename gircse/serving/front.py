"""The HTTP front: a bounded queue before the replicas, and errors that clients know what to do with."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from handler import MAX_CHARACTERS, MAX_TEXTS

from .protocol import write_error

MAX_BYTES = 4 * MAX_TEXTS * MAX_CHARACTERS  # of a request
RETRY_SECONDS = 1
GONE = Response()  # for a client that has left: nobody reads it

logger = logging.getLogger("gircse.serving")


class Front:
    """Passes requests on to replicas.

    Args:
        embed: the replicas: what a request's JSON holds -> status and JSON of the answer. Cancelled when the answer is
            no longer wanted.
        running: how many replicas there are.
        max_queue: texts that may wait or be in work, in all replicas.
        timeout: seconds after which a request is given up.
    """

    def __init__(
        self,
        embed: Callable[[Any], Awaitable[tuple[int, bytes]]],
        running: Callable[[], int],
        max_queue: int,
        timeout: float,
    ) -> None:
        self.embed, self.running, self.max_queue, self.timeout = embed, running, max_queue, timeout
        self.texts = 0  # that wait or are in work
        routes = [Route("/health", self.health), Route("/v1/embeddings", self.embeddings, methods=["POST"])]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: no_such_place})

    async def health(self, request: Request) -> Response:
        try:
            if await asyncio.to_thread(self.running):
                return reply(200, json.dumps({"status": "ok"}).encode())
        except (KeyError, RayError, RayServeException):  # KeyError: somebody deleted the app
            logger.warning("Ray does not say which replicas run", exc_info=True)
        return failure(503, "no replica of the model is running: one is being started, so try again")

    async def embeddings(self, request: Request) -> Response:
        try:
            body = await read_json(request)
        except ClientDisconnect:
            return GONE
        except OverflowError as error:
            return failure(413, str(error))
        except (ValueError, RecursionError) as error:
            return failure(400, f"the request is not JSON ({error}): send an object with input")
        texts = body.get("input") if isinstance(body, dict) else None
        several = isinstance(texts, list) and len(texts) <= MAX_TEXTS and not any(type(text) is int for text in texts)
        # 0 for what can't be embedded, as too long a list: a replica says so, for which nobody need try again.
        count = len(texts) if several else int(isinstance(texts, str))
        # A list that is longer than the whole queue is taken when there is nothing else to do.
        if count and self.texts and self.texts + count > self.max_queue:
            return failure(429, f"{self.texts} texts wait, and the queue holds {self.max_queue}: try again")
        self.texts += count
        try:
            return reply(*await self._answer(request, body))
        except ClientDisconnect:
            return GONE
        except TimeoutError:
            return failure(503, f"not embedded within {self.timeout:g} seconds: try again, or send fewer texts")
        except Exception as error:
            if isinstance(error, (RayError, RayServeException)) and not isinstance(error, RayTaskError):
                logger.warning("a replica was lost: %s", str(error).partition("\n")[0])
                return failure(503, "the replica that had this request is gone: try again")
            logger.exception("a request failed")
            return failure(500, "the server failed to embed this; its log says why")
        finally:
            self.texts -= count

    async def _answer(self, request: Request, body: Any) -> tuple[int, bytes]:
        """What the replicas answer.

        Raises:
            TimeoutError: after `timeout` seconds.
            ClientDisconnect: once the client has left: it may ask anew, and what it asked first would be done for
                nobody.
        """
        work, gone = asyncio.ensure_future(self.embed(body)), asyncio.ensure_future(disconnected(request))
        try:
            await asyncio.wait((work, gone), timeout=self.timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ClientDisconnect if gone.done() else TimeoutError
        finally:
            work.cancel()
            gone.cancel()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_json(request: Request) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise OverflowError(f"the request has more than {MAX_BYTES} bytes: send fewer texts at a time")
    return json.loads(body)


def reply(status: int, content: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, "application/json")


def failure(status: int, message: str) -> Response:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else None
    return reply(status, write_error(status, message), headers)


async def no_such_place(request: Request, error: Exception) -> Response:
    """What Starlette answers to another path or method."""
    asked = f"{request.method} {request.url.path}"
    return failure(
        getattr(error, "status_code", 404),
        f"there is no {asked:.80} here, only POST /v1/embeddings and GET /health",
    )
