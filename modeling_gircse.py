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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .adapters_gircse import AdapterMixin, merge_adapter
from .backbone_gircse import (
    HUB_ARGUMENTS,
    REPO_ARGUMENTS,
    Way,
    at_least_float32,
    attention_implementation,
    attention_of_any_device,
    check_structure,
    embed_tokens,
    find_way,
    load_backbone,
    max_positions,
    name_dtype,
)
from .configuration_gircse import GircseConfig
from .inputs_gircse import check_inputs, check_options
from .single_pass_gircse import check_bidirectional, single_pass_states
from .soft_tokens_gircse import next_token
from .static_steps_gircse import static_states
from .step_loop_gircse import StepLoop, check_loop, is_sharded, settled_states


@dataclass
class GircseOutput(ModelOutput):
    """Output of [`GircseModel.forward`]; K is 1 for `step_token="none"`.

    Args:
        embeddings: (B, d), float32 (float64 stays), unit norm: z_K.
        step_embeddings: (B, K, d), likewise: z_1..z_K.
        step_states: (B, K, d), the decoder's dtype: g_1..g_K, the last hidden states.
        prompt_state: (B, d), likewise: h'_0, that of the prompt's last token; None where nothing is generated.
    """

    embeddings: Tensor | None = None
    step_embeddings: Tensor | None = None
    step_states: Tensor | None = None
    prompt_state: Tensor | None = None


class GircsePreTrainedModel(AdapterMixin, PreTrainedModel):
    """What all GIRCSE models share: the configuration class, the backbone's capabilities, strict loading."""

    config_class = GircseConfig
    base_model_prefix = "gircse"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    # All are allowed here: the backbone's own class checks the chosen attention when it is built.
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
        name_dtype(kwargs)
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


