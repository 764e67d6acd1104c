"""Two-stage generation (the paper's appendix F): a causal LM augments a text, and any model embeds both.

Augmentations are kept on disk, a JSON line each, by text and instruction, so that a run that is started again, and the
next model, has none written anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from ..loading import dtype_argument
from ..rows import kept_lines

LONGEST = 512  # tokens of a text that the writer reads
# The paper's Table 7, to the letter.
REQUEST = """Given the INSTRUCTION and the TEXT, produce a helpful augmentation that, when concatenated to the \
original TEXT and embedded, is likely to improve embedding quality for the instruction’s task.

Do not explain yourself or output anything other than the augmentation.

Your answer must be written within {tokens} tokens.

INSTRUCTION: {instruction}

TEXT: {text}"""


class Writer:
    """Writes augmentations by greedy decoding.

    Args:
        model: folder or Hub id of a causal LM; by a chat template, if its tokenizer has one.
        file: where they are kept.
        tokens: the most of an augmentation.
        batch_size: texts that are augmented at once.
        dtype: of the weights.
        device: of the model.
        progress: wraps the starts of the batches.
    """

    def __init__(
        self,
        model: str,
        file: Path,
        tokens: int,
        batch_size: int,
        dtype: torch.dtype,
        device: str,
        progress: Callable[[range], Iterable[int]],
    ) -> None:
        self.file, self.tokens, self.batch_size, self.progress = file, tokens, batch_size, progress
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model = AutoModelForCausalLM.from_pretrained(model, **dtype_argument(dtype)).eval().to(device)
        file.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, str] = {row["key"]: row["augmentation"] for row in kept_lines(file)}

    def __call__(self, texts: Sequence[str], instruction: str) -> list[str]:
        """Each text with its augmentation below it; as they are without an instruction, as documents of a search."""
        if not instruction:
            return list(texts)
        keys = [_key(text, instruction) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.known}
        waiting = sorted(new, key=lambda key: len(new[key]), reverse=True)  # so that little is padded
        with self.file.open("a", encoding="ascii") as file:
            for start in self.progress(range(0, len(waiting), self.batch_size)):
                batch = waiting[start : start + self.batch_size]
                written = self.write([new[key] for key in batch], instruction)
                for key, augmentation in zip(batch, written, strict=True):
                    self.known[key] = augmentation
                    file.write(json.dumps({"key": key, "augmentation": augmentation}) + "\n")
                file.flush()
        return [f"{text}\n{self.known[key]}" for key, text in zip(keys, texts, strict=True)]

    @torch.no_grad()
    def write(self, texts: Sequence[str], instruction: str) -> list[str]:
        """The augmentations of a batch."""
        requests = [self._request(text, instruction) for text in texts]
        chat = bool(self.tokenizer.chat_template)  # has the special tokens in it
        inputs = self.tokenizer(requests, return_tensors="pt", padding=True, add_special_tokens=not chat)
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        settings = {"max_new_tokens": self.tokens, "do_sample": False, "pad_token_id": self.tokenizer.pad_token_id}
        written = self.model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
        return [line.strip() for line in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _request(self, text: str, instruction: str) -> str:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        text = text if len(ids) <= LONGEST else self.tokenizer.decode(ids[:LONGEST])
        request = REQUEST.format(tokens=self.tokens, instruction=instruction, text=text)
        if not self.tokenizer.chat_template:
            return f"{request}\n\nAUGMENTATION:"
        turn = [{"role": "user", "content": request}]
        return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def _key(text: str, instruction: str) -> str:
    return hashlib.blake2b(json.dumps([text, instruction]).encode(), digest_size=16).hexdigest()
