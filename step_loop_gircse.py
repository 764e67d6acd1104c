"""The step loop: a batch's prompt is prefilled once, and then one generated position after the other.

A common start of rows, such as an instruction, is run once; on a CPU, rows of like length are prefilled together
and their caches joined, so that little padding is computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .backbone_gircse import (
    Way,
    at_least_float32,
    decode,
    decoder_of,
    embed_tokens,
    exceeds_window,
    is_quantized,
    keys_and_values,
    positions_of,
    prompt_mask,
    step_mask,
)
from .soft_tokens_gircse import after_head

# Rows that start with at least so many equal tokens have these computed once, in a pass of their own. For fewer tokens
# the extra pass takes longer than it saves.
SHORTEST_SHARED_PREFIX = 8
# On a CPU, rows of like length are prefilled as a group of their own if that saves at least so many tokens of padding.
# A further group reads all weights once more, which takes as long as computing about 30 tokens. On a GPU that is more
# than the padding costs, so that all rows are prefilled together there.
LEAST_TOKENS_SAVED = 64


class StepLoop:
    """A batch between two steps: made by the prefill of its prompt, and then extended by one generated position a step.

    Args:
        model: a `GircseModel` with soft or hard step tokens.
        input_ids, attention_mask: (B, N) each, as `check_inputs` returns them.
        k: the most steps there will be.
        way: how the decoder is called; by default what `find_way` has found for the model.

    Attributes:
        state: (B, d), h'_0 at first and h'_k after k steps.
    """

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way | None = None) -> None:
        self.model, self.decoder = model, decoder_of(model.language_model)
        self.way = model._find_way(input_ids.device) if way is None else way
        if checkpoints(model.language_model):
            # Checkpointed layers run again in the backward pass, and would append to the cache a second time.
            self.way = self.way._replace(cache=None)
        self.past, self.inputs = {}, None
        if self.way.cache is None:
            # (B, N, d); each step appends its position
            self.inputs = embed_tokens(model.language_model, input_ids, attention_mask)
            positions = positions_of(attention_mask)
            seen = prompt_mask(model.language_model, attention_mask, self.way)
            self.state = decode(self.decoder, self.inputs, seen, positions, {})
        else:
            groups = prefill_groups(model.language_model, input_ids, attention_mask, k, self.way)
            parts = [self._prefill(input_ids, attention_mask, k, rows) for rows in groups]
            self.state, attention_mask, cache = parts[0] if len(parts) == 1 else joined(groups, parts)
            self.past = {self.way.cache: cache}
        self.end = attention_mask.shape[1]
        self.mask = F.pad(attention_mask, (0, k), value=1)  # (B, N + K)
        self.positions = positions_of(self.mask)  # (B, N + K)
        self.seen = step_mask(model.language_model, self.mask) if self.past else self.mask

    def _prefill(
        self, input_ids: Tensor, attention_mask: Tensor, k: int, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, DynamicCache]:
        """Prefills the rows of these numbers (None for all). Columns of nothing but padding are cut, and a common start
        is run once. Returns h'_0 (b, d), the mask in the order of the cache's slots (b, n), and the cache."""
        language_model, cache = self.model.language_model, DynamicCache()
        if rows is not None:
            longest = int(attention_mask[rows].sum(1).max())
            input_ids, attention_mask = input_ids[rows, -longest:], attention_mask[rows, -longest:]
        shared = shared_prefix(language_model, input_ids, attention_mask, k, self.way)
        past = {self.way.cache: cache}
        if shared:
            input_ids, attention_mask = prefix_first(input_ids, attention_mask, shared)
        inputs = embed_tokens(language_model, input_ids, attention_mask)
        positions = positions_of(attention_mask)
        if shared:
            first = inputs[:1, :shared], attention_mask[:1, :shared], positions[:1, :shared]
            decode(self.decoder, *first, past)
            cache.batch_repeat_interleave(len(inputs))
        seen = prompt_mask(language_model, attention_mask, self.way, shared)
        state = decode(self.decoder, inputs[:, shared:], seen, positions[:, shared:], past)
        return state, attention_mask, cache

    def step(self) -> tuple[Tensor | None, Tensor]:
        """s_k and g_k, (B, V) and (B, d); s_k is None where `next_token` makes it chunk by chunk."""
        probabilities, embedding = self.model._next_token(self.state)
        return probabilities, self.advance(embedding)

    def advance(self, embedding: Tensor) -> Tensor:
        """g_k (B, d) after d_k (B, d), which need not be the embedding of a generated token."""
        inputs = embedding[:, None]  # (B, 1, d)
        if not self.past:
            inputs = self.inputs = torch.cat([self.inputs, inputs], dim=1)
        self.end += 1
        seen = None if self.seen is None else self.seen[..., : self.end]
        at = self.positions[:, self.end - inputs.shape[1] : self.end]
        self.state = decode(self.decoder, inputs, seen, at, self.past)
        return self.state

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but those of these numbers, (b,) int64."""
        for name in ("state", "mask", "positions", "inputs", "seen"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[rows])
        for cache in self.past.values():
            cache.reorder_cache(rows)


