"""Any model as mteb sees it: its texts, prompts and metadata, and one encoding pass for all k."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import get_prompt
from mteb.models.model_meta import ScoringFunction
from mteb.models.models_protocols import EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from ..loading import (
    PROMPTS,
    card_of,
    check_is_there,
    commit_of,
    dtype_argument,
    file_of,
    identify_base,
    is_gircse,
    load,
    model_files,
    prompts_of,
    sentence_transformers_settings,
)
from .expansion import Writer
from .report import CODE_OF_ITS_OWN

STEPS = (1, 3, 5, 10, 15, 20)
SECONDS_BETWEEN_LINES = 60  # of progress, in a log
LOADER = "as mteb's loader writes it"  # in the place of a prompt


@dataclass
class Subject:
    """The model that is evaluated.

    Args:
        meta: mteb's metadata. Name and revision tell the model from all others, and from other states of its weights.
        settings: what else changes its embeddings or scores, beside k.
        steps: the values of k, or `[None]` for a model without steps.
        embed: (texts, prompt, side, steps) to (B, len(steps), d) float32; side is "query", "document" or None. None for
            a model that mteb loaded.
        prompts: literal prefixes by mteb's names.
        template: makes a prompt of an instruction; None if only `prompts` are used, by mteb's rule.
        shown: the k of the model card.
        default: the prompt of a task for which `prompts` has none, where there is no `template`.
        expand: augments texts before they are embedded.
        loaded: the model that mteb's registry loaded, which writes its own prompts.
    """

    meta: ModelMeta
    settings: dict[str, Any]
    steps: list[int | None]
    embed: Callable[[list[str], str, str | None, list[int | None]], np.ndarray] | None
    prompts: dict[str, str]
    template: str | None
    shown: int | None
    default: str = ""
    expand: Writer | None = None
    loaded: EncoderProtocol | None = None

    def meta_at(self, k: int | None) -> ModelMeta:
        """The metadata under which results of k are filed: mteb's cache goes by name, revision and these settings."""
        settings = self.settings if k is None else {"k": k, **self.settings}
        return self.meta.model_copy(update={"experiment_kwargs": settings or None})

    def prompt(self, metadata: Any, side: str | None) -> str:
        """The literal prefix of one side of a task; `side` is None for tasks whose texts are all alike."""
        if self.loaded:
            return LOADER
        if self.template is None:
            prompt_type = PromptType(side) if side else None
            found = get_prompt(self.prompts, metadata, prompt_type)
            return self.default if found is None else found
        return task_prompt(self.prompts, self.template, metadata, side)


def task_prompt(prompts: dict[str, str], template: str, metadata: Any, side: str | None) -> str:
    """The prefix of one side of a task by this repo's rule: the task's own prompt, that of the task that it was adapted
    from, mteb's instruction, its type's."""
    for name in (metadata.name, *(metadata.adapted_from or ())):
        for key in (f"{name}-{side}", name):
            if key in prompts:
                return prompts[key]
    instruction = metadata.prompt
    if isinstance(instruction, dict):
        instruction = instruction.get(side or "query")
    elif side == "document" and metadata.type != "Reranking":  # reranking compares texts of one kind
        instruction = None
    if not instruction and side is not None:
        return prompts.get(side, "")
    if not instruction and metadata.type in prompts:
        return prompts[metadata.type]
    return template.replace("{instruction}", instruction or get_abstask_prompt(metadata.name))


def instruction_of(metadata: Any, side: str | None) -> str:
    """The instruction of one side of a task, by the same rule; "" where there is none."""
    bare = "{instruction}"
    return task_prompt(repo_prompts(bare), bare, metadata, side)


def say(line: str) -> None:
    print(line, flush=True)  # unflushed, a log would get it hours later


def progress(starts: range) -> Iterator[int]:
    """Goes through the starts of batches with a bar in a terminal; in a log, which has no room for one, with a line
    every minute."""
    bar, said = tqdm(starts, desc="batches", leave=False, disable=None), time.monotonic()
    for done, start in enumerate(bar):
        if bar.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(f"  {done:,} of {len(starts):,} batches")
        yield start


