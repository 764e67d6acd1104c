"""The folder that onnxruntime and transformers.js load: the ONNX files, tokenizer, configuration and prompts."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from ..command_line import check_writable
from ..loading import PROMPTS, sentence_transformers_settings
from .formats import save, to_float16, to_int8
from .graph import INPUTS, OPSET, StepGraph, check_opset, complete, quiet, remote_module, trace, unfit

FLOAT32, FLOAT16, INT8 = FILES = ("model.onnx", "model_fp16.onnx", "model_quantized.onnx")
# At a lower cosine to PyTorch's vectors, the file in float32 computes something else.
LOWEST = 0.9999
PARTS = ".parts"  # while an export runs: the graph of one step, of which its files are made
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WRITTEN = ("config.json", PROMPTS, *TOKENIZER)
OF_A_HUB_REPO = ("README.md", ".gitattributes", ".git")  # may be there: an export is published from a clone
TEXTS = ["rain", "A red fox runs over the bridge.", "", "How do I renew the card that was stolen from me last week?"]
# The longest text that is compared has the most tokens of a text, or this many. Eager attention takes their square.
LONGEST_COMPARED = 1024


def export_onnx(
    model: Any,
    processor: Any,
    output_dir: str | Path,
    k: int | None = None,
    opset: int = OPSET,
    prompts: dict[str, str] | None = None,
) -> dict[str, float]:
    """Writes the folder, and compares each file with the model.

    Args:
        model: a `GircseModel` in float32 on the CPU, in eager attention.
        processor: its `GircseProcessor`.
        output_dir: a new folder, or that of an earlier export.
        k: the number of steps, `config.num_steps` by default; None with `step_token="none"`.
        opset: version of ONNX's operators.
        prompts: the model's, literally, by name; by default this repo's in the processor's template.

    Returns:
        For each file the lowest cosine to the model's own vectors; NaN if float16 overflows: that file is removed.

    Raises:
        ValueError: for a `k` or an `opset` out of range, a model of another dtype or device, a folder that holds
            something else, a tokenizer without a `tokenizer.json`, or a backbone that can't be exported.
    """
    check_opset(opset)
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"model is in {model.dtype} on {model.device}: load it in float32 on the CPU")
    folder = Path(output_dir)
    check_folder(folder)
    steps = remote_module(model, "inputs_gircse").check_k(model, k)
    suffix = processor.tokenizer(processor.suffix, add_special_tokens=False)["input_ids"] if processor.suffix else []
    most = model.text_limit(processor.max_length, steps)
    if most <= len(suffix):
        raise ValueError(f"k={steps} and the suffix leave no position for a text: choose a smaller k")
    graph = StepGraph(model.eval(), steps, suffix, int(processor("")["input_ids"][0, -1]))
    traced, exact = trace(graph, opset)
    remove_files(folder)
    write_tokenizer(processor, folder, most - len(suffix))
    write_files(graph, traced, exact, folder / "onnx")
    found = compare(model, processor, folder, k, most)
    write_settings(model, processor, folder, steps, prompts)  # they name the files that are left
    return found


def write_files(graph: StepGraph, traced: ir.Model, exact: list[str], folder: Path) -> None:
    whole, table = partial(complete, graph), table_of(graph, traced)
    source = folder / PARTS / FLOAT32
    source.parent.mkdir()
    try:
        save(traced, source)
        save(whole(traced), folder / FLOAT32)
        save(whole(to_float16(source, exact)), folder / FLOAT16)
        save(to_int8(source, table, whole), folder / INT8)
    finally:
        shutil.rmtree(source.parent)


def table_of(graph: StepGraph, exported: ir.Model) -> str:
    """The name that the token embeddings have in the file; tied ones may have that of the head."""
    table = graph.model.get_input_embeddings().weight
    names = [name for name, weight in graph.named_parameters(remove_duplicate=False) if weight is table]
    return next(name for name in names if name in exported.graph.initializers)


def check_folder(folder: Path) -> None:
    """Raises a ValueError for a folder that can't be written to, or has files that are not of an earlier export."""
    others = sorted({path.name for path in folder.glob("*")} - {*WRITTEN, "onnx", *OF_A_HUB_REPO})
    if others:
        raise ValueError(f"output_dir={str(folder)!r} holds {others[0]!r}, which is not of an export; choose another")
    check_writable(folder / "onnx")


def remove_files(folder: Path) -> None:
    """Of an earlier export, whose weights may have been in more files, or which was killed."""
    shutil.rmtree(folder / "onnx" / PARTS, ignore_errors=True)
    for name in FILES:
        for path in (folder / "onnx").glob(f"{name}*"):
            path.unlink()


