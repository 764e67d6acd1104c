"""The Hub-ready folder: weights, adapters, tokenizer, prompts and code."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .. import ROOT
from ..loading import PROMPTS, base_of, commit_of, is_hub_id, saving_problem, sentence_transformers_settings
from .arguments import GircseTrainingArguments
from .card import REMOTE_CODE

logger = logging.get_logger("gircse")

# What is copied to a trained model's folder; `save_pretrained` writes the other code files.
COMMANDS = ("train", "convert", "evaluate", "embed", "serve", "export")
USES = ("train", "eval", "embed", "serve", "onnx")
CODE_FILES = [*(f"{name}_gircse.py" for name in COMMANDS), "train_autoregembed.py", "sample_pairs.jsonl"]
CODE_FILES += ["requirements.txt", *(f"requirements-{use}.txt" for use in USES)]
CODE_FILES += ["sentence_gircse.py", "modules.json", "handler.py", "LICENSE"]
CODE_FILES += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "gircse").rglob("*.py"))]
CODE_FILES += [f"configs/{name}.yaml" for name in ("ddp", "fsdp2", "zero2", "zero3")]
ADAPTER_FOLDER = "adapter"
PREFIX = "base_model.model."  # of all keys of PEFT's files
MOST_ROUNDED_OFF = 0.1  # of what a LoRA has changed, without a warning
NEEDED_BY_ADAPTERS = {"peft": ">=0.15"}
# Patterns of files of a trained folder that are uploaded, beside code and tokenizer; and of those that an upload
# deletes from the repo if the folder lacks them.
PUBLISHED = ["config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", "README.md"]
PUBLISHED += ["model.safetensors.index.json", PROMPTS, f"{ADAPTER_FOLDER}/adapter_*", "training_curves.png"]
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*adapter_config.json"]


def export(
    model: Any,
    processor: Any,
    folder: str | Path,
    dtype: str = "float32",
    adapter_of: str | None = None,
    query_instruction: str | None = None,
) -> PreTrainedModel:
    """Saves a Hub-ready folder but for its card: weights (LoRA merged), tokenizer, configuration, prompts and code. The
    model is changed: its LoRA is merged, and its weights are converted to `dtype`.

    With `adapter_of`, the model that training started from, the LoRA alone takes the weights' place; see
    [`save_adapter`]. With `query_instruction`, "" included, that is what the saved prompt `query` asks for.

    Raises:
        ValueError: if there is an adapter and it changes nothing, or it is not in PEFT's own wrapper.
    """
    folder = Path(folder)
    tuned = hasattr(model, "merge_and_unload")
    if not tuned and getattr(model, "peft_config", None):
        raise ValueError(f"the model has adapters ({', '.join(model.peft_config)}): call model.merge_adapters() first")
    if tuned and not any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name):
        raise ValueError("the adapter changes nothing: all of its lora_B weights are zero; has it been trained?")
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite: training has diverged, and nothing is saved")
    if adapter_of:
        model = save_adapter(model, folder, getattr(torch, dtype), adapter_of)
    else:
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of an earlier run
        saved = getattr(torch, dtype)
        if tuned:  # in the wider dtype, as bfloat16 would round off much of what was learned
            model = model.to(torch.promote_types(model.dtype, saved))
            if (lost := share_rounded_off(model, saved)) > MOST_ROUNDED_OFF:
                remedy = "save in --save_dtype float32, or the LoRA alone (--save_adapter)"
                logger.warning(f"saved in {dtype}, the weights lose {lost:.0%} of what the LoRA has learned: {remedy}")
            model = model.merge_and_unload()
        model = model.to(saved)
        earlier = {file: file.stat().st_mtime_ns for file in folder.glob("model*.safetensors*")}
        model.save_pretrained(folder)
        for file, time in earlier.items():  # under other names, one of which would be loaded
            if file.exists() and file.stat().st_mtime_ns == time:
                file.unlink()
    complete(folder, processor, query_instruction)
    return model


@torch.no_grad()
def share_rounded_off(model: nn.Module, dtype: torch.dtype) -> float:
    """How much of a LoRA's change of the weights W is gone once W + BA is rounded to `dtype`: 1 - <kept, BA> / |BA|^2.
    Of a low rate or a short run most entries change by less than half of the last digit, and not at all then."""
    from peft.tuners.lora import Linear

    whole, lost = 0.0, 0.0
    for layer in model.modules():
        if isinstance(layer, Linear):
            weight = layer.get_base_layer().weight
            for name in layer.active_adapters:
                change = layer.get_delta_weight(name).float()
                kept = (weight.float() + change).to(dtype).float() - weight.to(dtype).float()
                whole += float((change * change).sum())
                lost += float((change * (change - kept)).sum())
    return lost / whole if whole else 0.0


def complete(folder: Path, processor: Any, query_instruction: str | None = None) -> None:
    """Adds to weights and configuration what else a Hub-ready folder has, but for its card; see [`export`]."""
    load_in_float32(folder)
    # Else a tokenizer of a general class loads in transformers 4 as one that gives token types, too.
    processor.tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    processor.save_pretrained(folder)
    for name in CODE_FILES:
        if not (folder / name).exists() or not (folder / name).samefile(ROOT / name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    settings = sentence_transformers_settings(processor.prompt_template)
    if query_instruction is not None:
        settings["prompts"]["query"] = processor.prompt_for(query_instruction)
    needed = {name: it for name, it in settings.get("requirements", {}).items() if name not in NEEDED_BY_ADAPTERS}
    if json.loads((folder / "config.json").read_text(encoding="utf-8"))["adapter"]:
        needed |= NEEDED_BY_ADAPTERS
    settings["requirements"] = needed
    content = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / PROMPTS).write_text(content + "\n", encoding="utf-8")


def published_files(processor: Any) -> list[str]:
    """Patterns of the files that training writes to its folder for publication. There may be others, as in a folder in
    which a user works."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        own = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    return [*PUBLISHED, *CODE_FILES, *REMOTE_CODE, *own]


