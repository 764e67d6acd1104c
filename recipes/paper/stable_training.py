"""What lets a pretrained backbone learn with K soft tokens: gradients at the start, and scores after as many steps.

    python recipes/paper/stable_training.py --backbone SMOLLM2 --data DATA --runs runs/stable \\
        --output results/stable_training

SMOLLM2 is the folder of a causal LM with a chat template, here SmolLM2-135M-Instruct; DATA, a folder with train/ and
eval/, is described in recipes/DATA.md. First, of the untrained backbone: the loss of each step, L_1..L_K, and the norm
of its gradient with respect to the layers' weights, then that of their sum with respect to all weights, for several T
and several shares of the gradient that pass through d_k; medians over one batch each of `--batches` sources. Then each
setting of RUNS is trained on the same batches and evaluated on samples of three tasks. `default_seed1` and the like are
short runs of `train_gircse.py` as it is. One JSON a run; what is there is not done again. `--only NAME ...` chooses
among them (`start` for the gradients).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import PAPER_PROMPT, load
from gircse.training.data import PairCollator, TrainingPairs
from gircse.training.losses import candidate_mask, icr_loss
from gircse.training.pairs import load_pairs
from train_objective import scale_gradient

ROOT = Path(__file__).resolve().parents[2]
K, TAU, QUERIES, MAX_LENGTH = 5, 0.02, 16, 48
# K and TAU are the paper's. Short texts and small batches let a run of 100 steps end on a CPU; none of these is tuned.
SOURCES = (
    "dictionary_oewn_reverse emotion_goemotions intent_banking77 intent_clinc150 intent_snips nli_counterfactual "
    "nli_medi_1000 nli_snli_devtest paraphrase_stsb_train qa_opentriviaqa"
).split()
PAIRS_OF_A_SOURCE = 320
SYMMETRIC = "goemotions banking77 clinc150_intent snips stsb snli cad_nli medi_nli".split()
SHARED = (
    f"--max_steps 100 --per_device_train_batch_size {QUERIES} --num_negatives 0 --max_length {MAX_LENGTH} --held_out 0 "
    f"--save_strategy no --report_to none --logging_steps 1 --symmetric_sources {' '.join(SYMMETRIC)}"
)
PAPERS = f"--prompt_template {shlex.quote(PAPER_PROMPT)}"
FULL = "--tuning full --learning_rate 5e-5"  # train_gircse.py's default for all weights
RUNS = {
    "paper": f"{PAPERS} --suffix '' --logit_temperature 1 --tuning lora --learning_rate 1e-4",
    "lora_1e-4": "--logit_temperature 2 --tuning lora --learning_rate 1e-4",
    "lora": "--logit_temperature 2 --tuning lora --learning_rate 2e-4",
    "lora_5e-4": "--logit_temperature 2 --tuning lora --learning_rate 5e-4",
    "t1": f"--logit_temperature 1 {FULL}",
    "t1_warm_up": f"--logit_temperature 1 --warmup_steps 50 {FULL}",
    "t2": f"--logit_temperature 2 {FULL}",
    "t4": f"--logit_temperature 4 {FULL}",
    "t_learned": f"--logit_temperature 2 --learn_temperature {FULL}",
    "gradient_0.1": f"--logit_temperature 1 --soft_token_gradient 0.1 {FULL}",
    "papers_prompt": f"{PAPERS} --suffix '' --logit_temperature 2 {FULL}",
    "end_token": f"{PAPERS} --suffix '<|im_end|>' --logit_temperature 2 {FULL}",
}
# The default but for a small budget; 1e-4 is a fifth of the default rate of a LoRA, and not tuned.
DEFAULT = "--max_steps 40 --per_device_train_batch_size 8 --learning_rate 1e-4 --logging_steps 1 --report_to none"
SEEDS = {f"default_seed{seed}": seed for seed in (1, 2, 3)}
TASKS = ["sts_stsbenchmark_dev", "retrieval_xquad_en", "classification_hwu64_intent"]


def write_pairs(data: Path, path: Path) -> None:
    """The same number of pairs of each source, drawn with a fixed seed."""
    lines = []
    for source in SOURCES:
        with gzip.open(data / "train" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as rows:
            lines += random.Random(0).sample(rows.read().splitlines(), PAIRS_OF_A_SOURCE)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# Gradients at the start


def gradients_at_the_start(pairs: Path, args: argparse.Namespace) -> list[dict]:
    """A row for each T and share of the gradient, and for the paper's prompt."""
    rows = load_pairs(pairs, symmetric_sources=SYMMETRIC)
    batches = [range(start, start + QUERIES) for start in range(0, len(rows), PAIRS_OF_A_SOURCE)][: args.batches]
    chat = [(None, None, temperature, share) for temperature in (1.0, 2.0, 4.0) for share in (1.0, 0.1, 0.0)]
    found = []
    for template, suffix, temperature, share in [*chat, (PAPER_PROMPT, "", 1.0, 1.0), (PAPER_PROMPT, "", 2.0, 1.0)]:
        model, processor = load(args.backbone, prompt_template=template, suffix=suffix, logit_temperature=temperature)
        scale_gradient(model, share)
        collator, pairs_of_rows = PairCollator(processor, MAX_LENGTH), TrainingPairs(rows, 0, 0)
        of_batches = [of_batch(model, collator([pairs_of_rows[i] for i in batch])) for batch in batches]
        losses, layers, total = (
            [statistics.median(x) for x in zip(*part, strict=True)] for part in zip(*of_batches, strict=True)
        )
        row = {"prompt": "chat" if template is None else "paper", "temperature": temperature, "share": share}
        rounded = {"losses": losses, "layers": layers, "all_weights": total}
        rounded = {name: [round(value, 3) for value in values] for name, values in rounded.items()}
        found.append({**row, **rounded, "all_weights": rounded["all_weights"][0]})
        print(found[-1], flush=True)
    return found