class GircseModel(GircsePreTrainedModel):
    """A causal LM that generates an embedding in K steps.

    Args:
        config: its `text_config` says which backbone is built.
        language_model: the backbone itself when it exists already; else it is built with random weights.

    Raises:
        ValueError: if the backbone has a structure that the step loop can't work with. Whether its vectors come out
            right is tested at the first text, which raises a ValueError then, or by `from_causal_lm`.
    """

    def __init__(self, config: GircseConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        check_structure(self.language_model)
        if hasattr(self.language_model, "hf_device_map"):  # saving and trainers look for it here
            places = self.language_model.hf_device_map.items()
            self.hf_device_map = {f"language_model.{name}".rstrip("."): place for name, place in places}
        self._ways: dict[str | None, Way] = {}  # how the decoder is called, by implementation of attention
        implementation = attention_implementation(self.language_model)
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
        language_model = load_backbone(name_or_path, step_token in ("soft", "hard"), **kwargs)
        if Path(name_or_path).exists():  # a local path means nothing in a published config
            language_model.config.name_or_path = ""
        if adapter is not None:
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            stays_quantized = bool(kwargs.get("quantization_config"))
            language_model = merge_adapter(language_model, adapter, stays_quantized, **where)
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
        # `model.device` is the device of the first weight, which a device map may have offloaded (meta). Inputs go to
        # that of the first weight that is not.
        device = next((weight.device for weight in model.parameters() if not weight.is_meta), torch.device("cpu"))
        with attention_of_any_device(language_model):
            model._find_way(device)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As [`PreTrainedModel.resize_token_embeddings`], by the backbone, so that new rows get its initialisation."""
        embeddings = self.language_model.resize_token_embeddings(*args, **kwargs)
        # The backbone has a copy of `text_config`, so that the new size has to be written to both (transformers < 5).
        self.config.text_config.vocab_size = self.language_model.config.vocab_size
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
            kwargs: must all be None, as PEFT's wrappers pass a fixed set of arguments, most of them None.

        Raises:
            TypeError: if `k` is not an int, or for an unknown argument.
            ValueError: if `k` < 1, a row has no token, an id is outside the vocabulary, or N + k exceeds the
                backbone's positions.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise TypeError(f"GircseModel.forward got {', '.join(unknown)}; it takes input_ids, attention_mask and k")
        input_ids, attention_mask, k = check_inputs(self, input_ids, attention_mask, k)
        prompt, states = self._step_states(input_ids, attention_mask, k)  # (B, d), (B, K, d)
        step_embeddings = F.normalize(self._pool(prompt, states), dim=-1)
        return GircseOutput(step_embeddings[:, -1], step_embeddings, states, prompt)

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
        check_options(self, tolerance, cache_implementation)
        steps = None
        if tolerance is not None:
            prompt, states, steps = settled_states(self, *check_inputs(self, input_ids, attention_mask, k), tolerance)
        elif cache_implementation == "static" and len(input_ids) > 0:
            prompt, states = static_states(self, *check_inputs(self, input_ids, attention_mask, k))
        else:  # a call of the module, so that hooks on it (device maps, FSDP) run
            output = self(input_ids, attention_mask, k)
            output = output if isinstance(output, tuple) else output.to_tuple()  # one, with return_dict=False
            states, prompt = (*output[2:], None)[:2]
        embeddings = self._pool(prompt, states, steps)  # (B, K, d)
        embeddings = F.normalize(embeddings, dim=-1) if normalize else embeddings
        embeddings = embeddings if return_steps else embeddings[:, -1]
        return embeddings if steps is None else (embeddings, steps)

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
            TypeError, ValueError: as in [`GircseModel.forward`]; if the model has no soft or hard step tokens, or
                `top_k` < 1.
        """
        if not self._generates:
            raise ValueError(f"step_token={self.config.step_token!r} generates no tokens to describe")
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be an int >= 1")
        input_ids, attention_mask, k = check_inputs(self, input_ids, attention_mask, k)
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

    def text_limit(self, max_length: int | None = None, k: int | None = None) -> int | None:
        """The most tokens that a text may have: `max_length`, or fewer if k steps (`config.num_steps` by default) would
        not find room in the backbone's positions; None if nothing limits it.

        Raises:
            ValueError: if the steps leave room for no token.
        """
        positions = max_positions(self.config.text_config)
        if positions is None:
            return max_length
        steps = 0 if self.config.step_token == "none" else self.config.num_steps if k is None else k
        if positions <= steps:
            raise ValueError(f"k={steps} takes all positions of the backbone: choose k below {positions}")
        return positions - steps if max_length is None else min(max_length, positions - steps)

    def _step_states(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """h'_0, (B, d), or None where nothing is generated, and g_1..g_K, (B, K, d)."""
        if len(input_ids) == 0:
            none = torch.zeros(0, k + 1, self.config.hidden_size, dtype=self.dtype, device=self.device)
            return (none[:, 0] if self._generates else None), none[:, 1:]
        if self._generates:
            loop = StepLoop(self, input_ids, attention_mask, k)
            return loop.state, torch.stack([loop.step()[1] for _ in range(k)], dim=1)
        return None, single_pass_states(self, input_ids, attention_mask, k, self._find_way(input_ids.device))

    def _pool(self, prompt: Tensor | None, states: Tensor, steps: Tensor | None = None) -> Tensor:
        """z_1..z_K from h'_0, (B, d), and g_1..g_K, (B, K, d), in float32 at least (Eq. 4). A text that stopped after
        some of the steps, (B,), keeps its last z for the others."""
        states = at_least_float32(states)
        if self.config.pooling != "last" and self.config.step_token != "none":
            count = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
            states = states.cumsum(dim=1)
            if self.config.pooling == "mean_with_prompt":
                states, count = states + at_least_float32(prompt)[:, None], count + 1
            states = states / count[:, None]
        if steps is None:
            return states
        last = torch.arange(states.shape[1], device=states.device).minimum(steps[:, None] - 1)  # (B, K)
        return states.gather(1, last[..., None].expand_as(states))

    @property
    def _generates(self) -> bool:
        return self.config.step_token in ("soft", "hard")

    def _next_token(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """s_{k+1} and d_{k+1} from h'_k; see `next_token`."""
        return next_token(self.get_input_embeddings(), self.get_output_embeddings(), self.config, state)

    def _find_way(self, device: torch.device) -> Way:
        """How this backbone's decoder is called: found by trial once for each implementation of attention, and kept.
        Raises a ValueError that names the backbone if its vectors would be wrong."""
        implementation = attention_implementation(self.language_model)
        if implementation not in self._ways:
            trials = self._tried_states, self._check_way
            self._ways[implementation] = find_way(self.language_model, *trials, self._generates, device)
        return self._ways[implementation]

    def _check_way(self, ids: Tensor, way: Way) -> None:
        """What the comparison of states does not show; raises a ValueError for it."""
        if self.config.attention == "bidirectional":
            check_bidirectional(self, ids)
        if self._generates and not is_sharded(self.language_model):  # else weights can't be read apart from a call
            check_loop(self, ids, way)

    def _tried_states(self, ids: Tensor, mask: Tensor, way: Way) -> Tensor:
        """What `find_way` compares, (B, n, d): h'_0 and the states of two steps. The steps take the prompt's last
        token, not the generated one, which rounding may change."""
        if not self._generates:
            return single_pass_states(self, ids, mask, min(2, self.config.num_steps), way)
        loop = StepLoop(self, ids, mask, 2, way)
        token = embed_tokens(self.language_model, ids[:, -1:], mask[:, -1:])[:, 0]
        return torch.stack([loop.state, loop.advance(token), loop.advance(token)], dim=1)


GircseModel.register_for_auto_class("AutoModel")
