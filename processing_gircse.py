"""Text to token ids for GIRCSE. This file owns the prompt: template, truncation, padding, and nothing else does.

A text t with an instruction becomes the one string p + t, then the suffix s:

    p = "Instruct: {instruction}\\nQuery: "      (paper, section 4.1: `Instruct: {task_definition}\\nQuery: {q}`)
    ids = tokens(p + t)[: max_length - |tokens(s)|] + tokens(s)

Without an instruction p is empty, so documents are embedded bare. No special tokens are added, as in the authors'
released code. The suffix (empty by default) is appended after truncation, so an over-long text keeps it.
"""

import json
import operator
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, ProcessorMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The names that tokenizers give these choices: True stands for the first name, False for the last.
PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "do_not_truncate")
# Other arguments that callers pass to tokenizers and processors: the one value that is accepted, as it asks for what
# the processor does anyway (None: no value is), and the remedy that the error names for any other value.
OTHER_ARGUMENTS = {
    "add_special_tokens": (False, "no special tokens are added: write them into prompt or suffix"),
    "return_attention_mask": (True, "it is always returned: drop it from the result"),
    "return_token_type_ids": (False, "the model takes none"),
    "return_overflowing_tokens": (False, "split the text before"),
    "return_special_tokens_mask": (False, "no special tokens are added"),
    "return_offsets_mapping": (False, "ask processor.tokenizer for it"),
    "return_length": (False, "attention_mask.sum(1) is the length"),
    "is_split_into_words": (False, "join the words to a text"),
    "stride": (0, "split the text before"),
    "truncation_side": ("right", "texts are cut at their end, so that the instruction stays"),
    "pad_to_multiple_of": (None, "for batches of one width use padding='max_length'"),
    "padding_side": (None, "set processor.padding_side"),
    "text_pair": (None, "one text at a time is embedded: join the two, or embed each"),
    "text_target": (None, "an embedding has no target: embed it as a text"),
    "images": (None, "the model takes texts alone"),
    "videos": (None, "the model takes texts alone"),
    "audio": (None, "the model takes texts alone"),
}