def load_in_float32(folder: Path) -> None:
    """Makes a plain `from_pretrained` load the weights in float32, whatever they are saved in. transformers 5 would
    load them as saved, and bfloat16 is several times slower on a CPU without instructions for it: those who want it
    pass `dtype`."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, config["text_config"]):
        part.pop("torch_dtype", None)  # transformers < 5 (before 4.56) writes this name, and reads both
        part["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(model: Any, folder: Path, dtype: torch.dtype, adapter_of: str) -> PreTrainedModel:
    """Saves the LoRA of a `PeftModel` as one of the plain causal LM, and a configuration that tells where it is.

    The keys are PEFT's for the causal LM, `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, so that
    PEFT alone loads it on that, too. It lies in a subfolder: with `adapter_config.json` beside `config.json`,
    `AutoModel.from_pretrained` would ignore the latter, and return the bare backbone.

    Returns:
        The model without its adapter.
    """
    from peft import get_peft_model_state_dict

    base = model.get_base_model()
    config = base.adapter_config_for_causal_lm(model.active_adapter)
    config.base_model_name_or_path, config.revision = place_of(adapter_of), commit_of(adapter_of)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    weights = {}
    for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        plain = name.removeprefix(PREFIX).removeprefix("language_model.")
        weights[PREFIX + plain] = weight.detach().to("cpu", dtype).contiguous()
    config.save_pretrained(folder / ADAPTER_FOLDER)
    save_file(weights, folder / ADAPTER_FOLDER / "adapter_model.safetensors", metadata={"format": "pt"})
    for path in folder.glob("model*.safetensors*"):  # of an earlier run
        path.unlink()
    base = model.unload()
    save_configuration(base, folder)
    return base


def place_of(model: str) -> str:
    """What an adapter names as its model: a Hub id as it is, and a folder's absolute path, so that it is found from any
    working directory."""
    if not Path(model).exists():
        return model
    place = str(Path(model).resolve())
    logger.warning(f"the adapter names {place} as its model, and loads on this machine alone: publish merged weights")
    return place


def save_configuration(base: PreTrainedModel, folder: Path) -> None:
    """Saves the model's code, and a configuration that tells that an adapter takes the weights' place."""
    base.config.adapter = ADAPTER_FOLDER
    custom_object_save(base, folder, config=base.config)
    base.config.save_pretrained(folder)


def check_adapter(model: Any, base_models: Sequence[str], publishes: bool) -> None:
    """Raises a ValueError for a model that `save_adapter` can't save, or that nobody else could load."""
    base = base_of(model)
    if base is model or base.config.step_token == "learned":
        lost = "full tuning" if base is model else "learned tokens"
        raise ValueError(f"save_adapter=True saves a LoRA of the backbone alone, and would lose {lost}: leave it out")
    if len(base_models) != 1:
        raise ValueError(f"save_adapter=True needs the one model that the LoRA belongs to, not {list(base_models)}")
    if publishes and not is_hub_id(base_models[0]):
        raise ValueError(f"save_adapter=True publishes no weights, and {base_models[0]!r} is not on the Hub")


def check_saving(model: Any, processor: Any, training: GircseTrainingArguments) -> None:
    """Raises a ValueError now, and not after training, for a model that the export could not save."""
    if problem := saving_problem(processor):
        raise ValueError(
            f"the tokenizer can't be saved ({problem}): give a folder with a tokenizer.json, such as one that "
            "AutoTokenizer.from_pretrained(..., mistral_format=False).save_pretrained(folder) has written"
        )
    base = base_of(model)
    quantized = getattr(base.config.text_config, "quantization_config", None) is not None
    if quantized and model is base:
        raise ValueError("the backbone is quantized, and its weights can't be trained as they are: use --tuning lora")
    if quantized and not training.save_adapter:
        raise ValueError(
            "the backbone is quantized, and a LoRA can't be merged into such weights: add --save_adapter, or start "
            "from the weights before quantization"
        )


def copy_on_cpu(model: nn.Module) -> nn.Module:
    """A copy on the CPU, as the accelerator may have no room for one beside model and optimizer."""
    copies: dict[int, Tensor] = {id(x): x.detach().to("cpu", copy=True) for x in model.buffers()}
    for weight in model.parameters():
        copies[id(weight)] = nn.Parameter(weight.detach().to("cpu", copy=True), weight.requires_grad)
    return copy.deepcopy(model, copies)
