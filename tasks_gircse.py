"""Data files of a folder as mteb tasks: mteb computes every score but triplet accuracy, which it lacks.

    sts_X                                 {"sentence1", "sentence2", "score"}
    pairclass_X                           {"sentence1", "sentence2", "label"}, label 0 or 1
    classification_X_fit, .._X_test       {"text", "label"}; a classifier is fitted on 8 texts a label of `fit`
    clustering_X                          {"text", "label"}
    retrieval_X_queries, .._corpus        {"_id", "text"}; a document may have a "title"
    retrieval_X_qrels                     {"query-id", "corpus-id", "score"}
    instruct_X                            {"text", "labels": {facet: label, ..}}
    instruct_X_triplets                   {"anchor", "positive", "negative", "facet"}
    instruct_instructions                 {"dataset": X, "facet", "instruction"}

Files are JSONL, gzipped or not, and a task is called by its file, without `_test` for a classification. Each facet of
an `instruct_X` is a task of its own, with the facet's instruction: the same texts have to be grouped by one label set
under one instruction and by the other under the other, so only a model that heeds it scores well on both.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.task_metadata import TaskMetadata
from torch.utils.data import DataLoader

# Of the paper's instructions (Tables 11 and 12) the one for this data, where there is one; else in its manner. An entry
# under the task's name in the prompts of a model goes before these.
INSTRUCTIONS = {
    "classification_banking77": "Given an online banking query, find the corresponding intents.",
    "classification_goemotions": "Classify the emotion expressed in the given online comment.",
    "classification_hwu64_intent": "Given a user utterance as query, find the user intents.",
    "classification_sst2": "Classify the sentiment expressed in the given sentence from a movie review.",
    "classification_trec_question_type": "Classify what kind of answer the given question asks for.",
    "clustering_clinc150_test_domain": "Identify the domain of the given request to a voice assistant.",
    "clustering_stackoverflow_titles": "Identify the topic or theme of StackExchange posts based on the titles.",
    "pairclass_cad_nli_test": "Given a premise, retrieve a hypothesis that is entailed by the premise.",
    "retrieval_medquad": "Given a health question, retrieve a passage that answers it.",
    "retrieval_scitldr": "Given a one-sentence summary, retrieve the abstract it summarises.",
    "retrieval_xquad_en": "Given a question, retrieve Wikipedia passages that answer the question.",
    # data of other names
    "sts": "Retrieve semantically similar text.",
    "pairclass": "Retrieve semantically similar text.",
    "classification": "Classify the given text.",
    "clustering": "Identify the topic or theme of the given text.",
    "retrieval": "Given a question, retrieve passages that answer the question.",
}
FACETS = "instruct_instructions"


def read_rows(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a ValueError says which line has no JSON object with all of `fields`."""
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                lacking = [field for field in fields if field not in row]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path.name}, line {number}: {line.strip()!r:.80} is not a JSON object") from error
            if lacking:
                raise ValueError(f"{path.name}, line {number} lacks {', '.join(lacking)}")
            rows.append(row)
    return rows


def columns(rows: list[dict[str, Any]], **names: str) -> Dataset:
    """A data set whose column `new` holds the field `names[new]`."""
    return Dataset.from_dict({new: [row[field] for row in rows] for new, field in names.items()})


