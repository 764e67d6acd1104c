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

import operator
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
    additive_mask,
    attention_implementation,
    attention_of_any_device,
    check_structure,
    decoder_of,
    embed_tokens,
    find_way,
    load_backbone,
    max_positions,
    name_dtype,
    prompt_mask,
)
from .configuration_gircse import GircseConfig
from .soft_tokens_gircse import after_head, next_token
from .static_steps_gircse import static_states
from .step_loop_gircse import StepLoop


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


class GircsePreTrainedModel(AdapterMixin, PreTrainedModel):
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
        ValueError: if the backbone has a structure that the step loop can't drive. Whether it can is tried at the first
            text, or by `from_causal_lm`.
    """

    def __init__(self, config: GircseConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        check_structure(self.language_model)
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
        language_model = load_backbone(name_or_path, step_token in ("soft", "hard"), **kwargs)
        if Path(name_or_path).exists():  # a folder of this machine says nothing in a published config
            language_model.config.name_or_path = ""
        if adapter is not None:
            where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
            language_model = merge_adapter(language_model, adapter, **where)
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
        with attention_of_any_device(language_model):
            model._check_numerics()
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
                states = static_states(self, *self._check_inputs(input_ids, attention_mask, k))
            embeddings = self._pool(states)
            embeddings = F.normalize(embeddings, dim=-1) if normalize else embeddings
            return embeddings if return_steps else embeddings[:, -1]
        if cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={cache_implementation!r} keeps all texts to the end, and "
                f"tolerance={tolerance!r} does not: leave one of them out"
            )
        if not self._generates:
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
        if not self._generates:
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
        most = self.text_limit(k=k)
        if most is not None and mask.shape[1] > most:
            positions = max_positions(self.config.text_config)
            raise ValueError(
                f"N + k = {mask.shape[1]} + {positions - most} exceeds the backbone's {positions} positions: truncate "
                f"the text to {most} tokens or use a smaller k"
            )
        return input_ids, mask.to(torch.long), k

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
        if self._generates:
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

    @property
    def _generates(self) -> bool:
        return self.config.step_token in ("soft", "hard")

    def _next_token(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """s_{k+1} and d_{k+1} from h'_k; see `next_token`."""
        return next_token(self.get_input_embeddings(), self.get_output_embeddings(), self.config, state)

    def _find_way(self, device: torch.device) -> Way:
        """How this backbone is driven: tried once, and known from then on."""
        implementation = attention_implementation(self.language_model)
        if implementation not in self._ways:
            self._ways[implementation] = find_way(self.language_model, self._tried_states, self._generates, device)
        return self._ways[implementation]

    def _tried_states(self, ids: Tensor, mask: Tensor, way: Way) -> Tensor:
        """States of two steps, (B, n, d), after any token but not the generated one, which rounding may change."""
        if not self._generates:
            return self._loopless_states(ids, mask, min(2, self.config.num_steps), way)
        loop = StepLoop(self, ids, mask, 2, way)
        token = embed_tokens(self.language_model, ids[:, -1:], mask[:, -1:])[:, 0]
        return torch.stack([loop.state, loop.advance(token), loop.advance(token)], dim=1)

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
        prompt = embed_tokens(self.language_model, input_ids, attention_mask)
        learned = self.learned_tokens.weight[:k].to(prompt.dtype).expand(prompt.shape[0], -1, -1)
        mask = F.pad(attention_mask, (0, k), value=1)
        return self._decode_all(torch.cat([prompt, learned], dim=1), mask, way)[:, -k:]

    def _prompt_state(self, input_ids: Tensor, attention_mask: Tensor, way: Way) -> Tensor:
        """The prompt's last state or the mean of its states, without generation: (B, 1, d)."""
        states = self._decode_all(embed_tokens(self.language_model, input_ids, attention_mask), attention_mask, way)
        if self.config.pooling == "last":
            return states[:, -1:]
        wide = states if states.dtype == torch.float64 else states.float()
        weights = attention_mask[..., None].to(wide.dtype)
        return (wide * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def _decode_all(self, inputs: Tensor, mask: Tensor, way: Way) -> Tensor:
        """Last hidden states of all positions in one pass, (B, N, d)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.config.attention == "bidirectional":
            mask = additive_mask(mask, inputs.dtype)[:, None, None].expand(-1, 1, mask.shape[1], -1)  # (B, 1, N, N)
        else:
            mask = prompt_mask(self.language_model, mask, way)
        return decoder_of(self.language_model)(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

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
        if not self._generates:
            return
        expected = self.language_model(input_ids=ids, attention_mask=ones, use_cache=False).logits[:, -1]
        loop = StepLoop(self, ids[:, :-1], ones[:, :-1], 1)
        inputs, state = embed(ids), loop.advance(embed(ids[:, -1]))
        pairs = [("logits", after_head(self.config.text_config, self.get_output_embeddings()(state)), expected)]
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


GircseModel.register_for_auto_class("AutoModel")
