"""GIRCSE as a module of Sentence Transformers: text to unit-norm embeddings.

    model = SentenceTransformer(repo, trust_remote_code=True)
    model.encode(texts, prompt_name="STS12", k=20)

This file joins the processor and the model. Batches, prompts by name, pools of processes, truncated and quantized
embeddings are the library's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModel, AutoProcessor

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.models import InputModule


class SentenceGircse(InputModule):
    """The only module of a GIRCSE `SentenceTransformer`; `SentenceTransformer(modules=[SentenceGircse(...)])` makes one
    of a model in memory.

    Args:
        model: a `GircseModel`.
        processor: its `GircseProcessor`.

    Raises:
        ImportError: if the class was imported from a package, under whose name it would be saved.
    """

    forward_kwargs = {"k"}
    config_keys = ["max_seq_length"]  # for print(model); it is the processor that saves it

    def __init__(self, model: Any, processor: Any) -> None:
        if not __name__.startswith("transformers_modules.") and "." in __name__:
            raise ImportError(
                f"SentenceGircse imported as {__name__!r} would be saved under that name, and not load elsewhere: use "
                "SentenceTransformer(folder, trust_remote_code=True), or put the folder itself on sys.path"
            )
        super().__init__()
        self.model = model
        self.processor = processor

    def preprocess(
        self,
        inputs: list[str],
        prompt: str | None = None,
        max_length: int | None = None,
        k: int | None = None,
        processing_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Token ids of B texts.

        Args:
            inputs: the texts.
            prompt: a literal prefix of all of them.
            max_length: most tokens of a text, prompt and suffix included; `max_seq_length` by default, or what the
                backbone's positions leave beside the generated ones.
            k: the number of generated tokens, as in `forward`.
            processing_kwargs: another way to give `max_length`, the library's: `{"text": {"max_length": 256}}`.
            kwargs: not used; the library passes more than this module takes.

        Returns:
            `input_ids` and `attention_mask`, (B, N) int64.

        Raises:
            TypeError: if a text or the prompt is not a str.
            ValueError: if `max_length` leaves no room for a text, or `processing_kwargs` asks for anything else.
        """
        if processing_kwargs:
            text = processing_kwargs.get("text", {})
            if processing_kwargs.keys() - {"text"} or text.keys() - {"max_length", "truncation"}:
                raise ValueError(f"processing_kwargs={processing_kwargs!r} may only be {{'text': {{'max_length': N}}}}")
            max_length = text.get("max_length", max_length)
        if max_length is None and (k is None or isinstance(k, int)):  # a wrong k is refused by `forward`
            room = self.model.max_input_length(k)
            if room is not None and 0 < room < self.max_seq_length:
                max_length = room
        return self.processor(list(inputs), prompt=prompt, max_length=max_length).data

    def tokenize(self, texts: list[str], **kwargs: Any) -> dict[str, Tensor]:
        """What sentence-transformers before 5.4 calls instead of `preprocess`, with the prompt in the texts."""
        return self.preprocess(texts, k=kwargs.get("k"))

    def forward(self, features: dict[str, Tensor], k: int | None = None) -> dict[str, Tensor]:
        """Adds `sentence_embedding`, (B, d) float32 of unit norm, differentiably.

        Args:
            features: `input_ids` and `attention_mask`, (B, N).
            k: the number of generated tokens, `config.num_steps` by default.

        Raises:
            TypeError, ValueError: as in `GircseModel.forward`.
        """
        output = self.model(features["input_ids"], features["attention_mask"], k=k)
        return {**features, "sentence_embedding": output.embeddings}

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text, prompt and suffix included."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.processor.max_length = value

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self.processor.tokenizer = value

    def get_embedding_dimension(self) -> int:
        """The embeddings' d."""
        return self.model.config.hidden_size

    get_sentence_embedding_dimension = get_embedding_dimension  # its name before sentence-transformers 5.4

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> SentenceGircse:
        """Loads model and processor from a folder or a Hub repo; called by `SentenceTransformer(...)`.

        Args:
            model_kwargs: for `AutoModel.from_pretrained`, such as `dtype`.
            processor_kwargs: for `AutoProcessor.from_pretrained`, such as `padding_side` or `max_length`, which may
                also be called `model_max_length`.
            tokenizer_kwargs: the name of `processor_kwargs` before sentence-transformers 5.4.
            config_kwargs: values in place of the configuration's, such as `num_steps`.

        Raises:
            ValueError: if `backend` is not "torch".
        """
        if backend != "torch":
            raise ValueError(f"backend={backend!r} has no loop that feeds hidden states back: use backend='torch'")
        common = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        for_model = {**common, **(config_kwargs or {}), **(model_kwargs or {})}
        for_processor = {**common, **(tokenizer_kwargs or {}), **(processor_kwargs or {})}
        if "model_max_length" in for_processor:
            for_processor.setdefault("max_length", for_processor.pop("model_max_length"))
        return cls(
            AutoModel.from_pretrained(model_name_or_path, **for_model),
            AutoProcessor.from_pretrained(model_name_or_path, **for_processor),
        )

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves weights, configuration, tokenizer, settings and all code; the library adds its own JSON files."""
        self.model.save_pretrained(output_path, safe_serialization=safe_serialization)
        self.processor.save_pretrained(output_path)
        # The library copies this file only if it was loaded from a model's folder, and not if it was imported.
        Path(output_path, "sentence_gircse.py").write_bytes(Path(__file__).read_bytes())
