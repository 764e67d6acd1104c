"""A server of OpenAI's embeddings API on Ray Serve: replicas on GPUs or CPUs, concurrent requests in batches.

    python serve_gircse.py --k 5
    curl localhost:8000/v1/embeddings -H "Content-Type: application/json" -d '{"input": "how do I renew my card"}'

A request on its way:

    Front      (this process) HTTP, a bounded queue, errors that clients try again after
    Ray Serve  gives it to the replica with less to do, and starts and stops replicas by how much there is
    Replica    checks it and makes tokens of its texts
    Batcher    puts them into a batch with those of other requests, under a budget of tokens

Control-C or SIGTERM ends it: no new requests are taken, and those that are in work are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import uvicorn
from ray import serve

from gircse import ROOT
from gircse.cluster import resources, room_on_gpus
from gircse.command_line import DTYPES, lenient_console, parser_of, positive_int
from gircse.loading import commit_of, is_gircse, is_hub_id
from gircse.serving.front import Front
from gircse.serving.replica import Replica
from handler import MAX_K, TEXTS_PER_BATCH, TOKENS_PER_BATCH

# Requests that a replica has at a time, so that the next batch is there when one ends; and how many there are for each
# replica before another one is started.
MOST_REQUESTS, BUSY_REQUESTS = 2 * TEXTS_PER_BATCH, 32


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="GIRCSE model, Hub id or folder; by default the one of this repo")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--name", help="of the model in requests; by default its Hub id or its folder's name, and gircse for this repo")
    add("--k", type=positive_int, help="generated tokens where a request doesn't say; by default the config's number")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0 is any that is free (default: 8000)")
    add("--dtype", choices=DTYPES, help="of the weights; by default bfloat16 on GPUs and float32 on CPUs")
    add("--num_gpus", type=float, help="GPUs of each replica, also a part of one; by default 1 where there are any")
    add("--num_cpus", type=positive_int, help="CPU cores of a replica; by default 1 beside a GPU, else a share of all")
    add("--min_replicas", type=positive_int, default=1, help="replicas that always run (default: 1)")
    add("--max_replicas", type=positive_int, help="the most replicas, under load; by default as many as --min_replicas")
    batch = f"tokens of a batch, generated ones included: rows times the longest (default: {TOKENS_PER_BATCH})"
    add("--max_batch_tokens", type=positive_int, default=TOKENS_PER_BATCH, help=batch)
    wait = "milliseconds that a batch with room left waits for more texts; longer after a larger batch (default: 5)"
    add("--batch_wait_ms", type=float, default=5, help=wait)
    queue = "texts that wait or are in work, in all replicas; beyond it the answer is 429 (default: 4096)"
    add("--max_queue", type=positive_int, default=4096, help=queue)
    add("--timeout", type=float, default=300, help="seconds after which a request is given up (default: 300)")
    options = parser.parse_args(argv)
    options.max_replicas = options.max_replicas or options.min_replicas
    return options


def check(options: argparse.Namespace) -> None:
    """Raises a ValueError for arguments that don't go together or a model that can't be served, before one is loaded;
    makes the model's folder an absolute path, and gives it a name."""
    if options.max_replicas < options.min_replicas:
        raise ValueError(f"max_replicas={options.max_replicas} is less than min_replicas={options.min_replicas}")
    if options.k is not None and options.k > MAX_K:
        raise ValueError(f"k={options.k} must be a whole number from 1 to {MAX_K}")
    if not 0 <= options.batch_wait_ms < math.inf:
        raise ValueError(f"batch_wait_ms={options.batch_wait_ms:g} must be a number of milliseconds, 0 for none")
    if not 0 < options.timeout < math.inf:
        raise ValueError(f"timeout={options.timeout:g} must be a number of seconds above 0")
    if not is_hub_id(options.model):
        folder = Path(options.model).expanduser().resolve()
        if not (folder / "config.json").is_file():
            raise ValueError(f"model={options.model!r} has no config.json: give a GIRCSE model's folder or Hub id")
        options.model = str(folder)
    if not is_gircse(options.model, options.revision):
        raise ValueError(f"model={options.model!r} is no GIRCSE model: train one of it with train_gircse.py")
    # One commit for all replicas: one that starts later would load what has been pushed since.
    options.revision = commit_of(options.model, options.revision)
    if options.name is None:
        folder = "gircse" if options.model == str(ROOT) else Path(options.model).name
        options.name = options.model if is_hub_id(options.model) else folder


