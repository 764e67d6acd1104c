"""GIRCSE as a module of Sentence Transformers: text to unit-norm embeddings.

    model = SentenceTransformer(repo, trust_remote_code=True)
    model.encode(texts, prompt_name="STS12", k=20)

This file joins the processor and the model. Batches, prompts by name, pools of processes, and truncated and quantized
embeddings come from Sentence Transformers.
"""

from __future__ import annotations

import copy
import json
import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils import cached_file, logging

try:
    from sentence_transformers.base.modules import InputModule
except ImportError:  # before sentence-transformers 5.4
    from sentence_transformers.models import InputModule

# The subfolder in which a saved model holds an adapter in place of weights; `adapter` in config.json names it.
ADAPTER_FOLDER = "adapter"

logger = logging.get_logger(__name__)


class Outputs(dict):
    """What `forward` returns without gradients. `encode(output_value=...)` looks its value up here by name; a name that
    GIRCSE has nothing for, such as "token_embeddings", raises a ValueError that says what there is."""

    def __missing__(self, name: str) -> Any:
        raise ValueError(
            f"output_value={name!r}: there is one embedding of a text, of generated tokens, and none of each of its "
            "tokens. Use 'sentence_embedding' or None; the states of the generated tokens are "
            "model[0].model(**model.preprocess(texts)).step_states"
        )


class SentenceGircse(InputModule):
    """The only module of a GIRCSE `SentenceTransformer`; `SentenceTransformer(modules=[SentenceGircse(...)])` makes one
    from a model in memory.

    Each folder is loaded with its own copy of the classes. Where two models must be of one class, as for
    `SentenceTransformer.merge`, load the second one with the classes of the first:

        module = type(first[0])(type(first[0].model).from_pretrained(folder), first[0].processor)
        second = SentenceTransformer(modules=[module])

    Args:
        model: a `GircseModel`.
        processor: its `GircseProcessor`.

    Raises:
        ImportError: if the class was imported from a package, under whose name it would be saved.
    """

    forward_kwargs = {"k"}
    config_keys = ["max_seq_length"]  # shown by print(model); the processor saves it

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
            inputs: the texts; a str is one.
            prompt: a literal prefix of all of them.
            max_length: most tokens of a text, prompt and suffix included; `max_seq_length` by default, or
                fewer, if the backbone has no positions for more beside the generated tokens.
            k: the number of generated tokens, as in `forward`.
            processing_kwargs: Sentence Transformers' way to give `max_length`: `{"text": {"max_length": 256}}`.
            kwargs: ignored; Sentence Transformers passes more than this module takes.

        Returns:
            `input_ids` and `attention_mask`, (B, N) int64.

        Raises:
            TypeError: if a text or the prompt is not a str.
            ValueError: if `max_length` leaves no room for a text, or `processing_kwargs` asks for anything else.
        """
        if processing_kwargs:
            text = processing_kwargs.get("text", {})
            # a long text is always cut, so that `truncation`, which may be given with it, changes nothing
            others = processing_kwargs.keys() - {"text"} or text.keys() - {"max_length", "truncation"}
            if others or text.get("truncation", True) is not True:
                raise ValueError(f"processing_kwargs={processing_kwargs!r} may only be {{'text': {{'max_length': N}}}}")
            max_length = text.get("max_length", max_length)
        if max_length is None:
            try:
                steps = None if k is None else operator.index(k)
            except TypeError:  # `forward` raises the error for it
                steps = None
            max_length = self.model.text_limit(self.max_seq_length, steps)
        texts = inputs if isinstance(inputs, str) else list(inputs)
        try:
            return self.processor(texts, prompt=prompt, max_length=max_length).data
        except (TypeError, ValueError) as error:
            if str(error).startswith("text["):
                raise type(error)(f"{error} (Counted in a batch: `encode` sorts texts by their length.)") from error
            raise

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
        features = {**features, "sentence_embedding": output.embeddings}
        # In training a plain dict: wrappers for several processes (DDP, FSDP) search the output for tensors, and may
        # not look into a subclass of dict.
        return features if torch.is_grad_enabled() else Outputs(features)

    @property
    def max_seq_length(self) -> int:
        """Most tokens of a text, prompt and suffix included; an int above the suffix's token count. Setting None takes
        as many as the backbone has positions for beside the generated tokens; a larger value is cut to that when texts
        are embedded. Stored in the processor as `max_length`; the tokenizer's `model_max_length` is not read."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        if value is None and (value := self.model.text_limit()) is None:
            raise ValueError("max_seq_length=None: the backbone's positions have no limit; give an int")
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
            raise ValueError(
                f"backend={backend!r} is not one of this model: use backend='torch'. export_gircse.py writes an ONNX "
                "graph with its steps, which onnxruntime runs by itself (docs/onnx.md)"
            )
        common = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
            "trust_remote_code": trust_remote_code,
        }
        if Path(model_name_or_path).exists():  # an adapter is saved with the name of what it belongs to
            model_name_or_path = os.path.abspath(model_name_or_path)
        for_model = {**(config_kwargs or {}), **(model_kwargs or {})}
        for_processor = {**common, **(tokenizer_kwargs or {}), **(processor_kwargs or {})}
        return cls(
            _load_model(model_name_or_path, common, for_model),
            AutoProcessor.from_pretrained(model_name_or_path, **for_processor),
        )

    def merge_adapter(self) -> None:
        """As `GircseModel.merge_adapters`, also for PEFT's own wrapper around the model (`PeftModel`)."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        model.merge_adapters()
        self.model = model

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves weights, configuration, tokenizer, settings and all code; the library adds its own JSON files.

        Of a model with an adapter, only the adapter is saved, and it is loaded together with the folder or the repo
        that the model came from. Where it could not be loaded so, it is merged, and all weights are saved.
        """
        model, config = self.model, self.model.config
        base = Path(config.name_or_path)
        layers = [module for module in model.modules() if hasattr(module, "base_layer")]
        if not hasattr(model, "peft_config"):
            model.save_pretrained(output_path, safe_serialization=safe_serialization)
        # Merged, since the adapter alone would not give the model again: one made in memory, or in a folder that is
        # gone, has nothing to load it with, one saved over its own folder has lost it, an adapter's file lacks the
        # learned tokens, a disabled one would be loaded as an active one, only one can be saved, and PEFT's own wrapper
        # saves no code.
        elif (
            not (config.name_or_path and (base.exists() or getattr(config, "_commit_hash", None)))
            or base.resolve() == Path(output_path).resolve()
            or config.step_token == "learned"
            or any(layer.disable_adapters or len(layer.active_adapters) > 1 for layer in layers)
            or hasattr(model, "get_base_model")
        ):
            merged = copy.deepcopy(self)
            merged.merge_adapter()
            for weight in model.parameters():  # may be mapped from the file that is written over (safetensors < 0.8)
                weight.data = weight.data.clone()
            merged.model.save_pretrained(output_path, safe_serialization=safe_serialization)
        else:
            if base.exists():
                logger.warning(
                    f"{output_path}: an adapter of the model in {base.resolve()}, with which it loads on this machine "
                    "alone. For a model that loads anywhere, call model[0].merge_adapter() before it is saved"
                )
            self._save_adapter(output_path, str(base.resolve()) if base.exists() else config.name_or_path)
        self.processor.save_pretrained(output_path)
        # Sentence Transformers copies this file only if it was loaded from a model's folder, not if it was imported.
        Path(output_path, "sentence_gircse.py").write_bytes(Path(__file__).read_bytes())

    def _save_adapter(self, output_path: str, base: str) -> None:
        """Saves the active adapter as one of the plain causal LM, with the configuration and the code of the model."""
        backbone, folder = self.model.language_model, Path(output_path, ADAPTER_FOLDER)
        # This writes the code, and the adapter with the names of a GircseModel, which goes: the one that is written
        # below has the names of the plain causal LM.
        self.model.save_pretrained(output_path)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            Path(output_path, name).unlink()
        config = copy.deepcopy(self.model.config)
        config.adapter = ADAPTER_FOLDER
        config.save_pretrained(output_path)
        adapters = {name: self.model.adapter_config_for_causal_lm(name) for name in self.model.peft_config}
        for adapter in adapters.values():
            adapter.base_model_name_or_path, adapter.revision = base, getattr(config, "_commit_hash", None)
            adapter.inference_mode = False
        backbone.peft_config, backbone._hf_peft_config_loaded = adapters, True
        try:
            backbone.save_pretrained(folder)
        finally:
            del backbone.peft_config
            backbone._hf_peft_config_loaded = False
        Path(folder, "generation_config.json").unlink(missing_ok=True)


