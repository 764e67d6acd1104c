"""Serving on Hugging Face Inference Endpoints, which make one `EndpointHandler(folder)` and call it for each request:

    {"inputs": "a text" or ["a text", ...],
     "parameters": {"k": 5, "instruction": "Given ..., retrieve ...", "normalize": true, "truncate_dim": 64}}

All parameters may be left out. They may also stand beside `inputs`, where `InferenceClient.feature_extraction` puts
them. The answer is a list of numbers for one text, and a list of such lists for a list of texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoProcessor

# Limits of one request.
MAX_TEXTS = 1024
MAX_CHARACTERS = 20_000  # of a text with its prompt
MAX_K = 64
MAX_NUMBERS = 10_000_000  # in the answer
# Limits of one batch, into which longer lists are cut: tokens, generated ones included, and texts, as each text takes a
# few floats for every token of the vocabulary.
TOKENS_PER_BATCH = 16_384
TEXTS_PER_BATCH = 256

PARAMETERS = {
    "k": None,
    "instruction": None,
    "prompt_name": None,
    "normalize": True,
    "truncate_dim": None,
    "return_steps": False,
}


class EndpointHandler:
    """A GIRCSE model that answers requests: in bfloat16 on a GPU, in float32 without one.

    Args:
        path: the folder of the repo. Its code is run, and nothing is downloaded.

    Raises:
        ValueError: if `path` is not the folder of a GIRCSE model, or holds an adapter without its backbone.
    """

    def __init__(self, path: str) -> None:
        if not Path(path).is_dir():
            raise ValueError(f"path={path!r} is not a folder: download the repo and give the folder it is in")
        settings = Path(path, "config.json")
        config = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
        if config.get("adapter") or Path(path, "adapter_config.json").exists():
            raise ValueError(
                f"path={path!r} holds an adapter, whose backbone would have to be downloaded: serve a folder with the "
                "merged weights, which training writes without --save_adapter; of a model loaded by Sentence "
                "Transformers, model[0].merge_adapter() and model.save_pretrained(folder) make one"
            )
        if config.get("model_type") != "gircse":
            found = f"is of type {config.get('model_type')!r}" if settings.exists() else "is not there"
            raise ValueError(f"path={path!r} is no GIRCSE model, as its config.json {found}: serve a trained folder")
        on_gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if on_gpu else torch.float32
        model = AutoModel.from_pretrained(path, trust_remote_code=True, local_files_only=True, dtype=dtype)
        self.model = model.to("cuda" if on_gpu else "cpu")
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True, local_files_only=True)
        settings = Path(path, "config_sentence_transformers.json")
        self.prompts = json.loads(settings.read_text(encoding="utf-8")).get("prompts", {}) if settings.exists() else {}

    def __call__(self, data: dict[str, Any]) -> list:
        """Embeds the texts of a request.

        Args:
            data: `inputs`, a text or a list of B texts, and optionally, inside `parameters` or beside `inputs`:
                `k`, the number of generated tokens, the config's `num_steps` by default;
                `instruction`, one for all texts, or `prompt_name`, a prompt of `config_sentence_transformers.json`;
                `normalize`, unit norm, true by default;
                `truncate_dim` or `dimensions`, the leading dimensions to keep, before they are normalized;
                `return_steps`, z_1..z_k instead of z_k.

        Returns:
            Lists of floats: (B, d), or (d,) for a single text; with `return_steps` (B, k, d) or (k, d).

        Raises:
            ValueError: for an unknown parameter, a wrong value, or more than the limits of this file.
            TypeError, ValueError: as in `GircseModel.generate_embedding`.
        """
        parameters = self._parameters(data)
        prompt = choose_prompt(parameters["instruction"], parameters["prompt_name"], self.processor, self.prompts)
        single = isinstance(data["inputs"], str)
        texts = [data["inputs"]] if single else data["inputs"]
        check_texts(texts, prompt)
        k, size = parameters["k"], parameters["truncate_dim"] or self.model.config.hidden_size
        generates = self.model.config.step_token != "none"
        steps = (k or self.model.config.num_steps) if generates else 1
        if parameters["return_steps"] and len(texts) * steps * size > MAX_NUMBERS:
            asked = f"{len(texts)} texts of {steps} x {size} numbers"
            raise ValueError(f"return_steps gives at most {MAX_NUMBERS}, not {asked}: send fewer texts at a time")
        most = self.model.text_limit(self.processor.max_length, k)
        ids = self.processor(texts, prompt=prompt, max_length=most, padding=False, return_tensors=None)["input_ids"]
        result: list = [None] * len(texts)
        for rows in batches([len(row) for row in ids], steps):
            inputs = padded([ids[row] for row in rows], self.model.device)
            embeddings = self.model.generate_embedding(
                *inputs, k=k, normalize=False, return_steps=parameters["return_steps"]
            )[..., :size]
            if parameters["normalize"]:
                embeddings = F.normalize(embeddings, dim=-1)
            for row, embedding in zip(rows, embeddings.tolist(), strict=True):
                result[row] = embedding
        return result[0] if single else result

    def _parameters(self, data: dict[str, Any]) -> dict[str, Any]:
        """The request's parameters, checked, and the defaults of those that are left out or null."""
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('the request has no inputs: send {"inputs": "a text"} or {"inputs": ["a text", ...]}')
        inside = data.get("parameters") or {}
        if not isinstance(inside, dict):
            raise ValueError(f"parameters={inside!r:.80} must be an object, such as {{'k': 5}}")
        beside = {name: value for name, value in data.items() if name not in ("inputs", "parameters")}
        beside, inside = ({name: it for name, it in side.items() if it is not None} for side in (beside, inside))
        for name in sorted(beside.keys() & inside.keys() - {"options"}):
            if beside[name] != inside[name]:
                raise ValueError(f"{name} is given beside parameters and, as another value, in it: leave one out")
        given = beside | inside
        # Clients send some parameters by themselves: `options`, for the scheduling of the old Inference API; the next
        # three, which ask for what is done anyway; `dimensions`, another name of `truncate_dim`.
        given.pop("options", None)
        for name, done in (("truncate", True), ("truncation_direction", "right"), ("encoding_format", "float")):
            if (value := given.pop(name, None)) not in (None, done, str(done).capitalize()):
                raise ValueError(f"{name}={value!r:.80} is not done: only {done!r} is, which may be left out")
        unknown = sorted(given.keys() - PARAMETERS.keys() - {"dimensions"})
        if unknown:
            raise ValueError(f"{', '.join(unknown):.80}: no such parameter; there are {', '.join(PARAMETERS)}")
        given = check_values(given, self.model.config.hidden_size)
        if "dimensions" in given:
            size = given.pop("dimensions")
            if given.setdefault("truncate_dim", size) != size:
                raise ValueError(f"truncate_dim={given['truncate_dim']} and dimensions={size} are one: leave one out")
        return PARAMETERS | given


