"""Where rows of pairs come from: files, folders, patterns and data sets of the Hub."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets

from ..loading import is_hub_id
from ..rows import ENDINGS, Row, RowFile, matching_files

# Words in the names of splits that are never trained on unless asked for: validation_matched, test_r1.
HELD_BACK = {"validation", "valid", "val", "dev", "test", "eval", "evaluation"}


def find_files(source: str) -> tuple[str, ...]:
    """The absolute paths that `source` stands for, sorted; () if it can only be a Hub id."""
    if not (Path(source).expanduser().exists() or re.search(r"[*?\[]", source)):
        if is_hub_id(source) and not source.endswith(ENDINGS):
            return ()
        raise FileNotFoundError(f"{source!r}: no such file or folder (working directory: {Path.cwd()})")
    files = sorted(str(file.absolute()) for file in matching_files(source) if file.name.endswith(ENDINGS))
    if not files:
        raise FileNotFoundError(
            f"{source!r}: no file here ends in {', '.join(ENDINGS)}; rename it, or for subfolders give a glob pattern"
        )
    return tuple(files)


def load_hub(name: str, config: str | None, split: str | None, limit: int | None) -> dict[str, datasets.Dataset]:
    """The rows by split; under "" if one split is all that is asked for."""
    try:
        config = config or datasets.get_dataset_default_config_name(name)
        if config is None:
            several = ", ".join(datasets.get_dataset_config_names(name))
            raise ValueError(f"{name!r} has several configurations: choose one by config (--data_config), of {several}")
        if split is not None:
            return {"": _load_split(name, config, split, limit)}
        splits = datasets.get_dataset_config_info(name, config).splits
        if "train" in splits:
            return {"": _load_split(name, config, "train", limit)}
        words = {s: set(re.split(r"[^a-z]+", s.lower())) for s in splits}
        some = [s for s in splits if not words[s] & HELD_BACK]
        some = [s for s in some if "train" in words[s]] or some
        # A split whose size the data set's card does not give counts as 1.
        sizes = {s: getattr(splits[s], "num_examples", 0) or 1 for s in some}
        if not sizes:
            raise ValueError(f"{name!r} has no split to train on, only {', '.join(splits)}; choose another data set")
        shares = {s: limit and math.ceil(limit * size / sum(sizes.values())) for s, size in sizes.items()}
        return {s: _load_split(name, config, s, share) for s, share in shares.items()}
    except (FileNotFoundError, ConnectionError) as error:
        place = f"no local file or folder (working directory: {Path.cwd()})"
        raise FileNotFoundError(f"{name!r} is {place}, and not to be had from the Hub: {error}") from error


def _load_split(name: str, config: str | None, split: str, limit: int | None) -> datasets.Dataset:
    if limit is None:
        return datasets.load_dataset(name, config, split=split)
    rows = datasets.load_dataset(name, config, split=split, streaming=True)
    return datasets.Dataset.from_list(list(rows.take(limit)))


def file_rows(paths: tuple[str, ...]) -> Iterator[tuple[str, str, Row]]:
    """Yields (file, default source, row). The source is the file's name; of files of one name in several folders, the
    path below the folder that holds all of them."""
    names = {path: Path(path.removesuffix(".gz")).with_suffix("") for path in paths}
    folders: dict[str, set[Path]] = {}
    for name in names.values():
        folders.setdefault(name.name, set()).add(name.parent)
    for path, name in names.items():
        alike = folders[name.name]
        below = os.path.commonpath(alike) if len(alike) > 1 else name.parent
        for row in RowFile(path).read():
            yield path, name.relative_to(below).as_posix(), row


def hub_rows(name: str, splits: Mapping[str, datasets.Dataset]) -> Iterator[tuple[str, str, Row]]:
    """Yields (data set and split, default source, row)."""
    for split, part in splits.items():
        place = f"{name}, {split}" if split else name
        for number, fields in enumerate(part, 1):
            yield place, split, Row(number, f"{place}: row {number}", fields)
