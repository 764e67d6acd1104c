"""Evaluate a model with mteb, at every k from one encoding pass; writes a table, a picture and the card's metadata.

    python evaluate_gircse.py --tasks local --data DIR                          # the root model on files (tasks_gircse)
    python evaluate_gircse.py --model ID --tasks mteb nanobeir followir --output_dir results/ID
    python evaluate_gircse.py --model intfloat/e5-base-v2 --tasks STS12 SciFact

`mteb` stands for MTEB(eng, v2), `nanobeir` and `followir` for these two benchmarks; any other name is a task of mteb or
of the folder. A model is a GIRCSE folder or Hub id, the baselines with `step_token="none"` included, or anything that
Sentence Transformers loads. Only a GIRCSE model with steps has several k, z_1..z_K of one pass (Eq. 4).

Texts go under the prompts of the model's `config_sentence_transformers.json`, by mteb's name of the task: the paper's
instructions. A task without one there takes that of the task it was adapted from, then mteb's own, then its type's;
documents of a search are embedded bare. A model of others that has no prompts gets those of mteb's registry. A run that
is started again with the same output_dir does what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb
import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, constants
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.abstask import AbsTask, get_abstask_prompt
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder, get_prompt
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import PretrainedConfig
from transformers.utils import cached_file

from report_gircse import CODE_OF_ITS_OWN, markdown, write_report
from tasks_gircse import local_tasks
from train_gircse import (
    ROOT,
    ModelArguments,
    commit_of,
    lenient_console,
    load_model,
    sentence_transformers_settings,
    unescape,
)

BENCHMARKS = {"mteb": "MTEB(eng, v2)", "nanobeir": "NanoBEIR", "followir": "FollowIR"}
STEPS = (1, 3, 5, 10, 15, 20)
SECONDS_BETWEEN_LINES = 60  # of progress, in a log
# What the paper's Table 9 reports of FollowIR, on the queries with their original instructions; mteb's score is p-MRR.
TABLE_9 = {
    "Robust04InstructionRetrieval": "map_at_1000",
    "News21InstructionRetrieval": "ndcg_at_5",
    "Core17InstructionRetrieval": "map_at_1000",
}


@dataclass
class Subject:
    """The model that is evaluated.

    Args:
        meta: what mteb knows of it; name and revision tell it from every other model and every other state of it.
        settings: what else changes its embeddings or scores, beside k.
        steps: the values of k, or `[None]` for a model without steps.
        embed: (texts, prompt, side, steps) to (B, len(steps), d) float32; side is "query", "document" or None.
        prompts: literal prefixes by mteb's names.
        template: makes a prompt of an instruction; None if only `prompts` are used, by mteb's rule.
        shown: the k of the model card.
    """

    meta: ModelMeta
    settings: dict[str, Any]
    steps: list[int | None]
    embed: Callable[[list[str], str, str | None, list[int | None]], np.ndarray]
    prompts: dict[str, str]
    template: str | None
    shown: int | None

    def meta_at(self, k: int | None) -> ModelMeta:
        """The metadata under which results of k are filed: mteb's cache goes by name, revision and these settings."""
        settings = self.settings if k is None else {"k": k, **self.settings}
        return self.meta.model_copy(update={"experiment_kwargs": settings or None})

    def prompt(self, metadata: Any, side: str | None) -> str:
        """The literal prefix of one side of a task; `side` is None for tasks whose texts are all alike."""
        if self.template is None:
            prompt_type = PromptType(side) if side else None
            return get_prompt(self.prompts, metadata, prompt_type) or ""
        for name in (metadata.name, *(metadata.adapted_from or ())):
            for key in (f"{name}-{side}", name):
                if key in self.prompts:
                    return self.prompts[key]
        instruction = metadata.prompt
        if isinstance(instruction, dict):
            instruction = instruction.get(side or "query")
        elif side == "document" and metadata.type != "Reranking":  # reranking compares texts of one kind
            instruction = None
        if not instruction and side is not None:
            return self.prompts.get(side, "")
        if not instruction and metadata.type in self.prompts:
            return self.prompts[metadata.type]
        return self.template.replace("{instruction}", instruction or get_abstask_prompt(metadata.name))


