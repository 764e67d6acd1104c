"""Embed many plain texts with a stronger encoder: what recipes/root_model/distil.py teaches a GIRCSE model.

    python recipes/root_model/teacher_vectors.py --text 'text/*.txt.gz' 'train/*.jsonl.gz' --output_dir runs/teacher \\
        --teacher sentence-transformers/all-MiniLM-L6-v2

The texts are those that `pretrain_backbone.documents` reads, long ones cut into sentences, each distinct one once, and
of each file at most `--most_of_a_file`, drawn at random. The folder gets `texts.json`, a list of n strings, and
`vectors.npy`, (n, d) float16 of unit norm. Give `--teacher` a Sentence Transformers model: a Hub id or a folder.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from pretrain_backbone import documents

SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[A-Z\"'(])")
SHORTEST, LONGEST = 12, 400  # characters


def pieces(path: str) -> list[str]:
    texts: dict[str, None] = {}
    for document in documents([path]):
        parts = [document] if len(document) <= LONGEST else SENTENCE_END.split(document)
        texts.update(dict.fromkeys(part for part in parts if SHORTEST <= len(part) <= LONGEST))
    return list(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="files or glob patterns: .txt, .jsonl, either .gz")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--most_of_a_file", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng, texts = random.Random(args.seed), {}
    paths = {path for pattern in args.text for path in glob.glob(pattern)}
    for path in sorted(paths, key=lambda path: Path(path).name):  # wherever they lie, the draw is the same
        found = pieces(path)
        texts.update(dict.fromkeys(rng.sample(found, min(args.most_of_a_file, len(found)))))
    texts = list(texts)
    print(f"{len(texts):,} texts")
    teacher = SentenceTransformer(args.teacher, model_kwargs={"dtype": torch.bfloat16})  # half of the time
    vectors = teacher.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=True)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    np.save(output / "vectors.npy", vectors.astype(np.float16))


if __name__ == "__main__":
    main()
