"""Search with the K generated states as K vectors of a text, against search with their mean.

    python recipes/paper/several_vectors.py --model . --tasks local --data DATA/eval --max_length 256 \\
        --dtype bfloat16 --output results/several_vectors.json

DATA is described in recipes/DATA.md; all arguments but `--output` are evaluate_gircse.py's, of which only the retrieval
tasks are used. Several vectors of a text are compared by MaxSim, as Sentence Transformers' MultiVectorEncoder does: for
each of the query's, the largest cosine with one of the document's, and the sum of these. nDCG@10 at each k.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import mteb
import torch
from mteb.models import MultiVectorWrapper
from sentence_transformers import MultiVectorEncoder
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate_gircse
from gircse.command_line import check_writable
from gircse.evaluation.subjects import Subject, load_subject
from gircse.evaluation.tasks import LocalRetrieval
from gircse.loading import load
from sentence_gircse import SentenceGircse

STEPS = [1, 5, 20]


class GeneratedStates(SentenceGircse):
    """g_1..g_K of each text, under the names that MultiVectorEncoder reads."""

    def forward(self, features: dict[str, Tensor], k: int | None = None, **kwargs: Any) -> dict[str, Tensor]:
        states = self.model(features["input_ids"], features["attention_mask"], k=k).step_states  # (B, K, d)
        return {"token_embeddings": states.float(), "attention_mask": torch.ones_like(states[..., 0])}


class SeveralVectors(MultiVectorWrapper):
    """The model as mteb searches with it: g_1..g_k, or their mean alone. Texts are embedded once for all k."""

    def __init__(self, encoder: MultiVectorEncoder, subject: Subject, batch_size: int) -> None:
        super().__init__(encoder)
        self.subject, self.batch_size = subject, batch_size
        self.states: dict[tuple[str, str], Tensor] = {}
        self.k, self.mean = 1, False

    def _encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any, **kwargs: Any) -> list[Tensor]:
        prompt = self.subject.prompt(task_metadata, prompt_type.value)
        texts = [text for batch in inputs for text in batch["text"]]
        new = list(dict.fromkeys(text for text in texts if (text, prompt) not in self.states))
        settings = {"batch_size": self.batch_size, "normalize_embeddings": False, "k": max(STEPS)}
        found = self.model.encode(new, prompt=prompt, show_progress_bar=False, **settings)
        self.states |= {(text, prompt): states.half() for text, states in zip(new, found, strict=True)}
        kept = [self.states[text, prompt][: self.k].float() for text in texts]
        return [normalize(states.mean(0, keepdim=True) if self.mean else states, dim=-1) for states in kept]


def measure(task: LocalRetrieval, encoder: SeveralVectors) -> dict[str, dict[str, float]]:
    """nDCG@10 x 100 by way and k."""
    found: dict[str, dict[str, float]] = {"mean": {}, "maxsim": {}}
    for encoder.mean in (True, False):
        for encoder.k in STEPS:
            done = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
            score = done.task_results[0].scores["test"][0]["ndcg_at_10"]
            found["mean" if encoder.mean else "maxsim"][str(encoder.k)] = round(100 * score, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True)
    args, rest = parser.parse_known_args()
    settings = evaluate_gircse.parse(["--k", *map(str, STEPS), *rest])
    if settings.expand_with:
        parser.error("--expand_with: texts are embedded alone here")
    check_writable(Path(args.output).parent)
    model, processor = load(settings.model, dtype=settings.dtype)
    subject = load_subject(settings)
    processor.max_length = int(subject.meta.max_tokens)  # with room for the most steps
    encoder = MultiVectorEncoder(modules=[GeneratedStates(model.eval(), processor)], device=settings.device)
    vectors = SeveralVectors(encoder, subject, settings.batch_size)
    tasks = evaluate_gircse.choose_tasks(settings.tasks, settings.data, settings.sample)
    tasks = [task for task in tasks if isinstance(task, LocalRetrieval)]
    if not tasks:
        raise ValueError(f"tasks={settings.tasks} are no searches of --data: name one, such as retrieval_xquad_en")
    content = {"command": shlex.join(["python", *sys.argv])}
    content["ndcg_at_10"] = {task.metadata.name: measure(task, vectors) for task in tasks}
    Path(args.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