def say(line: str) -> None:
    print(line, flush=True)  # a log would else get it hours later


def load_subject(args: argparse.Namespace) -> Subject:
    """Loads the model that the arguments name.

    Raises:
        ValueError: for a k that the model doesn't have.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    subject = (gircse_subject if is_gircse(args.model) else sentence_transformers_subject)(args, device)
    # What is at its default leaves no trace, so that defaults can be written out without an evaluation of its own.
    options = {"dtype": "float32", "max_length": None, "prompt_template": None, "sample": None}
    subject.settings |= {
        name: getattr(args, name) for name, default in options.items() if getattr(args, name) != default
    }
    return subject


def is_gircse(path: str) -> bool:
    try:
        return PretrainedConfig.get_config_dict(path)[0].get("model_type") == "gircse"
    except OSError:  # modules of Sentence Transformers may lie in subfolders
        return False


def gircse_subject(args: argparse.Namespace, device: str) -> Subject:
    model, processor = load_model(ModelArguments(model_name_or_path=args.model, dtype=args.dtype))  # this repo's code
    model.eval().to(device)
    if args.max_length:
        processor.max_length = args.max_length
    config = model.config
    if config.step_token == "none":
        steps = [None]
    else:
        most = config.num_steps if config.step_token == "learned" else max(args.k or STEPS)
        steps = sorted({k for k in args.k or STEPS if args.k or k <= most})
        if steps[0] < 1 or steps[-1] > most:
            raise ValueError(f"k={steps} must be from 1 to {most} for this model")
    room = model.max_input_length(steps[-1])
    if room is not None and room < 1:
        raise ValueError(f"k={steps[-1]} takes all positions of the backbone: choose k below {room + steps[-1]}")
    if room is not None and room < processor.max_length:
        # A setting, since the scores of a smaller k depend on what the largest one leaves of a text.
        args.max_length = processor.max_length = room

    def embed(texts: list[str], prompt: str, side: str | None, steps: list[int | None]) -> np.ndarray:
        inputs = processor(texts, prompt=prompt).to(device)
        if steps == [None]:
            return model.generate_embedding(**inputs, return_steps=True).cpu().numpy()
        states = model.generate_embedding(**inputs, k=max(steps), return_steps=True)
        return states[:, [k - 1 for k in steps]].cpu().numpy()

    template = args.prompt_template or processor.prompt_template
    settings = file_of(args.model, "config_sentence_transformers.json")
    prompts = json.loads(settings.read_text(encoding="utf-8")).get("prompts", {}) if settings else {}
    if args.prompt_template or not any(prompts.values()):
        prompts = repo_prompts(template)
    size = model.num_parameters()
    facts = {
        "max_tokens": processor.max_length,
        "embed_dim": config.hidden_size,
        "n_parameters": size,
        "n_embedding_parameters": model.get_input_embeddings().weight.numel(),
        "memory_usage_mb": round(size * model.dtype.itemsize / 2**20),
        "use_instructions": True,
        "similarity_fn_name": ScoringFunction.COSINE,
        "loader_kwargs": CODE_OF_ITS_OWN,
        "framework": ["Sentence Transformers", "PyTorch", "Transformers", "safetensors"],
    }
    shown = None if steps == [None] else config.num_steps if config.num_steps in steps else steps[-1]
    return Subject(model_meta(args, facts), {}, steps, embed, prompts, template, shown)


def sentence_transformers_subject(args: argparse.Namespace, device: str) -> Subject:
    name_of_dtype = "dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"  # transformers < 4.56
    model = SentenceTransformer(
        args.model,
        device=device,
        trust_remote_code=args.trust_remote_code,
        model_kwargs={name_of_dtype: getattr(torch, args.dtype)},
    )
    if args.max_length:
        model.max_seq_length = args.max_length

    def embed(texts: list[str], prompt: str, side: str | None, steps: list[int | None]) -> np.ndarray:
        encode = {"query": model.encode_query, "document": model.encode_document, None: model.encode}[side]
        return encode(texts, prompt=prompt, batch_size=len(texts), show_progress_bar=False)[:, None].astype(np.float32)

    prompts, settings, loader_kwargs = model.prompts, {}, {}
    if args.prompt_template:
        prompts = repo_prompts(args.prompt_template)
    elif not any(prompts.values()):
        prompts = registry_prompts(args.model_name or args.model)
        if any(prompts.values()):
            settings, loader_kwargs = {"prompts": "mteb"}, {"model_prompts": prompts}
        else:
            say(
                f"{args.model} has no prompts, nor has mteb's registry any prefixes for it: texts are embedded bare. "
                "If it was trained with prompts, give --prompt_template, or the --model_name that mteb knows it by."
            )
    if args.trust_remote_code:
        loader_kwargs["trust_remote_code"] = args.trust_remote_code
    known = ModelMeta.from_sentence_transformer_model(model)
    facts = {name: value for name in type(known).model_fields if (value := getattr(known, name)) is not None}
    facts["use_instructions"] = bool(args.prompt_template or any(prompts.values()))
    facts["loader_kwargs"] = known.loader_kwargs | loader_kwargs
    return Subject(model_meta(args, facts), settings, [None], embed, prompts, args.prompt_template, None)


def registry_prompts(name: str) -> dict[str, str]:
    """The prompts that mteb's registry has for a model whose repo has none, such as those of E5."""
    try:
        meta = mteb.get_model_meta(name, fetch_from_hf=False)
    except KeyError:
        return {}
    # To a loader of its own they may be anything, such as names of adapters (Jina) or templates (UAE).
    prefixes = meta.loader is SentenceTransformerEncoderWrapper
    return meta.loader_kwargs.get("model_prompts") or {} if prefixes else {}


