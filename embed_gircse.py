"""Bulk embedding on Ray Data: files of texts in, Parquet shards of embeddings out, in any number of runs.

    python embed_gircse.py --input "corpus/*.parquet" --text_column text --output vectors --k 20

A row on its way:

    make_plan     files -> shards of `rows_per_shard` rows; `_plan.json` holds what the run was asked for
    Ray Data      gives each shard that isn't there yet to one of a pool of actors, and to another one if that dies
    Embedder      reads the shard, sets bad rows aside, embeds the others and writes them under the shard's name
    report        what all shards set aside -> `_bad_rows.jsonl`

A shard's file appears whole or not at all, and its name follows from the plan: whatever is killed, and whenever, no row
is lost or repeated. Ray Data's own readers don't number rows, and one broken line ends them: `gircse.rows` reads.

Exit status: 0 if every row was embedded, 3 if bad rows were set aside, 2 for an unknown or missing argument, 1 for any
other error. After an error the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from tqdm import tqdm

import gircse
from gircse import ROOT
from gircse.command_line import DTYPES, lenient_console, local_path, parser_of, positive_int, progress
from gircse.embedding.actors import Embedder, Tally, size_pool
from gircse.embedding.plan import PLAN, list_shards, make_plan
from gircse.embedding.shards import BAD_ROWS, is_abandoned, is_there, report
from gircse.loading import prompts_of
from gircse.rows import ENDINGS

EXIT_BAD_ROWS = 3
RETRIES = 5  # of a shard, whose actor may have died of it, as of memory, or with its node


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=f"files, folders or quoted patterns: {', '.join(ENDINGS)}")
    add("--text_column", default="text", help="column or JSON field that holds the text (default: text)")
    add("--id_column", help="int or str column that becomes `id`; by default it is file:row, rows counted from 1")
    add("--output", type=local_path, required=True, help="folder of the shards, empty or of an earlier run")
    add("--model", default=str(ROOT), help="GIRCSE model, Hub id or folder; by default the one of this repo")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--trust_remote_code", action="store_true", help="run the code that --model brings, unless it is this repo's")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights; embeddings are float32")
    add("--k", type=positive_int, help="generated tokens, by default what the model's config says")
    add("--instruction", help="of every text; by default none: texts are documents of a retrieval task")
    add("--batch_size", type=positive_int, default=32)
    add("--rows_per_shard", type=positive_int, default=10_000, help="the most that a kill costs an actor (10000)")
    add("--num_actors", type=positive_int, help="models on a node; by default one a GPU, or one on all CPU cores")
    add("--num_gpus", type=float, help="GPUs of each actor, also a part of one; by default 1 where there are any")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, plan: dict[str, Any], waiting: Sequence[dict[str, Any]]) -> None:
    """Embeds the shards that are `waiting`.

    Raises:
        OSError: as in `gircse.loading.prompts_of`.
        ray.exceptions.RayError: if a shard can't be embedded, or its actor died `RETRIES` times and once more.
    """
    shared = what_actors_share(options, plan)
    if not ray.is_initialized():
        # The cluster of RAY_ADDRESS, or one of its own; without an address Ray would join whatever was started here.
        ray.init(os.environ.get("RAY_ADDRESS") or "local", include_dashboard=False)
    count, gpus, cpus = size_pool(options.num_actors, options.num_gpus)
    ray.data.DataContext.get_current().enable_progress_bars = False  # Ray's bars count shards; the one below, rows
    for name, level in (("ray.data", logging.WARNING), ("ray.data._internal.progress", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    ray.cloudpickle.register_pickle_by_value(gircse)  # a node may have no clone of this repo
    tally = ray.remote(num_cpus=0)(Tally).remote()
    finished = ray.data.from_items(waiting, override_num_blocks=len(waiting)).map(
        Embedder,
        fn_constructor_kwargs=shared | {"device": "cuda" if gpus else "cpu", "tally": tally},
        compute=ray.data.ActorPoolStrategy(size=count),
        num_gpus=gpus,
        num_cpus=cpus,
        max_task_retries=RETRIES,
    )
    total = sum(file["rows"] for file in plan["files"])
    before = total - sum(shard["stop"] - shard["start"] for shard in waiting)
    over, bad = threading.Event(), 0
    with progress(total=total, initial=before, unit=" rows", desc=f"{count} actors load the model") as bar:
        follower = threading.Thread(target=follow, args=(bar, tally, f"{count} actors", over.wait), daemon=True)
        follower.start()
        try:
            for shard in finished.iter_rows():
                bad += shard["bad"]
                bar.set_postfix(bad=bad, refresh=False)
        finally:
            over.set()
            follower.join()
        bar.update(total - bar.n)


def what_actors_share(options: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """Arguments of each [`Embedder`]. The prompt is read here, once: no actor may have another one, nor none
    for want of a connection."""
    prompts = prompts_of(plan["settings"]["model"], plan["settings"]["revision"])
    chosen = {"batch_size": options.batch_size, "trust_remote_code": options.trust_remote_code}
    output = str(options.output.absolute())
    return {"plan": plan, "document_prompt": prompts.get("document", ""), "output": output, **chosen}


def follow(bar: tqdm, tally: Any, working: str, wait: Callable[[float], bool]) -> None:
    """Moves the bar each second by what a [`Tally`] has been told, until `wait(1)` is true; its title becomes `working`
    with the first row."""
    while not wait(1):
        with suppress(ray.exceptions.RayError):  # the tally is late, or lost with its node: go on
            rows = bar.initial + ray.get(tally.total.remote(), timeout=5)
            if rows > bar.initial:
                bar.set_description(working, refresh=False)
            bar.update(rows - bar.n)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit status."""
    lenient_console()
    options = parse(argv)
    begun = (options.output / PLAN).exists()
    plan = make_plan(options)
    shards = list_shards(plan)
    waiting = [shard for shard in shards if not is_there(options.output / shard["name"])]
    if waiting:
        try:
            run(options, plan, waiting)
        except BaseException:  # Control-C too
            if not begun and not any(options.output.glob("*.parquet")):
                (options.output / PLAN).unlink()  # else the command that mends it would be taken for another job's
            raise

    embedded, bad = report(options.output, [shard["name"] for shard in shards])
    for leftover in filter(is_abandoned, options.output.glob(".*.tmp")):  # of killed runs
        with suppress(OSError):  # gone, or not ours to delete
            leftover.unlink()
    print(f"{embedded} rows embedded in {options.output}, {len(shards)} shards, {len(shards) - len(waiting)} of before")
    if bad:
        print(f"{bad} bad rows set aside, see {options.output / BAD_ROWS}")
    return EXIT_BAD_ROWS if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report usage to its makers
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
