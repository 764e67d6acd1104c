"""Evaluate a model with mteb, at every k from one encoding pass; writes a table, a picture and the card's metadata.

    python evaluate_gircse.py --tasks local --data DIR   # the root model on files (gircse/evaluation/tasks.py)
    python evaluate_gircse.py --model ID --tasks mteb nanobeir followir --output_dir runs/ID
    python evaluate_gircse.py --model intfloat/e5-base-v2 --tasks STS12 SciFact
    python evaluate_gircse.py --models models.json --tasks mteb followir   # several, in a table with ranks

`mteb` stands for MTEB(eng, v2), `nanobeir` and `followir` for these two benchmarks; any other name is a task of mteb or
of the folder. A model is a GIRCSE folder or Hub id, the baselines with `step_token="none"` included, or anything that
Sentence Transformers loads. Only a GIRCSE model with steps has several k, z_1..z_K of one pass (Eq. 4).

Texts go under the prompts of the model's `config_sentence_transformers.json`, by mteb's name of the task: the paper's
instructions. A task without one there takes that of the task it was adapted from, then mteb's own, then its type's;
documents of a search are embedded bare. A model of others that has no prompts gets those of mteb's registry; one for
which that has a loader of its own, as it does for most embedders of 7B, is loaded by it. A run that is started again
with the same output_dir does what is missing.

`--expand_with` embeds each text with an augmentation that a causal LM wrote for its instruction (the paper's appendix
F); they are kept in output_dir/expansions.

`--models` is a JSON file with a list of models, `{"model": folder or Hub id}`, beside it `model_name`,
`prompt_template`, `dtype`, `max_length` or `batch_size` where a model's differ from the command's. Each has a folder of
its own in output_dir, which gets `comparison.md` and `comparison.json`, laid out as the paper's Table 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mteb
import torch
from huggingface_hub import HfApi, constants
from mteb.abstasks.abstask import AbsTask

from gircse import ROOT
from gircse.command_line import DTYPES, check_writable, lenient_console, local_path, positive_int, unescape
from gircse.evaluation.cache import Results, prompts_of
from gircse.evaluation.comparison import markdown as comparison_table
from gircse.evaluation.comparison import write_comparison
from gircse.evaluation.encoding import LoadedEncoder, StepEncoder, Vectors
from gircse.evaluation.report import clear_report, markdown, write_report
from gircse.evaluation.subjects import STEPS, Subject, load_subject, say
from gircse.evaluation.tasks import local_tasks, unread_files

BENCHMARKS = {"mteb": "MTEB(eng, v2)", "nanobeir": "NanoBEIR", "followir": "FollowIR"}
# Metrics of the paper's Table 9 for FollowIR, on queries with original instructions; mteb's main score is p-MRR.
TABLE_9 = {
    "Robust04InstructionRetrieval": "map_at_1000",
    "News21InstructionRetrieval": "ndcg_at_5",
    "Core17InstructionRetrieval": "map_at_1000",
}
# What a model of --models may have of its own.
OWN = {"model": str, "model_name": str, "prompt_template": str, "dtype": str, "max_length": int, "batch_size": int}


# Tasks --------------------------------------------------------------------------------------------------------------


def choose_tasks(names: Sequence[str], data: str | None, sample: int | None = None) -> list[AbsTask]:
    """The tasks of the given names, each once; local ones of `sample` rows, if that is given.

    Raises:
        ValueError: for an unknown name, or `local` without data; for a sample of other tasks, or of one row.
    """
    local = {task.metadata.name: task for task in local_tasks(data, sample)} if data else {}
    unread = ", ".join(unread_files(data, local.values())) if data else ""
    if "local" in names and not local:
        found = f"no file of data={data!r} is named as one{f', but {unread}' * bool(unread)}" if data else "no data"
        raise ValueError(f"tasks 'local' needs data, a folder with files of tasks (docs/evaluation.md): {found}")
    if unread:
        say(f"  no task reads {unread}: the names of tasks' files are in docs/evaluation.md")
    chosen: dict[str, AbsTask] = {}
    for name in names:
        if name == "local":
            found = list(local.values())
        elif name in BENCHMARKS:
            found = list(mteb.get_benchmark(BENCHMARKS[name]).tasks)
        elif name in local:
            found = [local[name]]
        else:
            try:
                found = [mteb.get_task(name)]
            except KeyError as error:
                raise ValueError(f"task {name!r} is none of mteb's or of data={data!r}: {error.args[0]}") from error
        for task in found:
            for part in task.metadata.tasks if task.is_aggregate else [task]:
                chosen.setdefault(part.metadata.name, part)  # the first stays; a benchmark's may have fewer languages
    if sample is not None and (sample < 2 or not chosen.keys() <= local.keys()):
        raise ValueError(f"sample={sample} must be at least 2, and is for local tasks alone, not {', '.join(names)}")
    return list(chosen.values())


def unavailable(tasks: Sequence[AbsTask]) -> dict[str, str]:
    """Name and reason of each task whose data is neither here nor to be had from the Hub; downloads nothing."""
    with ThreadPoolExecutor(8) as pool:
        reasons = pool.map(why_unavailable, tasks)
    return {task.metadata.name: reason for task, reason in zip(tasks, reasons, strict=True) if reason}


def why_unavailable(task: AbsTask) -> str | None:
    if hasattr(task, "unavailable"):
        return task.unavailable()
    path, revision = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    if Path(constants.HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}", "snapshots", revision).is_dir():
        return None
    try:
        info = HfApi().dataset_info(path, revision=revision, timeout=20)
        if info.gated:
            HfApi().auth_check(path, repo_type="dataset")
    except Exception as error:  # the Hub's, or of the HTTP library that is used
        lines = [line for line in str(error).splitlines() if line] or [""]
        return f"{path}: {type(error).__name__}: {lines[0]:.150}"
    return None


def evaluate_task(task: AbsTask, subject: Subject, cache: Results, batch_size: int) -> None:
    """Writes the task's result to the cache for each k that isn't there yet."""
    steps = [k for k in subject.steps if not cache.has(task, subject, k)]
    if not steps:
        say("  has been evaluated before")
        return
    say("  reading its data")
    task.load_data()
    # Some tasks draw their texts. The random states are set back for each k and each model, so that each has those of a
    # run of its own.
    first = (task.rng_state.getstate(), task.np_rng.bit_generator.state)
    drawn, drawn_by_numpy = task.__dict__.setdefault("first_states", first)
    with Vectors(subject, steps, batch_size) as vectors:
        for k in steps:
            say(f"  evaluating{'' if k is None else f' k = {k}'}")  # mteb's classifiers and clusters take a while, too
            task.rng_state.setstate(drawn)
            task.np_rng.bit_generator.state = drawn_by_numpy
            mteb.evaluate(
                LoadedEncoder(subject) if subject.loaded else StepEncoder(vectors, k),
                task,
                cache=cache,
                overwrite_strategy="always",
                encode_kwargs={"batch_size": batch_size},
                co2_tracker=False,
                show_progress_bar=False,
            )
            cache.add(task, subject, k)
    task.unload_data()


# Report -------------------------------------------------------------------------------------------------------------


def collect(task: AbsTask, subject: Subject, cache: Results) -> list[dict[str, Any]]:
    """A row for each metric of a task with all of its k, scores x 100; none of a task that isn't done, nor of a score
    that is no number, as the correlation of equal values is none."""

    def percent(score: Any) -> float:
        return round(100 * float(score), 2)  # a float: YAML would write numpy's, as mteb gives, as objects

    if not all(cache.has(task, subject, k) for k in subject.steps):
        return []
    metadata = task.metadata
    results = {k: cache.load_task_result(metadata.name, subject.meta_at(k)) for k in subject.steps}
    # The cache may hold more languages and splits than this selection of the task has.
    results = {k: found.validate_and_filter_scores(task) for k, found in results.items()}
    getters = {metadata.main_score: lambda scores: scores["main_score"]}
    if extra := TABLE_9.get(metadata.name):
        getters[extra] = lambda scores: scores["og"][extra]
    rows = [
        {
            "task": metadata.name,
            "group": getattr(task, "group", metadata.type),
            "type": metadata.type,
            "metric": metric,
            "scores": {str(k): percent(found.get_score(getter=getter)) for k, found in results.items()},
            "dataset": metadata.dataset["path"],
            "revision": metadata.revision,
            "splits": list(task.eval_splits),
            "subsets": list(task.hf_subsets),
            "prompts": prompts_of(task, subject),
        }
        for metric, getter in getters.items()
    ]
    return [row for row in rows if all(map(math.isfinite, row["scores"].values()))]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="GIRCSE folder or Hub id, or any Sentence Transformers model (this repo)")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="local, mteb, nanobeir, followir, or names of tasks")
    add("--data", help="folder with the data files of local tasks")
    add("--sample", type=positive_int, help="of local tasks, so many rows of each, the same ones each time (all)")
    add("--k", nargs="+", type=int, help=f"numbers of generated tokens ({' '.join(map(str, STEPS))})")
    add("--output_dir", type=local_path, default="runs/eval", help="where results are kept and looked for (runs/eval)")
    add("--batch_size", type=positive_int, default=32, help="texts embedded at once (32)")
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (float32)")
    add("--max_length", type=positive_int, help="most tokens of a text (the model's)")
    add("--device", help="cuda, cpu, .. (cuda if there is one)")
    add(
        "--prompt_template",
        help="gives any model this repo's instructions, such as 'Instruct: {instruction}\\nQuery: '",
    )
    add("--model_name", help="organization/name under which results are filed (the Hub id, or local/FOLDER)")
    add("--trust_remote_code", action="store_true", help="run the code of a Hub model that is not a GIRCSE model")
    add("--expand_with", metavar="CAUSAL_LM", help="folder or Hub id of a model that augments each text first")
    add("--expansion_tokens", type=positive_int, default=256, help="the most of an augmentation (256)")
    add("--models", type=Path, metavar="FILE", help="a JSON list of models, in the place of --model")
    add("--beside", type=Path, metavar="FILE", help="a JSON file of other numbers, to stand below those of --models")
    args = parser.parse_args(argv)
    check(parser, args)
    return args


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command for arguments that don't go together; reads the numbers to stand beside."""
    if args.beside and not args.models:
        parser.error(f"--beside {args.beside} stands below a table of several models: give --models, too")
    if args.model_name and args.models:
        parser.error(f"--model_name {args.model_name} is of one model: give each of --models its own in the file")
    if args.beside:
        file, args.beside = args.beside, read_json(args.beside)
        try:
            comparison_table([], {}, args.beside)
        except (KeyError, TypeError, ValueError) as error:
            parser.error(f"--beside {file} is not like recipes/paper/table2.json: {type(error).__name__}: {error}")
    if args.model_name and "/" not in args.model_name:
        parser.error(f"--model_name {args.model_name} must be organization/name, as mteb files results")
    if args.prompt_template is not None:
        args.prompt_template = unescape(args.prompt_template)
        if "{instruction}" not in args.prompt_template:
            parser.error(f"prompt_template={args.prompt_template!r} has no '{{instruction}}'")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it is not there, or no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} can't be read as JSON: {error}") from error