def repo_prompts(template: str) -> dict[str, str]:
    """This repo's prompts in another template."""
    writer = SimpleNamespace(prompt_for=lambda text: template.replace("{instruction}", text) if text else "")
    return sentence_transformers_settings(writer)["prompts"]


def model_meta(args: argparse.Namespace, facts: dict[str, Any]) -> ModelMeta:
    """mteb's `ModelMeta` of a model, from what was seen of it and what its card says; what neither says is None.

    A folder is filed as `local/FOLDER` under the hash of its weights and settings, unless `--model_name` names it.
    """
    local = Path(args.model).is_dir()
    path = file_of(args.model, "README.md")
    card = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    name = args.model_name or (f"local/{Path(args.model).resolve().name}" if local else args.model)
    languages = card.get("language") or []
    named = {
        "name": name,
        "revision": content_hash(Path(args.model)) if local else commit_of(args.model),
        "languages": ["eng-Latn"] if "en" in ([languages] if isinstance(languages, str) else languages) else None,
        "license": card.get("license"),
        "open_weights": True,
        "adapted_from": card.get("base_model") if isinstance(card.get("base_model"), str) else None,
        "reference": None if name.startswith("local/") else f"https://huggingface.co/{name}",
    }
    empty = ModelMeta.create_empty().model_dump() | {"loader": SentenceTransformerEncoderWrapper}
    fields = empty | facts | {key: value for key, value in named.items() if value is not None}
    try:
        return ModelMeta(**fields)
    except ValueError:  # a licence that mteb doesn't know
        return ModelMeta(**fields | {"license": named["reference"]})


def file_of(model: str, name: str) -> Path | None:
    """A file of a folder or a Hub repo, if it has it."""
    try:
        return Path(cached_file(model, name))
    except OSError:
        return None


