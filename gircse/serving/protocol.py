"""OpenAI's `POST /v1/embeddings`: requests checked, answers and errors written. Limits and checks are the handler's."""

from __future__ import annotations

import base64
import json
import re
import struct
from typing import Any

from handler import check_texts, check_values, choose_prompt

PARAMETERS = ("input", "model", "dimensions", "encoding_format", "user", "k", "instruction", "prompt_name")
# The types of OpenAI's errors by their status.
ERROR_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
CODES = {404: "not_found", 429: "rate_limit_exceeded"}


class UnknownModelError(ValueError):
    """The request is for a model that is not served here."""


def read(
    body: Any, name: str, hidden_size: int, processor: Any, prompts: dict[str, str]
) -> tuple[list[str], str, dict[str, Any]]:
    """The texts of a request, their prompt, and its parameters without those that are null.

    Args:
        body: what the request's JSON holds.
        name: of the model that is served.
        hidden_size, processor, prompts: of that model; prompts by their names.

    Raises:
        UnknownModelError: if the request is for another model.
        ValueError: for an unknown parameter, a wrong value, or more than the handler's limits.
    """
    if not isinstance(body, dict) or body.get("input") is None:
        raise ValueError('input is missing: send {"input": "a text"} or {"input": ["a text", ...]}')
    unknown = sorted(body.keys() - {*PARAMETERS})
    if unknown:
        raise ValueError(f"{', '.join(unknown):.80}: no such parameter; there are {', '.join(PARAMETERS)}")
    given = check_values(body, hidden_size)
    for key in ("model", "user"):
        if not isinstance(given.get(key, ""), str):
            raise ValueError(f"{key}={given[key]!r:.80} must be a string")
    if given.get("model", name) != name:
        raise UnknownModelError(f"model={given['model']!r:.80} is not served here: ask for {name!r}")
    if given.get("encoding_format", "float") not in ("float", "base64"):
        raise ValueError(f"encoding_format={given['encoding_format']!r:.80} must be 'float' or 'base64'")
    texts = [given["input"]] if isinstance(given["input"], str) else given["input"]
    for index, text in enumerate(texts if isinstance(texts, list) else ()):
        if type(text) is int or (isinstance(text, list) and all(type(item) is int for item in text)):
            raise ValueError(
                f"input[{index}]={text!r:.80} is token ids, which mean nothing to another tokenizer: send texts"
            )
    prompt = choose_prompt(given.get("instruction"), given.get("prompt_name"), processor, prompts)
    check_texts(texts, prompt, "input")
    return texts, prompt, given


def write(vectors: list[list[float]], name: str, tokens: int, encoding_format: str) -> bytes:
    """The answer's JSON. Vectors in base64 are float32, the lowest byte first."""
    if encoding_format == "base64":
        shown = [base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() for vector in vectors]
    else:
        shown = vectors
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    rest = json.dumps({"object": "list", "model": name, "usage": usage})
    items = ({"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(shown))
    # One by one, as no other thread runs while one call of `dumps` lasts.
    return f'{rest[:-1]}, "data": [{", ".join(map(json.dumps, items))}]}}'.encode()


def write_error(status: int, message: str) -> bytes:
    """The JSON of an error; the handler's messages begin with the parameter that is wrong, if it is one."""
    start = re.match(r"\w+", message)
    param = start[0] if start and start[0] in PARAMETERS else None
    code = "model_not_found" if (status, param) == (404, "model") else CODES.get(status)
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
