"""Search with different numbers of steps for queries and documents, and from coarse to fine.

    python recipes/paper/unequal_steps.py --model . --tasks local --data DATA/eval --max_length 256 \\
        --dtype bfloat16 --output results/unequal_steps.json

DATA is described in recipes/DATA.md; other arguments than `--output` and `--shortlist` are evaluate_gircse.py's, of
whose tasks only those of retrieval are used. For each: nDCG@10 of queries at k_q in an index of documents at k_d; and
of a search that takes `--shortlist` documents by the least k on both sides, then orders these by the largest on both.
Its cost is the share of the documents that any query ever asks the largest k of.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import mteb
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate_gircse
from gircse.command_line import check_writable
from gircse.evaluation import subjects
from gircse.evaluation.encoding import StepEncoder, Vectors
from gircse.evaluation.tasks import LocalRetrieval

STEPS = [1, 5, 20]


class UnequalEncoder(AbsEncoder):
    """The model with a k for queries and one for documents, as mteb calls it."""

    def __init__(self, vectors: Vectors, k_query: int, k_document: int) -> None:
        sides = ((PromptType.query, k_query), (PromptType.document, k_document))
        self.sides = {side: StepEncoder(vectors, k) for side, k in sides}
        self.mteb_model_meta = vectors.subject.meta

    def encode(self, inputs: Any, *, prompt_type: PromptType, **kwargs: Any) -> Any:
        return self.sides[prompt_type].encode(inputs, prompt_type=prompt_type, **kwargs)


def search(encoder: UnequalEncoder, task: LocalRetrieval, folder: str | None = None) -> dict[str, float]:
    """mteb's scores; with a folder, the best documents of each query are written there."""
    options = {"cache": None, "prediction_folder": folder, "co2_tracker": False, "show_progress_bar": False}
    return mteb.evaluate(encoder, task, **options).task_results[0].scores["test"][0]


def measure(task: LocalRetrieval, subject: subjects.Subject, shortlist: int, batch_size: int) -> dict[str, Any]:
    task.load_data()
    with Vectors(subject, STEPS, batch_size) as vectors, tempfile.TemporaryDirectory() as folder:
        # The least k's search leaves its lists in the folder, for the shortlist.
        grid = {
            f"{k_query} in {k_document}": search(
                UnequalEncoder(vectors, k_query, k_document),
                task,
                folder if k_query == k_document == STEPS[0] else None,
            )
            for k_query in STEPS
            for k_document in STEPS
        }
        task.convert_to_reranking(folder, top_k=shortlist)
        split = task.dataset["default"]["test"]
        lists = split["top_ranked"]
        found = [
            document in lists[query]
            for query, relevant in split["relevant_docs"].items()
            for document, relevance in relevant.items()
            if relevance > 0
        ]
        fine = search(UnequalEncoder(vectors, STEPS[-1], STEPS[-1]), task)
    documents = len(split["corpus"])
    return {
        "queries": len(split["queries"]),
        "documents": documents,
        "ndcg_at_10": {name: round(100 * scores["ndcg_at_10"], 2) for name, scores in grid.items()},
        "coarse_to_fine": {
            "ndcg_at_10": round(100 * fine["ndcg_at_10"], 2),
            "relevant_in_shortlist": round(100 * sum(found) / len(found), 2),
            "documents_rescored": round(100 * len(set().union(*lists.values())) / documents, 2),
            "documents_rescored_a_query": round(100 * shortlist / documents, 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", required=True)
    parser.add_argument("--shortlist", type=int, default=20)
    args, rest = parser.parse_known_args()
    settings = evaluate_gircse.parse(["--k", *map(str, STEPS), *rest])
    check_writable(Path(args.output).parent)
    subject = subjects.load_subject(settings)
    tasks = evaluate_gircse.choose_tasks(settings.tasks, settings.data, settings.sample)
    tasks = [task for task in tasks if isinstance(task, LocalRetrieval)]
    if not tasks:
        raise ValueError(f"tasks={settings.tasks} are no searches of --data: name one, such as retrieval_xquad_en")
    content = {"command": shlex.join(["python", *sys.argv]), "shortlist": args.shortlist}
    content["tasks"] = {t.metadata.name: measure(t, subject, args.shortlist, settings.batch_size) for t in tasks}
    Path(args.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
