"""The paper's comparisons from one pretrained backbone: trains each variant, evaluates it, and keeps what came out.

    python recipes/paper/compare_methods.py --backbone SMOLLM2 --data DATA --runs runs/paper \\
        --results results/comparison

SMOLLM2 is the folder of a causal LM with a chat template, here SmolLM2-135M-Instruct; DATA, a folder with train/ and
eval/, is described in recipes/DATA.md. First each method's learning rate is chosen after a short run, by the mean of
held-out accuracy and STS-Benchmark's development split; then follow, with the same data, steps and batch for all but
the other systems, most of which have data of their own and rates that were not tuned:

    gircse, causal_eos               three seeds
    bidirectional_avg                the first seed, as all that follow
    last_step, no_refinement         Table 3's rows between Causal-EOS and GIRCSE: the loss on the last step alone; on
                                     every step, without the penalty
    ..._lora                         each method with the paper's LoRA instead of all weights, at five times its rate
    ..._two                          GIRCSE and Causal-EOS as the authors' code contrasts, 2 queries and their 4
                                     documents, of which 8 make up a step; here those of one batch, so that nothing
                                     else differs
    causal_eos_generating            Causal-EOS as trained, made to generate (Figure 2, bottom)
    untrained                        AutoRegEmbed's encoder, learned tokens in one pass without generation: one step
                                     that changes nothing, to see what training brings
    learned_tokens                   ICR on this encoder
    answers                          hard tokens, trained to give short answers; InBedder's mean, h'_0 included
    compressed, autoregembed         the two stages of train_autoregembed.py, each of half the steps: the first has
                                     answers, abstracts and definitions said, the second contrasts the triplets of the
                                     pairs' NLI sources
    compressed_soft, warmed_up       the first stage with soft tokens, and GIRCSE from there, in the other half

One JSON a run: the commands, what was trained, and evaluate_gircse.py's scores on samples of all tasks. What was done
before is not repeated: runs whose JSON is there, models that were saved, tasks that were evaluated; a training that was
interrupted goes on from its last checkpoint. `--jobs 2` has two run at once, with half of the cores each; `--only NAME`
chooses among the runs. On a GPU, which one run of so small a model leaves idle most of the time:

    ... --jobs 8 --training "--attn_implementation sdpa --save_strategy no"
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAIRS, HELD_OUT, BATCH = 10_496, 256, 16
STEPS = (PAIRS - HELD_OUT) // BATCH
STAGE = STEPS // 2  # of the runs in two stages, which together read as many rows as any other run
TUNING_STEPS = 100
# Arguments of choose_pairs.py. What answers is a word or a name, short enough to be said; what is said of a compressed
# text may be long, since target_length cuts it.
FILES = {
    "pairs": f"--pairs {PAIRS} --longest 80",
    "answers": f"--pairs {PAIRS} --longest 80 --sources opentriviaqa oewn_reverse_dictionary",
    "contexts": f"--pairs {PAIRS} --longest 3000 --sources opentriviaqa medquad scitldr_title scitldr_tldr "
    "oewn_word_sense oewn_reverse_dictionary",
    "triplets": "--pairs 5000 --longest 80 --sources snli cad_nli cad_nli_reverse --with_negatives",
}
# Of each method three or more, by factors of 2, until the best was not at an end.
LEARNING_RATES = {
    "gircse": (5e-5, 1e-4, 2e-4),
    "causal_eos": (2.5e-5, 5e-5, 1e-4),
    "bidirectional_avg": (5e-5, 1e-4, 2e-4, 4e-4, 8e-4),
}
# Of the other systems, not tuned; for AutoRegEmbed's stages five and four times its paper's, of a model 50 times as
# large. What is untrained gets a rate that moves no weight.
OTHER_RATES = {"untrained": 1e-30, "answers": 5e-5, "compression": 5e-5, "alignment": 2e-5}
# GIRCSE as train_gircse.py makes it of a causal LM. The baselines read the same prompt and suffix, so that Causal-EOS's
# embedding is the state from which GIRCSE generates.
METHODS = {
    "gircse": "",
    "causal_eos": "--step_token none --pooling last",
    "bidirectional_avg": "--step_token none --attention bidirectional",
}
# GIRCSE's is the best of three (docs/results.md), five times that of all weights. The baselines keep this ratio.
LORA_RATES = {"gircse": 5e-4, "causal_eos": 2.5e-4, "bidirectional_avg": 1e-3}
TWO = "--contrast 2"
# Of each variant: the method that it changes, and the arguments that change it; the last one given counts.
VARIANTS = {
    "last_step": ("gircse", "--objective last_step"),
    "no_refinement": ("gircse", "--refinement_weight 0"),
    **{f"{name}_lora": (name, f"--tuning lora --learning_rate {rate}") for name, rate in LORA_RATES.items()},
    "gircse_two": ("gircse", TWO),
    "causal_eos_two": ("causal_eos", TWO),
}
# The same for all, before --training. Texts of 80 characters have up to 64 tokens with their prompt; bfloat16 and eager
# attention are for speed on CPU cores with bfloat16 instructions (benchmarks/attention.py).
SHARED = f"""--tuning full --max_length 64 --held_out {HELD_OUT} --per_device_train_batch_size {BATCH} --bf16
    --attn_implementation eager --save_steps 150 --save_total_limit 1 --logging_steps 10 --report_to none"""
EVALUATION = "--max_length 128 --batch_size 256 --dtype bfloat16"  # to fit two CPU cores; not tuned


@dataclass
class Run:
    name: str
    method: str  # whose learning rate it gets
    seed: int
    settings: str
    k: str  # of the evaluation
    data: str = "pairs"
    script: str = "recipes/paper/train_objective.py"
    start: str = ""  # the run whose model it goes on from, instead of the backbone
    steps: int = STEPS


def other_systems() -> list[Run]:
    few, stage = "1 5 20", {"script": "train_autoregembed.py", "steps": STAGE}
    learned = "--step_token learned --num_steps 5"
    # The answers have 3 tokens or fewer in the median, and generation doesn't stop at their end.
    answers = "--objective answers --step_token hard --pooling mean_with_prompt --num_steps 3"
    first, second = "--stage compression --target_length 64", "--stage alignment --decoder SMOLLM2 --target_length 64"
    return [
        Run("untrained-seed0", "untrained", 0, learned, "1 5", steps=1),
        Run("learned_tokens-seed0", "gircse", 0, learned, "1 5"),
        Run("answers-seed0", "answers", 0, answers, "1 3 5 20", "answers"),
        Run("compressed-seed0", "compression", 0, first, "1 5", "contexts", **stage),
        Run("autoregembed-seed0", "alignment", 0, second, "1 5", "triplets", start="compressed-seed0", **stage),
        Run("compressed_soft-seed0", "compression", 0, f"{first} --step_token soft", few, "contexts", **stage),
        Run("warmed_up-seed0", "gircse", 0, "", few, start="compressed_soft-seed0", steps=STAGE),
    ]


def plan() -> list[Run]:
    """All runs, in the order in which tables need them: the compared methods first; what another goes on from before
    it."""
    curve, few = "1 3 5 10 15 20", "1 5 20"
    runs = [Run(f"{method}-seed0", method, 0, settings, curve) for method, settings in METHODS.items()]
    for seed in (1, 2):
        runs += [Run(f"{name}-seed{seed}", name, seed, METHODS[name], few) for name in ("gircse", "causal_eos")]
    for name, (method, changes) in VARIANTS.items():
        runs.append(Run(f"{name}-seed0", method, 0, f"{METHODS[method]} {changes}", few))
    return runs + other_systems()


def call(command: list[str], log: Path, threads: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("a", encoding="utf-8") as file:
        file.write(shlex.join(command) + "\n")
        file.flush()
        arguments = [sys.executable, *command[1:]]
        subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT, check=True, env=environment)


def write_pairs(args: argparse.Namespace, names: Iterable[str] = ("pairs",)) -> None:
    for name in names:
        output = args.runs / f"{name}.jsonl"
        if not output.exists():
            chosen = ["--data", str(args.data), "--output", str(output), *FILES[name].split()]
            call(["python", "recipes/choose_pairs.py", *chosen], args.runs / f"{name}.log", args.threads)


def train(run: Run, rate: float, args: argparse.Namespace, folder: Path) -> list[str]:
    """Trains into `folder`, unless that was done before; returns the command."""
    start = args.runs / run.start if run.start else args.backbone
    settings = [str(args.backbone) if part == "SMOLLM2" else part for part in run.settings.split()]
    command = ["python", run.script, "--model_name_or_path", str(start)]
    command += ["--train_data", str(args.runs / f"{run.data}.jsonl"), "--output_dir", str(folder), *SHARED.split()]
    command += ["--max_steps", str(run.steps), "--seed", str(run.seed), "--learning_rate", str(rate), *settings]
    command += args.training.split()
    log, model = folder / "run.log", folder / "model.safetensors"
    checkpoints = [*folder.glob("checkpoint-*/trainer_state.json")]
    if (model.exists() or checkpoints) and shlex.join(command) not in log.read_text(encoding="utf-8"):
        raise ValueError(f"{folder} holds a model of another command, {log.name} tells which: remove the folder")
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume_from_checkpoint", "last"] if checkpoints else []
        call([*command, *resume], log, args.threads)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return command


def evaluate(model: Path, args: argparse.Namespace, task: str, k: str, sample: int) -> list[str]:
    command = ["python", "evaluate_gircse.py", "--model", str(model), "--tasks", task, "--sample", str(sample)]
    command += [*EVALUATION.split(), "--k", *k.split(), "--data", str(args.data / "eval")]
    command += ["--output_dir", str(model / "eval")]
    call(command, model / "run.log", args.threads)
    return command


def scores(model: Path) -> list[dict]:
    """The tasks' rows of an evaluation: task, group, metric, and k to score."""
    found = json.loads((model / "eval" / "results.json").read_text(encoding="utf-8"))
    if found["not_evaluated"]:
        raise RuntimeError(f"{model}: not evaluated: {found['not_evaluated']}")
    return [{name: row[name] for name in ("task", "group", "metric", "revision", "scores")} for row in found["tasks"]]


