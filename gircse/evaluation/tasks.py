"""Data files of a folder as mteb tasks: mteb computes every score but triplet accuracy, which it lacks.

    sts_X                                 {"sentence1", "sentence2", "score"}
    pairclass_X                           {"sentence1", "sentence2", "label"}, label 0 or 1
    classification_X_fit, .._X_test       {"text", "label"}; a classifier is fitted on 8 texts a label of `fit`
    clustering_X                          {"text", "label"}
    retrieval_X_queries, .._corpus        {"_id", "text"}; a document may have a "title"
    retrieval_X_qrels                     {"query-id", "corpus-id", "score"}, score a whole number, from 1 on relevant
    instruct_X                            {"text", "labels": {facet: label, ..}}
    instruct_X_triplets                   {"anchor", "positive", "negative", "facet"}
    instruct_instructions                 {"dataset": X, "facet", "instruction"}

Files end in whatever `gircse.rows` reads, such as the .jsonl and .tsv of BEIR; a task is called by its file, without
`_test` for a classification. All values of a task are checked before its texts are embedded, since a wrong one would
not fail but give a wrong score. Labels and ids are text, whole numbers or booleans, and 1 is the same as "1". Queries
without a relevant document are left out, as all rankings are equally good for them; how many is said.

Each facet of an `instruct_X` is a task of its own, with the facet's instruction: the same texts have to be grouped by
one label set under one instruction and by the other under the other, so only a model that heeds it scores well on both.
A text need not have all facets.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets
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

from ..rows import ENDINGS
from .fields import (
    Check,
    binary,
    columns,
    drawn_rows,
    facet_labels,
    grade,
    located_rows,
    must_differ,
    name,
    name_in_files,
    number,
    read_rows,
    text,
    text_or_empty,
)

# The paper's instruction (Tables 11 and 12) for the data, or one in its manner where the paper has none. A prompt of
# the model under the task's name is taken before these.
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
    # by kind of task, for data of other names; queries of a search get the model's own prompt `query`
    "sts": "Retrieve semantically similar text.",
    "pairclass": "Retrieve semantically similar text.",
    "classification": "Classify the given text.",
    "clustering": "Identify the topic or theme of the given text.",
}
FACETS = "instruct_instructions"
LOCAL = "local/"  # where other tasks have the Hub id of their data set


class LocalTask:
    """What local tasks share: their files, and loading by the layout's `read`. `make` gives each task a
    class of its own, as mteb's tasks have."""

    kind: str
    main_score: str
    group: str
    symmetric = True
    varies: str | None = None  # the column without whose differences there is nothing to score
    metadata: TaskMetadata
    files: dict[str, Path]
    facet: str | None
    facets: Collection[str]
    sample: int | None

    @classmethod
    def make(
        cls,
        name: str,
        files: dict[str, Path],
        instruction: str | None,
        facet: str | None = None,
        facets: Collection[str] = (),
        sample: int | None = None,
    ) -> LocalTask:
        """A task; the hash of its files is the data set's revision, with the sample's size behind it.

        Args:
            name: the task's name in results.
            files: role to path; a path where no file is makes the task `unavailable`.
            instruction: of all texts; for retrieval, of the queries, None for the model's own.
            facet: the label set, where there are several.
            facets: all that have an instruction.
            sample: so many of its rows, drawn with a fixed seed, instead of all.
        """
        content = hashlib.sha256()
        for path in files.values():
            content.update(_hash_of(path))
        revision = content.hexdigest()[:12] + (f"-sample{sample}" if sample else "")
        metadata = TaskMetadata(
            name=name,
            description=f"{cls.kind}, from {', '.join(path.name for path in files.values())}",
            dataset={"path": f"{LOCAL}{name}", "revision": revision},
            type=cls.kind,
            category="t2c" if cls.kind in ("Classification", "Clustering") else "t2t",
            eval_langs=["eng-Latn"],
            main_score=cls.main_score,
            prompt=instruction if cls.symmetric or not instruction else {"query": instruction},
        )
        own = {"metadata": metadata, "files": files, "facet": facet, "facets": facets, "sample": sample}
        return type(cls.__name__, (cls,), own)()

    def unavailable(self) -> str | None:
        """Which files are missing, or None."""
        missing = [path.name for path in self.files.values() if not path.exists()]
        endings = " ".join(ending for ending in ENDINGS if not ending.endswith(".gz"))
        return f"there is no {' and no '.join(missing)} that ends in one of {endings}" if missing else None

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            dataset = self.read()
            self.dataset = dataset if self.sample is None else self.drawn(dataset, self.sample)
            if self.sample is not None and self.varies:
                values = self.dataset["test"][self.varies]
                must_differ(f"a sample of {self.sample} rows (take more)", self.varies, values)
            self.data_loaded = True

    def say_left_out(self, facets: Iterable[str]) -> None:
        """Prints which facets of a file have no instruction, as misspelt ones; their labels are in no task."""
        if lost := Counter(facet for facet in facets if facet not in self.facets):
            shown = ", ".join(f"{ascii(facet)} ({count})" for facet, count in lost.most_common(3))
            print(f"  {self.files['data'].name}: {len(lost)} facets are not in {FACETS} and are left out: {shown}")

    def drawn(self, dataset: Any, count: int) -> Any:
        """Up to `count` rows of each split."""
        return DatasetDict({split: drawn_rows(rows, count) for split, rows in dataset.items()})