def load_subject(args: argparse.Namespace) -> Subject:
    """Loads the model that the arguments name.

    Raises:
        ValueError: for a path where nothing is; for a k that the model doesn't have; for one of mteb's registry that is
            no encoder, or runs code of its own unasked.
    """
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_is_there(args.model)
    try:
        ours = is_gircse(args.model)
    except (OSError, ValueError):  # Sentence Transformers' modules may lie in subfolders
        ours = False
    registered = None if ours or args.prompt_template or Path(args.model).is_dir() else registry_meta(args.model)
    # Options at their defaults are left out: a run that names a default finds the results of one that does not.
    options = {"dtype": "float32", "max_length": None, "prompt_template": None, "sample": None}
    if registered and registered.loader not in (None, SentenceTransformerEncoderWrapper):
        subject, options = registry_subject(args, registered, device), {"sample": None}
    else:
        subject = (gircse_subject if ours else sentence_transformers_subject)(args, device)
    subject.settings |= {
        name: getattr(args, name) for name, default in options.items() if getattr(args, name) != default
    }
    if args.expand_with:
        name = writer_name(args.expand_with)
        file = f"{name.replace('/', '__')}-{args.dtype}-{args.expansion_tokens}.jsonl"
        settings = args.expansion_tokens, args.batch_size, getattr(torch, args.dtype), device, progress
        subject.expand = Writer(args.expand_with, Path(args.output_dir, "expansions", file), *settings)
        subject.settings |= {"expand_with": name, "expansion_tokens": args.expansion_tokens}
        if subject.loaded and args.dtype != "float32":  # which is not the model's then, but the writer's
            subject.settings["expansion_dtype"] = args.dtype
    return subject


def writer_name(model: str) -> str:
    """A causal LM's Hub id or folder's name, and the state of its weights."""
    if Path(model).is_dir():
        return f"{Path(model).resolve().name}@{content_hash(Path(model))}"
    file_of(model, "config.json")  # so that the commit is known
    return f"{model}@{commit_of(model)}"


def gircse_subject(args: argparse.Namespace, device: str) -> Subject:
    model, processor = load(args.model, dtype=args.dtype)  # this repo's code
    model.eval().to(device)
    if args.max_length:
        processor.max_length = args.max_length
    config = model.config
    steps = steps_of(config, args.k)
    room = model.text_limit(processor.max_length, steps[-1])
    if room < processor.max_length:
        # Written to `args`, so that results are filed under it: the largest k decides how much of a text is kept, and
        # so changes the scores of smaller ones.
        args.max_length = processor.max_length = room

    def embed(texts: list[str], prompt: str, side: str | None, steps: list[int | None]) -> np.ndarray:
        inputs = processor(texts, prompt=prompt).to(device)
        if steps == [None]:
            return model.generate_embedding(**inputs, return_steps=True).cpu().numpy()
        states = model.generate_embedding(**inputs, k=max(steps), return_steps=True)
        return states[:, [k - 1 for k in steps]].cpu().numpy()

    template = args.prompt_template or processor.prompt_template
    prompts = prompts_of(args.model)
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
    if shown not in (None, config.num_steps):
        say(f"  --k has no {config.num_steps}, the model's num_steps: its card and a comparison show k = {shown}")
    return Subject(model_meta(args, facts), {}, steps, embed, prompts, template, shown)


def steps_of(config: PretrainedConfig, wanted: list[int] | None) -> list[int | None]:
    """The k that are evaluated, in rising order: those asked for, or STEPS and the model's own number. None stands for
    a model that generates nothing."""
    if config.step_token == "none":
        return [None]
    tried = wanted or (*STEPS, config.num_steps)
    most = config.num_steps if config.step_token == "learned" else max(tried)
    steps = sorted({k for k in tried if wanted or k <= most})
    if steps[0] < 1 or steps[-1] > most:
        raise ValueError(f"k={steps} must be from 1 to {most} for this model")
    return steps