def settled_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, k: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h'_0, (B, d), g_1..g_K, (B, K, d), and how many of them each text took until cos(z_k, z_{k-1}) > 1 - tolerance,
    (B,) int64. A text that has settled leaves the batch; its later states are zeros."""
    batch, device = len(input_ids), input_ids.device
    steps = torch.full((batch,), k, device=device)
    if batch == 0:
        none = torch.zeros(0, k + 1, model.config.hidden_size, device=device)
        return none[:, 0], none[:, 1:], steps
    loop = StepLoop(model, input_ids, attention_mask, k)
    prompt, running, previous = loop.state, torch.arange(batch, device=device), None
    states = at_least_float32(prompt).new_zeros(batch, k, prompt.shape[-1])
    for step in range(1, k + 1):
        states[running, step - 1] = at_least_float32(loop.step()[1])
        current = model._pool(prompt[running], states[running, :step])[:, -1]
        if previous is not None:
            settled = F.cosine_similarity(current, previous, dim=-1) > 1 - tolerance
            steps[running[settled]] = step
            if settled.all():
                break
            if settled.any() and step < k:
                rows = (~settled).nonzero()[:, 0]
                loop.keep(rows)
                running, current = running[rows], current[rows]
        previous = current
    return prompt, states, steps


@torch.no_grad()
def check_loop(model: Any, ids: Tensor, way: Way) -> None:
    """Raises a ValueError unless logits and token embeddings of `ids`, (1, N), as the step loop makes them, are those
    of the backbone's own forward pass."""
    language_model, embed, head = model.language_model, model.get_input_embeddings(), model.get_output_embeddings()
    ones = torch.ones_like(ids)
    expected = language_model(input_ids=ids, attention_mask=ones, use_cache=False).logits[:, -1]
    loop = StepLoop(model, ids[:, :-1], ones[:, :-1], 1, way)
    inputs, state = embed(ids), loop.advance(embed(ids[:, -1]))
    pairs = [("logits", after_head(model.config.text_config, head(state)), expected)]
    if model.config.step_token == "soft" and not embed.weight.is_meta:  # else the loop itself calls the module
        one_hot = F.one_hot(ids[0], embed.num_embeddings).to(embed.weight.dtype)
        scale = torch.as_tensor(getattr(embed, "embed_scale", 1.0)).to(embed.weight)
        pairs.append(("token embeddings", one_hot @ embed.weight * scale, inputs[0]))
    for what, ours, theirs in pairs:
        ours = ours.to(theirs.device)  # under a device map, the head may be on another device
        if is_quantized(language_model):
            rounding = 0.3  # activations too may be rounded, by row or with all others
        else:
            rounding = 2e-3 if ours.dtype in (torch.float32, torch.float64) else 6e-2
        if not float((ours - theirs).abs().max()) <= rounding * float(theirs.abs().max()):
            raise ValueError(
                f"{type(language_model).__name__} is not supported: its {what} are not what the step loop computes "
                "through the KV cache"
            )


