"""Turn a teacher's vectors into the space of a student's states, without changing a single similarity.

    python recipes/root_model/align_vectors.py --model_name_or_path runs/backbone --vectors runs/teacher \\
        --output_dir runs/aligned

The student has more dimensions, d, than the teacher, d_t. Rows t of the teacher become R t with R^T R = 1, so that all
cosines stay what they are. Of all such R, (d, d_t), it is the one that brings R t nearest to what the student makes of
the same texts before any training (orthogonal Procrustes: with M = Z^T T of both sides' centred rows and its singular
vectors M = U S V^T, R = U V^T). The folder is laid out as that of teacher_vectors.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from gircse.loading import load
from teacher_vectors import TeacherTexts

BATCH = 64


def check_sizes(of_teacher: int, of_student: int) -> None:
    if of_student < of_teacher:
        raise ValueError(f"vectors of {of_teacher} dimensions don't fit into the model's {of_student}")


def alignment(teacher: Tensor, student: Tensor) -> Tensor:
    """R, (d, d_t): float32, of orthonormal columns.

    Args:
        teacher: (n, d_t), unit norm.
        student: (n, d), d >= d_t, of the same texts.

    Raises:
        ValueError: the student has fewer dimensions.
    """
    check_sizes(teacher.shape[1], student.shape[1])
    student, teacher = (x.double() - x.double().mean(0) for x in (student, teacher))
    u, _, v = torch.linalg.svd(student.T @ teacher, full_matrices=False)
    return (u @ v).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="a causal LM or a GIRCSE model")
    parser.add_argument("--vectors", required=True, help="folder of teacher_vectors.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--logit_temperature", type=float, help="T of a new model (2)")
    parser.add_argument("--fit_on", type=int, default=4000, help="texts, drawn at random")
    parser.add_argument("--k", type=int, default=5)
    args = parser.parse_args()

    model, processor = load(args.model_name_or_path, logit_temperature=args.logit_temperature)
    texts = TeacherTexts(args.vectors)
    check_sizes(texts.vectors.shape[1], model.config.hidden_size)
    rows = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: args.fit_on].tolist()
    rows.sort(key=lambda row: len(texts.texts[row]))  # batches of like length
    embedded = []
    for start in range(0, len(rows), BATCH):
        batch = [texts.texts[row] for row in rows[start : start + BATCH]]
        embedded.append(model.generate_embedding(**processor(batch), k=args.k))
    student, teacher = torch.cat(embedded), torch.from_numpy(np.asarray(texts.vectors)[rows].astype(np.float32))
    aligned = alignment(teacher, student)
    print(f"mean cosine on these texts, before any training: {(teacher @ aligned.T * student).sum(-1).mean():.3f}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(args.vectors, "texts.json"), args.output_dir)
    everything = np.asarray(texts.vectors).astype(np.float32) @ aligned.T.numpy()
    np.save(args.output_dir / "vectors.npy", everything.astype(np.float16))


if __name__ == "__main__":
    main()