def content_hash(folder: Path) -> str:
    """12 digits that change with the weights or a setting of a model's folder."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
    folders = {folder} | {folder / module["path"] for module in modules}
    config = folder / "config.json"  # names the folder of an adapter that takes the weights' place
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    if settings.get("model_type") == "gircse" and settings.get("adapter"):
        folders.add(folder / settings["adapter"])
    paths = {p for f in folders if f.is_dir() for p in f.iterdir() if p.suffix in (".safetensors", ".bin", ".json")}
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.relative_to(folder).parts):  # alike on any system
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


# Encoding -----------------------------------------------------------------------------------------------------------


class Vectors:
    """z_k of every distinct text of a task under its prompt, for several k, from one pass.

    They wait on disk in a folder for temporary files (`TMPDIR`), which goes when the block ends: 4 bytes x d x number
    of k for each text, so 2 GB for 100,000 documents with d = 896 and six k. In memory there is one k at a time.
    """

    def __init__(self, subject: Subject, steps: list[int | None], batch_size: int) -> None:
        self.subject, self.steps, self.batch_size = subject, steps, batch_size
        self.rows: dict[bytes, int] = {}

    def __enter__(self) -> Vectors:
        self.folder = tempfile.TemporaryDirectory(prefix="gircse-vectors-")
        self.files = {k: Path(self.folder.name, f"{k}.f32").open("wb") for k in self.steps}
        return self

    def __exit__(self, *_: Any) -> None:
        for file in self.files.values():
            file.close()
        self.folder.cleanup()

    def __call__(self, texts: list[str], prompt: str, side: str | None, k: int | None) -> np.ndarray:
        """(len(texts), d) float32: z_k of each text, embedded now unless it was before, at any k."""
        keys = [self._key(text, prompt, side) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.rows}
        by_length = sorted(new, key=lambda key: len(new[key]), reverse=True)  # so that little is padded
        if new:
            say(f"  embedding {len(new):,} texts")
        for start in progress(range(0, len(by_length), self.batch_size)):
            batch = by_length[start : start + self.batch_size]
            embeddings = self.subject.embed([new[key] for key in batch], prompt, side, self.steps)  # (B, |k|, d)
            for column, file in enumerate(self.files.values()):
                np.ascontiguousarray(embeddings[:, column], dtype=np.float32).tofile(file)
            self.rows.update(zip(batch, range(len(self.rows), len(self.rows) + len(batch)), strict=True))
        self.files[k].flush()
        stored = np.memmap(self.files[k].name, np.float32, "r").reshape(len(self.rows), -1)
        return np.asarray(stored[[self.rows[key] for key in keys]])

    @staticmethod
    def _key(text: str, prompt: str, side: str | None) -> bytes:
        parts = json.dumps([text, prompt, side])
        return hashlib.blake2b(parts.encode(), digest_size=16).digest()  # the texts themselves would fill the memory


def progress(starts: range) -> Iterator[int]:
    """Goes through the starts of batches with a bar in a terminal; in a log, which has no room for one, with a line
    every minute."""
    bar, said = tqdm(starts, desc="batches", leave=False, disable=None), time.monotonic()
    for done, start in enumerate(bar):
        if bar.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"  {done:,} of {len(starts):,} batches")
        yield start


class StepEncoder(AbsEncoder):
    """The model at one k, as mteb calls it (its `EncoderProtocol`)."""

    def __init__(self, vectors: Vectors, k: int | None) -> None:
        self.vectors, self.k = vectors, k
        self.mteb_model_meta = vectors.subject.meta_at(k)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
        side = prompt_type.value if prompt_type else None
        texts = [text for batch in inputs for text in batch["text"]]
        return self.vectors(texts, self.vectors.subject.prompt(task_metadata, side), side, self.k)


# Tasks --------------------------------------------------------------------------------------------------------------


def choose_tasks(names: Sequence[str], data: str | None, sample: int | None = None) -> list[AbsTask]:
    """The tasks of the given names, each once; local ones of `sample` rows, if that is given.

    Raises:
        ValueError: for an unknown name, or `local` without a folder; for a sample of other tasks, or of one row.
    """
    local = {task.metadata.name: task for task in local_tasks(data, sample)} if data else {}
    if "local" in names and not local:
        raise ValueError("tasks 'local' needs data: a folder with data files")
    chosen: dict[str, AbsTask] = {}
    for name in names:
        if name == "local":
            found = list(local.values())
        elif name in BENCHMARKS:
            found = list(mteb.get_benchmark(BENCHMARKS[name]).tasks)
        elif name in local:
            found = [local[name]]
        else:
            try:
                found = [mteb.get_task(name)]
            except KeyError as error:
                raise ValueError(f"task {name!r} is none of mteb's or of data={data!r}: {error.args[0]}") from error
        for task in found:
            for part in task.metadata.tasks if task.is_aggregate else [task]:
                chosen.setdefault(part.metadata.name, part)  # a benchmark's may be of fewer languages
    if sample is not None and (sample < 2 or not chosen.keys() <= local.keys()):
        raise ValueError(f"sample={sample} must be at least 2, and is for local tasks alone, not {', '.join(names)}")
    return list(chosen.values())


def unavailable(tasks: Sequence[AbsTask]) -> dict[str, str]:
    """Name and reason of each task whose data is neither here nor to be had from the Hub; downloads nothing."""
    with ThreadPoolExecutor(8) as pool:
        reasons = pool.map(why_unavailable, tasks)
    return {task.metadata.name: reason for task, reason in zip(tasks, reasons, strict=True) if reason}


def why_unavailable(task: AbsTask) -> str | None:
    if hasattr(task, "unavailable"):
        return task.unavailable()
    path, revision = task.metadata.dataset["path"], task.metadata.dataset["revision"]
    if Path(constants.HF_HUB_CACHE, f"datasets--{path.replace('/', '--')}", "snapshots", revision).is_dir():
        return None
    try:
        info = HfApi().dataset_info(path, revision=revision, timeout=20)
        if info.gated:
            HfApi().auth_check(path, repo_type="dataset")
    except Exception as error:  # of the Hub, or of whichever library carries its requests
        lines = [line for line in str(error).splitlines() if line] or [""]
        return f"{path}: {type(error).__name__}: {lines[0]:.150}"
    return None


def is_done(cache: mteb.ResultCache, task: AbsTask, meta: ModelMeta) -> bool:
    """Whether the cache has this task's result, of this very data. mteb itself takes one of other data for it."""
    try:
        result = cache.load_task_result(task.metadata.name, meta)
    except ValueError:  # half a file, as a run that is killed leaves it
        return False
    of_this_data = result is not None and result.dataset_revision == task.metadata.revision
    return of_this_data and not result.get_missing_evaluations(task)


