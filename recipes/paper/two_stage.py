"""Two-stage generation (the paper's appendix F): texts with augmentations that a causal LM wrote, against texts alone.

    python recipes/paper/two_stage.py --expand_with SMOLLM2 --models models.json --tasks local --data DATA/eval \\
        --sample 150 --k 5 --output_dir runs/two_stage --output results/two_stage.json

DATA is described in recipes/DATA.md; all arguments but `--output` are evaluate_gircse.py's, which takes several models
at one k, and runs twice, without and with `--expand_with`. Written are the scores x 100 by task and model. What was
evaluated before is not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate_gircse


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for name in ("--output", "--output_dir"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--expand_with", "--models", "--k"):
        parser.add_argument(name, required=True)
    args, rest = parser.parse_known_args()
    rest += ["--models", args.models, "--k", args.k]
    names = evaluate_gircse.each_model(evaluate_gircse.parse(rest))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way, more in (("alone", []), ("augmented", ["--expand_with", args.expand_with])):
        out = args.output_dir / way
        if evaluate_gircse.main([*rest, *more, "--output_dir", str(out)]):
            raise SystemExit(f"not all was evaluated: {out}")
        for name in names:
            results = json.loads((out / name.replace("/", "__") / "results.json").read_text(encoding="utf-8"))
            for row in results["tasks"]:
                (score,) = row["scores"].values()
                found.setdefault(row["task"], {}).setdefault(name, {})[way] = score
    content = {"command": shlex.join(["python", *sys.argv]), "scores": found}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