class LocalSTS(LocalTask, AbsTaskSTS):
    kind, group, main_score = "STS", "STS", "cosine_spearman"
    varies = "score"

    def read(self) -> DatasetDict:
        rows = read_rows(self.files["data"], sentence1=text, sentence2=text, score=number)
        must_differ(self.files["data"], "score", [row["score"] for row in rows])
        return DatasetDict(test=columns(rows, sentence1="sentence1", sentence2="sentence2", score="score"))


class LocalPairClassification(LocalTask, AbsTaskPairClassification):
    kind, group, main_score = "PairClassification", "PairClassification", "max_ap"
    varies = "labels"

    def read(self) -> DatasetDict:
        rows = read_rows(self.files["data"], sentence1=text, sentence2=text, label=binary)
        must_differ(self.files["data"], "label", [row["label"] for row in rows])
        return DatasetDict(test=columns(rows, sentence1="sentence1", sentence2="sentence2", labels="label"))


class LocalClassification(LocalTask, AbsTaskClassification):
    kind, group, main_score = "Classification", "Classification", "accuracy"

    def read(self) -> DatasetDict:
        fit = read_rows(self.files["fit"], text=text, label=name)
        must_differ(self.files["fit"], "label", [row["label"] for row in fit])
        # Labels become numbers, as mteb's average precision of two classes needs them.
        numbers = {label: i for i, label in enumerate(sorted({row["label"] for row in fit}))}
        test = []
        for where, row in located_rows(self.files["test"], {"text": text, "label": name}):
            if row["label"] not in numbers:
                raise ValueError(
                    f"{where}: label={row['label']!r:.80} is on no text of {self.files['fit'].name}, so no classifier "
                    "can learn it: add some there or remove the row"
                )
            test.append(row)
        for row in (*fit, *test):
            row["label"] = numbers[row["label"]]
        train, test = (columns(rows, text="text", label="label") for rows in (fit, test))
        return DatasetDict(train=train, test=test)

    def drawn(self, dataset: DatasetDict, count: int) -> DatasetDict:
        """Up to `count` texts to test on, and to fit on as many of each label as mteb's classifier takes: from fewer it
        learns hardly anything."""
        order = dataset["train"].shuffle(seed=0)
        seen: Counter[int] = Counter()
        kept = [
            i
            for i, label in enumerate(order["label"])
            if not seen.update([label]) and seen[label] <= self.samples_per_label
        ]
        return DatasetDict(train=order.select(kept), test=drawn_rows(dataset["test"], count))


class LocalClustering(LocalTask, AbsTaskClustering):
    kind, group, main_score = "Clustering", "Clustering", "v_measure"
    varies = "labels"
    max_fraction_of_documents_to_embed = None  # all
    max_documents_per_cluster = 4096

    def read(self) -> DatasetDict:
        rows = read_rows(self.files["data"], text=text, label=name)
        must_differ(self.files["data"], "label", [row["label"] for row in rows])
        return DatasetDict(test=columns(rows, sentences="text", labels="label"))


class LocalFacetClustering(LocalClustering):
    """Clustering by one of several label sets, under its instruction."""

    group = "Instruction following"

    def read(self) -> DatasetDict:
        found = read_rows(self.files["data"], text=text, labels=facet_labels)
        self.say_left_out(facet for row in found for facet in row["labels"])
        rows = [{**row, "label": row["labels"][self.facet]} for row in found if self.facet in row["labels"]]
        if not rows:
            raise ValueError(f"{self.files['data']}: no row has a label of facet {self.facet!r}, which {FACETS} names")
        must_differ(self.files["data"], f"label of facet {self.facet!r}", [row["label"] for row in rows])
        return DatasetDict(test=columns(rows, sentences="text", labels="label"))


