"""Search with different numbers of steps for queries and documents, and from coarse to fine.

    python recipes/unequal_steps.py --model . --data DATA/eval --output results/unequal_steps.json

For every retrieval task of the folder (tasks_gircse.py): nDCG@10 of queries at k_q in an index of documents at k_d; and
of a search that takes `--shortlist` documents by k = 1 on both sides, then orders these by k = 20 on both sides. Its
cost is the share of the documents that anyone ever asks k = 20 of.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytrec_eval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate_gircse
from tasks_gircse import LocalRetrieval, local_tasks

STEPS = [1, 3, 5, 10, 20]
METRIC = "ndcg_cut_10"


def embed(subject: evaluate_gircse.Subject, texts: list[str], prompt: str, side: str) -> np.ndarray:
    """(n, len(STEPS), d); texts of like length go together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = [
        subject.embed([texts[i] for i in order[start : start + 32]], prompt, side, STEPS)
        for start in range(0, len(order), 32)
    ]
    return np.concatenate(parts)[np.argsort(order)]


def ndcg(relevant: dict[str, dict[str, int]], queries: list[str], documents: list[str], scores: np.ndarray) -> float:
    """Mean nDCG@10 x 100; scores (queries, documents), -inf for what is not found."""
    run = {}
    for query, row in zip(queries, scores, strict=True):
        best = np.argsort(-row)[:100]
        run[query] = {documents[i]: float(row[i]) for i in best if np.isfinite(row[i])}
    found = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10"}).evaluate(run)
    return round(100 * float(np.mean([row[METRIC] for row in found.values()])), 2)


def measure(task: LocalRetrieval, subject: evaluate_gircse.Subject, shortlist: int) -> dict:
    task.load_data()
    split = task.dataset["default"]["test"]
    relevant, queries, documents = split["relevant_docs"], split["queries"]["id"], split["corpus"]["id"]
    texts = [f"{row['title']} {row['text']}".strip() for row in split["corpus"]]
    z_q = embed(subject, list(split["queries"]["text"]), subject.prompt(task.metadata, "query"), "query")
    z_d = embed(subject, texts, subject.prompt(task.metadata, "document"), "document")
    cosines = np.einsum("qid,njd->ijqn", z_q, z_d)  # (k of queries, k of documents, queries, documents)

    coarse, fine = cosines[0, 0], cosines[-1, -1]
    threshold = np.sort(coarse, axis=1)[:, -min(shortlist, coarse.shape[1])][:, None]
    listed = coarse >= threshold
    columns = {document: i for i, document in enumerate(documents)}
    hits = [listed[i, columns[d]] for i, query in enumerate(queries) for d in relevant.get(query, {})]
    return {
        "queries": len(queries),
        "documents": len(documents),
        "ndcg_at_10": {
            f"{k_q} in {k_d}": ndcg(relevant, queries, documents, cosines[i, j])
            for i, k_q in enumerate(STEPS)
            for j, k_d in enumerate(STEPS)
        },
        "coarse_to_fine": {
            "ndcg_at_10": ndcg(relevant, queries, documents, np.where(listed, fine, -np.inf)),
            "recall_of_shortlist": round(100 * float(np.mean(hits)), 2),
            "documents_rescored": round(100 * float(listed.any(0).mean()), 2),
            "documents_rescored_a_query": round(100 * float(listed.mean()), 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--shortlist", type=int, default=20)
    args = parser.parse_args()
    argv = ["--model", args.model, "--tasks", "local", "--data", args.data, "--k", *map(str, STEPS)]
    subject = evaluate_gircse.load_subject(evaluate_gircse.parse(argv))
    tasks = [task for task in local_tasks(args.data) if isinstance(task, LocalRetrieval)]
    content = {"command": shlex.join(["python", *sys.argv]), "shortlist": args.shortlist}
    content["tasks"] = {task.metadata.name: measure(task, subject, args.shortlist) for task in tasks}
    Path(args.output).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