def training_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out_accuracy(folder: Path) -> dict[str, float]:
    """By k, after training."""
    last, key = [line for line in training_log(folder) if "eval_accuracy" in line][-1], "eval_accuracy_k"
    return {name.removeprefix(key): round(100 * value, 2) for name, value in last.items() if name.startswith(key)}


def short_run(run: Run, rate: float, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What choices are made by, each by k: held-out accuracy, and STS-Benchmark's development split."""
    folder = args.runs / run.name
    train(replace(run, steps=TUNING_STEPS), rate, args, folder)
    evaluate(folder, args, "sts_stsbenchmark_dev", run.k, sample=750)
    return {"held_out_accuracy": held_out_accuracy(folder), "sts_dev": scores(folder)[0]["scores"]}


def try_rate(method: str, rate: float, args: argparse.Namespace) -> dict[str, float]:
    """The scores of a short run at the trained k."""
    found = short_run(Run(f"{method}-rate{rate}", method, 0, METHODS[method], "5"), rate, args)
    accuracy = found["held_out_accuracy"]
    return {"held_out_accuracy": accuracy.get("5", accuracy.get("1")), "sts_dev": next(iter(found["sts_dev"].values()))}


def choose_rates(args: argparse.Namespace, each: Callable[[Callable, Iterable], Iterable]) -> dict[str, float]:
    """Method to its rate; what was measured is kept in learning_rates.json."""
    file = args.results / "learning_rates.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {method: {} for method in METHODS}
    missing = [(m, rate) for m, rates in LEARNING_RATES.items() for rate in rates if str(rate) not in found[m]]
    if missing:
        rows = each(lambda pair: try_rate(*pair, args), missing)
        for (method, rate), row in zip(missing, rows, strict=True):
            found[method][str(rate)] = row
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {method: float(max(rows, key=lambda rate: sum(rows[rate].values()))) for method, rows in found.items()}


def perform(run: Run, rates: dict[str, float], args: argparse.Namespace) -> None:
    result, folder = args.results / f"{run.name}.json", args.runs / run.name
    generating = args.results / "causal_eos_generating-seed0.json"
    if result.exists() and (run.name != "causal_eos-seed0" or generating.exists()):
        return
    trained = train(run, rates[run.method], args, folder)
    keep(result, run, [trained, evaluate(folder, args, "local", run.k, args.sample)], folder, folder, args)
    if run.name == "causal_eos-seed0":
        copy = make_generate(folder, args.runs / generating.stem)
        keep(generating, run, [trained, evaluate(copy, args, "local", "1 5 20", args.sample)], folder, copy, args)
    print(f"{run.name} done", flush=True)


def make_generate(folder: Path, copy: Path) -> Path:
    """A model trained without generation, with soft tokens generated and averaged."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("eval", "run.log"), dirs_exist_ok=True)
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config |= {"step_token": "soft", "pooling": "mean"}
    (copy / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return copy


def keep(
    result: Path, run: Run, commands: list[list[str]], trained: Path, evaluated: Path, args: argparse.Namespace
) -> None:
    """Writes a run's JSON; its commands read the same wherever backbone, data and runs lie."""
    lines = [shlex.join(command) for command in commands]
    for place, name in ((args.runs, "runs/paper"), (args.data, "DATA"), (args.backbone, "SMOLLM2")):
        lines = [re.sub(rf"(?<= ){re.escape(str(place))}(?=[/ ]|$)", name, line) for line in lines]
    # Not where it isn't of these pairs: of other data, of other settings, or where a first stage may have read them.
    of_pairs = run.data == "pairs" and evaluated == trained and not run.start
    content = {
        "commands": lines,
        "method": result.name.split("-")[0],
        "seed": run.seed,
        "held_out_accuracy": held_out_accuracy(trained) if of_pairs else {},
        "log": [line for line in training_log(trained) if "loss" in line],
        "tasks": scores(evaluated),
    }
    result.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    names = [run.name for run in plan()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "backbone", "runs", "results"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=300, help="rows of each task that is evaluated")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--training", default="", help="more arguments of train_gircse.py, for all runs, as one string")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    os.chdir(ROOT)
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    for folder in (args.runs, args.results):
        folder.mkdir(parents=True, exist_ok=True)
    runs = [run for run in plan() if run.name in args.only]
    write_pairs(args, dict.fromkeys(["pairs", *(run.data for run in runs)]))
    names = [run.name for run in runs]
    chains = [[run, *(later for later in runs if later.start == run.name)] for run in runs if run.start not in names]
    with ThreadPoolExecutor(args.jobs) as pool:
        rates = choose_rates(args, pool.map) | OTHER_RATES
        print(rates, flush=True)
        list(pool.map(lambda chain: [perform(run, rates, args) for run in chain], chains))


if __name__ == "__main__":
    main()
