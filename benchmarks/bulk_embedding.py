"""Bulk embedding with pools of different sizes: texts a second, and the whole job's time.

    python benchmarks/bulk_embedding.py --output benchmarks/results

The root model on short texts (the queries of sample_pairs.jsonl, over and over), through `embed_gircse.py` as a process
of its own. A pool `AxT` is A actors of T threads each. The job's seconds hold the start of Ray and of the actors, which
is the same for any number of texts; texts a second are those between the first shard and the last one. Medians over
rounds in which the pools take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from common import ROOT, Table, parser


def run(pool: str, source: Path, options: list[str], folder: Path) -> tuple[float, float]:
    """Seconds of the job, and shards a second from the first one to the last."""
    actors, threads = map(int, pool.split("x"))
    gpus = min(1.0, torch.cuda.device_count() / actors)
    command = [sys.executable, str(ROOT / "embed_gircse.py"), "--input", str(source), "--output", str(folder)]
    command += ["--num_actors", str(actors), "--num_gpus", str(gpus), *options]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    seconds = time.perf_counter() - started
    times = sorted(file.stat().st_mtime for file in folder.glob("[0-9]*.parquet"))
    return seconds, (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    options = parser(__doc__, rounds=1)
    options.add_argument("--texts", type=int, default=100_000)
    options.add_argument("--shards", type=int, default=50)
    options.add_argument("--pools", nargs="+", default=["1x1", "1x2", "2x1"], help="actors x threads")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--batch_size", type=int, default=32)
    args = options.parse_args()

    size = -(-args.texts // args.shards)
    call = ["--k", str(args.steps), "--batch_size", str(args.batch_size), "--rows_per_shard", str(size)]
    results: dict[str, list[tuple[float, float]]] = {pool: [] for pool in args.pools}
    with tempfile.TemporaryDirectory() as name:
        lines = (ROOT / "sample_pairs.jsonl").read_text(encoding="utf-8").splitlines()
        queries = cycle(json.dumps({"text": json.loads(line)["query"]}) + "\n" for line in lines)
        source = Path(name, "texts.jsonl")
        source.write_text("".join(islice(queries, args.texts)), encoding="utf-8")
        for number in range(args.rounds):
            for pool, measured in results.items():
                measured.append(run(pool, source, call, Path(name, f"{pool}-{number}")))

    table = Table(actors="{}", threads="{}", job_s="{:.1f}", texts_per_second="{:.1f}", speedup="{:.2f}x")
    base = statistics.median(rate for _, rate in results[args.pools[0]])
    for pool, measured in results.items():
        actors, threads = pool.split("x")
        rate = statistics.median(rate for _, rate in measured)
        table.add(
            actors=actors,
            threads=threads,
            job_s=statistics.median(seconds for seconds, _ in measured),
            texts_per_second=rate * size,
            speedup=rate / base,
        )
    table.save(args.output)


if __name__ == "__main__":
    main()
