"""A Hub-ready GIRCSE folder from weights that were trained elsewhere, as they are.

    python convert_gircse.py Alibaba-NLP/LaSER-Qwen3-0.6B --output_dir laser-0.6b --pooling mean_with_prompt \\
        --num_steps 2 --max_length 512 --document_prompt '<|im_start|>user\\n' \\
        --suffix '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' \\
        --prompt_template '<|im_start|>user\\nInstruct: {instruction}\\nQuery: '
    python convert_gircse.py mistralai/Mistral-7B-v0.1 --adapter Roytsai27/GIRCSE-Mistral7B --suffix '' \\
        --output_dir gircse-mistral

The model is a plain causal LM, and `--adapter` a PEFT adapter of it, which is merged; with `--save_adapter` the adapter
takes the weights' place, and the causal LM is fetched from where it is when the folder is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.utils import logging

from gircse.command_line import check_writable, lenient_console, local_path, parser_of, unescape
from gircse.loading import PROMPTS, commit_of, is_gircse, load, only_gguf_file
from gircse.training.publishing import ADAPTER_FOLDER, complete, export, place_of, save_configuration

logger = logging.get_logger("gircse")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("model", help="the plain causal LM: Hub id or folder")
    add("--adapter", help="a PEFT adapter of it: Hub id or folder")
    add("--save_adapter", action="store_true", help="save the adapter as it is, not merged weights")
    add("--output_dir", type=local_path, required=True, help="a new folder")
    add("--num_steps", type=int, default=5, help="K, the generated tokens where nobody asks for another number (5)")
    add("--logit_temperature", type=float, default=1.0, help="T of the soft tokens (1, as in both papers)")
    add("--pooling", default="mean", help="mean, mean_with_prompt or last (mean)")
    add(
        "--prompt_template",
        help="what precedes a text; by default as in training: of the chat template, unless a suffix is given",
    )
    add(
        "--suffix",
        help="what follows every text; by default as in training: of the chat template, unless the other is given",
    )
    add("--document_prompt", default="", help="what precedes a document, but in training and AutoProcessor (nothing)")
    add(
        "--max_length",
        type=int,
        help="most tokens of a text, all included (512, if there is room)",
    )
    add("--save_dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the saved weights (bfloat16)")
    options = parser.parse_args(argv)
    for name in ("prompt_template", "suffix", "document_prompt"):
        if (value := getattr(options, name)) is not None:
            setattr(options, name, unescape(value))
    return options


def check(options: argparse.Namespace) -> None:
    """Raises a ValueError for arguments that don't go together, before anything is loaded."""
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output_dir={str(folder)!r} is there and not an empty folder: choose another")
    gguf = only_gguf_file(options.model)
    if options.save_adapter and not options.adapter:
        raise ValueError("save_adapter needs the adapter that is to be saved: add --adapter")
    if options.save_adapter and gguf:
        raise ValueError(f"save_adapter: an adapter can't be loaded beside a GGUF file ({gguf}); leave it out")
    if not gguf and is_gircse(options.model):
        raise ValueError(f"model={options.model!r} is a GIRCSE model already: load it as it is")
    check_writable(folder)


def convert(options: argparse.Namespace) -> None:
    prompts = {"prompt_template": options.prompt_template, "suffix": options.suffix}
    axes = {name: getattr(options, name) for name in ("num_steps", "logit_temperature", "pooling")}
    # An adapter that doesn't fit raises, also where it is not saved merged.
    model, processor = load(options.model, adapter=options.adapter, **prompts, **axes)
    if options.max_length is not None:
        longest = model.text_limit(options.max_length)
        prompts = {"prompt_template": processor.prompt_template, "suffix": processor.suffix}
        processor = type(processor)(processor.tokenizer, max_length=longest, **prompts)  # raises if it is too small
    if options.save_adapter:
        copy_adapter(options.adapter, options.model, options.output_dir / ADAPTER_FOLDER)
        save_configuration(model, options.output_dir)
        complete(options.output_dir, processor)
    else:
        if options.adapter and options.save_dtype == "bfloat16":
            remedy = "--save_dtype float32 or --save_adapter keeps them"
            logger.warning(
                f"merged weights are rounded to bfloat16, and small changes by the adapter are lost: {remedy}"
            )
        export(model, processor, options.output_dir, options.save_dtype)
    if options.document_prompt:
        file = options.output_dir / PROMPTS
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["prompts"]["document"] = options.document_prompt
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_adapter(adapter: str, model: str, folder: Path) -> None:
    """Copies an adapter, which then names `model` as what it belongs to, also where it has named another place."""
    found = Path(adapter if Path(adapter).is_dir() else snapshot_download(adapter, allow_patterns=[*ADAPTER_FILES]))
    settings = json.loads((found / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    if not (found / ADAPTER_FILES[1]).exists():
        raise ValueError(f"adapter={adapter!r} has no {ADAPTER_FILES[1]}: leave --save_adapter out, and it is merged")
    settings |= {"base_model_name_or_path": place_of(model), "revision": commit_of(model), "inference_mode": True}
    folder.mkdir(parents=True)
    (folder / ADAPTER_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(found / ADAPTER_FILES[1], folder / ADAPTER_FILES[1])


def main(argv: Sequence[str] | None = None) -> None:
    lenient_console()
    options = parse(argv)
    check(options)
    convert(options)
    print(f"Saved to {options.output_dir}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