# What `serve_gircse.py` uses, too.


def check_values(given: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """What is given and not null; raises a ValueError for a wrong value."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, most in (("k", MAX_K), ("truncate_dim", hidden_size), ("dimensions", hidden_size)):
        if name in given and not (type(given[name]) is int and 1 <= given[name] <= most):
            raise ValueError(f"{name}={given[name]!r:.80} must be a whole number from 1 to {most}")
    for name, kind in (("normalize", bool), ("return_steps", bool), ("instruction", str), ("prompt_name", str)):
        if name in given and not isinstance(given[name], kind):
            raise ValueError(f"{name}={given[name]!r:.80} must be {'a string' if kind is str else 'true or false'}")
    return given


def choose_prompt(instruction: str | None, name: str | None, processor: Any, prompts: dict[str, str]) -> str:
    """The literal prefix of all texts, of an instruction or of the prompt of this name."""
    if name is None:
        return processor.prompt_for(instruction)
    if instruction is not None:
        raise ValueError("instruction and prompt_name are both given: leave one of them out")
    if name not in prompts:
        raise ValueError(f"prompt_name={name!r:.80} is not in config_sentence_transformers.json: use instruction")
    return prompts[name]


def check_texts(texts: Any, prompt: str, argument: str = "inputs") -> None:
    """Raises a ValueError unless `texts` is a list of texts within the limits."""
    if not isinstance(texts, list):
        raise ValueError(f"{argument}={texts!r:.80} must be a text or a list of texts")
    if len(texts) > MAX_TEXTS:
        raise ValueError(f"{argument} has {len(texts)} texts, more than {MAX_TEXTS}: send them in several requests")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{argument}[{index}]={text!r:.80} must be a text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{argument}[{index}]={text!r:.80} holds half a character (a lone surrogate)") from None
        if len(prompt) + len(text) > MAX_CHARACTERS:
            raise ValueError(
                f"{argument}[{index}] has {len(prompt) + len(text)} characters, prompt included, more than "
                f"{MAX_CHARACTERS}: shorten it"
            )


def batches(lengths: list[int], k: int) -> Iterator[list[int]]:
    """Row numbers by batch, longest texts first, so that batches have little padding."""
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while rows:
        count = most_rows(lengths[rows[0]], k)
        yield rows[:count]
        rows = rows[count:]


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> ids and mask, int64 (B, N) each."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # whatever stands where the mask is 0
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(device), mask.to(device)


def most_rows(longest: int, k: int, tokens: int | None = None) -> int:
    """How many texts of at most `longest` tokens a batch of `tokens` may have, by default of `TOKENS_PER_BATCH`."""
    return max(1, min(TEXTS_PER_BATCH, (tokens or TOKENS_PER_BATCH) // (longest + k)))
