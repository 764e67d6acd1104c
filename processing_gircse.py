"""Text to token ids for GIRCSE. This file owns the prompt: template, truncation, padding, and nothing else does.

A text t with an instruction becomes the one string p + t, then the suffix s:

    p = "Instruct: {instruction}\\nQuery: "      (paper, section 4.1: `Instruct: {task_definition}\\nQuery: {q}`)
    ids = tokens(p + t)[: max_length - |tokens(s)|] + tokens(s)

Without an instruction p is empty, so documents are embedded bare. No special tokens are added, as in the authors'
released code. The suffix (empty by default) is appended after truncation, so an over-long text keeps it.
"""

import json
from pathlib import Path

from transformers import BatchEncoding, ProcessorMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)


def _check_texts(texts: list, argument: str, optional: bool = False) -> None:
    """Raise an error naming the first entry that is not a str, or one that can't be encoded (None passes when
    `optional`)."""
    for index, item in enumerate(texts):
        if not isinstance(item, str) and not (optional and item is None):
            raise TypeError(
                f"{argument}[{index}] is {item!r:.80} of type {type(item).__name__}, but must be a str. "
                f"Pass a str or a list of str{', None for a text without instruction' if optional else ''}."
            )
        try:
            (item or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{argument}[{index}] is {item!r:.80} and holds half a character (a lone surrogate). Cut texts between "
                "characters, or replace such halves."
            ) from error