def check_entry(entry: Any, file: Path) -> None:
    """Raises a ValueError for what is no model of `--models`."""
    if not isinstance(entry, dict) or "model" not in entry or not entry.keys() <= OWN.keys():
        remedy = f"an object with 'model' and, if they differ, {', '.join([*OWN][1:])}"
        raise ValueError(f"{file}: {json.dumps(entry)[:200]} must be {remedy}")
    for key, value in entry.items():
        if type(value) is not OWN[key]:
            raise ValueError(f"{file}: {key}={value!r} must be of type {OWN[key].__name__}")
        if OWN[key] is int and value < 1:
            raise ValueError(f"{file}: {key}={value} must be at least 1")
    if "/" not in entry.get("model_name", "/"):
        raise ValueError(f"{file}: model_name={entry['model_name']!r} must be organization/name, as mteb files results")
    if "{instruction}" not in entry.get("prompt_template", "{instruction}"):
        raise ValueError(f"{file}: prompt_template={entry['prompt_template']!r} has no '{{instruction}}'")
    if entry.get("dtype", DTYPES[0]) not in DTYPES:
        raise ValueError(f"{file}: dtype={entry['dtype']!r} must be one of {', '.join(DTYPES)}")


def each_model(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The name of each model of `--models` and its arguments.

    Raises:
        ValueError: for an entry that is no model, or a name that two have.
    """
    content = read_json(args.models)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{args.models} holds {json.dumps(content)[:200]}: it must be a list of models")
    found: dict[str, argparse.Namespace] = {}
    for entry in content:
        check_entry(entry, args.models)
        folder = Path(entry["model"])
        name = entry.get("model_name") or (folder.resolve().name if folder.is_dir() else entry["model"])
        if name in found:
            raise ValueError(f"{args.models}: two models are called {name!r}; give one of them a model_name")
        found[name] = argparse.Namespace(**vars(args) | entry)
    return found


# Evaluation ---------------------------------------------------------------------------------------------------------


def evaluate_model(
    args: argparse.Namespace, tasks: Sequence[AbsTask], failed: dict[str, str], out: Path, command: str
) -> tuple[list[dict[str, Any]], int | None]:
    """Evaluates a model and writes its report to `out`: the rows of all tasks that are done, and the k of its card.
    Tasks that failed come to `failed`."""
    say(f"loading {args.model}")
    subject = load_subject(args)
    cache = Results(out)
    done = {task.metadata.name: collect(task, subject, cache) for task in tasks}
    if not any(done.values()):
        clear_report(out)  # of another model
    for number, task in enumerate(tasks, 1):
        name = task.metadata.name
        say(f"[{number}/{len(tasks)}] {name}")
        try:
            evaluate_task(task, subject, cache, args.batch_size)
        except Exception as error:  # one task must not cost the hours spent on the others
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
        done[name] = collect(task, subject, cache)
        rows = [row for of_task in done.values() for row in of_task]
        if name not in failed and not done[name]:
            failed[name] = "its score is no number: are all embeddings alike, or all of its labels?"
        if rows:
            write_report(out, rows, failed, subject.meta, subject.settings, subject.shown, command)
    if rows:
        say(f"\n{markdown(rows)}\n\nWritten to {out}")
    return rows, subject.shown


def evaluate_models(
    models: dict[str, argparse.Namespace], tasks: Sequence[AbsTask], failed: dict[str, str], out: Path, command: str
) -> bool:
    """Evaluates each model into a folder of its own in `out`, and writes the comparison; whether all went well."""
    found, lacking, well = {}, {}, True
    for name, args in models.items():
        lost = dict(failed)
        try:
            rows, shown = evaluate_model(args, tasks, lost, out / name.replace("/", "__"), command)
        except Exception as error:  # nor must one model cost the others
            traceback.print_exc()
            say(f"  {name} was not evaluated: {type(error).__name__}: {error}")
            rows = []
        well = well and len(lost) == len(failed) and bool(rows)
        if rows:
            found[name] = rows, shown
        lacking[name] = [
            task.metadata.name for task in tasks if task.metadata.name not in {row["task"] for row in rows}
        ]
        gc.collect()  # Sentence Transformers' models refer to themselves, and two may be too large for a GPU
        torch.cuda.empty_cache()
    if found:
        lacking = {name: missing for name, missing in lacking.items() if missing}
        say(f"\n{write_comparison(out, found, args.beside, command, lacking)}\n\nWritten to {out}")
    return well


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a task failed or none could be had."""
    lenient_console()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    models = each_model(args) if args.models else {}
    check_writable(args.output_dir)
    tasks = choose_tasks(args.tasks, args.data, args.sample)
    say(f"looking for the data of {len(tasks)} tasks, here and on the Hub")
    failed = unavailable(tasks)
    say(f"{len(tasks) - len(failed)} of {len(tasks)} data sets can be had")
    for name, reason in failed.items():
        say(f"  not {name}: {reason}")
    tasks = [task for task in tasks if task.metadata.name not in failed]
    if not tasks:
        return 1
    out, command = args.output_dir, shlex.join(["python", "evaluate_gircse.py", *argv])
    if models:
        return int(not evaluate_models(models, tasks, failed, out, command))
    had = len(failed)
    evaluate_model(args, tasks, failed, out, command)
    return int(len(failed) > had)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