class LocalRetrieval(LocalTask, AbsTaskRetrieval):
    kind, group, main_score = "Retrieval", "Retrieval", "ndcg_at_10"
    symmetric = False

    def read(self) -> dict[str, dict[str, dict[str, Any]]]:
        queries = self._read_by_id("queries", text=text)
        corpus = self._read_by_id("corpus", text=text_or_empty, title=text_or_empty)
        relevant = self._read_judgements(queries, corpus)
        split = {
            "queries": columns([queries[query] for query in relevant], id="_id", text="text"),
            "corpus": columns([*corpus.values()], id="_id", title="title", text="text"),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        return {"default": {"test": split}}

    def drawn(self, dataset: dict[str, Any], count: int) -> dict[str, Any]:
        """Up to `count` queries, the documents that are judged for them, and as many others."""
        split = dict(dataset["default"]["test"])
        split["queries"] = drawn_rows(split["queries"], count)
        split["relevant_docs"] = {query: split["relevant_docs"][query] for query in split["queries"]["id"]}
        judged = {document for grades in split["relevant_docs"].values() for document in grades}
        is_judged = [document in judged for document in split["corpus"]["id"]]
        own, others = ([i for i, flag in enumerate(is_judged) if flag is side] for side in (True, False))
        others = drawn_rows(split["corpus"].select(others), count)
        split["corpus"] = concatenate_datasets([split["corpus"].select(own), others])
        return {"default": {"test": split}}

    def _read_by_id(self, role: str, **checks: Check) -> dict[str, dict[str, str]]:
        rows: dict[str, dict[str, str]] = {}
        for where, row in located_rows(self.files[role], {"_id": name, **checks}, optional=["title"]):
            if row["_id"] in rows:
                raise ValueError(f"{where}: _id={row['_id']!r:.80} has been given before: each row needs its own")
            if not row["text"] and not row["title"]:  # BEIR has documents that are a title alone
                raise ValueError(f"{where}: text and title are empty: write one or remove the row")
            rows[row["_id"]] = row
        return rows

    def _read_judgements(
        self, queries: dict[str, dict[str, str]], corpus: dict[str, dict[str, str]]
    ) -> dict[str, dict[str, int]]:
        """Grade by query and document, of the queries that have a relevant one, in the order of `queries`."""
        judged: dict[str, dict[str, int]] = {query: {} for query in queries}
        sides = {"query-id": ("queries", queries), "corpus-id": ("corpus", corpus)}
        checks = {"query-id": name, "corpus-id": name, "score": grade}
        for where, row in located_rows(self.files["qrels"], checks):
            for field, (role, known) in sides.items():
                if row[field] not in known:
                    raise ValueError(
                        f"{where}: {field}={row[field]!r:.80} is no _id of {self.files[role].name}: "
                        "add it there or remove the judgement"
                    )
            grades = judged[row["query-id"]]
            if row["corpus-id"] in grades:
                raise ValueError(
                    f"{where}: query-id={row['query-id']!r:.80}, corpus-id={row['corpus-id']!r:.80} has been judged "
                    f"before, with score={grades[row['corpus-id']]}: keep one of the two"
                )
            grades[row["corpus-id"]] = row["score"]
        relevant = {query: grades for query, grades in judged.items() if max(grades.values(), default=0) > 0}
        if not relevant:
            raise ValueError(f"{self.files['qrels']}: no score is 1 or more, so that no document is relevant")
        if left_out := [query for query in queries if query not in relevant]:
            shown = f"{', '.join(map(ascii, left_out[:3]))}{', ..' if len(left_out) > 3 else ''}"
            print(f"  {len(left_out)} of {len(queries)} queries have no relevant document and are left out: {shown}")
        return relevant


class LocalTriplets(LocalTask, AbsTask):
    """Accuracy: how often an anchor is nearer to its positive than to its negative, under the facet's instruction
    (InBedder's IntentEmotion, as in section 4.1 of the paper). A tie is no success."""

    kind, group, main_score = "Reranking", "Instruction following", "accuracy"

    def read(self) -> DatasetDict:
        sides = ("anchor", "positive", "negative")
        found = read_rows(self.files["data"], **dict.fromkeys(sides, text), facet=text)
        self.say_left_out(row["facet"] for row in found)
        rows = [row for row in found if row["facet"] == self.facet]
        if not rows:
            raise ValueError(f"{self.files['data']}: no row is of facet {self.facet!r}, which {FACETS} names")
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


def local_tasks(folder: str | Path, sample: int | None = None) -> list[LocalTask]:
    """The tasks of all files of `folder`, by name; also those of which a file is missing. With `sample`, of so many
    rows each: of a search, queries with their judged documents and as many other ones.

    Raises:
        ValueError: if `folder` is no folder or has two files for one part of a task, or the instructions' file is
            broken.
    """
    paths = data_files(folder)

    def files(**stems: str) -> dict[str, Path]:
        return {role: paths.get(stem, Path(folder, stem)) for role, stem in stems.items()}

    tasks = {}
    for stem in paths:
        layout = stem.partition("_")[0]
        if layout == "sts":
            task, title, needed = LocalSTS, stem, files(data=stem)
        elif layout == "pairclass":
            task, title, needed = LocalPairClassification, stem, files(data=stem)
        elif layout == "clustering":
            task, title, needed = LocalClustering, stem, files(data=stem)
        elif match := re.fullmatch(r"(classification_.+)_(fit|test)", stem):
            task, title = LocalClassification, match[1]
            needed = files(fit=f"{title}_fit", test=f"{title}_test")
        elif match := re.fullmatch(r"(retrieval_.+)_(queries|corpus|qrels)", stem):
            task, title = LocalRetrieval, match[1]
            needed = files(**{role: f"{title}_{role}" for role in ("queries", "corpus", "qrels")})
        else:
            continue
        if title not in tasks:
            tasks[title] = task.make(title, needed, INSTRUCTIONS.get(title, INSTRUCTIONS.get(layout)), sample=sample)

    described = read_instructions(paths[FACETS]) if FACETS in paths else {}
    for (dataset, facet), instruction in described.items():
        facets = {known for of, known in described if of == dataset}
        for stem, task in ((dataset, LocalFacetClustering), (f"{dataset}_triplets", LocalTriplets)):
            if f"instruct_{stem}" in paths or task is LocalFacetClustering:
                title = f"instruct_{stem}-{facet}"
                tasks[title] = task.make(title, files(data=f"instruct_{stem}"), instruction, facet, facets, sample)
    for stem in paths:
        dataset = stem.removeprefix("instruct_").removesuffix("_triplets")
        if stem.startswith("instruct_") and stem != FACETS and dataset not in {known for known, _ in described}:
            raise ValueError(f"{paths[stem].name}: {FACETS} has no instruction for dataset {dataset!r}")
    return [tasks[title] for title in sorted(tasks)]


def unread_files(folder: str | Path, tasks: Iterable[LocalTask]) -> list[str]:
    """Names of the data files of `folder` that none of its tasks reads, as their names fit no layout."""
    read = {path.name for task in tasks for path in task.files.values()}
    names = (path.name for path in Path(folder).iterdir() if path.name.endswith(ENDINGS))
    return sorted(name for name in names if name not in read and not name.startswith(FACETS))


def data_files(folder: str | Path) -> dict[str, Path]:
    """The files of the layouts above, by their names without ending."""
    if not Path(folder).is_dir():
        raise ValueError(f"data={str(folder)!r} is no folder")
    paths: dict[str, Path] = {}
    layouts = "sts|pairclass|classification|clustering|retrieval|instruct"
    pattern = re.compile(rf"((?:{layouts})_.+?)(?:{'|'.join(map(re.escape, ENDINGS))})")
    for path in sorted(Path(folder).iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or not path.is_file():
            continue
        if match[1] in paths:
            both = f"{paths[match[1]].name} and {path.name}"
            raise ValueError(f"data={str(folder)!r} has both {both}: remove or rename one of them")
        paths[match[1]] = path
    return paths


def read_instructions(path: Path) -> dict[tuple[str, str], str]:
    """Instruction by data set and facet."""
    instructions: dict[tuple[str, str], str] = {}
    checks = {"dataset": text, "facet": name_in_files, "instruction": text}
    for where, row in located_rows(path, checks):
        key = row["dataset"], row["facet"]
        if key in instructions:
            raise ValueError(f"{where}: dataset={key[0]!r} has an instruction for facet={key[1]!r} before: keep one")
        instructions[key] = row["instruction"]
    return instructions


def _hash_of(path: Path) -> bytes:
    """SHA-256 of a file's content; of nothing, if there is no such file."""
    if not path.exists():
        return hashlib.sha256().digest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
