"""How much a backbone loses without some of its layers, after the same short GIRCSE training.

    python recipes/root_model/try_lengths.py --backbone SMOLLM2 --data DATA --runs runs/lengths \\
        --output results/lengths.json

SMOLLM2 and DATA are those of recipes/paper/compare_methods.py, and so are the training, short as for the choice of a
learning rate, and what it is judged by: held-out pairs and STS-Benchmark's development split. What was done before is
not repeated; `--jobs 2` has two run at once, with half of the cores each.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "paper"))
import compare_methods as compare
from compare_methods import Run

# Runs of layers to leave out, of 30: near the end, as published work on pruning depth does; and in the middle, where
# this model's layers change a state least.
LEFT_OUT = ("none", "18 28", "20 27", "10 17")


def try_length(left_out: str, args: argparse.Namespace) -> dict:
    name = left_out.replace(" ", "-")
    run, folder = Run(name, "gircse", 0, "", "1 5 20"), args.runs / name
    args = copy.copy(args)
    if left_out != "none":
        args.backbone, whole = args.runs / f"{name}-backbone", args.backbone
        folder.mkdir(parents=True, exist_ok=True)
        command = ["python", "recipes/root_model/shorten.py", str(whole), str(args.backbone), "--leave_out"]
        compare.call([*command, *left_out.split()], folder / "run.log", args.threads)
    found = compare.short_run(run, args.rate, args)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    row = {"left_out": left_out, "layers": config["text_config"]["num_hidden_layers"], **found}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("backbone", "data", "runs", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--training", default="", help="more arguments of train_gircse.py, as one string")
    args = parser.parse_args()
    os.chdir(compare.ROOT)
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    args.runs.mkdir(parents=True, exist_ok=True)
    compare.write_pairs(args)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda left_out: try_length(left_out, args), LEFT_OUT))
    args.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
