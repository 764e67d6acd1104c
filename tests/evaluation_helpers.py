"""What the tests of the evaluation share: small data of every layout, a model, and a run of the command."""

from __future__ import annotations

import json
from pathlib import Path

from mteb.models import ModelMeta

import evaluate_gircse
from evaluate_gircse import main
from gircse.evaluation import subjects
from helpers import export_tiny, write_rows

PAIRS = [
    ("a boat on the lake", "a ship on the water", 4.0, 1),
    ("the oven is hot", "snow falls all night", 0.2, 0),
    ("she paints a fence", "a woman paints the fence", 4.8, 1),
    ("two cats sleep", "a dog barks at the moon", 1.0, 0),
    ("he lost his keys", "his keys are gone", 4.2, 1),
    ("the train was late", "bread needs yeast", 0.0, 0),
    ("tea without sugar", "coffee with milk", 2.4, 0),
]
ANIMALS = ["cat", "horse"]
PLACES = ["kitchen", "garden"]
SCENES = [
    {"text": f"the {animal} {verb} in the {place}", "labels": {"animal": animal, "place": place}}
    for animal in ANIMALS
    for place in PLACES
    for verb in ("sleeps", "eats", "waits")
]
TRIPLETS = [
    ("the cat eats in the garden", "a cat in a kitchen", "a horse in a garden", "animal"),
    ("the cat eats in the garden", "a horse in a garden", "a cat in a kitchen", "place"),
    ("the horse sleeps in the kitchen", "a horse in a garden", "a cat in a kitchen", "animal"),
]
DOCUMENTS = [f"document {i}: {text}" for i, text in enumerate(sum(([a, b] for a, b, *_ in PAIRS), []))]
RELEVANT = {"q0": {"d0": 2, "d1": 1}, "q1": {"d3": 1}, "q2": {"d4": 1, "d9": 1}}
QUERIES = {"q0": "where do boats float", "q1": "what falls in winter", "q2": "who paints"}
FACETS = {"animal": "Identify the animal.", "place": "Identify the place."}
SEARCH = "Given a web search query, retrieve relevant passages that answer the query."  # the models' prompt `query`
TASKS = {
    "classification_rooms": "accuracy",
    "clustering_rooms": "v_measure",
    "instruct_scenes-animal": "v_measure",
    "instruct_scenes-place": "v_measure",
    "instruct_scenes_triplets-animal": "accuracy",
    "instruct_scenes_triplets-place": "accuracy",
    "pairclass_pairs": "max_ap",
    "retrieval_little": "ndcg_at_10",
    "sts_pairs": "cosine_spearman",
}


def write_data(folder: Path) -> Path:
    folder.mkdir()
    rooms = [{"text": row["text"], "label": row["labels"]["place"]} for row in SCENES]
    files = {
        "sts_pairs": [{"sentence1": a, "sentence2": b, "score": score} for a, b, score, _ in PAIRS],
        "pairclass_pairs": [{"sentence1": a, "sentence2": b, "label": label} for a, b, _, label in PAIRS],
        "classification_rooms_fit": rooms[::2],
        "classification_rooms_test": rooms[1::2],
        "clustering_rooms": rooms,
        "retrieval_little_queries": [{"_id": i, "text": text} for i, text in QUERIES.items()],
        "retrieval_little_corpus": [
            {"_id": f"d{i}", "title": "Titled" if i % 3 == 0 else "", "text": text} for i, text in enumerate(DOCUMENTS)
        ],
        "retrieval_little_qrels": [
            {"query-id": q, "corpus-id": d, "score": s} for q, found in RELEVANT.items() for d, s in found.items()
        ],
        "instruct_scenes": SCENES,
        "instruct_scenes_triplets": [
            {"anchor": a, "positive": p, "negative": n, "facet": facet} for a, p, n, facet in TRIPLETS
        ],
        "instruct_instructions": [
            {"dataset": "scenes", "facet": facet, "instruction": text} for facet, text in FACETS.items()
        ],
    }
    for stem, rows in files.items():
        write_rows(folder / (f"{stem}.jsonl" if stem == "sts_pairs" else f"{stem}.jsonl.gz"), rows)
    return folder


def make_folder(gircse, folder: Path, seed: int = 2, suffix: str = "", **axes) -> Path:
    export_tiny(gircse, folder, seed=seed, axes=axes, suffix=suffix)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n")
    return folder


class Passes:
    """Counts the texts that a block's runs embed, task by task, and keeps the batches' lengths."""

    def __init__(self, monkeypatch) -> None:
        self.texts, self.batches, self.largest_k = 0, [], []
        loader = subjects.load_subject

        def load(args):
            subject = loader(args)
            embed = subject.embed

            def counted(texts, prompt, side, steps):
                self.texts += len(texts)
                self.batches.append([len(text) for text in texts])
                self.largest_k.append(steps[-1])
                return embed(texts, prompt, side, steps)

            subject.embed = counted
            return subject

        monkeypatch.setattr(evaluate_gircse, "load_subject", load)


def run(folder: Path, out: Path, *options: str, data: Path | None = None, tasks=("local",), status: int = 0) -> dict:
    argv = ["--model", str(folder), "--tasks", *tasks, "--output_dir", str(out), "--device", "cpu", *options]
    assert main([*argv, "--data", str(data)] if data else argv) == status
    return json.loads((out / "results.json").read_text(encoding="utf-8")) if (out / "results.json").exists() else {}


def scores(report: dict) -> dict[str, dict[str, float]]:
    return {row["task"]: row["scores"] for row in report["tasks"]}


def registered(out: Path) -> ModelMeta:
    names = {}
    exec((out / "model_meta.py").read_text(encoding="utf-8"), names)
    return names["model"]
