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

import inspect
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_gircse import GircseConfig

# What the step loop passes to the decoder; a backbone without one of these can't be driven by it.
DECODER_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache")
# A pass of its own costs more than it saves for fewer tokens.
SHORTEST_SHARED_PREFIX = 8
# Layer types whose whole state is a key-value cache.
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


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
        """As [`PreTrainedModel.from_pretrained`], but weights that don't match the model raise.

        Raises:
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape.
        """
        with_info = kwargs.pop("output_loading_info", False)
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
        ValueError: if the backbone can't be driven through a KV cache, or its LM head can't be reproduced.
    """

    def __init__(self, config: GircseConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        _check_structure(self.language_model)
        implementation = getattr(self.language_model.config, "_attn_implementation", None)
        if config.attention == "bidirectional" and implementation not in ("eager", "sdpa", None):
            raise ValueError(
                f"attn_implementation={implementation!r} takes no bidirectional mask; use 'sdpa' or 'eager' with "
                "attention='bidirectional'"
            )
        if config.step_token == "learned":
            self.learned_tokens = nn.Embedding(config.num_steps, config.hidden_size, dtype=self.language_model.dtype)
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
            kwargs: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`, `revision`, ...).

        Raises:
            ValueError: if the backbone can't be supported, or the adapter doesn't match it or changes nothing.
        """
        language_model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
        if Path(name_or_path).exists():  # a folder of this machine says nothing in a published config
            language_model.config.name_or_path = ""
        if adapter is not None:
            language_model = _merge_adapter(language_model, adapter)
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Embeds token ids, without gradients.

        Args:
            input_ids, attention_mask, k: as in [`GircseModel.forward`].
            normalize: unit norm (the default), or the plain mean of the step states.
            return_steps: z_1..z_K instead of z_K.
            tolerance: stop a text once cos(z_k, z_{k-1}) > 1 - tolerance. A text that has stopped leaves the batch and
                keeps its embedding for the remaining steps.

        Returns:
            (B, d), or (B, K, d) with `return_steps`; float32 (float64 stays). With `tolerance` a pair: that and the
            steps used, (B,) int64.

        Raises:
            TypeError, ValueError: as in [`GircseModel.forward`]; for a `tolerance` outside (0, 2] or without a loop.
        """
        if tolerance is None:
            output = self(input_ids, attention_mask, k)
            embeddings = output.step_embeddings if normalize else self._pool(output.step_states)
            return embeddings if return_steps else embeddings[:, -1]
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
        for probabilities, _ in self._steps(input_ids, attention_mask, k):
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
        positions = getattr(self.config.text_config, "max_position_embeddings", None)
        generated = 0 if self.config.step_token == "none" else k
        if positions is not None and mask.shape[1] + generated > positions:
            raise ValueError(
                f"N + k = {mask.shape[1]} + {generated} exceeds the backbone's {positions} positions: truncate the "
                f"text to {positions - generated} tokens or use a smaller k"
            )
        return input_ids, mask.to(torch.long), k

    def _check_k(self, k: int | None) -> int:
        if self.config.step_token == "none":
            if k is not None:
                raise ValueError(
                    f"k={k!r} has no meaning with step_token='none', which generates nothing: leave it out"
                )
            return 1
        if k is None:
            return self.config.num_steps
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k={k!r} must be an int >= 1, not {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k={k} must be an int >= 1")
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
        if self.config.step_token == "none":
            return self._prompt_state(input_ids, attention_mask)
        if self.config.step_token == "learned":
            return self._learned_states(input_ids, attention_mask, k)
        return torch.stack([state for _, state in self._steps(input_ids, attention_mask, k)], dim=1)  # (B, K, d)

    def _pool(self, states: Tensor) -> Tensor:
        """z_1..z_K from g_1..g_K, (B, K, d), in float32 at least (Eq. 4)."""
        states = states if states.dtype == torch.float64 else states.float()
        if self.config.pooling == "last" or self.config.step_token == "none":
            return states
        steps = torch.arange(1, states.shape[1] + 1, device=states.device, dtype=states.dtype)
        return states.cumsum(dim=1) / steps[:, None]

    def _steps(
        self, input_ids: Tensor, attention_mask: Tensor, k: int
    ) -> Generator[tuple[Tensor, Tensor], Tensor | None, None]:
        """Yields (s_k, g_k), (B, V) and (B, d), for k = 1..K. Sent row numbers are the rows kept from then on."""
        decoder = _decoder(self.language_model)
        length = input_ids.shape[1]
        # Under gradient checkpointing the layers would fill the cache a second time in backward, and differ from what
        # the forward pass saw. Running the whole sequence at each step, as Algorithm 1 does, is exact then.
        cache = DynamicCache() if _takes_cache(self.language_model) and not self._checkpointing() else None
        shared = 0 if cache is None else self._shared_prefix(input_ids, attention_mask, k)
        if shared:
            input_ids, attention_mask = _prefix_first(input_ids, attention_mask, shared)
        inputs = self._prompt_embeddings(input_ids, attention_mask)  # (B, N, d)
        mask = F.pad(attention_mask, (0, k), value=1)  # (B, N + K)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if shared:
            decoder(
                inputs_embeds=inputs[:1, :shared],
                attention_mask=mask[:1, :shared],
                position_ids=positions[:1, :shared],
                past_key_values=cache,
                use_cache=True,
            )
            cache.batch_repeat_interleave(len(mask))
            inputs = inputs[:, shared:]
        probabilities = None
        for step in range(k + 1):
            end = length + step
            state = (
                decoder(
                    inputs_embeds=inputs,
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, end - inputs.shape[1] : end],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
                .last_hidden_state[:, -1]
                .to(mask.device)
            )  # (B, d)
            if step > 0:
                rows = yield probabilities, state
                if rows is not None:
                    state, mask, positions, inputs = state[rows], mask[rows], positions[rows], inputs[rows]
                    if cache is not None:
                        cache.reorder_cache(rows)
            if step < k:
                probabilities, embedding = self._next_token(state)
                new = embedding[:, None]  # (B, 1, d)
                inputs = torch.cat([inputs, new], dim=1) if cache is None else new

    def _shared_prefix(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> int:
        """How many tokens all rows start with, such as an instruction's: their states are the same in every row, so
        that the prefill runs them once. 0 where that does not pay, or would not be exact."""
        batch, length = input_ids.shape
        window = getattr(self.config.text_config, "sliding_window", None)
        # Padding then lies between the prefix and the rest, and a sliding window would count it.
        if batch == 1 or input_ids.is_meta or (window is not None and length + k > window):
            return 0
        # Sharded weights are gathered at each call of a layer, so that all processes have to make the same calls.
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            return 0
        lengths = attention_mask.sum(1)
        index = (length - lengths)[:, None] + torch.arange(length, device=input_ids.device)
        tokens = input_ids.gather(1, index.clamp(max=length - 1))  # (B, N), each row's tokens first
        same = (tokens == tokens[:1]).all(0) & (torch.arange(length, device=input_ids.device) < lengths.min() - 1)
        shared = int(same.long().cumprod(0).sum())
        return shared if shared >= SHORTEST_SHARED_PREFIX else 0

    def _next_token(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """s_{k+1} (B, V), in float32 at least, and its embedding d_{k+1} (B, d) from h'_k (Eq. 5 and 6)."""
        logits = self._logits(state)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        probabilities = torch.softmax(logits / self.config.logit_temperature, dim=-1)
        embed = self.get_input_embeddings()
        if self.config.step_token == "hard":
            return probabilities, embed(probabilities.argmax(dim=-1))
        # Under autocast the product is in half precision; steps enter the decoder in the dtype that the prompt has.
        mixed = (probabilities.to(embed.weight) @ embed.weight).to(embed.weight.dtype)
        # Gemma 3 scales inside its embedding module, so that a product with the weight alone is short of it.
        scale = getattr(embed, "embed_scale", None)
        return probabilities, mixed if scale is None else mixed * torch.as_tensor(scale).to(mixed)

    def _logits(self, state: Tensor) -> Tensor:
        """The backbone's own logits for one state a row, (B, V), with what its forward does after the LM head."""
        config = self.config.text_config
        logits = self.get_output_embeddings()(state)
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
        generator = self._steps(input_ids, attention_mask, k)
        total, previous, rows = 0, None, None
        for step in range(1, k + 1):
            state = generator.send(rows)[1]
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

    def _learned_states(self, input_ids: Tensor, attention_mask: Tensor, k: int) -> Tensor:
        """K trained tokens after the prompt, in one pass: (B, K, d)."""
        prompt = self._prompt_embeddings(input_ids, attention_mask)
        learned = self.learned_tokens.weight[:k].to(prompt.dtype).expand(prompt.shape[0], -1, -1)
        mask = F.pad(attention_mask, (0, k), value=1)
        return self._decode_all(torch.cat([prompt, learned], dim=1), mask)[:, -k:]

    def _prompt_state(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The prompt's last state or the mean of its states, without generation: (B, 1, d)."""
        states = self._decode_all(self._prompt_embeddings(input_ids, attention_mask), attention_mask)
        if self.config.pooling == "last":
            return states[:, -1:]
        wide = states if states.dtype == torch.float64 else states.float()
        weights = attention_mask[..., None].to(wide.dtype)
        return (wide * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)

    def _decode_all(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states of all positions in one pass, (B, N, d)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if self.config.attention == "bidirectional":
            mask = _bidirectional_mask(mask, inputs.dtype)
        return _decoder(self.language_model)(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _prompt_embeddings(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # Ids under the mask may be anything (-100 is common); any id of the vocabulary does for them.
        return self.get_input_embeddings()(input_ids * attention_mask)

    def _checkpointing(self) -> bool:
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.language_model.modules())

    @torch.no_grad()
    def _check_numerics(self) -> None:
        """Compares the parts that the step loop relies on with the backbone's own forward pass."""
        name = type(self.language_model).__name__
        embed, decoder = self.get_input_embeddings(), _decoder(self.language_model)
        ids = torch.arange(4, device=self.device)[None] % embed.num_embeddings
        ones = torch.ones_like(ids)
        if self.config.attention == "bidirectional":
            changed = ids.clone()
            changed[0, -1] = (ids[0, -1] + 1) % embed.num_embeddings
            first = [self._decode_all(embed(x), ones)[:, 0] for x in (ids, changed)]
            if torch.equal(*first):
                raise ValueError(f"{name} stays causal under a bidirectional mask; use attention='causal'")
        if self.config.step_token not in ("soft", "hard"):
            return
        expected = self.language_model(input_ids=ids, attention_mask=ones, use_cache=False).logits[:, -1]
        cache = DynamicCache() if _takes_cache(self.language_model) else None
        inputs, state = embed(ids), None
        for part, end in ((slice(0, 3), 3), (slice(3, 4), 4)) if cache is not None else ((slice(0, 4), 4),):
            state = decoder(
                inputs_embeds=inputs[:, part],
                attention_mask=ones[:, :end],
                position_ids=torch.arange(4, device=self.device)[None, part],
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state[:, -1]
        pairs = [("logits", self._logits(state), expected)]
        if self.config.step_token == "soft":
            one_hot = F.one_hot(ids[0], embed.num_embeddings).to(embed.weight.dtype)
            scale = torch.as_tensor(getattr(embed, "embed_scale", 1.0)).to(embed.weight)
            pairs.append(("token embeddings", one_hot @ embed.weight * scale, inputs[0]))
        for what, ours, theirs in pairs:
            allowed = (2e-3 if ours.dtype in (torch.float32, torch.float64) else 6e-2) * float(theirs.abs().max())
            if not float((ours - theirs).abs().max()) <= allowed:
                raise ValueError(
                    f"{name} is not supported: its {what} are not what the step loop computes through the KV cache"
                )


def _decoder(language_model: PreTrainedModel) -> nn.Module:
    """f: the causal LM without its head."""
    decoder = language_model.get_decoder() if hasattr(language_model, "get_decoder") else language_model
    if decoder is language_model:  # as transformers 4.57 says of GPT-2
        decoder = language_model.base_model
    return getattr(language_model, "model", decoder) if decoder is language_model else decoder


def _prefix_first(input_ids: Tensor, attention_mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Rows of padding and tokens -> rows of the first `shared` tokens, padding and the other tokens."""
    position = attention_mask.cumsum(1)  # 0 for padding, which is on the left
    order = ((position == 0).long() + 2 * (position > shared).long()).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _takes_cache(language_model: PreTrainedModel) -> bool:
    """Whether the decoder takes a `DynamicCache`. In transformers 4.51, GPT-2 takes tuples, and Gemma a cache of fixed
    length. Without a cache, each step runs the whole sequence: slower, and the same."""
    supported = getattr(language_model, "_supports_cache_class", None)  # later versions have all of them take it
    fixed = getattr(language_model.config, "cache_implementation", None) == "hybrid"
    return supported is None or (supported and not fixed)


def _check_structure(language_model: PreTrainedModel) -> None:
    """Refuses, by name, a backbone that the step loop can't drive."""
    name, config = type(language_model).__name__, language_model.config
    reason = None
    decoder = _decoder(language_model)
    parameters = inspect.signature(decoder.forward).parameters
    lacking = [argument for argument in DECODER_ARGUMENTS if argument not in parameters]
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif decoder is language_model or language_model.get_output_embeddings() is None:
        reason = "it has no decoder and LM head that can be called apart"
    elif config.get_text_config() is not config:
        reason = "it is multimodal"
    elif getattr(language_model, "_is_stateful", False) or layer_types - ATTENTION_LAYERS:
        reason = "its layers keep another state than keys and values"
    elif getattr(config, "hidden_size_per_layer_input", None):
        reason = "its layers read the token ids again, and a soft token has none"
    elif lacking:
        reason = f"its decoder takes no {', '.join(lacking)}"
    if reason is not None:
        raise ValueError(f"{name} can't be a GIRCSE backbone: {reason}; choose a decoder-only attention model")


def _bidirectional_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, N) of 0 and 1 -> (B, 1, N, N), added to the attention scores: every position sees every token."""
    hidden = (attention_mask == 0)[:, None, None, :].expand(-1, 1, attention_mask.shape[1], -1)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def _merge_adapter(language_model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    """The causal LM with a PEFT adapter of that causal LM merged into its weights."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError(f"adapter={adapter!r} needs the peft package: pip install peft") from error
    config = PeftConfig.from_pretrained(adapter)
    try:
        model = PeftModel(language_model, config)
        result = model.load_adapter(adapter, "default")
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"adapter={adapter!r} does not fit {type(language_model).__name__}: {error}") from error
    # The adapter's own weights carry its name, whatever its kind (LoRA, IA3, ...).
    lost = [key for key in result.missing_keys if ".default" in key] + list(result.unexpected_keys)
    if lost:
        raise ValueError(f"adapter={adapter!r} does not fit {type(language_model).__name__}: unmatched {lost[:3]}")
    updates = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    if updates and not any(parameter.any() for parameter in updates):
        raise ValueError(f"adapter={adapter!r} changes nothing: all of its lora_B weights are zero; was it trained?")
    return model.merge_and_unload()


GircseModel.register_for_auto_class("AutoModel")