def write_tokenizer(processor: Any, folder: Path, limit: int) -> None:
    """Writes a tokenizer that gives any client the ids of the processor, but for the suffix, which the graph appends: a
    client may cut a text after its tokenizer has put something behind it. Nothing is added to a text, and what goes
    beyond `limit` tokens is cut at the end."""
    with tempfile.TemporaryDirectory() as saved:
        processor.tokenizer.save_pretrained(saved)
        if not Path(saved, "tokenizer.json").exists():
            name = type(processor.tokenizer).__name__
            raise ValueError(
                f"{name} has no tokenizer.json, which other clients read: use a model with a fast tokenizer"
            )
        content, given = (json.loads(Path(saved, name).read_text(encoding="utf-8")) for name in TOKENIZER)
    pad = processor.pad_token_id
    pad_token = processor.tokenizer.convert_ids_to_tokens(pad)
    content["post_processor"] = None
    content["truncation"] = {"direction": "Right", "max_length": limit, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": pad,
        "pad_type_id": 0,
        "pad_token": pad_token,
    }
    (folder / TOKENIZER[0]).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    tokens = {name: given[name] for name in ("bos_token", "eos_token", "unk_token") if given.get(name)}
    kept = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": limit, "pad_token": pad_token}
    kept |= {"padding_side": "right", "truncation_side": "right", "clean_up_tokenization_spaces": False}
    write_json(folder / TOKENIZER[1], {**tokens, **kept, "model_input_names": list(INPUTS)})


def write_settings(model: Any, processor: Any, folder: Path, k: int, prompts: dict[str, str] | None) -> None:
    """`config.json`, of a kind that transformers.js passes on to onnxruntime as it is, and the prompts."""
    config = model.config
    # Not "gircse": once a process has that type's configuration, AutoTokenizer would read this file by it.
    settings = {name: getattr(config, name) for name in config.SETTINGS} | {"model_type": "gircse_onnx", "num_steps": k}
    settings |= {"hidden_size": config.hidden_size, "vocab_size": model.get_input_embeddings().num_embeddings}
    if external := [path.name for path in sorted((folder / "onnx").glob("*.onnx_data"))]:
        settings["transformers.js_config"] = {
            "use_external_data_format": {name.removesuffix("_data"): True for name in external}
        }
    write_json(folder / "config.json", settings)
    of_texts = sentence_transformers_settings(processor.prompt_template)
    of_texts.pop("requirements", None)  # of the model in PyTorch
    of_texts["prompts"] = prompts or of_texts["prompts"]
    write_json(folder / PROMPTS, of_texts)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(model: Any, processor: Any, folder: Path, k: int | None, most: int) -> dict[str, float]:
    """The lowest cosine of each file to the model, over texts of unlike lengths with and without a prompt, suffix
    included of at most `most` tokens.

    Raises:
        ValueError: if that of the file in float32 is below `LOWEST`.
    """
    window = getattr(model.config.text_config, "sliding_window", None) or 0
    longest = min(most, max(LONGEST_COMPARED, window + 8))
    prompt = processor.prompt_for("Retrieve semantically similar text.")
    texts = [*TEXTS, *(prompt + text for text in TEXTS), " of it" * (most if longest == most else longest // 2)]
    with quiet():  # the last text is truncated on purpose
        inputs = [processor(text, max_length=most) for text in texts]  # k may leave less room than the processor's own
        expected = torch.cat([model.generate_embedding(**each, k=k) for each in inputs])
    tokenizer, found = Tokenizer.from_file(str(folder / "tokenizer.json")), {}
    for name in FILES:
        path = folder / "onnx" / name
        session = onnxruntime.InferenceSession(path)
        vectors = np.concatenate([embed(session, tokenizer, part) for part in (texts[:-1], texts[-1:])])
        found[name] = float(F.cosine_similarity(expected, torch.from_numpy(vectors)).min())
        if name == FLOAT32 and not found[name] >= LOWEST:
            remove_files(folder)
            raise unfit(model, f"its vectors have cosines down to {found[name]:.6f} to those of PyTorch")
        if not np.isfinite(found[name]):
            for file in path.parent.glob(f"{name}*"):
                file.unlink()
    return found


def embed(session: onnxruntime.InferenceSession, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """(B, d) float32, the texts in one batch."""
    rows = tokenizer.encode_batch(texts)
    ids, mask = [row.ids for row in rows], [row.attention_mask for row in rows]
    feed = {name: np.array(value, dtype=np.int64) for name, value in zip(INPUTS, (ids, mask), strict=True)}
    return session.run(None, feed)[0][:, 0]