def of_batch(model: nn.Module, inputs: dict) -> tuple[list[float], list[float], list[float]]:
    """L_1..L_K, the norms of their gradients with respect to the layers' weights, and that of their sum's gradient with
    respect to all weights, as the one element of a list."""
    queries, documents = (
        model(inputs[side]["input_ids"], inputs[side]["attention_mask"], k=K).step_embeddings
        for side in ("query", "document")
    )
    loss = icr_loss(queries, documents, candidate_mask(inputs), temperature=TAU)
    weights = [*model.parameters()]
    table = next(i for i, weight in enumerate(weights) if weight is model.get_input_embeddings().weight)
    norms, total = [], None
    for step in loss.steps:
        found = torch.autograd.grad(step, weights, retain_graph=True)
        squares = [gradient.square().sum() for gradient in found]
        norms.append((sum(squares) - squares[table]).sqrt().item())
        total = found if total is None else [a.add_(b) for a, b in zip(total, found, strict=True)]
    return loss.steps.tolist(), norms, [sum(gradient.square().sum() for gradient in total).sqrt().item()]


# Runs


def call(command: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        subprocess.run(
            [sys.executable, *command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=True,
            env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
        )


def perform(name: str, pairs: Path, args: argparse.Namespace) -> dict:
    """Trains and evaluates one setting, unless the folder of the run holds what has been done."""
    folder = args.runs / name
    folder.mkdir(parents=True, exist_ok=True)
    base = ["--model_name_or_path", str(args.backbone), "--train_data", str(pairs), "--output_dir", str(folder)]
    if name in SEEDS:
        train = ["python", "train_gircse.py", *base, *DEFAULT.split(), "--seed", str(SEEDS[name])]
    else:
        train = ["python", "recipes/paper/train_objective.py", *base, *shlex.split(SHARED), *shlex.split(RUNS[name])]
    if not (folder / "model.safetensors").exists():
        call(train, args.runs / f"{name}.log")
    lines = (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    names = ("L_1", f"L_{K}", "grad_norm", "mean_cosine", "log_candidates", "temperature")
    log = [{k: round(line[k], 3) for k in names if k in line} for line in map(json.loads, lines) if "L_1" in line]
    if name in SEEDS:
        return {"commands": shown([train], args), "log": log}
    evaluate = ["python", "evaluate_gircse.py", "--model", str(folder), "--tasks", *TASKS, "--sample", str(args.sample)]
    evaluate += ["--data", str(args.data / "eval"), "--output_dir", str(folder / "eval"), "--k", "1", "5", "20"]
    call(evaluate, args.runs / f"{name}.log")
    tasks = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))["tasks"]
    scores = [{key: task[key] for key in ("task", "metric", "revision", "scores")} for task in tasks]
    return {"commands": shown([train, evaluate], args), "log": log, "tasks": scores}


def shown(commands: list[list[str]], args: argparse.Namespace) -> list[str]:
    """The commands, wherever backbone, data and runs lie."""
    lines = [shlex.join(command) for command in commands]
    for place, name in ((args.runs, "runs/stable"), (args.data, "DATA"), (args.backbone, "SMOLLM2")):
        lines = [line.replace(str(place), name) for line in lines]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("backbone", "data", "runs", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=["start", *RUNS, *SEEDS], default=["start", *RUNS, *SEEDS])
    parser.add_argument("--batches", type=int, default=1, help="of one source each, for the gradients")
    parser.add_argument("--sample", type=int, default=300, help="rows of each task that is evaluated")
    args = parser.parse_args()
    os.chdir(ROOT)
    for folder in (args.runs, args.output):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = args.runs / "pairs.jsonl"
    write_pairs(args.data, pairs)
    for name in args.only:
        result = args.output / f"{name}.json"
        if not result.exists():
            print(name, flush=True)
            content = gradients_at_the_start(pairs, args) if name == "start" else perform(name, pairs, args)
            result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