def _load_model(name: str, where: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Loads the model of a folder or repo. An adapter that `save` wrote is not merged: a trainer that goes on from a
    checkpoint matches the loaded weights with its model's by their names, which merging would change."""
    try:
        config = AutoConfig.from_pretrained(name, **where)
    except (OSError, ValueError):
        # No config.json, as beside an adapter that transformers saved: AutoModel loads that, or raises the error again.
        config = None
    adapter = getattr(config, "adapter", None)
    if adapter is not None:
        place = {key: value for key, value in where.items() if key != "trust_remote_code"}
        place["subfolder"] = "/".join(filter(None, (place["subfolder"], adapter)))
        saved = json.loads(Path(cached_file(name, "adapter_config.json", **place)).read_text(encoding="utf-8"))
    if adapter is None or saved["inference_mode"]:
        return AutoModel.from_pretrained(name, **{**where, **settings})
    # Only this folder's code is run, of the commit that was asked for, and none of the repo that the adapter was
    # trained on.
    trusted = {"trust_remote_code": where["trust_remote_code"], "code_revision": where["revision"]}
    with torch.device("meta"):
        try:
            code = type(AutoModel.from_config(config, **trusted))
        except TypeError:  # loaded before: transformers 5 then knows the class, and gives it the code_revision
            code = type(AutoModel.from_config(config, trust_remote_code=where["trust_remote_code"]))
    kept = {key: getattr(config, key) for key in config.SETTINGS}
    chosen, settings = settings, {**place, "subfolder": "", "revision": saved["revision"], **kept, **settings}
    settings.pop("trust_remote_code", None)
    base = saved["base_model_name_or_path"]
    try:
        model = code.from_pretrained(base, **settings)
    except OSError as error:
        raise OSError(f"{name!r} holds an adapter of {base!r}, which can't be loaded here: {error}") from error
    try:
        model.load_adapter(name, **place)
    except ImportError as error:  # transformers wants a newer peft for it
        logger.warning(f"{name}: the adapter is merged, and can't be trained on: {error}")
        return AutoModel.from_pretrained(name, **{**where, **chosen})
    return model