def checkpoints(language_model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on, transformers' or torch's (FSDP's own): the backward pass then runs layers
    again."""
    marks = ("gradient_checkpointing", "_checkpoint_wrapped_module")
    layers = language_model.modules()
    return language_model.training and any(getattr(layer, mark, False) for layer in layers for mark in marks)


def prefill_groups(
    language_model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way
) -> list[Tensor | None]:
    """Numbers of the rows that are prefilled together, (b,) each, or None for all rows: rows with a common start,
    which then runs once, and rows of like length, which then have little padding."""
    if len(input_ids) == 1 or input_ids.device.type != "cpu" or runs_in_step(language_model):
        return [None]
    lengths = attention_mask.sum(1)
    order = lengths.argsort(stable=True)
    starts = tokens_first(input_ids, attention_mask)[:, :SHORTEST_SHARED_PREFIX]
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, start in zip(order.tolist(), starts[order].tolist(), strict=True):
        alike.setdefault(tuple(start), []).append(row)
    groups, others = [], []
    for rows in alike.values():
        shared = shared_prefix(language_model, input_ids[rows], attention_mask[rows], k, way)
        if shared * (len(rows) - 1) >= LEAST_TOKENS_SAVED:
            groups.append(rows)
        else:
            others += rows
    lengths = lengths.tolist()
    groups.append(sorted(others, key=lengths.__getitem__))
    groups = [part for rows in groups if rows for part in split_by_length(rows, lengths)]
    return [None] if len(groups) == 1 else [torch.tensor(rows) for rows in groups]


def runs_in_step(language_model: PreTrainedModel) -> bool:
    """Whether this process has to call layers as often as the others do: sharded weights (FSDP, ZeRO-3) are gathered by
    all processes together at each call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return language_model.training or is_sharded(language_model)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of the weights: FSDP2's tensors have a mesh, ZeRO-3's an id."""
    if any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_id") for weight in model.parameters()):
        return True
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def shared_prefix(language_model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way) -> int:
    """How many tokens all rows start with, such as an instruction's: their states are the same in every row, so
    that the prefill runs them once. 0 where that saves no time, or would not be exact."""
    batch, length = input_ids.shape
    # After a shared prefix, padding lies between prefix and rest, and a sliding window would count it as positions.
    if batch == 1 or input_ids.is_meta or not way.gaps or exceeds_window(language_model.config, length + k):
        return 0
    if runs_in_step(language_model):
        return 0
    lengths, tokens = attention_mask.sum(1), tokens_first(input_ids, attention_mask)
    same = (tokens == tokens[:1]).all(0) & (torch.arange(length, device=input_ids.device) < lengths.min() - 1)
    shared = int(same.long().cumprod(0).sum())
    return shared if shared >= SHORTEST_SHARED_PREFIX else 0


def tokens_first(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Rows of padding and tokens, (B, N) -> each row's tokens, and then its last token repeated."""
    length = input_ids.shape[1]
    index = (length - attention_mask.sum(1))[:, None] + torch.arange(length, device=input_ids.device)
    return input_ids.gather(1, index.clamp(max=length - 1))


def split_by_length(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Row numbers, shortest row first, in groups that save LEAST_TOKENS_SAVED tokens of padding or more each."""
    saved = [count * (lengths[rows[-1]] - lengths[rows[count - 1]]) for count in range(1, len(rows))]
    if max(saved, default=0) < LEAST_TOKENS_SAVED:
        return [rows]
    count = saved.index(max(saved)) + 1
    return split_by_length(rows[:count], lengths) + split_by_length(rows[count:], lengths)


def prefix_first(input_ids: Tensor, attention_mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Rows of padding and tokens -> rows of the first `shared` tokens, padding and the other tokens."""
    position = attention_mask.cumsum(1)  # 0 for padding, which is on the left
    order = ((position == 0).long() + 2 * (position > shared).long()).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def joined(
    groups: list[Tensor], parts: list[tuple[Tensor, Tensor, DynamicCache]]
) -> tuple[Tensor, Tensor, DynamicCache]:
    """What `StepLoop._prefill` returned for each group -> the same for all rows, in their order. Shorter groups get
    empty slots on the left, which the mask hides."""
    states, masks, caches = zip(*parts, strict=True)
    order, longest = torch.cat(groups).argsort(), max(mask.shape[1] for mask in masks)
    mask = torch.cat([F.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])[order]
    joined = DynamicCache()
    for index, layers in enumerate(zip(*map(keys_and_values, caches), strict=True)):
        padded = (
            torch.cat([F.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in side])[order]
            for side in zip(*layers, strict=True)
        )
        joined.update(*padded, index)
    return torch.cat(states)[order], mask, joined
