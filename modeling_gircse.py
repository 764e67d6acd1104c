"""GIRCSE: text embeddings from generated soft tokens, over any causal LM (Tsai et al., Algorithm 1).

With token embeddings E (V x d), decoder f, LM head W and a prompt t_1..t_N:

    h'_0 = f(E[t])_N                        prefill; the KV cache is kept
    for k = 1..K:
        s_k = softmax(W h'_{k-1} / T)       soft token (Eq. 5)
        d_k = s_k E                         its embedding (Eq. 6)
        g_k = h'_k = f(d_k | cache)         one new position over the cache
    z_k = mean(g_1..g_k)                    the embedding after k steps (Eq. 4)

Attention is causal, so earlier states never depend on later tokens: going through the differentiable cache gives the
values and the gradients of Algorithm 1, which runs the whole sequence again at each step. All of z_1..z_K are running
means of one pass.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers.utils import ModelOutput, cached_file, can_return_tuple, logging

from .configuration_gircse import GircseConfig

# A common start of fewer tokens than this is not worth a pass of its own.
SHORTEST_SHARED_PREFIX = 8
# On a CPU, a group of rows is prefilled by itself if that saves as many tokens: for about 30, reading all weights once
# more takes as long as the tokens would. On other devices, rows are prefilled together.
LEAST_TOKENS_SAVED = 64
# Static caches come in lengths that are multiples of this, so that few shapes are compiled.
STATIC_CACHE_MULTIPLE = 64
# Vocabularies from this size on are mixed in chunks in training, where keeping B x V floats a step would cost more than
# making them again; and the size of a chunk: what a processor's cache holds; on a GPU, few launches.
SMALLEST_CHUNKED_VOCABULARY = 32768
CHUNK_ON_CPU, CHUNK = 2048, 16384
# Where a file is found on the Hub: arguments of `from_pretrained` that hold for more than one repo, or for one alone.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
REPO_ARGUMENTS = ("revision", "subfolder")
# What architectures call how far layers see that don't see all positions: sliding_window, attention_window_size, ...
WINDOW = r"window(_size|_length)?$"
# What a call of the decoder raises that can't take what it is given: another way of driving it is tried then.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)

logger = logging.get_logger(__name__)


@dataclass
class GircseOutput(ModelOutput):
    """Output of [`GircseModel.forward`]; K is 1 for `step_token="none"`.

    Args:
        embeddings: (B, d), float32 (float64 stays), unit norm: z_K.
        step_embeddings: (B, K, d), likewise: z_1..z_K.
        step_states: (B, K, d), the decoder's dtype: g_1..g_K, the last hidden states.
    """

    embeddings: Tensor | None = None
    step_embeddings: Tensor | None = None
    step_states: Tensor | None = None


SLOW = (
    "{} has no KV cache of transformers {} that could be gone on from, so each step runs the whole sequence: the same "
    "vectors, and far slower."
)


class Way(NamedTuple):
    """How a backbone is driven, as `GircseModel._find_way` tries it out on the backbone itself. The defaults are
    Algorithm 1 as it is written: slow, and right for every decoder that takes embeddings and a mask.

    Args:
        cache: the name under which the decoder takes a KV cache that can be gone on from; None if each step runs the
            whole sequence.
        square_masks: whether the decoder takes a mask of its own for each position of the prompt, (B, 1, N, N).
    """

    cache: str | None = None
    square_masks: bool = False


class GircsePreTrainedModel(PreTrainedModel):
    """What all GIRCSE models share: the configuration class, the backbone's capabilities, strict loading."""

    config_class = GircseConfig
    base_model_prefix = "gircse"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # Each of these is decided by the backbone, which checks its own when it is built.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: the backbone initialises itself, and `GircseModel.__init__` the learned tokens."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> GircsePreTrainedModel:
        """As [`PreTrainedModel.from_pretrained`], but weights that don't match the model raise, and a repo may hold a
        PEFT adapter in place of weights (`config.adapter`): it is merged into the backbone that it was made for.

        Raises:
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape; if an adapter does
                not match its backbone or changes nothing.
        """
        with_info = kwargs.pop("output_loading_info", False)
        _name_dtype(kwargs)
        config = kwargs.get("config")
        if not isinstance(config, PretrainedConfig):
            where = {name: kwargs[name] for name in (*HUB_ARGUMENTS, *REPO_ARGUMENTS) if name in kwargs}
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **where)
        if config.adapter is not None:
            model = cls._from_adapter(pretrained_model_name_or_path, **kwargs)
            return (model, {}) if with_info else model
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
        if wrong:
            found = "; ".join(f"{len(keys)} {kind} ({', '.join(keys[:3])})" for kind, keys in wrong.items())
            raise ValueError(
                f"{pretrained_model_name_or_path!r} does not hold the weights of {cls.__name__} ({found}). "
                "For a plain causal LM use GircseModel.from_causal_lm(...)"
            )
        return (model, info) if with_info else model

    @classmethod
    def _from_adapter(cls, repo: str, config: PretrainedConfig | None = None, **kwargs: Any) -> GircsePreTrainedModel:
        """The model whose backbone, a causal LM or a GIRCSE model on the Hub, gets the adapter of `repo` merged."""
        common = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        where = {name: kwargs.pop(name) for name in REPO_ARGUMENTS if name in kwargs} | common
        # Nothing but this repo's own code is run, whatever the backbone's repo holds.
        for name in ("trust_remote_code", "code_revision", "adapter_kwargs", "_commit_hash"):
            kwargs.pop(name, None)
        # A configuration would take the dtype for itself; it is for the weights, and those are the backbone's.
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
        if not isinstance(config, PretrainedConfig):
            config, kwargs = cls.config_class.from_pretrained(
                config or repo, return_unused_kwargs=True, **where, **kwargs
            )
        kwargs |= dtype
        # transformers 4 keeps the caller's choice in the outer configuration, 5 hands it down.
        chosen = [getattr(part, "_attn_implementation_internal", None) for part in (config.text_config, config)]
        kwargs.setdefault("attn_implementation", chosen[0] or chosen[1])
        where["subfolder"] = "/".join(filter(None, (where.get("subfolder"), config.adapter)))
        folder = _adapter_folder(repo, **where)
        source = _peft(repo).PeftConfig.from_pretrained(folder)
        base, common = source.base_model_name_or_path, {**common, "revision": source.revision}
        if PretrainedConfig.get_config_dict(base, **common)[0].get("model_type") == cls.config_class.model_type:
            language_model = cls.from_pretrained(base, **common, **kwargs).language_model
        else:
            language_model = _load_backbone(base, **common, **kwargs)
        language_model = _merge_adapter(language_model, folder)
        config.text_config, config.adapter = language_model.config, None  # as saved from now on, it has weights
        # Left open, transformers 4 would take the backbone's from it.
        config._attn_implementation = language_model.config._attn_implementation
        return cls(config, language_model).eval()


