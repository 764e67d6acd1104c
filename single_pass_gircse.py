"""One pass for models that generate nothing: states of the prompt, or of learned tokens after it (Table 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone_gircse import Way, additive_mask, at_least_float32, decoder_of, embed_tokens, positions_of, prompt_mask


def single_pass_states(model: Any, input_ids: Tensor, attention_mask: Tensor, k: int, way: Way) -> Tensor:
    """The states in the place of g_1..g_K: those of K learned tokens, (B, K, d), or without step tokens the prompt's
    last state or the mean of its states, (B, 1, d).

    Args:
        model: a `GircseModel` with `step_token` "learned" or "none".
        input_ids, attention_mask: (B, N) each, as `check_inputs` returns them.
        way: how the decoder is called; see `Way`.
    """
    inputs = embed_tokens(model.language_model, input_ids, attention_mask)  # (B, N, d)
    if model.config.step_token == "learned":
        learned = model.learned_tokens.weight[:k].to(inputs.dtype).expand(inputs.shape[0], -1, -1)
        mask = F.pad(attention_mask, (0, k), value=1)
        return decode_all(model, torch.cat([inputs, learned], dim=1), mask, way)[:, -k:]
    states = decode_all(model, inputs, attention_mask, way)
    if model.config.pooling == "last":
        return states[:, -1:]
    states = at_least_float32(states)
    weights = attention_mask[..., None].to(states.dtype)
    return (states * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def decode_all(model: Any, inputs: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Last hidden states of all positions in one pass, (B, N, d)."""
    positions = positions_of(mask)
    if model.config.attention == "bidirectional":
        mask = additive_mask(mask, inputs.dtype)[:, None, None].expand(-1, 1, mask.shape[1], -1)  # (B, 1, N, N)
    else:
        mask = prompt_mask(model.language_model, mask, way)
    return decoder_of(model.language_model)(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


@torch.no_grad()
def check_bidirectional(model: Any, ids: Tensor) -> None:
    """Raises a ValueError if the first position of `ids`, (1, N), does not see what comes after it."""
    embed = model.get_input_embeddings()
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % embed.num_embeddings
    first = [decode_all(model, embed(x), torch.ones_like(x), Way())[:, 0] for x in (ids, changed)]
    if torch.equal(*first):
        name = type(model.language_model).__name__
        raise ValueError(f"{name} stays causal under a bidirectional mask; use attention='causal'")