def sentence_transformers_subject(args: argparse.Namespace, device: str) -> Subject:
    model = SentenceTransformer(
        args.model,
        device=device,
        trust_remote_code=args.trust_remote_code,
        model_kwargs=dtype_argument(getattr(torch, args.dtype)),
    )
    if args.max_length:
        try:
            model.max_seq_length = args.max_length
        except AttributeError as error:  # of static embeddings, which read any number of tokens
            raise ValueError(f"max_length={args.max_length}: {args.model} has no such limit, leave it out") from error

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
    default = model.prompts.get(model.default_prompt_name) or ""
    return Subject(model_meta(args, facts), settings, [None], embed, prompts, args.prompt_template, None, default)


def registry_subject(args: argparse.Namespace, meta: ModelMeta, device: str) -> Subject:
    """A model for which mteb has a loader of its own: most embedders of 7B need an end token, an instruction's template
    or a side of padding that their repos don't tell Sentence Transformers."""
    if (meta.loader_kwargs.get("trust_remote_code") or trusts(meta.loader)) and not args.trust_remote_code:
        raise ValueError(f"model={args.model!r} runs code of its own, in mteb's loader too: give --trust_remote_code")
    say("  mteb's loader for it brings prompts, dtype and length limit: --dtype and --max_length don't count")
    loaded = meta.load_model(device=device)
    if not isinstance(loaded, EncoderProtocol):
        raise ValueError(f"model={args.model!r} is a {type(loaded).__name__} in mteb's registry, which embeds no texts")
    named = meta.model_copy(update={"name": args.model_name or meta.name})
    return Subject(named, {}, [None], None, {}, None, None, loaded=loaded)


def trusts(loader: Any) -> bool:
    """Whether a loader of mteb's runs a model's own code whatever its arguments are, as dozens do."""
    classes = inspect.getmro(loader) if isinstance(loader, type) else [loader]
    sources = [inspect.getsource(it) for it in classes if it.__module__.startswith("mteb.")]
    return any(re.search(r"trust_remote_code\s*=\s*True", source) for source in sources)


def registry_meta(name: str) -> ModelMeta | None:
    """What mteb's registry has on a model, if it knows it."""
    try:
        return mteb.get_model_meta(name, fetch_from_hf=False)
    except KeyError:
        return None


def registry_prompts(name: str) -> dict[str, str]:
    """The prompts that mteb's registry has for a model whose repo has none, such as those of E5."""
    meta = registry_meta(name)
    # For a model with a loader of its own, they may be no prefixes but names of adapters (Jina) or templates (UAE).
    prefixes = meta is not None and meta.loader is SentenceTransformerEncoderWrapper
    return meta.loader_kwargs.get("model_prompts") or {} if prefixes else {}


def repo_prompts(template: str) -> dict[str, str]:
    """This repo's prompts in another template."""
    return sentence_transformers_settings(template)["prompts"]


def model_meta(args: argparse.Namespace, facts: dict[str, Any]) -> ModelMeta:
    """mteb's `ModelMeta` of a model, from what was seen of it and what its card says; what neither says is None.

    A folder is filed as `local/FOLDER` under the hash of its weights and settings, unless `--model_name` names it.
    """
    local = Path(args.model).is_dir()
    card = card_of(args.model)
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
    except ValueError:  # mteb doesn't know the licence, and takes a link
        return ModelMeta(**fields | {"license": named["reference"]})


def content_hash(folder: Path) -> str:
    """12 digits that change with the weights or a setting of a model's folder, or of what its adapter goes with."""
    own = {path.relative_to(folder).as_posix(): path for path in model_files(folder)}
    base, files = identify_base(folder)
    digest = hashlib.sha256()
    for name, path in (own | files).items():
        digest.update(name.encode())
        if name == "config.json":  # the dtype of a load without one, which an evaluation never is, is no part
            settings = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in settings.items() if key not in ("dtype", "torch_dtype")}
            digest.update(json.dumps(kept, sort_keys=True).encode())
            continue
        with io.BytesIO(without_requirements(path)) if name == PROMPTS else path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if base and not files:  # on the Hub
        digest.update(json.dumps(base).encode())
    return digest.hexdigest()[:12]


def without_requirements(path: Path) -> bytes:
    """A file of prompts but for the versions of packages, which make no other model."""
    content = path.read_bytes()
    settings = json.loads(content)
    if settings.pop("requirements", None) is None:
        return content
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
