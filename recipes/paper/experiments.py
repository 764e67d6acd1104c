"""The paper's comparisons from one backbone: trains each variant, evaluates it, and keeps what came out.

    python recipes/paper/experiments.py --data DATA --backbone runs/small --runs runs/all --results results/experiments

DATA, a folder with train/ and eval/, is described in recipes/DATA.md. First each method's learning rate is chosen,
by the mean of held-out accuracy and STS-Benchmark's development split after a short run; then follow, with the same
data, steps and batch for all methods:

    gircse, causal_eos, bidirectional_avg    three seeds, and one larger number of samples with the first seed
    last_step, no_refinement                 Table 3's rows between Causal-EOS and GIRCSE: the loss on the last step
                                             alone; on every step, without the penalty
    mean                                     the steps' losses averaged, as in the released code, instead of summed
    mixed_steps                              queries' and documents' embeddings of different steps contrasted
    causal_avg                               Bidirectional-Avg with causal attention
    gircse_end_token                         GIRCSE, the text ended by Causal-EOS's token; three seeds
    ..._long_warm_up                         each method, the learning rate rising over half of the steps; three seeds
    causal_eos_generating                    Causal-EOS as trained, made to generate (Figure 2, bottom)

One JSON a run: the commands, what was trained, and evaluate_gircse.py's scores. What was done before is not repeated:
runs whose JSON is there, models that were saved, tasks that were evaluated. Paths are relative to the repo's root.
`--jobs 2` has two run at once, with half of the cores each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64  # without gradient caching, which costs time; not tuned
LEARNING_RATES = (1e-4, 3e-4, 1e-3)  # of 3e-4, 1e-3 and 3e-3 the lowest had won, so that the grid went lower
GENERATING = "--k 5 --num_steps 5"  # the paper's K in training
BASELINES = {
    "causal_eos": "--step_token none --pooling last --suffix <|endoftext|>",
    "bidirectional_avg": "--step_token none --attention bidirectional",
}
METHODS = {"gircse": GENERATING, **BASELINES}
# Of each variant: the method that it changes, whose learning rate it gets, and the arguments that change it.
VARIANTS = {
    "last_step": ("gircse", "--objective last_step"),
    "no_refinement": ("gircse", "--refinement_weight 0"),
    "mean": ("gircse", "--reduction mean"),
    "mixed_steps": ("gircse", "--objective mixed_steps"),
    "causal_avg": ("bidirectional_avg", "--attention causal"),
}
# GIRCSE starts worse, as its first state follows whatever a text ends with. Two remedies: a learning rate that rises
# over half of the steps, instead of a tenth, and an end token after each text.
STARTS = {f"{method}_long_warm_up": (method, "--warmup_ratio 0.5") for method in METHODS}
STARTS["gircse_end_token"] = ("gircse", "--suffix <|endoftext|>")
# The same for all methods. T = 1 is the paper's; texts end at 64 tokens so that all runs fit on two CPU cores; sources
# whose documents are like their queries are symmetric, and get the instruction on both sides. The rest is not tuned.
SHARED = f"""--tuning full --temperature 0.05 --num_negatives 1 --max_length 64 --held_out 512 --mix_sources --bf16
    --logit_temperature 1 --per_device_train_batch_size {BATCH} --save_strategy no --report_to none --symmetric_sources
    goemotions cad_imdb_sentiment cad_imdb_content clinc150_domain banking77 clinc150_intent snips stsb snli cad_nli"""
EVALUATION = "--max_length 128 --batch_size 64 --dtype bfloat16"  # to fit two CPU cores; not tuned


@dataclass
class Run:
    name: str
    method: str  # whose learning rate it gets
    samples: int
    seed: int
    settings: str
    k: str  # of the evaluation


def plan(samples: int, more_samples: int, seeds: int) -> list[Run]:
    """All runs, in the order in which tables need them: the compared methods first."""
    runs = []
    for seed in range(seeds):
        k = "1 5 20" if seed else "1 3 5 10 15 20"
        runs += [Run(f"{m}-{samples}-seed{seed}", m, samples, seed, METHODS[m], k) for m in METHODS]
        changed = STARTS | VARIANTS if seed == 0 else STARTS
        for name, (method, changes) in changed.items():
            k = "1 5 20" if name in STARTS else "1 5"
            runs.append(Run(f"{name}-{samples}-seed{seed}", method, samples, seed, f"{METHODS[method]} {changes}", k))
        if seed == 0:
            runs += [Run(f"{m}-{more_samples}-seed0", m, more_samples, 0, METHODS[m], "1 5") for m in METHODS]
    return runs


def call(command: list[str], log: Path, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)


def train(run: Run, learning_rate: float, args: argparse.Namespace, folder: Path) -> list[str]:
    """Trains into `folder`, unless that was done before; returns the command."""
    command = ["python", "recipes/paper/train_objective.py", "--model_name_or_path", str(args.backbone)]
    command += ["--train_data", str(args.data / "train"), "--output_dir", str(folder), *run.settings.split()]
    command += ["--learning_rate", str(learning_rate), "--max_steps", str(run.samples // BATCH)]
    command += ["--seed", str(run.seed), "--logging_steps", "20", *SHARED.split()]
    if not (folder / "model.safetensors").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        call([sys.executable, *command[1:]], folder / "run.log", args.threads)
    return command


def evaluate(model: Path, out: Path, args: argparse.Namespace, task: str, k: str) -> list[str]:
    command = ["python", "evaluate_gircse.py", "--model", str(model), "--tasks", task, *EVALUATION.split()]
    command += ["--k", *k.split(), "--data", str(args.data / "eval"), "--output_dir", str(out)]
    call([sys.executable, *command[1:]], model / "run.log", args.threads)
    return command


def scores(out: Path) -> list[dict]:
    """The tasks' rows of an evaluation: task, group, metric, and k to score."""
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    if found["not_evaluated"]:
        raise RuntimeError(f"{out}: not evaluated: {found['not_evaluated']}")
    return [{name: row[name] for name in ("task", "group", "metric", "scores")} for row in found["tasks"]]


