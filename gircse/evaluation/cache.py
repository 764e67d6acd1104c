"""mteb's results on disk, with the prompts that they were measured with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mteb
from filelock import FileLock
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask

from .subjects import Subject, instruction_of


class Results(mteb.ResultCache):
    """mteb's cache in a folder, and beside it the prompts, which it doesn't keep: a result of others is no result."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.file = out / "prompts.json"

    def has(self, task: AbsTask, subject: Subject, k: int | None) -> bool:
        """Whether there is a result for this revision of the data and for these prompts; mteb alone takes any."""
        try:
            result = self.load_task_result(task.metadata.name, subject.meta_at(k))
        except ValueError:  # half a file, as a killed run leaves it
            return False
        if result is None or result.dataset_revision != task.metadata.revision or result.get_missing_evaluations(task):
            return False
        return self._kept().get(self._key(task, subject, k)) == prompts_of(task, subject)

    def add(self, task: AbsTask, subject: Subject, k: int | None) -> None:
        """Keeps the prompts of a result that has just been written."""
        with FileLock(self.file.with_name(".prompts.lock")):  # others may evaluate into the same folder
            prompts = self._kept() | {self._key(task, subject, k): prompts_of(task, subject)}
            half = self.file.with_suffix(".tmp")
            half.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(half, self.file)

    def _kept(self) -> dict[str, dict[str, str]]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    @staticmethod
    def _key(task: AbsTask, subject: Subject, k: int | None) -> str:
        meta = subject.meta_at(k)
        return f"{meta.name}@{meta.revision} {meta.experiment_name or ''} {task.metadata.name}"


def prompts_of(task: AbsTask, subject: Subject) -> dict[str, str]:
    """The literal prefixes of a task's sides, or of "both"; beside them the instructions that a model's loader or the
    writer of augmentations is given."""
    sides = ("query", "document") if isinstance(task, AbsTaskRetrieval) else (None,)
    found = {side or "both": subject.prompt(task.metadata, side) for side in sides}
    if subject.loaded:
        given = task.metadata.prompt or {}
        given = given if isinstance(given, dict) else {"both": given}
        found |= {f"{side}, instruction": text for side, text in given.items() if text}
    if subject.expand:
        found |= {f"{side or 'both'}, augmented for": instruction_of(task.metadata, side) for side in sides}
    return found
