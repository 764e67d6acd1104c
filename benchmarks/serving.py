"""Requests a second under many clients: the handler, one request at a time, against the server that batches.

    python benchmarks/serving.py --output benchmarks/results

Requests of one short text each (queries of sample_pairs.jsonl), from clients that send the next one when the last one
is answered, over HTTP on this machine. `handler` answers one request at a time, as the container of Inference Endpoints
does, and `handler, lists` is given lists of as many texts as there are clients. `server` is `serve_gircse.py`. All take
turns in one run; medians over rounds. Both have all cores, or a GPU.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path

import torch

from common import ROOT, Table, parser


def serve_handler(model: str, port: int) -> None:
    """The handler behind HTTP, one request at a time in a thread, as the toolkit of Inference Endpoints calls it."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from handler import EndpointHandler

    handler, thread = EndpointHandler(model), ThreadPoolExecutor(1)

    async def predict(request: Request) -> Response:
        found = await asyncio.get_running_loop().run_in_executor(thread, handler, await request.json())
        return Response(json.dumps(found), media_type="application/json")

    app = Starlette(routes=[Route("/", predict, methods=["POST"])])
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


@contextmanager
def started(command: list[str], log: Path, port: int | None) -> Iterator[int]:
    """A server as a process; gives its port, or that which it prints, once it listens."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(log.read_text(errors="replace")[-3000:])
            found = re.search(r"on http://127.0.0.1:(\d+)/v1", log.read_text(errors="replace"))
            port = int(found[1]) if found else port
            with socket.socket() as probe:
                if port and probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def send(port: int, path: str, bodies: list[dict], clients: int) -> tuple[float, list[float], list[dict]]:
    """Seconds in all, seconds of each request, and the answers."""
    shares = [bodies[start::clients] for start in range(clients)]

    def work(share: list[dict]) -> list[tuple[float, dict]]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        found = []
        for body in share:
            began = time.perf_counter()
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {answer}")
            found.append((time.perf_counter() - began, answer))
        connection.close()
        return found

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = [item for share in pool.map(work, shares) for item in share]
    return time.perf_counter() - began, *map(list, zip(*found, strict=True))


def check_same(handler: list, served: list[float]) -> None:
    """Both give the same vector; in bfloat16, one as far as batches change it."""
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(handler), torch.tensor(served), dim=0).item()
    least = 0.99 if torch.cuda.is_available() else 0.9999
    if not cosine > least:
        raise RuntimeError(f"the two give different vectors, of cosine {cosine}")


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--model", default=str(ROOT))
    options.add_argument("--requests", type=int, default=400, help="of each round and server")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--steps", type=int, default=5)
    options.add_argument("--serve", default="", help="more arguments for serve_gircse.py, in one string")
    options.add_argument("--handler_port", type=int, help="serves the handler alone; the benchmark starts itself so")
    args = options.parse_args()
    if args.handler_port:
        return serve_handler(args.model, args.handler_port)

    lines = (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    texts = list(islice(cycle(json.loads(line)["query"] for line in lines), args.requests))
    lists = [texts[start : start + args.clients] for start in range(0, len(texts), args.clients)]
    with socket.socket() as free, tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        own = [sys.executable, __file__, "--model", args.model, "--handler_port", str(port)]
        handler = stack.enter_context(started(own, Path(name, "handler.log"), port))
        command = [sys.executable, str(ROOT / "serve_gircse.py"), "--model", args.model, "--port", "0"]
        server = stack.enter_context(started([*command, *args.serve.split()], Path(name, "server.log"), None))
        parameters = {"parameters": {"k": args.steps}}
        routes = {
            "handler": (handler, "/", [{"inputs": text, **parameters} for text in texts], 1),
            "handler, lists": (handler, "/", [{"inputs": part, **parameters} for part in lists], args.clients),
            "server": (server, "/v1/embeddings", [{"input": text, "k": args.steps} for text in texts], 1),
        }
        measured: dict[str, list] = {route: [] for route in routes}
        for number in range(args.rounds + 1):
            for route, (port, path, bodies, size) in routes.items():
                found = send(port, path, bodies, args.clients if size == 1 else 1)
                if number:  # the first round is a warm-up
                    measured[route].append((args.requests / found[0], found[1]))
                elif route == "handler":
                    vector = found[2][0]
                elif route == "server":
                    check_same(vector, found[2][0]["data"][0]["embedding"])

    table = Table(
        route="{}",
        k="{}",
        clients="{}",
        texts_per_second="{:.1f}",
        median_ms="{:.0f}",
        p95_ms="{:.0f}",
        speedup="{:.2f}x",
    )
    for route, rounds in measured.items():
        times = sorted(seconds for _, each in rounds for seconds in each)
        ratios = [rate / base for (rate, _), (base, _) in zip(rounds, measured["handler"], strict=True)]
        table.add(
            route=route,
            k=args.steps,
            clients=args.clients if route != "handler, lists" else 1,
            texts_per_second=statistics.median(rate for rate, _ in rounds),
            median_ms=1000 * statistics.median(times),
            p95_ms=1000 * times[math.ceil(0.95 * len(times)) - 1],
            speedup=statistics.median(ratios),
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