def held_out_accuracy(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if any(name.startswith("eval_accuracy") for name in line)][-1]
    return {name.removeprefix("eval_accuracy_k"): 100 * v for name, v in last.items() if "accuracy" in name}


def choose_rate(method: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Learning rate to scores of a short run."""
    found = {}
    for rate in LEARNING_RATES:
        folder = args.runs / f"{method}-rate{rate}"
        run = Run(folder.name, method, args.tuning_samples, 0, METHODS[method], "1 5")
        train(run, rate, args, folder)
        evaluate(folder, folder / "eval", args, "sts_stsbenchmark_dev", run.k)
        k = "5" if method == "gircse" else None
        accuracy, dev = held_out_accuracy(folder)[k or "1"], scores(folder / "eval")[0]["scores"][str(k)]
        found[str(rate)] = {"held_out_accuracy": round(accuracy, 2), "sts_dev": dev}
    return found


def best_rate(found: dict[str, dict[str, float]]) -> float:
    return float(max(found, key=lambda rate: sum(found[rate].values())))


def perform(run: Run, rates: dict[str, float], args: argparse.Namespace) -> None:
    result, folder = args.results / f"{run.name}.json", args.runs / run.name
    if result.exists():
        return
    rate = rates[run.method]
    trained = train(run, rate, args, folder)
    if run.name == f"causal_eos-{args.samples}-seed0":
        name = run.name.replace("causal_eos", "causal_eos_generating")
        copy = make_generate(folder, args.runs / name)
        commands = [trained, evaluate(copy, copy / "eval", args, "local", "1 5 20")]
        keep(args.results / f"{name}.json", run, rate, commands, folder, copy / "eval")
    commands = [trained, evaluate(folder, folder / "eval", args, "local", run.k)]
    keep(result, run, rate, commands, folder, folder / "eval")
    print(f"{run.name} done", flush=True)


def make_generate(folder: Path, copy: Path) -> Path:
    """A model trained without generation, with soft tokens generated and averaged."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("eval", "run.log"), dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"step_token": "soft", "pooling": "mean"}
    (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


def keep(result: Path, run: Run, rate: float, commands: list[list[str]], folder: Path, out: Path) -> None:
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    content = {
        "commands": [shlex.join(command) for command in commands],
        "method": result.name.split("-")[0],
        "samples": run.samples,
        "seed": run.seed,
        "learning_rate": rate,
        "held_out_accuracy": held_out_accuracy(folder),
        "log": [line for line in log if "loss" in line],
        "tasks": scores(out),
    }
    result.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "backbone", "runs", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--more_samples", type=int, default=40_000)
    parser.add_argument("--tuning_samples", type=int, default=5_120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    os.chdir(ROOT)
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    args.results.mkdir(parents=True, exist_ok=True)

    chosen = args.results / "learning_rates.json"
    with ThreadPoolExecutor(args.jobs) as pool:
        if not chosen.exists():
            tuned = dict(zip(METHODS, pool.map(lambda method: choose_rate(method, args), METHODS), strict=True))
            chosen.write_text(json.dumps(tuned, indent=1) + "\n", encoding="utf-8")
        tuned = json.loads(chosen.read_text(encoding="utf-8"))
        rates = {method: best_rate(found) for method, found in tuned.items()}
        print(rates, flush=True)
        list(pool.map(lambda run: perform(run, rates, args), plan(args.samples, args.more_samples, args.seeds)))


if __name__ == "__main__":
    main()