class LocalTask:
    """What local tasks share: their files, and loading by the layout's `read`. `make` gives a task its own class, as
    mteb has it."""

    kind: str
    main_score: str
    group: str
    symmetric = True
    metadata: TaskMetadata
    files: dict[str, Path]
    facet: str | None

    @classmethod
    def make(cls, name: str, files: dict[str, Path], instruction: str, facet: str | None = None) -> LocalTask:
        """A task; the hash of its files is the data set's revision.

        Args:
            name: the task's name in results.
            files: role to path; a path where no file is makes the task `unavailable`.
            instruction: of all texts; for retrieval, of the queries.
            facet: the label set, where there are several.
        """
        content = hashlib.sha256()
        for path in files.values():
            content.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
        metadata = TaskMetadata(
            name=name,
            description=f"{cls.kind}, from {', '.join(path.name for path in files.values())}",
            dataset={"path": f"local/{name}", "revision": content.hexdigest()[:12]},
            type=cls.kind,
            category="t2c" if cls.kind in ("Classification", "Clustering") else "t2t",
            eval_langs=["eng-Latn"],
            main_score=cls.main_score,
            prompt=instruction if cls.symmetric else {"query": instruction},
        )
        return type(cls.__name__, (cls,), {"metadata": metadata, "files": files, "facet": facet})()

    def unavailable(self) -> str | None:
        """Which files are missing, or None."""
        missing = [path.name for path in self.files.values() if not path.exists()]
        return f"there is no {' and no '.join(missing)}" if missing else None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset = self.read()
            self.data_loaded = True


class LocalSTS(LocalTask, AbsTaskSTS):
    kind, group, main_score = "STS", "STS", "cosine_spearman"

    def read(self) -> DatasetDict:
        rows = read_rows(self.files["data"], "sentence1", "sentence2", "score")
        return DatasetDict(test=columns(rows, sentence1="sentence1", sentence2="sentence2", score="score"))


class LocalPairClassification(LocalTask, AbsTaskPairClassification):
    kind, group, main_score = "PairClassification", "PairClassification", "max_ap"

    def read(self) -> DatasetDict:
        rows = read_rows(self.files["data"], "sentence1", "sentence2", "label")
        return DatasetDict(test=columns(rows, sentence1="sentence1", sentence2="sentence2", labels="label"))


class LocalClassification(LocalTask, AbsTaskClassification):
    kind, group, main_score = "Classification", "Classification", "accuracy"

    def read(self) -> DatasetDict:
        splits = {split: read_rows(self.files[split], "text", "label") for split in ("fit", "test")}
        # mteb's average precision of two classes wants numbers
        numbers = {label: i for i, label in enumerate(sorted({str(r["label"]) for s in splits.values() for r in s}))}
        for rows in splits.values():
            for row in rows:
                row["label"] = numbers[str(row["label"])]
        train, test = (columns(splits[split], text="text", label="label") for split in ("fit", "test"))
        return DatasetDict(train=train, test=test)


class LocalClustering(LocalTask, AbsTaskClustering):
    kind, group, main_score = "Clustering", "Clustering", "v_measure"
    max_fraction_of_documents_to_embed = None  # all
    max_documents_per_cluster = 4096

    def read(self) -> DatasetDict:
        return DatasetDict(
            test=columns(read_rows(self.files["data"], "text", "label"), sentences="text", labels="label")
        )