def _check_texts(texts: list, argument: str, optional: bool = False) -> None:
    """Raise an error naming the first entry that is not a str or can't be encoded as UTF-8; None passes when
    `optional`."""
    for index, item in enumerate(texts):
        if not isinstance(item, str) and not (optional and item is None):
            shown = " ".join(repr(item).split())  # in one line; pandas objects have several
            raise TypeError(
                f"{argument}[{index}] is {shown:.80} of type {type(item).__name__}, but must be a str. "
                f"Pass a str or a list of str{', None for a text without instruction' if optional else ''}."
            )
        try:
            (item or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{argument}[{index}] is {item!r:.80} and holds half a character (a lone surrogate). Cut texts between "
                "characters, or replace such halves."
            ) from error


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Raise an error with the remedy for an argument that is unknown, or asks for what the processor never does."""
    for name, value in arguments.items():
        if name not in OTHER_ARGUMENTS:
            raise TypeError(
                f"GircseProcessor got {name}={value!r:.80}, an argument that it does not know. It takes text, "
                "instruction, prompt, max_length, padding, truncation and return_tensors."
            )
        done, remedy = OTHER_ARGUMENTS[name]
        if value is not None and not (isinstance(value, (int, str)) and value == done):
            raise ValueError(f"{name}={value!r:.80} is not supported ({remedy}). Leave {name} out.")


def _choose(argument: str, value: Any, names: tuple[str, ...]) -> str:
    """The one of `names` that `value` stands for: a name, a bool, a member of transformers' enums such as
    `PaddingStrategy`, or None for the first name."""
    value = getattr(value, "value", value)
    if value is None or isinstance(value, bool):
        return names[-1] if value is False else names[0]
    if value not in names:
        raise ValueError(f"{argument}={value!r:.80} is unknown. Choose True, False or one of {', '.join(names)}.")
    return value


def _is_single(value: Any) -> bool:
    """Whether `value` counts as one text, and not as a collection of texts: a list, an array, a column of a table, a
    generator. Bytes, dicts and sets count as one text, so that they are refused as not being a str."""
    return isinstance(value, (str, bytes, Mapping, Set)) or not isinstance(value, Iterable)


def _respell_tokenizer_config(folder: Path) -> None:
    """Rewrite `tokenizer_config.json` so that transformers 4 and 5 load the tokenizer that was saved.

    Where it names a class such as `GPT2Tokenizer` or `LlamaTokenizer`, transformers 5 takes only the vocabulary and the
    merges from `tokenizer.json` and builds the rest anew, with other ids where the normalizer or the pre-tokenizer is
    another one; transformers 4 may look for files that 5 does not save. `PreTrainedTokenizerFast` takes the whole file.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # say how this process loaded the tokenizer
        config.pop(name, None)
    if (folder / "tokenizer.json").exists():
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # transformers < 5 expects a dict here
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class GircseProcessor(ProcessorMixin):
    """Turns texts and instructions into a padded batch for `GircseModel`.

    Args:
        tokenizer: the backbone's tokenizer; it is never modified.
        prompt_template: what precedes a text that has an instruction; must contain `{instruction}`.
        suffix: appended to every text, and kept when the text is truncated.
        max_length: most tokens per text, prompt and suffix included; an int above the suffix's token count. It can
            also be read and set as `model_max_length`, the name of tokenizers; the tokenizer's own limit is not read.

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
        self._checked_length(max_length, len(self._tokenize([suffix])[0]))
        self.prompt_template = prompt_template
        self.suffix = suffix
        self.max_length = max_length
        self._warned_truncation = False

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "GircseProcessor":
        """As [`ProcessorMixin.from_pretrained`]; also takes the constructor's settings, and `max_length` under the name
        `model_max_length`."""
        if "model_max_length" in kwargs:  # else set on the tokenizer, whose own limit is not read
            kwargs.setdefault("max_length", kwargs.pop("model_max_length"))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def max_length(self) -> int:
        return self.__dict__["max_length"]

    @max_length.setter
    def max_length(self, value: int) -> None:
        # Kept under the name of the constructor's argument, where ProcessorMixin looks for what to save. The suffix may
        # be set later than this, so that its tokens are counted in each call, not here.
        self.__dict__["max_length"] = self._checked_length(value)

    @property
    def model_max_length(self) -> int:
        return self.max_length

    @model_max_length.setter
    def model_max_length(self, value: int) -> None:
        self.max_length = value

    @property
    def pad_token_id(self) -> int:
        """The id that rows are padded with. transformers' pipelines make batches by this and `padding_side`."""
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
        text: str | Iterable[str],
        text_pair: Any = None,
        *,
        instruction: str | Iterable[str | None] | None = None,
        prompt: str | None = None,
        max_length: int | None = None,
        padding: bool | str = True,
        truncation: bool | str = True,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchEncoding:
        """Tokenize B texts; a str is a batch of one.

        Args:
            text: the texts. "" is legal: a row without any token becomes one eos (else bos, else pad) token.
            instruction: one for all texts, or one per text (None or "": no prompt).
            prompt: a literal prefix for all texts, instead of `instruction` (what Sentence Transformers passes).
            max_length: overrides the processor's setting for this call.
            padding: True or "longest", to the longest row; "max_length"; False or "do_not_pad". On
                `tokenizer.padding_side`.
            truncation: True or "longest_first": a text is cut to at most `max_length` tokens; False or
                "do_not_truncate": it stays whole.
            return_tensors: "pt", "np", or None for lists.
            text_pair, kwargs: other arguments of tokenizers, accepted at the values that ask for what is done anyway
                (`add_special_tokens=False`, `return_attention_mask=True`, ...).

        Returns:
            `input_ids` and `attention_mask`, int64 of shape (B, N); (0, 0) for an empty list.

        Raises:
            TypeError: a text, an instruction or the prompt is not a str, or an argument is unknown.
            ValueError: one of them holds half a character (a lone surrogate), both `instruction` and `prompt` are
                given, the number of instructions differs from B, `max_length` is too small, or a prompt so long that
                nothing of a text would be left, a row is empty and the tokenizer has no eos, bos or pad token, rows of
                several lengths are to be a tensor without padding, or an argument asks for something that is not done.
        """
        _check_arguments({"text_pair": text_pair, **kwargs})
        padding = _choose("padding", padding, PADDINGS)
        cut = _choose("truncation", truncation, TRUNCATIONS) != "do_not_truncate"
        texts = [text] if _is_single(text) else list(text)
        _check_texts(texts, "text")
        prompts = self._prompts(len(texts), instruction, prompt)
        # Suffix and max_length are checked in each call, since ProcessorMixin.from_pretrained sets those that it is
        # given after the constructor has checked its own (transformers < 5).
        suffix_ids = self._tokenize([self.suffix])[0]
        max_length = self._checked_length(self.max_length if max_length is None else max_length, len(suffix_ids))
        room = max_length - len(suffix_ids)
        # Prompt and text are one string, so that BPE merges across their boundary are the natural ones.
        rows = self._tokenize([before + item for before, item in zip(prompts, texts, strict=True)])
        truncated = [before for before, ids in zip(prompts, rows, strict=True) if len(ids) > room] if cut else []
        self._check_room(truncated, "instruction" if prompt is None else "prompt", max_length, len(suffix_ids))
        if truncated and not self._warned_truncation:
            self._warned_truncation = True
            logger.warning(
                f"{len(truncated)} of {len(rows)} texts were truncated to max_length={max_length} tokens, prompt and "
                "suffix included. Raise max_length to embed more of them. This is said once per processor."
            )
        rows = [((ids[:room] if cut else ids) + suffix_ids) or [self._empty_id()] for ids in rows]
        width = {"longest": max(map(len, rows), default=0), "max_length": max_length, "do_not_pad": 0}[padding]
        return self._batch(rows, width, return_tensors)

    def decode(self, *args, **kwargs) -> str:
        """Forwarded to the tokenizer. Here for transformers < 5 (4.51), whose `ProcessorMixin` has no such method."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Forwarded to the tokenizer. Here for transformers < 5 (4.51), as `decode` is."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Save settings, tokenizer and this file, so that transformers 4.51 to 5 load the folder.

        `kwargs` go to `push_to_hub`, for example `repo_id`.
        """
        saved = super().save_pretrained(save_directory)
        _respell_tokenizer_config(Path(save_directory))
        if push_to_hub:  # ProcessorMixin would upload before the line above
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return saved

    def _prompts(self, count: int, instruction: str | list[str | None] | None, prompt: str | None) -> list[str]:
        if prompt is not None:
            if instruction is not None:
                raise ValueError(f"instruction={instruction!r:.80} and prompt={prompt!r:.80} are both given: drop one.")
            _check_texts([prompt], "prompt")
            return [prompt] * count
        instructions = [instruction] * count if _is_single(instruction) else list(instruction)
        if len(instructions) != count:
            raise ValueError(
                f"instruction has {len(instructions)} entries for {count} texts. Give one str for all, or one a text."
            )
        _check_texts(instructions, "instruction", optional=True)
        return [self.prompt_for(item) for item in instructions]

    def _check_room(self, prompts: list[str], argument: str, max_length: int, suffix_tokens: int) -> None:
        """Raise a ValueError if texts that are cut keep no token, since all of them would get the same embedding."""
        different = [item for item in dict.fromkeys(prompts) if item]
        for item, ids in zip(different, self._tokenize(different), strict=True):
            if len(ids) + suffix_tokens >= max_length:
                raise ValueError(
                    f"{argument}: the prompt {item!r:.80} has {len(ids)} tokens and the suffix {suffix_tokens}, of "
                    f"max_length={max_length}, which leaves none for a text. Shorten {argument} or raise max_length."
                )

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        # Tokenizers raise an IndexError for an empty list (transformers < 5). verbose=False drops the tokenizer's
        # warning of too many tokens, which would be wrong, as rows are truncated afterwards.
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    @staticmethod
    def _checked_length(max_length: int, suffix_tokens: int = 0) -> int:
        try:
            number = operator.index(max_length)  # takes numpy's integers, too
        except TypeError:
            number = 0
        if isinstance(max_length, bool) or number <= suffix_tokens:
            least = f"greater than the suffix's {suffix_tokens} tokens" if suffix_tokens else ">= 1"
            remedy = "Raise max_length or shorten suffix." if suffix_tokens else "Give for example 512."
            raise ValueError(f"max_length must be an int {least}, got {max_length!r}. {remedy}")
        return number

    def _empty_id(self) -> int:
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            if (token_id := getattr(self.tokenizer, name)) is not None:
                return token_id
        raise ValueError("a text has no token, and tokenizer no eos, bos or pad token to replace it: set eos_token.")

    def _batch(self, rows: list[list[int]], width: int, return_tensors: str | None) -> BatchEncoding:
        """The batch; rows shorter than `width` are padded to it, longer ones stay as they are."""
        if return_tensors is not None and len({max(len(ids), width) for ids in rows}) > 1:
            raise ValueError(
                f"return_tensors={return_tensors!r} needs rows of one length: give return_tensors=None for lists, "
                "padding=True, or truncation=True with padding='max_length'"
            )
        # Not by tokenizer.pad, which refuses a tokenizer without a pad token; giving it one would modify the caller's
        # tokenizer.
        left = self.padding_side == "left"

        def pad(values: list[int], fill: int) -> list[int]:
            fills = [fill] * (width - len(values))
            return fills + values if left else values + fills

        mask = [pad([1] * len(ids), 0) for ids in rows]
        data = {"input_ids": [pad(ids, self.pad_token_id) for ids in rows], "attention_mask": mask}
        if rows or return_tensors is None:
            return BatchEncoding(data, tensor_type=return_tensors)
        # BatchEncoding makes a float tensor of shape (0,) of an empty list: cut an int64 (1, 1) one instead.
        one = BatchEncoding({name: [[0]] for name in data}, tensor_type=return_tensors)
        return BatchEncoding({name: tensor[:0, :0] for name, tensor in one.items()})


GircseProcessor.register_for_auto_class("AutoProcessor")