def _respell_tokenizer_config(folder: Path) -> None:
    """Write `tokenizer_config.json` so that transformers 4 and 5 load the tokenizer that was saved.

    By a class such as `GPT2Tokenizer` or `LlamaTokenizer`, 5 would take but the vocabulary and the merges from
    `tokenizer.json` and make up the rest, and 4 may want files that 5 does not save."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how this process loaded it
        config.pop(name, None)
    if (folder / "tokenizer.json").exists():
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4.x expects a dict under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class GircseProcessor(ProcessorMixin):
    """Turns texts and instructions into a padded batch for `GircseModel`.

    Args:
        tokenizer: the backbone's tokenizer; it is never modified.
        prompt_template: what precedes a text that has an instruction; must contain `{instruction}`.
        suffix: appended to every text, and kept when the text is truncated.
        max_length: most tokens per text, prompt and suffix included; an int above the suffix's token count.

    Invalid settings raise a ValueError.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer,
        prompt_template: str = "Instruct: {instruction}\nQuery: ",
        suffix: str = "",
        max_length: int = 512,
        **kwargs,
    ):
        super().__init__(tokenizer, **kwargs)
        if not isinstance(prompt_template, str) or "{instruction}" not in prompt_template:
            raise ValueError(
                f"prompt_template must contain '{{instruction}}', got {prompt_template!r}. "
                "Write for example 'Instruct: {instruction}\\nQuery: '."
            )
        if not isinstance(suffix, str):
            raise ValueError(f"suffix must be a str, got {suffix!r}. Use '' for none.")
        self._check_max_length(max_length, len(self._tokenize([suffix])[0]))
        self.prompt_template = prompt_template
        self.suffix = suffix
        self.max_length = max_length
        self._warned_truncation = False

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    @property
    def pad_token_id(self) -> int:
        """What rows are padded with. Pipelines ask the processor for it and for `padding_side`, to make batches."""
        pad_id = self.tokenizer.pad_token_id
        # Any id of the vocabulary would do: the mask hides it.
        return self.tokenizer.eos_token_id or 0 if pad_id is None else pad_id

    @property
    def padding_side(self) -> str:
        return self.tokenizer.padding_side

    @padding_side.setter
    def padding_side(self, value: str) -> None:
        self.tokenizer.padding_side = value

    def prompt_for(self, instruction: str | None) -> str:
        """The literal prefix put before a text: "" when `instruction` is None or ""."""
        # replace, not format: any other braces of the template stay as they are
        return self.prompt_template.replace("{instruction}", instruction) if instruction else ""

    def __call__(
        self,
        text: str | list[str],
        *,
        instruction: str | list[str | None] | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        padding: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchEncoding:
        """Tokenize B texts; a str is a batch of one.

        Args:
            text: the texts. "" is legal: a row without any token becomes one eos (else bos, else pad) token.
            instruction: one for all texts, or one per text (None or "": no prompt).
            prompt: a literal prefix for all texts, instead of `instruction` (what Sentence Transformers passes).
            max_length: overrides the processor's setting for this call.
            padding: pad to the longest row, on `tokenizer.padding_side`.
            return_tensors: "pt", "np", or None for lists.

        Returns:
            `input_ids` and `attention_mask`, int64 of shape (B, N); (0, 0) for an empty list.

        Raises:
            TypeError: a text, an instruction or the prompt is not a str.
            ValueError: one of them holds half a character (a lone surrogate), both `instruction` and `prompt` are
                given, the number of instructions differs from B, `max_length` is too small, or a row is empty and the
                tokenizer has no eos, bos or pad token.
        """
        texts = list(text) if isinstance(text, (list, tuple)) else [text]
        _check_texts(texts, "text")
        prompts = self._prompts(len(texts), instruction, prompt)
        # Read and checked anew: 4.x sets the settings given to from_pretrained after the constructor.
        suffix_ids = self._tokenize([self.suffix])[0]
        max_length = self.max_length if max_length is None else max_length
        self._check_max_length(max_length, len(suffix_ids))
        room = max_length - len(suffix_ids)
        # Prompt and text are one string, so that BPE merges across their boundary are the natural ones.
        rows = self._tokenize([before + item for before, item in zip(prompts, texts, strict=True)])
        truncated = sum(len(ids) > room for ids in rows)
        if truncated and not self._warned_truncation:
            self._warned_truncation = True
            logger.warning(
                f"{truncated} of {len(rows)} texts were truncated to max_length={max_length} tokens, prompt and suffix "
                "included. Raise max_length to embed more of them. This is said once per processor."
            )
        rows = [(ids[:room] + suffix_ids) or [self._empty_id()] for ids in rows]
        return self._batch(rows, padding, return_tensors)

    def decode(self, *args, **kwargs) -> str:
        """Forwarded to the tokenizer (`ProcessorMixin` has no such method in transformers 4.51)."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Forwarded to the tokenizer."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Save settings, tokenizer and this file, so that transformers 4.51 to 5 load the folder.

        `kwargs` go to `push_to_hub`, for example `repo_id`.
        """
        saved = super().save_pretrained(save_directory)
        _respell_tokenizer_config(Path(save_directory))
        if push_to_hub:  # not by the parent, which would upload before the line above
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def _prompts(self, count: int, instruction: str | list[str | None] | None, prompt: str | None) -> list[str]:
        if prompt is not None:
            if instruction is not None:
                raise ValueError(f"instruction={instruction!r:.80} and prompt={prompt!r:.80} are both given: drop one.")
            _check_texts([prompt], "prompt")
            return [prompt] * count
        if not isinstance(instruction, (list, tuple)):
            instruction = [instruction] * count
        if len(instruction) != count:
            raise ValueError(f"instruction has {len(instruction)} entries for {count} texts. Give a str, or one text.")
        _check_texts(instruction, "instruction", optional=True)
        return [self.prompt_for(item) for item in instruction]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # 4.x raises IndexError on []. verbose=False drops the tokenizer's own length warning, wrong as we truncate.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    @staticmethod
    def _check_max_length(max_length: int, suffix_tokens: int) -> None:
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length <= suffix_tokens:
            raise ValueError(
                f"max_length must be an int greater than the suffix's {suffix_tokens} tokens, got {max_length!r}. "
                "Raise max_length or shorten suffix."
            )

    def _empty_id(self) -> int:
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            if (token_id := getattr(self.tokenizer, name)) is not None:
                return token_id
        raise ValueError("a text has no token, and tokenizer no eos, bos or pad token to replace it: set eos_token.")

    def _batch(self, rows: list[list[int]], padding: bool, return_tensors: str | None) -> BatchEncoding:
        # Not tokenizer.pad: it refuses tokenizers without a pad token, and giving them one would change the user's.
        left = self.padding_side == "left"
        width = max(map(len, rows), default=0) if padding else 0

        def pad(values: list[int], fill: int) -> list[int]:
            fills = [fill] * (width - len(values))
            return fills + values if left else values + fills

        mask = [pad([1] * len(ids), 0) for ids in rows]
        data = {"input_ids": [pad(ids, self.pad_token_id) for ids in rows], "attention_mask": mask}
        if rows or return_tensors is None:
            return BatchEncoding(data, tensor_type=return_tensors)
        # An empty list would become a float tensor of shape (0,): cut an int64 (1, 1) one down instead.
        one = BatchEncoding({name: [[0]] for name in data}, tensor_type=return_tensors)
        return BatchEncoding({name: tensor[:0, :0] for name, tensor in one.items()})


GircseProcessor.register_for_auto_class("AutoProcessor")
