"""Draw training pairs from DATA/train: short ones, as many of each source, without those that state no licence.

    python recipes/choose_pairs.py --data DATA --output runs/pairs.jsonl --pairs 10496 --longest 80

DATA is described in recipes/DATA.md. Of each source, rows are drawn with a fixed seed among those of which no text has
more than `--longest` characters; one that has too few gives all, and the others make up for it. Sources of few classes
are then called `classes`, all of them: batches are of one source, and of 16 queries of 7 classes most would share
theirs with another one, whose document counts as a negative, since rows don't name their class.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

# All but nli_medi_1000, which states no licence: no published weights may be trained on it.
UNLICENSED = "nli_medi_1000.jsonl.gz"
OF_FEW_CLASSES = {"goemotions", "clinc150_domain", "snips", "cad_imdb_sentiment", "cad_imdb_content"}
# Sources whose documents are like their queries: they get the instruction too.
SYMMETRIC = "classes banking77 clinc150_intent stsb snli cad_nli"


def longest_text(row: dict) -> int:
    """In characters."""
    return max(map(len, (row["query"], *row["pos"], *row["neg"])))


def read(folder: Path, longest: int) -> dict[str, list[dict]]:
    """The rows of each source that are short enough."""
    sources: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.jsonl.gz")):
        if path.name != UNLICENSED:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for row in map(json.loads, lines):
                    if longest_text(row) <= longest:
                        sources.setdefault(row["source"], []).append(row)
    return sources


def choose(sources: dict[str, list[dict]], count: int, seed: int) -> list[dict]:
    """`count` rows, those of the source with the fewest first.

    Raises:
        ValueError: all sources together have fewer.
    """
    if sum(map(len, sources.values())) < count:
        raise ValueError(f"pairs={count}, but there are {sum(map(len, sources.values()))} of that length")
    rng, chosen = random.Random(seed), []
    for done, name in enumerate(sorted(sources, key=lambda name: len(sources[name]))):
        share = (count - len(chosen)) // (len(sources) - done)
        rows = rng.sample(sources[name], min(share, len(sources[name])))
        chosen += [{**row, "source": "classes"} for row in rows] if name in OF_FEW_CLASSES else rows
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True, help="characters of a text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = choose(read(args.data / "train", args.longest), args.pairs, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