class GircseModel(GircsePreTrainedModel):
    """A causal LM that generates an embedding in K steps.

    Args:
        config: its `text_config` says which backbone is built.
        language_model: the backbone itself when it exists already; else it is built with random weights.

    Raises:
        ValueError: if the backbone has a structure that the step loop can't drive. Whether it can is tried at the first
            text, or by `from_causal_lm`.
    """

    def __init__(self, config: GircseConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        _check_structure(self.language_model)
        self._ways: dict[str | None, Way] = {}  # by implementation of attention
        implementation = getattr(self.language_model.config, "_attn_implementation", None)
        if config.attention == "bidirectional" and implementation not in ("eager", "sdpa", None):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no bidirectional mask; use 'sdpa' or 'eager' with "
                "attention='bidirectional'"
            )
        if config.step_token == "learned":
            like = {"dtype": self.language_model.dtype, "device": self.get_input_embeddings().weight.device}
            self.learned_tokens = nn.Embedding(config.num_steps, config.hidden_size, **like)
            nn.init.normal_(self.learned_tokens.weight, std=getattr(config.text_config, "initializer_range", 0.02))
        self.post_init()

    @classmethod
    def from_causal_lm(
        cls,
        name_or_path: str,
        adapter: str | None = None,
        *,
        num_steps: int = 20,
        logit_temperature: float = 1.0,
        step_token: str = "soft",
        attention: str = "causal",
        pooling: str = "mean",
        **kwargs: Any,
    ) -> GircseModel:
        """Starts from a plain causal LM, and merges a PEFT adapter that was made for it when one is given.

        Args:
            name_or_path: Hub id or folder of any causal LM.
            adapter: Hub id or folder of a PEFT adapter of that causal LM.
            num_steps, logit_temperature, step_token, attention, pooling: see [`GircseConfig`].
            kwargs: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `revision`, ...); `token`,
                `cache_dir`, `local_files_only` and `force_download` hold for the adapter, too.

        Raises:
            ValueError: if the backbone can't be supported or lacks weights, or the adapter doesn't match it or changes
                nothing.
        """
        language_model = _load_backbone(name_or_path, step_token in ("soft", "hard"), **kwargs)
        if Path(name_or_path).exists():  # a folder of this machine says nothing in a published config
            language_model.config.name_or_path = ""
        if adapter is not None:
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            language_model = _merge_adapter(language_model, adapter, **where)
        config = GircseConfig(
            text_config=language_model.config,
            num_steps=num_steps,
            logit_temperature=logit_temperature,
            step_token=step_token,
            attention=attention,
            pooling=pooling,
        )
        model = cls(config, language_model)
        model.eval()
        with _attention_of_any_device(language_model):
            model._check_numerics()
        return model

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the method of all models of transformers, for adapters of the plain causal LM (keys
        `base_model.model.model.layers...`) and those of a `GircseModel` (`base_model.model.language_model...`). The
        adapter is not merged; `set_adapter(name)` switches between several.

        Raises:
            ValueError: if the adapter does not match the backbone or changes nothing, and is not kept then; if there
                is another of that name.
        """
        if peft_model_id is None or args or "adapter_state_dict" in kwargs:
            return super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        peft, name = _peft(peft_model_id), adapter_name or "default"
        _check_version_of_peft(peft)
        where = {key: kwargs.pop(key) for key in (*HUB_ARGUMENTS, *REPO_ARGUMENTS) if key in kwargs}
        where |= {key: value for key, value in (kwargs.pop("adapter_kwargs", None) or {}).items() if key[0] != "_"}
        if where.get("subfolder"):
            peft_model_id, where = _adapter_folder(peft_model_id, **where), {}
        config = _config_here(peft.PeftConfig.from_pretrained(peft_model_id, **where))
        weights = {
            _key_here(key): value for key, value in peft.load_peft_weights(peft_model_id, "cpu", **where).items()
        }
        _check_changes(peft_model_id, weights)
        loaded = getattr(self, "peft_config", {})  # by name; there is no such attribute without any
        if name in loaded:
            raise ValueError(f"adapter_name={name!r} is taken; choose another, or free it by delete_adapter({name!r})")
        active = self.active_adapters() if loaded else None
        conversions = getattr(self, "_weight_conversions", None)
        try:
            info = super().load_adapter(peft_config=config, adapter_state_dict=weights, adapter_name=name, **kwargs)
            self._check_kept(name, weights, peft.utils.ModulesToSaveWrapper)
        except (KeyError, RuntimeError, ValueError) as error:
            if name in getattr(self, "peft_config", {}):
                self.delete_adapter(name)
            elif not hasattr(self, "peft_config"):  # it failed half-way
                _unwrap(self)
            if active:
                self.set_adapter(active)
            raise _misfit(peft_model_id, self.language_model, error) from error
        finally:
            self._weight_conversions = conversions  # transformers 5.0 would save the model under the adapter's names
        return info

    def _check_kept(self, name: str, weights: dict[str, Tensor], replacement: type) -> None:
        """Raises a ValueError unless all of an adapter is loaded, and the steps see what it does."""
        if not isinstance(self.get_input_embeddings(), (nn.Embedding, replacement)):
            raise ValueError(
                "it adds to the token embeddings, whose weight the steps read as it is; merge it by "
                "GircseModel.from_causal_lm(adapter=...)"
            )
        kept = self.get_adapter_state_dict(name)
        lost = weights.keys() ^ kept.keys()
        # transformers 5 leaves out some of what it does not know (DoRA), so that a key alone says nothing.
        lost |= {key for key in weights.keys() - lost if not torch.equal(weights[key].to(kept[key]), kept[key])}
        if lost:
            raise ValueError(f"unmatched {sorted(lost)[:3]}; GircseModel.from_causal_lm(adapter=...) may take it")

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """As the method of all models of transformers; layers that no adapter is left for are plain ones again."""
        super().delete_adapter(adapter_names)
        _unwrap(self)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As the method of all models of transformers, by the backbone, whose initialisation new rows get."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.config.text_config.vocab_size = self.language_model.config.vocab_size  # copies in transformers < 5
        return embeddings

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, k: int | None = None, **kwargs: Any
    ) -> GircseOutput:
        """Embeds token ids, differentiably.

        Args:
            input_ids: (B, N) int64; padding on either side.
            attention_mask: (B, N), 1 for tokens and 0 for padding; all ones when left out.
            k: the number of steps, `config.num_steps` by default.
            kwargs: must be None each; wrappers that pass a fixed set of arguments (PEFT) may do so.

        Raises:
            TypeError: if `k` is not an int, or for an unknown argument.
            ValueError: if `k` < 1, a row has no token, an id is outside the vocabulary, or N + k exceeds the
                backbone's positions.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"GircseModel.forward got {', '.join(unknown)}; it takes input_ids, attention_mask and k")
        input_ids, attention_mask, k = self._check_inputs(input_ids, attention_mask, k)
        if input_ids.shape[0] == 0:
            empty = torch.zeros(0, k, self.config.hidden_size, device=self.device)
            return GircseOutput(embeddings=empty[:, 0], step_embeddings=empty, step_states=empty)
        states = self._step_states(input_ids, attention_mask, k)  # (B, K, d)
        step_embeddings = F.normalize(self._pool(states), dim=-1)
        return GircseOutput(embeddings=step_embeddings[:, -1], step_embeddings=step_embeddings, step_states=states)

    @torch.no_grad()
    def generate_embedding(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        k: int | None = None,
        normalize: bool = True,
        return_steps: bool = False,
        tolerance: float | None = None,
        cache_implementation: str | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds token ids, without gradients.

        Args:
            input_ids, attention_mask, k: as in [`GircseModel.forward`].
            normalize: unit norm (the default), or the plain mean of the step states.
            return_steps: z_1..z_K instead of z_K.
            tolerance: stop a text once cos(z_k, z_{k-1}) > 1 - tolerance. A text that has stopped leaves the batch and
                keeps its embedding for the remaining steps.
            cache_implementation: `"static"` runs a compiled step (`torch.compile`; CUDA graphs on a GPU) over a cache
                of fixed size, which the model then keeps for the next call of the same shape. The first calls compile.
                For many small batches of few different shapes.

        Returns:
            (B, d), or (B, K, d) with `return_steps`; float32 (float64 stays). With `tolerance` a pair: that and the
            steps used, (B,) int64.

        Raises:
            TypeError, ValueError: as in [`GircseModel.forward`]; for a `tolerance` outside (0, 2] or without a loop;
                for an unknown `cache_implementation`, or one that the backbone can't have.
        """
        if cache_implementation not in (None, "static"):
            raise ValueError(f"cache_implementation={cache_implementation!r} is unknown; use 'static' or leave it out")
        if tolerance is None:
            if cache_implementation is None or len(input_ids) == 0:
                states = self(input_ids, attention_mask, k).step_states
            else:
                states = self._static_states(*self._check_inputs(input_ids, attention_mask, k))
            embeddings = self._pool(states)
            embeddings = F.normalize(embeddings, dim=-1) if normalize else embeddings
            return embeddings if return_steps else embeddings[:, -1]
        if cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={cache_implementation!r} keeps all texts to the end, and "
                f"tolerance={tolerance!r} does not: leave one of them out"
            )
        if self.config.step_token not in ("soft", "hard"):
            raise ValueError(
                f"tolerance={tolerance!r} needs step_token 'soft' or 'hard', not {self.config.step_token!r}"
            )
        if not 0 < tolerance <= 2:
            raise ValueError(f"tolerance={tolerance!r} must be in (0, 2]: texts stop at cosine > 1 - tolerance")
        input_ids, attention_mask, k = self._check_inputs(input_ids, attention_mask, k)
        embeddings, steps = self._until_settled(input_ids, attention_mask, k, tolerance)
        embeddings = F.normalize(embeddings, dim=-1) if normalize else embeddings
        return (embeddings if return_steps else embeddings[:, -1]), steps

    @torch.no_grad()
    def describe_steps(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        k: int | None = None,
        top_k: int = 5,
        tokenizer: Any = None,
    ) -> list[list[list[tuple[int | str, float]]]]:
        """The most probable tokens of each soft token s_1..s_K (the paper's Table 4).

        Args:
            input_ids, attention_mask, k: as in [`GircseModel.forward`].
            top_k: how many tokens a step.
            tokenizer: decodes them; without it they are token ids.

        Returns:
            For each text, for each step, `top_k` pairs (token, probability), most probable first.

        Raises:
            TypeError, ValueError: as in [`GircseModel.forward`]; if the model has no soft or hard step tokens.
        """
        if self.config.step_token not in ("soft", "hard"):
            raise ValueError(f"step_token={self.config.step_token!r} generates no tokens to describe")
        input_ids, attention_mask, k = self._check_inputs(input_ids, attention_mask, k)
        texts: list[list[list[tuple[int | str, float]]]] = [[] for _ in range(input_ids.shape[0])]
        if not texts:
            return texts
        loop = StepLoop(self, input_ids, attention_mask, k)
        for _ in range(k):
            probabilities, _ = loop.step()
            values, ids = probabilities.topk(min(top_k, probabilities.shape[-1]))
            for text, row_ids, row_values in zip(texts, ids.tolist(), values.tolist(), strict=True):
                tokens = row_ids if tokenizer is None else [tokenizer.decode([i]) for i in row_ids]
                text.append(list(zip(tokens, row_values, strict=True)))
        return texts

    def _check_inputs(
        self, input_ids: Tensor, attention_mask: Tensor | None, k: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Checked inputs, every row's tokens moved to the right and columns that are all padding cut."""
        k = self._check_k(k)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must be (B, N)"
            )
        if input_ids.shape[0] == 0:
            return input_ids, attention_mask, k
        mask = attention_mask.to(torch.bool)
        # Generated tokens follow the last column, so padding goes to the left: distances between cache slots are then
        # the distances between positions, which sliding windows rely on, and the side chosen by the caller is moot.
        order = torch.argsort(mask, dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        if not input_ids.is_meta:
            longest = self._check_values(input_ids, mask)
            input_ids, mask = input_ids[:, -longest:], mask[:, -longest:]
        most = self.max_input_length(k)
        if most is not None and mask.shape[1] > most:
            positions = _positions(self.config.text_config)
            raise ValueError(
                f"N + k = {mask.shape[1]} + {positions - most} exceeds the backbone's {positions} positions: truncate "
                f"the text to {most} tokens or use a smaller k"
            )
        return input_ids, mask.to(torch.long), k

    def max_input_length(self, k: int | None = None) -> int | None:
        """The most tokens of a text that leave room for k steps (`config.num_steps` by default) in the backbone's
        positions; None if it has no limit."""
        positions = _positions(self.config.text_config)
        if positions is None or self.config.step_token == "none":
            return positions
        return positions - (self.config.num_steps if k is None else k)

    def _check_k(self, k: int | None) -> int:
        if self.config.step_token == "none":
            if k is not None:
                raise ValueError(
                    f"k={k!r} has no meaning with step_token='none', which generates nothing: leave it out"
                )
            return 1
        name, k = ("config.num_steps", self.config.num_steps) if k is None else ("k", k)
        if isinstance(k, bool) or not hasattr(k, "__index__"):
            raise TypeError(f"{name}={k!r} must be an int >= 1, not {type(k).__name__}")
        k = operator.index(k)  # of numpy, too
        if k < 1:
            raise ValueError(f"{name}={k} must be an int >= 1")
        if self.config.step_token == "learned" and k > self.config.num_steps:
            raise ValueError(f"k={k} exceeds the {self.config.num_steps} learned tokens of this model (num_steps)")
        return k

    def _check_values(self, input_ids: Tensor, mask: Tensor) -> int:
        lengths = mask.sum(1)
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(f"attention_mask: row {row} has no token; give every text at least one (such as eos)")
        vocabulary = self.get_input_embeddings().num_embeddings
        outside = mask & ((input_ids < 0) | (input_ids >= vocabulary))
        if outside.any():
            raise ValueError(
                f"input_ids holds {int(input_ids[outside][0])}, outside the vocabulary 0..{vocabulary - 1}; "
                "use the tokenizer that belongs to this model"
            )
        return int(lengths.max())

    def _step_states(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> Tensor:
        """g_1..g_K, (B, K, d)."""
        if self.config.step_token in ("soft", "hard"):
            loop = StepLoop(self, input_ids, attention_mask, k)
            return torch.stack([loop.step()[1] for _ in range(k)], dim=1)
        return self._loopless_states(input_ids, attention_mask, k, self._find_way(input_ids.device))

    def _loopless_states(self, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way) -> Tensor:
        """What `_step_states` returns where nothing is generated."""
        if self.config.step_token == "none":
            return self._prompt_state(input_ids, attention_mask, way)
        return self._learned_states(input_ids, attention_mask, k, way)

    def _pool(self, states: Tensor) -> Tensor:
        """z_1..z_K from g_1..g_K, (B, K, d), in float32 at least (Eq. 4)."""
        states = states if states.dtype == torch.float64 else states.float()
        if self.config.pooling == "last" or self.config.step_token == "none":
            return states
        steps = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
        return states.cumsum(dim=1) / steps[:, None]

    def _prompt_mask(self, mask: Tensor, way: Way, start: int = 0) -> Tensor:
        """What the prompt's positions see, from `start` on. Where scores and mask overflow (float16), eager attention
        makes NaN of padding that sees nothing, and then of all that multiply its values by 0."""
        length = mask.shape[1]
        if not way.square_masks or mask.is_meta or mask.all() or self._exceeds_window(length):
            return mask  # (B, N), from which the backbone makes what it needs
        earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=mask.device)
        seen = earlier & mask[:, None].bool() | itself
        return _additive_mask(seen, self.language_model.dtype)[:, None, start:]  # (B, 1, N - start, N)

    def _step_mask(self, mask: Tensor) -> Tensor | None:
        """What the generated positions see of the cache: the mask that step k's call takes the first N + k columns of.
        Made once, so that the backbone makes none of its own at each step, which would read the mask's values back from
        a GPU."""
        implementation = self._attention_implementation()
        if implementation not in ("eager", "sdpa") or self._exceeds_window(mask.shape[1]):
            return mask  # (B, N + K), from which the backbone makes what it needs
        if implementation == "sdpa" and not mask.is_meta and mask.all():
            return None  # a single position sees all that is in the cache
        return _additive_mask(mask, self.language_model.dtype)[:, None, None]  # (B, 1, 1, N + K)

    def _attention_implementation(self) -> str | None:
        return getattr(self.language_model.config, "_attn_implementation", None)

    def _find_way(self, device: torch.device) -> Way:
        """How this backbone is driven: tried once, and known from then on."""
        implementation = self._attention_implementation()
        if implementation not in self._ways:
            self._ways[implementation] = self._try_ways(device)
        return self._ways[implementation]

    @torch.compiler.disable
    @torch.no_grad()
    def _try_ways(self, device: torch.device) -> Way:
        """The fastest way in which a padded row beside another one comes out as Algorithm 1 has it for that row alone.

        Names of arguments, kinds of caches and masks differ between architectures and between versions of transformers:
        what the installed one takes is tried instead of looked up.

        Raises:
            ValueError: if no way does, so that vectors would be wrong.
        """
        ids = torch.arange(8, device=device).reshape(2, 4) % self.get_input_embeddings().num_embeddings
        mask = torch.ones_like(ids)
        mask[1, 0] = 0
        training = [module for module in self.language_model.modules() if module.training]
        self.language_model.eval()  # dropout would make every pass another one
        problem = "its states depend on padding, or can't be gone on from"
        try:
            expected = self._tried_states(ids[1:, 1:], mask[1:, 1:], Way())
            other = self._tried_states(ids[1:, -1:], mask[1:, -1:], Way())
            for way in self._possible_ways(ids):
                try:
                    found = self._tried_states(ids, mask, way)[1:]
                except REFUSALS as error:
                    problem = str(error)
                    continue
                if _agree(found, expected, other):
                    if way.cache is None and self.config.step_token in ("soft", "hard"):
                        logger.warning(SLOW.format(type(self.language_model).__name__, transformers.__version__))
                    return way
        except TypeError as error:  # of arguments; what else a plain pass raises is the machine's and says so itself
            problem = str(error)
        finally:
            for module in training:
                module.training = True
        raise _unfit(self.language_model, f"with transformers {transformers.__version__}, {problem}")

    def _possible_ways(self, ids: Tensor) -> list[Way]:
        """Fastest first, `Way()` last."""
        squares = [True, False] if self._attention_implementation() == "eager" else [False]
        names: list[str | None] = [None]
        if self.config.step_token in ("soft", "hard"):
            inputs = self._prompt_embeddings(ids, torch.ones_like(ids))
            with suppress(*REFUSALS):
                # A decoder returns the cache that it has made under the name by which it takes one. Some make another
                # kind, of fixed length, and mask for that (Gemma 2 in transformers 4.51).
                output = _decoder(self.language_model)(inputs_embeds=inputs, use_cache=True)
                names = [name for name, value in output.items() if isinstance(value, DynamicCache)] + names
        return [Way(name, square) for name in names for square in squares]

    def _tried_states(self, ids: Tensor, mask: Tensor, way: Way) -> Tensor:
        """States of two steps, (B, n, d), after any token but not the generated one, which rounding may change."""
        if self.config.step_token not in ("soft", "hard"):
            return self._loopless_states(ids, mask, min(2, self.config.num_steps), way)
        loop, token = StepLoop(self, ids, mask, 2, way), self._prompt_embeddings(ids[:, -1:], mask[:, -1:])[:, 0]
        return torch.stack([loop.state, loop.advance(token), loop.advance(token)], dim=1)

    def _exceeds_window(self, length: int) -> bool:
        """Whether some layer may not see all of `length` positions, so that masks are left to the backbone."""
        config = self.config.text_config
        windows = [value for name, value in vars(config).items() if re.search(WINDOW, name) and type(value) is int]
        if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"} and not windows:
            return True  # how far these layers see is not known
        return any(length > window for window in windows)

    def _static_states(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> Tensor:
        """g_1..g_K, (B, K, d), by a compiled step over a cache of fixed size."""
        slots = -(-(attention_mask.shape[1] + k) // STATIC_CACHE_MULTIPLE) * STATIC_CACHE_MULTIPLE
        self._check_static(slots, input_ids.device)
        loop = StepLoop(self, input_ids, attention_mask, k)
        mask, positions, state = loop.mask, loop.positions, loop.state
        past = {loop.way.cache: self._fixed_cache(loop.past[loop.way.cache], len(mask), slots)}
        hidden = _additive_mask(F.pad(mask, (0, slots - mask.shape[1])), self.language_model.dtype)[:, None, None]
        slot = torch.arange(slots, device=mask.device)
        step, states, state = _compiled_step(state.device.type), [], state.contiguous()
        for end in range(mask.shape[1] - k + 1, mask.shape[1] + 1):
            seen = hidden.masked_fill(slot >= end, torch.finfo(hidden.dtype).min)
            # CUDA graphs write each result to the same place.
            state = step(self, state, seen, positions[:, end - 1 : end].contiguous(), past).clone()
            states.append(state)
        return torch.stack(states, dim=1)

    def _check_static(self, slots: int, device: torch.device) -> None:
        implementation = self._attention_implementation()
        reason = None
        if self.config.step_token not in ("soft", "hard"):
            reason = f"step_token={self.config.step_token!r} has no loop to compile; leave it out"
        elif not _static_caches_count():
            reason = f"transformers {transformers.__version__} is too old for it; update transformers or leave it out"
        elif self._find_way(device).cache is None or self._checkpointing():
            reason = "each step runs the whole sequence; leave it out"
        elif implementation not in ("eager", "sdpa"):
            reason = f"attn_implementation={implementation!r} takes no mask of fixed size; load with 'sdpa'"
        elif self._exceeds_window(slots):
            reason = f"its {slots} positions (N + k rounded up) exceed the backbone's sliding window; leave it out"
        if reason is not None:
            raise ValueError(f"cache_implementation='static' is not possible here: {reason}")

    def _fixed_cache(self, cache: DynamicCache, batch: int, slots: int) -> StaticCache:
        """The prefill's cache, moved into one whose memory stays where it is, as CUDA graphs want it, from call to
        call: the model keeps the last one, for as long as the shape stays the same."""
        key = (batch, slots, self.language_model.dtype, str(self.device), torch.is_inference_mode_enabled())
        kept, fixed = _static_caches().get(self, (None, None))
        if kept != key:
            _static_caches().pop(self, None)
            fixed = StaticCache(config=self.config.text_config, max_cache_len=slots)
            _static_caches()[self] = (key, fixed)
        fixed.reset()
        for index, layer in enumerate(cache.layers):
            fixed.update(layer.keys, layer.values, index)
            layer.keys = layer.values = None
        return fixed

    def _prefill_groups(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> list[Tensor | None]:
        """Numbers of the rows that are prefilled together, (b,) each, or None for all rows: rows with a common start,
        which then runs once, and rows of like length, which then have little padding."""
        if len(input_ids) == 1 or input_ids.device.type != "cpu" or self._runs_in_step():
            return [None]
        lengths = attention_mask.sum(1)
        order = lengths.argsort(stable=True)
        starts = _tokens_first(input_ids, attention_mask)[:, :SHORTEST_SHARED_PREFIX]
        alike: dict[tuple[int, ...], list[int]] = {}
        for row, start in zip(order.tolist(), starts[order].tolist(), strict=True):
            alike.setdefault(tuple(start), []).append(row)
        groups, others = [], []
        for rows in alike.values():
            shared = self._shared_prefix(input_ids[rows], attention_mask[rows], k)
            if shared * (len(rows) - 1) >= LEAST_TOKENS_SAVED:
                groups.append(rows)
            else:
                others += rows
        lengths = lengths.tolist()
        groups.append(sorted(others, key=lengths.__getitem__))
        groups = [part for rows in groups if rows for part in _split_by_length(rows, lengths)]
        return [None] if len(groups) == 1 else [torch.tensor(rows) for rows in groups]

    def _runs_in_step(self) -> bool:
        """Whether this process has to make the same calls of layers as others, which gather sharded weights at each."""
        return self.training and torch.distributed.is_available() and torch.distributed.is_initialized()

    def _shared_prefix(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> int:
        """How many tokens all rows start with, such as an instruction's: their states are the same in every row, so
        that the prefill runs them once. 0 where that does not pay, or would not be exact."""
        batch, length = input_ids.shape
        # Padding then lies between the prefix and the rest, and a sliding window would count it.
        if batch == 1 or input_ids.is_meta or self._exceeds_window(length + k) or self._runs_in_step():
            return 0
        lengths, tokens = attention_mask.sum(1), _tokens_first(input_ids, attention_mask)
        same = (tokens == tokens[:1]).all(0) & (torch.arange(length, device=input_ids.device) < lengths.min() - 1)
        shared = int(same.long().cumprod(0).sum())
        return shared if shared >= SHORTEST_SHARED_PREFIX else 0

    def _next_token(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """s_{k+1} (B, V), in float32 at least, and its embedding d_{k+1} (B, d) from h'_k (Eq. 5 and 6). With
        gradients on and a large vocabulary, soft tokens are made chunk by chunk and s_{k+1} is None."""
        embed, head = _gathered(self.get_input_embeddings()), _gathered(self.get_output_embeddings())
        # A device map may offload weights (to the meta device), or spread them; their modules' calls see to that.
        direct = type(head).forward is nn.Linear.forward
        direct = direct and {head.weight.device, embed.weight.device} == {state.device}
        # A call of the head under FSDP2 would free the weights that the mix's backward pass reads.
        chunked = len(embed.weight) >= SMALLEST_CHUNKED_VOCABULARY or hasattr(head, "unshard")
        if torch.is_grad_enabled() and self.config.step_token == "soft" and direct and chunked:
            probabilities = None
            mixed = _SoftEmbedding.apply(state, head.weight, head.bias, embed.weight, self._scores)
        else:
            probabilities = torch.softmax(self._scores(head(state)), dim=-1)
            if self.config.step_token == "hard":
                return probabilities, embed(probabilities.argmax(dim=-1))
            if embed.weight.is_meta and not state.is_meta:
                table = embed(torch.arange(embed.num_embeddings, device=state.device))  # scaled where the model does
                return probabilities, probabilities.to(table) @ table
            mixed = probabilities.to(embed.weight) @ embed.weight
        # Under autocast the product is in half precision; steps enter the decoder in the dtype that the prompt has.
        mixed = mixed.to(embed.weight.dtype)
        # Gemma 3 scales inside its embedding module, so that a product with the weight alone is short of it.
        scale = getattr(embed, "embed_scale", None)
        return probabilities, mixed if scale is None else mixed * torch.as_tensor(scale).to(mixed)

    def _scores(self, logits: Tensor) -> Tensor:
        """What softmax is taken of, in float32 at least; one by one, from the LM head's output."""
        logits = self._after_head(logits)
        return (logits if logits.dtype == torch.float64 else logits.float()) / self.config.logit_temperature

    def _after_head(self, logits: Tensor) -> Tensor:
        """What the backbone's own forward pass does to the LM head's output."""
        config = self.config.text_config
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _until_settled(
        self, input_ids: Tensor, attention_mask: Tensor, k: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        batch, device = input_ids.shape[0], input_ids.device
        embeddings = torch.zeros(batch, k, self.config.hidden_size, device=device)
        steps = torch.full((batch,), k, dtype=torch.long, device=device)
        if batch == 0:
            return embeddings, steps
        running = torch.arange(batch, device=device)
        loop = StepLoop(self, input_ids, attention_mask, k)
        total, previous, rows = 0, None, None
        for step in range(1, k + 1):
            if rows is not None:
                loop.keep(rows)
            state = loop.step()[1]
            state = state if state.dtype == torch.float64 else state.float()
            embeddings = embeddings.to(state.dtype)
            total = state + (total if rows is None else total[rows])
            current = state if self.config.pooling == "last" else total / step
            embeddings[running, step - 1 :] = current[:, None]
            rows = None
            if previous is not None:
                settled = F.cosine_similarity(current, previous, dim=-1) > 1 - tolerance
                steps[running[settled]] = step
                if settled.all():
                    break
                if settled.any():
                    rows = (~settled).nonzero()[:, 0]
                    running, current = running[rows], current[rows]
            previous = current
        return embeddings, steps

    def _learned_states(self, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way) -> Tensor:
        """K trained tokens after the prompt, in one pass: (B, K, d)."""
        prompt = self._prompt_embeddings(input_ids, attention_mask)
        learned = self.learned_tokens.weight[:k].to(prompt.dtype).expand(prompt.shape[0], -1, -1)
        mask = F.pad(attention_mask, (0, k), value=1)
        return self._decode_all(torch.cat([prompt, learned], dim=1), mask, way)[:, -k:]

    def _prompt_state(self, input_ids: Tensor, attention_mask: Tensor, way: Way) -> Tensor:
        """The prompt's last state or the mean of its states, without generation: (B, 1, d)."""
        states = self._decode_all(self._prompt_embeddings(input_ids, attention_mask), attention_mask, way)
        if self.config.pooling == "last":
            return states[:, -1:]
        wide = states if states.dtype == torch.float64 else states.float()
        weights = attention_mask[..., None].to(wide.dtype)
        return (wide * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def _decode_all(self, inputs: Tensor, mask: Tensor, way: Way) -> Tensor:
        """Last hidden states of all positions in one pass, (B, N, d)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.config.attention == "bidirectional":
            mask = _additive_mask(mask, inputs.dtype)[:, None, None].expand(-1, 1, mask.shape[1], -1)  # (B, 1, N, N)
        else:
            mask = self._prompt_mask(mask, way)
        return _decoder(self.language_model)(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _prompt_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Ids under the mask may be anything (-100 is common); any id of the vocabulary does for them.
        return _gathered(self.get_input_embeddings())(input_ids * attention_mask)

    def _checkpointing(self) -> bool:
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.language_model.modules())

    @torch.no_grad()
    def _check_numerics(self) -> None:
        """Compares what the step loop makes of logits and token embeddings with the backbone's own forward pass."""
        name, embed = type(self.language_model).__name__, self.get_input_embeddings()
        # A device map may offload the first weights, which `self.device` tells of, to the meta device.
        device = next((weight.device for weight in self.parameters() if not weight.is_meta), torch.device("cpu"))
        ids = torch.arange(4, device=device)[None] % embed.num_embeddings
        ones = torch.ones_like(ids)
        if self.config.attention == "bidirectional":
            changed = ids.clone()
            changed[0, -1] = (ids[0, -1] + 1) % embed.num_embeddings
            first = [self._decode_all(embed(x), ones, Way())[:, 0] for x in (ids, changed)]
            if torch.equal(*first):
                raise ValueError(f"{name} stays causal under a bidirectional mask; use attention='causal'")
        self._find_way(device)
        if self.config.step_token not in ("soft", "hard"):
            return
        expected = self.language_model(input_ids=ids, attention_mask=ones, use_cache=False).logits[:, -1]
        loop = StepLoop(self, ids[:, :-1], ones[:, :-1], 1)
        inputs, state = embed(ids), loop.advance(embed(ids[:, -1]))
        pairs = [("logits", self._after_head(self.get_output_embeddings()(state)), expected)]
        if self.config.step_token == "soft" and not embed.weight.is_meta:  # else the loop calls the module, too
            one_hot = F.one_hot(ids[0], embed.num_embeddings).to(embed.weight.dtype)
            scale = torch.as_tensor(getattr(embed, "embed_scale", 1.0)).to(embed.weight)
            pairs.append(("token embeddings", one_hot @ embed.weight * scale, inputs[0]))
        for what, ours, theirs in pairs:
            ours = ours.to(theirs.device)  # a device map has the head wherever there is room
            allowed = (2e-3 if ours.dtype in (torch.float32, torch.float64) else 6e-2) * float(theirs.abs().max())
            if not float((ours - theirs).abs().max()) <= allowed:
                raise ValueError(
                    f"{name} is not supported: its {what} are not what the step loop computes through the KV cache"
                )


def _gathered(module: nn.Module) -> nn.Module:
    """FSDP2 gathers a module's weights when it is called; the step loop reads them without that."""
    if hasattr(module, "unshard"):
        module.unshard()
    return module


def _decoder(language_model: PreTrainedModel) -> nn.Module:
    """f: the causal LM without its head."""
    decoder = language_model.get_decoder() if hasattr(language_model, "get_decoder") else language_model
    # transformers 4.57 says of GPT-2 that it is its own decoder; ModernBERT calls its head so.
    if decoder is language_model or not isinstance(decoder, PreTrainedModel):
        decoder = language_model.base_model
    return getattr(language_model, "model", decoder) if decoder is language_model else decoder


class StepLoop:
    """A batch on its way: the prompt's states, and then one generated position after the other.

    Args:
        model: a [`GircseModel`] with soft or hard step tokens.
        input_ids, attention_mask: (B, N) each, as `_check_inputs` returns them.
        k: the most steps there will be.
        way: how the backbone is driven, by default as the model has found out.

    Attributes:
        state: (B, d), h'_0 at first and h'_k after k steps.
    """

    def __init__(
        self, model: GircseModel, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way | None = None
    ) -> None:
        self.model, self.decoder = model, _decoder(model.language_model)
        self.way = model._find_way(input_ids.device) if way is None else way
        if model._checkpointing():
            # The layers would fill a cache a second time in backward, and differ from what the forward pass saw.
            self.way = self.way._replace(cache=None)
        self.past, self.inputs = {}, None
        if self.way.cache is None:
            self.inputs = model._prompt_embeddings(input_ids, attention_mask)  # (B, N, d), which steps are added to
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            seen = model._prompt_mask(attention_mask, self.way)
            self.state = _decode(self.decoder, self.inputs, seen, positions, {})
        else:
            groups = model._prefill_groups(input_ids, attention_mask, k)
            parts = [self._prefill(input_ids, attention_mask, k, rows) for rows in groups]
            self.state, attention_mask, cache = parts[0] if len(parts) == 1 else _joined(groups, parts)
            self.past = {self.way.cache: cache}
        self.end = attention_mask.shape[1]
        self.mask = F.pad(attention_mask, (0, k), value=1)  # (B, N + K)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)  # (B, N + K)
        self.seen = model._step_mask(self.mask) if self.past else self.mask

    def _prefill(
        self, input_ids: Tensor, attention_mask: Tensor, k: int, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """h'_0 (b, d), the mask in the order of the cache's slots (b, n), and the cache, of the rows of these numbers
        (None for all), with columns that are all padding cut and a common start run once."""
        model, cache = self.model, DynamicCache()
        if rows is not None:
            longest = int(attention_mask[rows].sum(1).max())
            input_ids, attention_mask = input_ids[rows, -longest:], attention_mask[rows, -longest:]
        shared, past = model._shared_prefix(input_ids, attention_mask, k), {self.way.cache: cache}
        if shared:
            input_ids, attention_mask = _prefix_first(input_ids, attention_mask, shared)
        inputs = model._prompt_embeddings(input_ids, attention_mask)
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        if shared:
            first = inputs[:1, :shared], attention_mask[:1, :shared], positions[:1, :shared]
            _decode(self.decoder, *first, past)
            cache.batch_repeat_interleave(len(inputs))
        seen = model._prompt_mask(attention_mask, self.way, shared)
        state = _decode(self.decoder, inputs[:, shared:], seen, positions[:, shared:], past)
        return state, attention_mask, cache

    def step(self) -> tuple[Tensor | None, Tensor]:
        """s_k and g_k, (B, V) and (B, d); s_k is None where `_next_token` makes it chunk by chunk."""
        probabilities, embedding = self.model._next_token(self.state)
        return probabilities, self.advance(embedding)

    def advance(self, embedding: Tensor) -> Tensor:
        """g_k (B, d) after d_k (B, d), whichever token that is of."""
        inputs = embedding[:, None]  # (B, 1, d)
        if not self.past:
            inputs = self.inputs = torch.cat([self.inputs, inputs], dim=1)
        self.end += 1
        seen = None if self.seen is None else self.seen[..., : self.end]
        at = self.positions[:, self.end - inputs.shape[1] : self.end]
        self.state = _decode(self.decoder, inputs, seen, at, self.past)
        return self.state

    def keep(self, rows: Tensor) -> None:
        """Goes on with the rows of these numbers alone, (b,) int64."""
        for name in ("state", "mask", "positions", "inputs", "seen"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])
        for cache in self.past.values():
            cache.reorder_cache(rows)


def _decode(
    decoder: nn.Module, inputs: Tensor, mask: Tensor | None, positions: Tensor, past: dict[str, Cache]
) -> Tensor:
    """The last position's state, (B, d), after `inputs` (B, n, d) have run over the cache, which `past` names as the
    decoder does."""
    output = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=bool(past), **past)
    return output.last_hidden_state[:, -1].to(positions.device)


def _agree(found: Tensor, expected: Tensor, other: Tensor) -> bool:
    """Whether states (1, n, d) are the same up to rounding: far nearer to each other than to those of another text. On
    the meta device there are no values to tell."""
    if found.is_meta:
        return True
    rounding = 0.01 if torch.finfo(found.dtype).eps < 1e-6 and not torch.is_autocast_enabled(found.device.type) else 0.1
    found, expected, other = (x.float() for x in (found, expected, other))
    error, difference, size = (x.norm() for x in (found - expected, other - expected, expected))
    return bool(error <= max(rounding * difference, 1e-4 * size))


def _step(model: GircseModel, state: Tensor, seen: Tensor, position: Tensor, past: dict[str, Cache]) -> Tensor:
    """h'_k from h'_{k-1}, (B, d)."""
    return _decode(_decoder(model.language_model), model._next_token(state)[1][:, None], seen, position, past)


@functools.cache
def _static_caches_count() -> bool:
    """Whether static caches know by themselves where the next token goes, as they do from some 5.x on: tried."""
    config = CONFIG_MAPPING["qwen2"](num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=1)
    try:
        cache, one = StaticCache(config=config, max_cache_len=3), torch.ones(1, 1, 1, 1)
        for _ in range(2):
            keys, _ = cache.update(one, one, 0)
        return keys.flatten().tolist() == [1, 1, 0] and int(cache.get_seq_length()) == 2
    except REFUSALS:
        return False


@functools.cache
def _static_caches() -> WeakKeyDictionary[GircseModel, tuple[tuple, StaticCache]]:
    """Of each model that was asked for one; not an attribute, as it's no part of a copied or pickled model."""
    return WeakKeyDictionary()


@functools.cache
def _compiled_step(device_type: str) -> Any:
    return torch.compile(_step, mode="reduce-overhead" if device_type == "cuda" else None)


class _SoftEmbedding(torch.autograd.Function):
    """m = p E with p = softmax(x), x = scores(W h + b), without keeping (B, V) floats for the backward pass.

    Forward walks the vocabulary in chunks with a running maximum and sum (online softmax). Backward makes each chunk's
    p again: with g the gradient of m, that of x is p * (g E^T - g . m). A tied table (E is W) gets one gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, state: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor, scores: Callable[[Tensor], Tensor]
    ) -> Tensor:
        device = state.device.type
        ctx.scores, ctx.tied = scores, weight is table
        ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        ctx.chunk = CHUNK_ON_CPU if device == "cpu" else CHUNK
        high = total = mixed = None
        for rows in _chunks(len(weight), ctx.chunk):
            x = scores(F.linear(state, weight[rows], None if bias is None else bias[rows]))  # (B, C)
            peak = x.amax(-1, keepdim=True)
            new = peak if high is None else torch.maximum(high, peak)
            p = (x - new).exp()
            part_total, part_mixed = p.sum(-1, keepdim=True), (p.to(table.dtype) @ table[rows]).to(x.dtype)
            if high is None:
                total, mixed = part_total, part_mixed
            else:
                shrink = (high - new).exp()
                total, mixed = total * shrink + part_total, mixed * shrink + part_mixed
            high = new
        mixed = mixed / total
        ctx.save_for_backward(state, weight, bias, table, mixed, high + total.log())
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, weight, bias, table, mixed, log_total = ctx.saved_tensors
        _, for_weight, for_bias, for_table, _ = ctx.needs_input_grad
        d_weight = torch.empty_like(weight) if for_weight else None
        d_bias = torch.empty_like(bias) if for_bias else None
        d_table = torch.empty_like(table) if for_table and not ctx.tied else None
        d_state, g_dot_m = torch.zeros_like(state, dtype=mixed.dtype), (grad * mixed).sum(-1, keepdim=True)
        g = grad.to(table.dtype)
        with torch.autocast(state.device.type, **ctx.autocast):
            for rows in _chunks(len(weight), ctx.chunk):
                with torch.enable_grad():
                    logits = F.linear(
                        state.detach(), weight.detach()[rows], None if bias is None else bias.detach()[rows]
                    )
                    x = ctx.scores(logits.requires_grad_())
                p = (x.detach() - log_total).exp()
                dx = p * ((g @ table[rows].T).to(p.dtype) - g_dot_m)
                d_logits = torch.autograd.grad(x, logits, dx)[0].to(weight.dtype)
                p = p.to(table.dtype)
                d_state += d_logits @ weight[rows]
                if d_weight is not None and ctx.tied:  # both products at once
                    d_weight[rows] = torch.cat([d_logits, p]).T @ torch.cat([state, g])
                elif d_weight is not None:
                    d_weight[rows] = d_logits.T @ state
                if d_table is not None:
                    d_table[rows] = p.T @ g
                if d_bias is not None:
                    d_bias[rows] = d_logits.sum(0)
        return d_state.to(state.dtype), d_weight, d_bias, d_table, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _tokens_first(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Rows of padding and tokens, (B, N) -> each row's tokens, and then its last one again and again."""
    length = input_ids.shape[1]
    index = (length - attention_mask.sum(1))[:, None] + torch.arange(length, device=input_ids.device)
    return input_ids.gather(1, index.clamp(max=length - 1))


def _split_by_length(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Row numbers, shortest row first, in groups that are padded to their own longest row, as far as that pays."""
    saved = [count * (lengths[rows[-1]] - lengths[rows[count - 1]]) for count in range(1, len(rows))]
    if max(saved, default=0) < LEAST_TOKENS_SAVED:
        return [rows]
    count = saved.index(max(saved)) + 1
    return _split_by_length(rows[:count], lengths) + _split_by_length(rows[count:], lengths)


def _joined(
    groups: list[Tensor], parts: list[tuple[Tensor, Tensor, DynamicCache]]
) -> tuple[Tensor, Tensor, DynamicCache]:
    """What `StepLoop._prefill` returns of each group -> the same of all rows in their order; shorter ones have empty
    slots on the left, which the mask hides."""
    states, masks, caches = zip(*parts, strict=True)
    order, longest = torch.cat(groups).argsort(), max(mask.shape[1] for mask in masks)
    mask = torch.cat([F.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])[order]
    joined = DynamicCache()
    for index, layers in enumerate(zip(*map(_keys_and_values, caches), strict=True)):
        padded = (
            torch.cat([F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in side])[order]
            for side in zip(*layers, strict=True)
        )
        joined.update(*padded, index)
    return torch.cat(states)[order], mask, joined


def _keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, (B, heads, N, size) each."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))  # transformers < 4.54


def _prefix_first(input_ids: Tensor, attention_mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Rows of padding and tokens -> rows of the first `shared` tokens, padding and the other tokens."""
    position = attention_mask.cumsum(1)  # 0 for padding, which is on the left
    order = ((position == 0).long() + 2 * (position > shared).long()).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _check_structure(language_model: PreTrainedModel) -> None:
    """Refuses, by name, a backbone whose parts the step loop can't use as they are. Whether it can be driven is tried
    by `GircseModel._find_way`, so that this holds only what no trial of a few tokens would show."""
    config, reason = language_model.config, None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif _decoder(language_model) is language_model or language_model.get_output_embeddings() is None:
        reason = "it has no decoder and LM head that can be called apart"
    elif config.get_text_config() is not config:
        reason = "it is multimodal (its text part, saved as a causal LM of its own, may be one)"
    elif config.model_type not in CONFIG_MAPPING or not isinstance(config, CONFIG_MAPPING[config.model_type]):
        reason = "it is made by code of its own, which the saved model would lack"
    elif getattr(config, "attention_chunk_size", None):  # Llama 4
        reason = "its layers count their chunks of attention from the padding on, not from the text"
    elif getattr(config, "hidden_size_per_layer_input", None):
        reason = "its layers read the token ids again, and a soft token has none"
    if reason is not None:
        raise _unfit(language_model, reason)


def _unfit(language_model: PreTrainedModel, reason: str) -> ValueError:
    name = type(language_model).__name__
    return ValueError(f"{name} can't be a GIRCSE backbone: {reason}; choose a decoder-only attention model")


def _load_backbone(name_or_path: str, needs_head: bool = True, **kwargs: Any) -> PreTrainedModel:
    """A plain causal LM. What its checkpoint lacks would be random: a ValueError, but for a head that is not needed."""
    _name_dtype(kwargs)
    model, info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if kwargs.get("gguf_file"):  # which is dequantized at loading: no loader of what is saved may take it for quantized
        _drop_quantization(model)
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    lost = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    lost = [key for key in lost if needs_head or key.rpartition(".")[0] not in head]
    if lost:
        raise ValueError(
            f"{name_or_path!r} lacks {len(lost)} weights of {type(model).__name__}, such as {lost[0]!r}, which would "
            "be random: choose a checkpoint of the whole causal LM"
        )
    return model


def _drop_quantization(model: PreTrainedModel) -> None:
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def _name_dtype(kwargs: dict[str, Any]) -> None:
    """Has the dtype under the name that the installed transformers takes: `torch_dtype` until 4.55, `dtype` since."""
    given = [kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs]
    if given:
        kwargs["dtype" if hasattr(PretrainedConfig(), "dtype") else "torch_dtype"] = given[-1]


def _positions(config: PretrainedConfig) -> int | None:
    """How many positions a text and its steps may take in a backbone; None if it has no limit.

    LongRoPE turns all texts of a batch in another way as soon as one of them is longer than the original limit, and a
    step may pass it with a cache from before: up to there, a text's vector is its own."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings")
        return original or config.original_max_position_embeddings
    return getattr(config, "max_position_embeddings", None)


def _additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and 1 -> what is added to attention scores, of the same shape."""
    hidden = attention_mask == 0
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def _merge_adapter(language_model: PreTrainedModel, adapter: str, **where: Any) -> PreTrainedModel:
    """The causal LM with a PEFT adapter of that causal LM merged into its weights."""
    peft = _peft(adapter)
    config = peft.PeftConfig.from_pretrained(adapter, **where)
    tied = _is_tied(language_model)
    trainable = {name: weight.requires_grad for name, weight in language_model.named_parameters()}
    try:
        model = peft.PeftModel(language_model, config)
        ends = (language_model.get_input_embeddings(), language_model.get_output_embeddings())
        if tied and any(isinstance(end, peft.tuners.tuners_utils.BaseTunerLayer) for end in ends):
            raise ValueError(
                "it changes the token embeddings or the LM head, which are one weight there, by themselves; train it "
                "without these among its target_modules (modules_to_save may hold them)"
            )
        result = model.load_adapter(adapter, "default", **where)
        # The adapter's own weights carry its name, whatever its kind (LoRA, IA3, ...).
        lost = [key for key in result.missing_keys if ".default" in key] + list(result.unexpected_keys)
        if lost:
            raise ValueError(f"unmatched {lost[:3]}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise _misfit(adapter, language_model, error) from error
    _check_changes(adapter, dict(model.named_parameters()))
    merged = model.merge_and_unload()
    for name, weight in merged.named_parameters():
        weight.requires_grad_(trainable.get(name, True))  # PEFT has frozen them all
    if tied and not _is_tied(merged):  # the adapter brought its own; nothing may tie them again
        merged.config.tie_word_embeddings = False
        merged.all_tied_weights_keys = {}
    return merged


@contextmanager
def _attention_of_any_device(language_model: PreTrainedModel) -> Iterator[None]:
    """For a pass on the CPU, where flash attention, which may be chosen for later, can't run."""
    config, device = language_model.config, language_model.get_input_embeddings().weight.device
    chosen = getattr(config, "_attn_implementation", None)
    if device.type != "cpu" or chosen in ("eager", "sdpa", None):
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _is_tied(language_model: PreTrainedModel) -> bool:
    head = language_model.get_output_embeddings()
    return head is not None and head.weight is language_model.get_input_embeddings().weight


def _adapter_folder(adapter: str, subfolder: str, **where: Any) -> str:
    """The local copy of an adapter in a subfolder; offline, PEFT looks for its weights in the wrong place there."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return str(Path([cached_file(adapter, name, subfolder=subfolder, **where) for name in names][0]).parent)


def _unwrap(model: PreTrainedModel) -> None:
    """Puts the layers back that PEFT wraps for no adapter any more, as the wrappers change the names of weights."""
    wrapped = []
    for name, module in model.named_modules():
        plain = getattr(module, "base_layer", getattr(module, "original_module", None))
        if plain is not None and not (hasattr(model, "peft_config") and {*module.parameters()} - {*plain.parameters()}):
            wrapped.append((name, plain))
    for name, plain in reversed(wrapped):  # inner wrappers first
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)


def _peft(adapter: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapter={adapter!r} needs the peft package: pip install peft") from error
    return peft


def _check_version_of_peft(peft: Any) -> None:
    """Raises an ImportError if the installed transformers switches adapters by a newer peft alone."""
    try:
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils import check_peft_version
    except ImportError:  # wherever it is then, transformers looks itself
        return
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise ImportError(
            f"transformers {transformers.__version__} needs peft >= {MIN_PEFT_VERSION} for unmerged adapters, and "
            f"this is peft {peft.__version__}: pip install -U peft, or merge the adapter by "
            "GircseModel.from_causal_lm(adapter=...), which works with this one"
        ) from error


def _misfit(adapter: str, language_model: PreTrainedModel, reason: Exception) -> ValueError:
    return ValueError(f"adapter={adapter!r} does not fit {type(language_model).__name__}: {reason}")


def _check_changes(adapter: str, weights: dict[str, Tensor]) -> None:
    updates = [weight for name, weight in weights.items() if "lora_B" in name]
    if updates and not any(weight.any() for weight in updates):
        raise ValueError(f"adapter={adapter!r} changes nothing: all of its lora_B weights are zero; was it trained?")


def _key_here(key: str) -> str:
    """A key of an adapter's file, of the plain causal LM or of a `GircseModel`, as a key of a `GircseModel`."""
    key = key.removeprefix("base_model.model.")
    return key if key.startswith(("language_model.", "learned_tokens.")) else f"language_model.{key}"


def _config_here(config: Any) -> Any:
    """A PEFT configuration whose regular expressions of names hold in a `GircseModel`, too."""
    for field in ("target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, field, None), str):  # a regular expression of whole names
            setattr(config, field, _pattern_here(value))
    for field in ("alpha_pattern", "rank_pattern"):
        if value := getattr(config, field, None):
            setattr(config, field, {_pattern_here(key): number for key, number in value.items()})
    return config


def _pattern_here(pattern: str) -> str:
    """A regular expression of names of the plain causal LM or of a `GircseModel`, as one of a `GircseModel`."""
    return rf"(language_model\.)?({pattern.removeprefix('^')})"


GircseModel.register_for_auto_class("AutoModel")
