"""Models from Hub ids and folders: GIRCSE models, plain causal LMs and GGUF files, with this repo's own classes."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import deepspeed
from transformers.utils import cached_file, logging

from . import ROOT

# What the paper puts before a text (appendix C), and what stands for the text in `chat_prompt`.
PAPER_PROMPT, TEXT = "Instruct: {instruction}\nQuery: ", "{text}"
LOGIT_TEMPERATURE = 2.0  # T of a new model; at the papers' 1 gradients explode (docs/results.md)
PROMPTS = "config_sentence_transformers.json"
# What an evaluation writes, also into a model's folder.
REPORTS = ("results.json", "comparison.json", "prompts.json")
# The JSON files and pickled weights of a GIRCSE model. Its folder is often a working directory too, with other ones.
OWN_FILES = re.compile(
    r"((processor_|preprocessor_)?config|config_sentence_transformers|modules|tokenizer(_config)?|special_tokens_map"
    r"|added_tokens|vocab|.+\.index)\.json|pytorch_model.*\.bin"
)
KINDS = (".safetensors", ".bin", ".json", ".jinja")
# Of models of others: vocabularies, weights and code; and what is in their folders that is no part of the model.
OF_OTHERS = re.compile(r"vocab\.txt|merges\.txt|.+\.(model|gguf|py|onnx)")
NO_MODEL = re.compile(rf"\.|checkpoint-|runs$|eval$|{'|'.join(map(re.escape, REPORTS))}")
# A new model's max_length leaves positions for at least this many steps, which evaluation takes.
STEPS_OF_EVALUATION = 20

logger = logging.get_logger("gircse")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models made inside have whole weights. With DeepSpeed ZeRO-3, transformers would make them as empty shards,
    whatever `zero3_init_flag` says, and such models can't be checked, evaluated or filled; training shards them later
    by itself."""
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    config = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def load(
    path: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    adapter: str | None = None,
    gguf_file: str | None = None,
    prompt_template: str | None = None,
    suffix: str | None = None,
    revision: str | None = None,
    **axes: Any,
) -> tuple[PreTrainedModel, Any]:
    """The model and its processor, from a GIRCSE model or a plain causal LM. The code is this repo's own.

    Args:
        path: Hub id or folder.
        dtype: of the weights, a name such as `"bfloat16"`.
        attn_implementation: as in `from_pretrained`.
        adapter: a PEFT adapter of the plain causal LM, which is merged.
        gguf_file: which GGUF file of a repo to load; by default the only one of a folder without a config.json.
        prompt_template, suffix: of a new model's processor; without both, as [`chat_prompt`] says.
        revision: branch, tag or commit on the Hub.
        axes: of a new model, as `GircseModel.from_causal_lm` takes them; None where they are not given.

    Raises:
        ValueError: if the arguments don't go together, the folder is none of these, or the backbone is refused; if what
            is given of a new model differs from what a GIRCSE model has.
    """
    path = str(path)
    axes = {name: value for name, value in axes.items() if value is not None}
    model_class = get_class_from_dynamic_module("modeling_gircse.GircseModel", str(ROOT))
    processor_class = get_class_from_dynamic_module("processing_gircse.GircseProcessor", str(ROOT))
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), **attention}
    at = {"revision": revision} if revision else {}
    gguf = {"gguf_file": name} if (name := gguf_file or only_gguf_file(path)) else {}
    if not gguf and is_gircse(path, revision):
        if adapter:
            raise ValueError(f"adapter={adapter!r} needs a plain causal LM, and {path!r} is a GIRCSE model")
        # With the configuration, AutoTokenizer doesn't ask for trust in the folder's code, which is not needed.
        config = model_class.config_class.from_pretrained(path, **at)
        processor = processor_class.from_pretrained(path, config=config, trust_remote_code=False, **at)
        with whole_weights():
            model = model_class.from_pretrained(path, **at, **settings)
        check_given(path, model.config, axes)
        check_given(path, processor, {"prompt_template": prompt_template, "suffix": suffix})
        return model, processor
    options = {"logit_temperature": LOGIT_TEMPERATURE, **axes, **settings, **gguf, **at}
    with whole_weights():
        model = model_class.from_causal_lm(path, adapter=adapter, **options)
    processor = new_processor(processor_class, path, prompt_template, suffix, **gguf, **at)
    processor.max_length = model.text_limit(processor.max_length, max(model.config.num_steps, STEPS_OF_EVALUATION))
    return model, processor