class LocalFacetClustering(LocalClustering):
    """Clustering by one of several label sets, under its instruction."""

    group = "Instruction following"

    def read(self) -> DatasetDict:
        rows = [row for row in read_rows(self.files["data"], "text", "labels") if self.facet in row["labels"]]
        labels = [row["labels"][self.facet] for row in rows]
        return DatasetDict(test=Dataset.from_dict({"sentences": [row["text"] for row in rows], "labels": labels}))


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    kind, group, main_score = "Retrieval", "Retrieval", "ndcg_at_10"
    symmetric = False

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        queries = read_rows(self.files["queries"], "_id", "text")
        corpus = [{"title": "", **row} for row in read_rows(self.files["corpus"], "_id", "text")]
        relevant: dict[str, dict[str, int]] = {}
        for row in read_rows(self.files["qrels"], "query-id", "corpus-id", "score"):
            relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
        split = {
            "queries": columns(queries, id="_id", text="text"),
            "corpus": columns(corpus, id="_id", title="title", text="text"),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        return {"default": {"test": split}}


class LocalTriplets(LocalTask, AbsTask):
    """Accuracy: how often an anchor is nearer to its positive than to its negative, under the facet's instruction
    (InBedder's IntentEmotion, as in section 4.1 of the paper). A tie is no success."""

    kind, group, main_score = "Reranking", "Instruction following", "accuracy"

    def read(self) -> DatasetDict:
        sides = ("anchor", "positive", "negative")
        rows = [row for row in read_rows(self.files["data"], *sides, "facet") if row["facet"] == self.facet]
        return DatasetDict(test=columns(rows, **{side: side for side in sides}))

    def _evaluate_subset(
        self,
        model: Any,
        data_split: Dataset,
        *,
        encode_kwargs: dict[str, Any],
        hf_split: str,
        hf_subset: str,
        **kwargs: Any,
    ) -> dict[str, float]:
        def embed(side: str) -> Any:
            texts = DataLoader(Dataset.from_dict({"text": data_split[side]}), batch_size=encode_kwargs["batch_size"])
            where = {"task_metadata": self.metadata, "hf_split": hf_split, "hf_subset": hf_subset}
            return model.encode(texts, **where, **encode_kwargs)

        anchors = embed("anchor")
        near, far = (np.asarray(model.similarity_pairwise(anchors, embed(side))) for side in ("positive", "negative"))
        return {"accuracy": float((near > far).mean())}

    def _calculate_descriptive_statistics_from_split(self, split: str, **kwargs: Any) -> dict[str, int]:
        return {"num_samples": len(self.dataset[split])}


def local_tasks(folder: str | Path) -> list[LocalTask]:
    """The tasks of all files of `folder`, by name; also those of which a file is missing.

    Raises:
        ValueError: if `folder` is no folder, or the instructions' file is broken.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"data={str(folder)!r} is no folder")
    paths = {}
    for path in sorted(Path(folder).iterdir()):
        if match := re.fullmatch(r"(.+)\.jsonl(\.gz)?", path.name):
            paths[match[1]] = path

    def files(**stems: str) -> dict[str, Path]:
        return {role: paths.get(stem, Path(folder, f"{stem}.jsonl.gz")) for role, stem in stems.items()}

    tasks = {}
    for stem in paths:
        layout = stem.partition("_")[0]
        if layout == "sts":
            task, name, needed = LocalSTS, stem, files(data=stem)
        elif layout == "pairclass":
            task, name, needed = LocalPairClassification, stem, files(data=stem)
        elif layout == "clustering":
            task, name, needed = LocalClustering, stem, files(data=stem)
        elif match := re.fullmatch(r"(classification_.+)_(fit|test)", stem):
            task, name = LocalClassification, match[1]
            needed = files(fit=f"{name}_fit", test=f"{name}_test")
        elif match := re.fullmatch(r"(retrieval_.+)_(queries|corpus|qrels)", stem):
            task, name = LocalRetrieval, match[1]
            needed = files(**{role: f"{name}_{role}" for role in ("queries", "corpus", "qrels")})
        else:
            continue
        if name not in tasks:
            tasks[name] = task.make(name, needed, INSTRUCTIONS.get(name, INSTRUCTIONS[layout]))

    facets = read_rows(paths[FACETS], "dataset", "facet", "instruction") if FACETS in paths else []
    for row in facets:
        for stem, task in ((row["dataset"], LocalFacetClustering), (f"{row['dataset']}_triplets", LocalTriplets)):
            if f"instruct_{stem}" in paths or task is LocalFacetClustering:
                name = f"instruct_{stem}-{row['facet']}"
                tasks[name] = task.make(name, files(data=f"instruct_{stem}"), row["instruction"], row["facet"])
    described = {row["dataset"] for row in facets}
    for stem in paths:
        dataset = stem.removeprefix("instruct_").removesuffix("_triplets")
        if stem.startswith("instruct_") and stem != FACETS and dataset not in described:
            raise ValueError(f"{paths[stem].name}: {FACETS} has no instruction for dataset {dataset!r}")
    return [tasks[name] for name in sorted(tasks)]
