"""Embed many plain texts with a stronger encoder: what recipes/root_model/distil.py teaches a GIRCSE model.

    python recipes/root_model/teacher_vectors.py --text 'DATA/text/*.txt.gz' 'DATA/train/*.jsonl.gz' \\
        --teacher sentence-transformers/all-MiniLM-L6-v2 --output_dir runs/teacher

DATA is described in recipes/DATA.md. The texts are the documents of the files (`documents`), long ones cut into
sentences, each distinct one once, and of each file at most `--most_of_a_file`, drawn at random; and as they are, of
each file at most `--long_of_a_file` of the long ones. The folder gets `texts.json`, a list of n strings, and
`vectors.npy`, (n, d) float16 of unit norm. `--teacher` is a model of Sentence Transformers: a Hub id or a folder.

The first step of the root model; the later ones read this folder by `TeacherTexts`.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.training.pairs import load_pairs

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(])")
SHORTEST, LONGEST = 12, 400  # characters of a text; longer documents are cut into sentences
LONGEST_WHOLE = 1200  # and taken whole up to here, which is about as much as the teacher reads


def matching(patterns: list[str]) -> list[str]:
    """The files of all patterns, by name, so that what is drawn doesn't depend on the folder.

    Raises:
        ValueError: a pattern matches no file.
    """
    found = {pattern: glob.glob(pattern) for pattern in patterns}
    for pattern, paths in found.items():
        if not paths:
            raise ValueError(f"--text {pattern!r} matches no file; correct it or leave it out")
    return sorted({path for paths in found.values() for path in paths}, key=lambda path: Path(path).name)


def documents(path: str) -> Iterator[str]:
    """The lines of a text file; of a file of pairs (.jsonl, .jsonl.gz), each distinct text."""
    if path.removesuffix(".gz").endswith(".jsonl"):
        yield from dict.fromkeys(t for row in load_pairs(path) for t in (row["query"], *row["pos"], *row["neg"]))
        return
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
        yield from (line.strip() for line in lines if line.strip())


class TeacherTexts(torch.utils.data.Dataset):
    """Texts of a folder that this script wrote with their vectors, (d,) float32."""

    def __init__(self, folder: str) -> None:
        self.texts = json.loads(Path(folder, "texts.json").read_text(encoding="utf-8"))
        self.vectors = np.load(Path(folder, "vectors.npy"), mmap_mode="r")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        return self.texts[index], torch.from_numpy(self.vectors[index].astype(np.float32))


def pieces(path: str) -> tuple[list[str], list[str]]:
    """The distinct texts of a file, and its long documents."""
    texts: dict[str, None] = {}
    whole: dict[str, None] = {}
    for document in documents(path):
        parts = [document] if len(document) <= LONGEST else SENTENCE_END.split(document)
        texts.update(dict.fromkeys(part for part in parts if SHORTEST <= len(part) <= LONGEST))
        if LONGEST < len(document) <= LONGEST_WHOLE:
            whole[document] = None
    return list(texts), list(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files or glob patterns: .txt, .jsonl, either .gz")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--most_of_a_file", type=int, default=20000)
    parser.add_argument("--long_of_a_file", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from sentence_transformers import SentenceTransformer  # needed here alone: later steps import this file, too

    rng, texts = random.Random(args.seed), {}
    for path in matching(args.text):
        for found, most in zip(pieces(path), (args.most_of_a_file, args.long_of_a_file), strict=True):
            texts.update(dict.fromkeys(rng.sample(found, min(most, len(found)))))
    texts = list(texts)
    print(f"{len(texts):,} texts")
    teacher = SentenceTransformer(args.teacher, model_kwargs={"dtype": torch.bfloat16})  # half of float32's time
    vectors = teacher.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=True)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    np.save(output / "vectors.npy", vectors.astype(np.float16))


if __name__ == "__main__":
    main()