def evaluate_task(task: AbsTask, subject: Subject, cache: mteb.ResultCache, batch_size: int) -> None:
    """Writes the task's result to the cache for each k that isn't there yet."""
    steps = [k for k in subject.steps if not is_done(cache, task, subject.meta_at(k))]
    if not steps:
        say("  has been evaluated before")
        return
    say("  reading its data")
    task.load_data()
    # Some tasks draw their texts. Each k gets the same ones, those that a run of its own would draw.
    drawn, drawn_by_numpy = task.rng_state.getstate(), task.np_rng.bit_generator.state
    with Vectors(subject, steps, batch_size) as vectors:
        for k in steps:
            say(f"  evaluating{'' if k is None else f' k = {k}'}")  # mteb's classifiers and clusters take a while, too
            task.rng_state.setstate(drawn)
            task.np_rng.bit_generator.state = drawn_by_numpy
            mteb.evaluate(
                StepEncoder(vectors, k),
                task,
                cache=cache,
                overwrite_strategy="always",
                encode_kwargs={"batch_size": batch_size},
                co2_tracker=False,
                show_progress_bar=False,
            )
    task.unload_data()


# Report -------------------------------------------------------------------------------------------------------------


def collect(tasks: Sequence[AbsTask], subject: Subject, cache: mteb.ResultCache) -> list[dict[str, Any]]:
    """A row for each task and metric with all of its k, scores x 100; tasks that aren't done are left out."""

    def percent(score: Any) -> float:
        return round(100 * float(score), 2)  # mteb's means are numpy's, which YAML would spell out as objects

    rows = []
    for task in tasks:
        metadata = task.metadata
        if not all(is_done(cache, task, subject.meta_at(k)) for k in subject.steps):
            continue
        results = {k: cache.load_task_result(metadata.name, subject.meta_at(k)) for k in subject.steps}
        # The cache may hold more languages and splits, of another selection.
        results = {k: found.validate_and_filter_scores(task) for k, found in results.items()}
        getters = {metadata.main_score: lambda scores: scores["main_score"]}
        if extra := TABLE_9.get(metadata.name):
            getters[extra] = lambda scores, name=extra: scores["og"][name]
        sides = ("query", "document") if isinstance(task, AbsTaskRetrieval) else (None,)
        for metric, getter in getters.items():
            rows.append(
                {
                    "task": metadata.name,
                    "group": getattr(task, "group", metadata.type),
                    "type": metadata.type,
                    "metric": metric,
                    "scores": {str(k): percent(found.get_score(getter=getter)) for k, found in results.items()},
                    "dataset": metadata.dataset["path"],
                    "revision": metadata.revision,
                    "splits": list(task.eval_splits),
                    "subsets": list(task.hf_subsets),
                    "prompts": {side or "both": subject.prompt(metadata, side) for side in sides},
                }
            )
    return rows


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="GIRCSE folder or Hub id, or any Sentence Transformers model (this repo)")
    add("--tasks", nargs="+", required=True, metavar="NAME", help="local, mteb, nanobeir, followir, or names of tasks")
    add("--data", help="folder with the data files of local tasks")
    add("--sample", type=int, help="of local tasks, so many rows of each, the same ones each time (all)")
    add("--k", nargs="+", type=int, help=f"numbers of generated tokens ({' '.join(map(str, STEPS))})")
    add("--output_dir", default="results", help="where results are kept and looked for (results)")
    add("--batch_size", type=int, default=32, help="texts embedded at once (32)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights (float32)")
    add("--max_length", type=int, help="most tokens of a text (the model's)")
    add("--device", help="cuda, cpu, .. (cuda if there is one)")
    add(
        "--prompt_template",
        help="gives any model this repo's instructions, such as 'Instruct: {instruction}\\nQuery: '",
    )
    add("--model_name", help="organization/name under which results are filed (the Hub id, or local/FOLDER)")
    add("--trust_remote_code", action="store_true", help="run the code of a Hub model that is not a GIRCSE model")
    args = parser.parse_args(argv)
    if args.prompt_template:
        args.prompt_template = unescape(args.prompt_template)
        if "{instruction}" not in args.prompt_template:
            parser.error(f"prompt_template={args.prompt_template!r} has no '{{instruction}}'")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 if a task failed or none could be had."""
    lenient_console()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    tasks = choose_tasks(args.tasks, args.data, args.sample)
    say(f"looking for the data of {len(tasks)} tasks, here and on the Hub")
    failed = unavailable(tasks)
    say(f"{len(tasks) - len(failed)} of {len(tasks)} data sets can be had")
    for name, reason in failed.items():
        say(f"  not {name}: {reason}")
    tasks = [task for task in tasks if task.metadata.name not in failed]
    if not tasks:
        return 1

    say(f"loading {args.model}")
    subject = load_subject(args)
    out, command = Path(args.output_dir), shlex.join(["python", "evaluate_gircse.py", *argv])
    cache = mteb.ResultCache(out)
    broken, rows = False, []
    for number, task in enumerate(tasks, 1):
        name = task.metadata.name
        say(f"[{number}/{len(tasks)}] {name}")
        try:
            evaluate_task(task, subject, cache, args.batch_size)
        except Exception as error:  # hours of other tasks are not to be lost for this one
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
            broken = True
        if rows := collect(tasks[:number], subject, cache):
            write_report(out, rows, failed, subject.meta, subject.settings, subject.shown, command)
    if rows:
        say(f"\n{markdown(rows)}\n\nWritten to {out}")
    return int(broken)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