def new_processor(
    processor_class: Any, path: str, prompt_template: str | None, suffix: str | None, **options: Any
) -> Any:
    """The processor of a plain causal LM; `options` are for its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    given = prompt_template, suffix
    usual = chat_prompt(tokenizer) if given == (None, None) else (PAPER_PROMPT, "")
    template, end = (other if one is None else one for one, other in zip(given, usual, strict=True))
    processor = processor_class(tokenizer, prompt_template=template, suffix=end)
    # Where the mistral-common package is installed, Mistral's repos load as its tokenizer, which can't be saved.
    if "mistral_format" not in options and saving_problem(processor):
        return new_processor(processor_class, path, prompt_template, suffix, mistral_format=False, **options)
    return processor


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` for a dtype, by its name in the installed transformers."""
    return {"dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype": dtype}  # transformers < 5 (before 4.56)


def base_of(model: Any) -> Any:
    """The model itself, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_given(path: str, owner: Any, given: dict[str, Any]) -> None:
    """Raises a ValueError if something is given that a GIRCSE model, or its processor, has otherwise."""
    for name, value in given.items():
        if value is not None and value != getattr(owner, name):
            raise ValueError(
                f"{name}={value!r} is for a new model, and {path!r} is a GIRCSE model with {getattr(owner, name)!r}: "
                "leave it out, or start from a causal LM"
            )


def chat_prompt(tokenizer: Any) -> tuple[str, str]:
    """What goes before and after a text: the start of a user's turn of the tokenizer's chat template with the paper's
    prompt, and the end of that turn up to where the model would answer. Without a chat template: the paper's prompt.

    The turn is taken from a later place of a conversation, since many templates begin one with a default system
    message."""
    turn = {"role": "user", "content": f"{PAPER_PROMPT}{TEXT}"}
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

    def render(messages: list[dict[str, str]], answers: bool) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)

    if not getattr(tokenizer, "chat_template", None):
        return PAPER_PROMPT, ""
    try:
        first, before, both = render([turn], True), render(earlier, False), render([*earlier, turn], True)
    except Exception as error:  # a template is a program, which may raise anything
        logger.warning(f"the chat template can't be used ({error}): texts get the paper's prompt")
        return PAPER_PROMPT, ""
    prompt, found, suffix = (both.removeprefix(before) if both.startswith(before) else first).partition(TEXT)
    if not found or PAPER_PROMPT not in prompt:
        return PAPER_PROMPT, ""
    start = tokenizer.bos_token or ""
    return (prompt if prompt.startswith(start) or not first.startswith(start) else start + prompt), suffix


def is_gircse(path: str, revision: str | None = None) -> bool:
    """Whether a folder or Hub repo is a GIRCSE model; raises as [`read_config`] does."""
    return read_config(path, revision).get("model_type") == "gircse"


def read_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a folder or Hub repo.

    Raises:
        ValueError: for a path where nothing is, and for a folder that is no model of transformers; the message says
            what it holds instead. For a revision of a folder.
    """
    check_is_there(path)
    folder = Path(path)
    if revision and folder.exists():
        raise ValueError(f"revision={revision!r} is for models on the Hub, and {path!r} is a folder: leave it out")
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
            remedy = f"holds a PEFT adapter of {base!r}: train or convert that, with this folder as --adapter"
            with suppress(OSError, ValueError):
                if is_gircse(base):
                    remedy = (
                        f"holds an adapter of {base!r}: merge it by model = AutoModel.from_pretrained({path!r}, "
                        "trust_remote_code=True) and model.merge_adapters(), and save that by "
                        "gircse.training.publishing.export(model, processor, folder)"
                    )
        elif gguf := sorted(file.name for file in folder.glob("*.gguf")):
            one = ", by --gguf_file one of them" if len(gguf) > 1 else ""
            remedy = f"holds GGUF files ({', '.join(gguf)}), which train_gircse.py makes a model of{one}"
        elif (folder / "modules.json").exists():
            remedy = "is a Sentence Transformers model of other modules: give the causal LM that it was made from"
        else:
            remedy = "has no config.json: give the folder of a causal LM or of a GIRCSE model"
        raise ValueError(f"the model {path!r} {remedy}")
    return PretrainedConfig.get_config_dict(path, revision=revision)[0]


def check_is_there(path: str) -> None:
    """Raises a ValueError for a file, and for a path where nothing is."""
    folder = Path(path)
    if folder.is_file() or not (folder.exists() or is_hub_id(path)):
        found = "is a file: give its folder" if folder.is_file() else f"is not there (working directory: {Path.cwd()})"
        raise ValueError(f"the model {path!r} {found}")


def only_gguf_file(path: str) -> str | None:
    """The GGUF file of a folder that has just one, and no config.json; else None."""
    files = [] if (Path(path) / "config.json").exists() else list(Path(path).glob("*.gguf"))
    return files[0].name if len(files) == 1 else None