def size(options: argparse.Namespace) -> tuple[float, int]:
    """GPUs and CPU cores of each replica.

    Raises:
        ValueError: if the nodes that are there have no room for `min_replicas`.
    """
    nodes, gpus = resources(options.num_gpus)

    def room(cores: int) -> int:
        return sum(min(cpu // cores, room_on_gpus(gpu, gpus)) if gpus else cpu // cores for cpu, gpu in nodes)

    fair = range(max(cpu for cpu, _ in nodes), 0, -1)  # as many cores as leave room for all replicas
    cpus = options.num_cpus or (1 if gpus else next((n for n in fair if room(n) >= options.max_replicas), 1))
    if room(cpus) < options.min_replicas:
        raise ValueError(
            f"there is no room for min_replicas={options.min_replicas} of num_gpus={gpus:g} and num_cpus={cpus} each "
            f"(CPUs and GPUs of the nodes: {nodes}); ask for fewer"
        )
    return gpus, cpus


def deploy(options: argparse.Namespace, app: str) -> Any:
    """Starts the replicas; returns the handle that gives requests to them.

    Raises:
        ValueError: as in [`size`].
        RuntimeError: if they don't start; Ray has printed the error of one.
    """
    gpus, cpus = size(options)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    deployment = serve.deployment(
        Replica,
        name="Replica",
        # Nodes find this repo's code, and packages, where this machine has them.
        ray_actor_options={
            "num_gpus": gpus,
            "num_cpus": cpus,
            "runtime_env": {"env_vars": {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}},
        },
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "initial_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": BUSY_REQUESTS,
        },
        max_ongoing_requests=MOST_REQUESTS,
        # One that is no longer needed answers what it has before it ends.
        graceful_shutdown_timeout_s=options.timeout,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    settings = {name: getattr(options, name) for name in ("model", "revision", "name", "k", "max_batch_tokens")}
    settings["dtype"] = options.dtype or ("bfloat16" if gpus else "float32")
    settings |= {"device": "cuda" if gpus else "cpu", "batch_wait": options.batch_wait_ms / 1000}
    serve.start(proxy_location="Disabled")  # HTTP is the front's
    print(f"Loading {options.model} in {options.min_replicas} replicas of {cpus} CPU cores, {gpus:g} GPUs", flush=True)
    try:
        return serve.run(deployment.bind(**settings), name=app, route_prefix=None)
    except BaseException:
        serve.delete(app)  # a cluster would go on trying
        raise


def bind(host: str, port: int) -> socket.socket:
    """The server's socket. Taken before the model is loaded, and not yet listening."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port} can't be listened on ({error}): choose another") from error
    return bound


def run(options: argparse.Namespace, bound: socket.socket) -> None:
    """Serves until a signal comes."""
    host, port = bound.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    app = f"gircse-{socket.gethostname()}-{port}"  # another server on the same cluster has another one
    handle = deploy(options, app)

    async def embed(body: Any) -> tuple[int, bytes]:
        response = handle.remote(body)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # else the replica would go on
            raise

    def running() -> int:
        found = serve.status().applications[app].deployments["Replica"].replica_states
        return sum(count for state, count in found.items() if state == "RUNNING")

    front = Front(embed, running, options.max_queue, options.timeout)
    # At the end, a client that is slow to send its request is not waited for longer than for an answer.
    patience = math.ceil(options.timeout)
    config = uvicorn.Config(front.app, log_level="warning", access_log=False, timeout_graceful_shutdown=patience)
    server = uvicorn.Server(config)
    bound.listen()  # from the next line on, clients may connect
    print(f"Serving {options.name} on http://{address}/v1, end with Control-C", flush=True)
    try:
        server.run(sockets=[bound])  # returns when all that was begun is answered
    finally:
        serve.delete(app)  # on a cluster the replicas would stay


def main(argv: Sequence[str] | None = None) -> None:
    lenient_console()
    options = parse(argv)
    check(options)
    with bind(options.host, options.port) as bound:
        # Without RAY_ADDRESS one is started here, and not one joined that this machine may have had at some time.
        ray.init(os.environ.get("RAY_ADDRESS") or "local", include_dashboard=False)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends well, then leaves the signal to this
        try:
            run(options, bound)
        except KeyboardInterrupt:
            pass
        finally:
            ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report usage to its makers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
