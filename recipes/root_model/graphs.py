"""The step loop in CUDA graphs, with gradients: for training a small model on a GPU.

A pass of SmolLM2-135M takes thousands of kernels of a few microseconds, and to launch one from Python takes up to 20:
one process leaves an H200 idle for five sixths of the time, whatever its batch. A CUDA graph launches all kernels of a
pass at once. It has fixed shapes, so that texts are padded to one of a few lengths, batches to a number of rows, and a
prompt that texts share is not run once but for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache


class Loop(nn.Module):
    """z_1..z_K of rows of padding and tokens, (B, K, d), by a model with soft tokens and the mean of their states.

    What `GircseModel` computes, without a branch that depends on values, for which a GPU would have to be waited.
    """

    def __init__(self, model: nn.Module, k: int) -> None:
        super().__init__()
        config = model.config
        if (config.step_token, config.pooling, config.attention) != ("soft", "mean", "causal"):
            raise ValueError("CUDA graphs are for soft tokens, the mean of states and causal attention here")
        self.language_model, self.k, self.temperature = model.language_model, k, config.logit_temperature
        self.cache_argument = model._find_way(model.device).cache  # its name differs between versions of transformers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device = input_ids.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            states = self._states(input_ids, attention_mask)
        count = torch.arange(1, self.k + 1, device=input_ids.device)[:, None]
        return F.normalize(torch.stack(states, dim=1).float().cumsum(dim=1) / count, dim=-1)

    def _states(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        decoder, embed = self.language_model.model, self.language_model.get_input_embeddings()
        length = input_ids.shape[1]
        mask = F.pad(attention_mask, (0, self.k), value=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        itself = torch.eye(length, dtype=torch.bool, device=mask.device)  # what padding sees
        earlier = torch.ones_like(itself).tril()
        seen = (earlier & mask[:, None, :length].bool() | itself)[:, None]  # (B, 1, N, N)
        later = mask[:, None, None].bool()  # (B, 1, 1, N + K)
        cache, states = DynamicCache(), []
        inputs = embed(input_ids * attention_mask)
        for step in range(self.k + 1):
            end = length + step
            output = decoder(
                inputs_embeds=inputs,
                attention_mask=additive(seen if step == 0 else later[..., :end]),
                position_ids=positions[:, :length] if step == 0 else positions[:, end - 1 : end],
                use_cache=True,
                **{self.cache_argument: cache},
            )
            state = output.last_hidden_state[:, -1]
            states.append(state)
            if step < self.k:
                logits = self.language_model.lm_head(state).float() / self.temperature
                inputs = (logits.softmax(dim=-1) @ embed.weight).to(embed.weight.dtype)[:, None]
        return states[1:]


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


class GraphedLoop:
    """Calls `Loop` by graphs, one for each shape, made when first needed; without a GPU, directly.

    Args:
        model: a `GircseModel` in eager attention, on its device.
        lengths: those to which texts are padded; the last is the longest that a text may have.
    """

    def __init__(self, model: nn.Module, lengths: Sequence[int]) -> None:
        self.model, self.lengths = model, sorted(lengths)
        self.graphs: dict[tuple[int, int, int], Any] = {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, k: int, rows: int) -> Tensor:
        """z_1..z_K, (B, K, d), of B <= `rows` rows with padding on either side."""
        count, longest = len(input_ids), int(attention_mask.sum(1).max())
        if longest > self.lengths[-1]:
            raise ValueError(f"a text has {longest} tokens, more than the last of lengths={self.lengths}")
        width = next(length for length in self.lengths if length >= longest)
        # Tokens to the right, and rows of one token below.
        order = attention_mask.argsort(dim=1, stable=True)[:, -longest:]
        ids, mask = (F.pad(x.gather(1, order), (width - longest, 0)) for x in (input_ids, attention_mask))
        below = (0, 0, 0, rows - count)
        ids, mask = F.pad(ids, below), F.pad(mask, below)
        mask[count:, -1] = 1
        key = (rows, width, k)
        if key not in self.graphs:
            loop = Loop(self.model, k).train()
            if ids.device.type == "cuda":
                with torch.autocast("cuda", enabled=False):  # whose cache of cast weights no graph may use
                    loop = torch.cuda.make_graphed_callables(loop, (ids.clone(), mask.clone()), num_warmup_iters=1)
            self.graphs[key] = loop
        return self.graphs[key](ids, mask)[:count]
