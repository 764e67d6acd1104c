"""Draw training pairs from DATA/train: short ones, as many of each source, without those that state no licence.

    python recipes/choose_pairs.py --data DATA --output runs/pairs.jsonl --pairs 10496 --longest 80

DATA is described in recipes/DATA.md. Of each source, rows are drawn with a fixed seed among those of which no text has
more than `--longest` characters; one that has too few gives all, and the others make up for it. Sources of few classes
are then called `classes`, all of them: batches are of one source, and of 16 queries of 7 classes most would share
theirs with another one, whose document counts as a negative, since rows don't name their class.

With `--label_classes`, rows of four sources that are made of classes get a `label`, by which training leaves such
negatives out, and these sources keep their names. A row's class is told by the rows: a text is of its positives' class,
a film review not of its negatives'. So a class whose pairs don't all hang together has several labels, as Banking77's
77 intents have about two each. Two sources get none, SNIPS and film reviews by their film.
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
# Sources whose positives are of the query's class, in groups of the same texts or classes: a request's intent has one
# domain. The last has two classes, so that a negative tells as much as a positive.
OF_CLASSES = (("goemotions",), ("banking77",), ("clinc150_intent", "clinc150_domain"), ("cad_imdb_sentiment",))
OF_TWO_CLASSES = "cad_imdb_sentiment"
# Sources whose documents are like their queries: they get the instruction too.
SYMMETRIC = OF_FEW_CLASSES | {"banking77", "clinc150_intent", "stsb", "snli", "cad_nli"}


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


class Classes:
    """Which class a text is of, or the opposite of, as far as pairs of texts tell: sets of texts, joined pair by pair.
    Of each text it keeps another one of its set, and whether both are of the same class (0) or of opposite ones (1)."""

    def __init__(self) -> None:
        self.towards: dict[str, tuple[str, int]] = {}

    def find(self, text: str) -> tuple[str, int]:
        """The text that stands for the set, and whether this one is of its class."""
        other, opposite = self.towards.setdefault(text, (text, 0))
        if other == text:
            return text, 0
        last, more = self.find(other)
        self.towards[text] = last, opposite ^ more
        return self.towards[text]

    def join(self, text: str, other: str, opposite: int) -> None:
        (a, of_text), (b, of_other) = self.find(text), self.find(other)
        self.towards[a] = b, of_text ^ of_other ^ opposite if a != b else 0


def label(sources: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Rows of the sources of classes with their labels; the label of a clinc150_intent row is its intent's."""
    labelled = dict(sources)
    for group in OF_CLASSES:
        classes = Classes()
        for name in group:
            for row in sources.get(name, []):
                for text in row["pos"]:
                    classes.join(row["query"], text, 0)
                for text in row["neg"] if name == OF_TWO_CLASSES else []:
                    classes.join(row["query"], text, 1)
            # After the first source of a group, its classes; after the second, the wider ones that hold them.
            numbers: dict[tuple[str, int], int] = {}
            found = [classes.find(row["query"]) for row in sources.get(name, [])]
            labels = [f"{name} {numbers.setdefault(of, len(numbers))}" for of in found]
            labelled[name] = [{**row, "label": of} for row, of in zip(sources.get(name, []), labels, strict=True)]
    return labelled


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
        settings = {"symmetric": name in SYMMETRIC}
        if name in OF_FEW_CLASSES and not any("label" in row for row in rows):
            settings["source"] = "classes"
        chosen += [{**row, **settings} for row in rows]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--longest", type=int, required=True, help="characters of a text")
    parser.add_argument("--sources", nargs="*", metavar="SOURCE", help="draw from these alone")
    parser.add_argument("--with_negatives", action="store_true", help="only rows that have a hard negative")
    parser.add_argument("--label_classes", action="store_true")
    parser.add_argument("--twice", nargs="*", default=[], help="sources whose chosen rows count twice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sources = read(args.data / "train", args.longest)
    for option in ("sources", "twice"):
        if unknown := {*(getattr(args, option) or ())} - sources.keys():
            raise ValueError(f"--{option} {', '.join(sorted(unknown))}: there are only {', '.join(sorted(sources))}")
    sources = {name: rows for name, rows in sources.items() if args.sources is None or name in args.sources}
    if args.with_negatives:
        sources = {name: [row for row in rows if row["neg"]] for name, rows in sources.items()}
    rows = choose(label(sources) if args.label_classes else sources, args.pairs, args.seed)
    if called := {*args.twice} - {row["source"] for row in rows}:
        raise ValueError(
            f"--twice {', '.join(sorted(called))}: no row is called so (sources of few classes are `classes`)"
        )
    rows += [row for row in rows if row["source"] in args.twice]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