def saving_problem(processor: Any) -> Exception | None:
    """What saving the processor raises, or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            processor.save_pretrained(folder)
        except Exception as error:  # tokenizers raise many kinds of errors
            return error


def commit_of(name: str, revision: str | None = None) -> str | None:
    """The commit of the Hub repo `name` that was loaded, from its files' place in the cache; None for a folder."""
    files = ("config.json", "modules.json") if is_hub_id(name) else ()
    found = [try_to_load_from_cache(name, file, revision=revision) for file in files]
    return next((Path(path).parent.name for path in found if isinstance(path, str)), None)


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and not Path(name).exists()


def file_of(model: str, name: str) -> Path | None:
    """A file of a folder or a Hub repo, if it has it."""
    try:
        return Path(cached_file(model, name))
    except OSError:
        return None


def card_of(model: str) -> dict[str, Any]:
    """The metadata of the card of a folder or a Hub repo; {} where there is none, or none that can be read."""
    path = file_of(model, "README.md")
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path else {}
    except Exception as error:  # what others wrote in YAML raises many kinds of errors
        logger.warning(f"the card of {model!r} can't be read: {error}")
        return {}


def prompts_of(model: str, revision: str | None = None) -> dict[str, str]:
    """The literal prompts by name in the `config_sentence_transformers.json` of a folder or Hub id, if it has one.

    Raises:
        OSError: if it can't be told whether it has one, as without it texts might go in under wrong prompts.
    """
    try:
        file = cached_file(model, PROMPTS, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:  # no connection, and the file was not fetched before
        remedy = f"`hf download {model}` fetches the whole repo"
        raise OSError(f"the model {model!r}: its {PROMPTS}, which may hold prompts, can't be had: {remedy}") from error
    return json.loads(Path(file).read_text(encoding="utf-8")).get("prompts", {}) if file else {}


def model_files(folder: Path) -> list[Path]:
    """The files that the vectors of a folder's model depend on, in the same order on any system: weights and settings
    of the model, and of an adapter that takes the weights' place; of a model of others all that may be such, in any
    folder. Not the reports of an evaluation and other files of a user, nor shards that no index names, as nothing loads
    them."""
    if settings := own_settings(folder):
        folders = {folder, folder / (settings.get("adapter") or "")}
        paths = {path for each in folders if each.is_dir() for path in each.iterdir() if path.suffix in KINDS}
        loose = {path for path in paths if path.parent == folder and path.suffix in (".json", ".bin")}
        paths -= {path for path in loose if not OWN_FILES.fullmatch(path.name)}
    else:
        paths = {path for path in folder.rglob("*") if path.suffix in KINDS or OF_OTHERS.fullmatch(path.name)}
        paths -= {path for path in paths if any(map(NO_MODEL.match, path.relative_to(folder).parts))}
    indexed = {path.parent for path in paths if path.name.endswith(".index.json")}
    paths -= {path for path in paths if "-of-" in path.name and path.parent not in indexed}
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


def identify_base(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What identifies the causal LM that the adapter of a GIRCSE model's folder goes with, and its files, if it is a
    folder too; nothing of a model without an adapter."""
    adapter = own_settings(folder).get("adapter")
    if not adapter:
        return {}, {}
    settings = json.loads((folder / adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    if Path(base).is_dir():
        return {"base": base}, {f"base file {file.name}": file for file in model_files(Path(base))}
    if commit_of(base, revision) is None:
        with suppress(OSError, ValueError):  # offline, or not there: loading will say so
            read_config(base, revision)  # which is in the cache from now on, where its place tells the commit
    return {"base": base, "base revision": commit_of(base, revision) or revision}, {}


def own_settings(folder: Path) -> dict[str, Any]:
    """The `config.json` of a GIRCSE model's folder; {} for another one."""
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    return settings if settings.get("model_type") == "gircse" else {}


def sentence_transformers_settings(template: str) -> dict[str, Any]:
    """This repo's `config_sentence_transformers.json`, its prompts in another `prompt_template`. One that is not of
    this repo's template, as `convert_gircse.py --document_prompt` writes it, is of the model here alone: "" takes its
    place."""
    settings, own = (
        json.loads((ROOT / name).read_text(encoding="utf-8")) for name in (PROMPTS, "processor_config.json")
    )
    before, _, after = own["prompt_template"].partition("{instruction}")
    for name, prompt in settings["prompts"].items():
        instruction = prompt.removeprefix(before).removesuffix(after)
        known = instruction and prompt == f"{before}{instruction}{after}"
        settings["prompts"][name] = template.replace("{instruction}", instruction) if known else ""
    return settings
