"""Soft tokens: a distribution over the vocabulary, and the mix of token embeddings that enters the decoder.

    s_k = softmax((W h'_{k-1} + b) / T)     (Eq. 5)
    d_k = s_k E                             (Eq. 6)

In training, large vocabularies are mixed chunk by chunk, and the chunks made again in the backward pass, so that
nothing of the vocabulary's size is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PretrainedConfig

from .backbone_gircse import at_least_float32, unsharded

# In training, a step over a vocabulary of at least this size is computed in chunks, which are computed again in the
# backward pass: that costs less time than keeping B x V floats.
SMALLEST_CHUNKED_VOCABULARY = 32768
# Tokens of a chunk: on a CPU as many as its cache holds; elsewhere more, so that few kernels are launched.
CHUNK_ON_CPU, CHUNK = 2048, 16384


def next_token(
    embed: nn.Module, head: nn.Module, config: PretrainedConfig, state: Tensor
) -> tuple[Tensor | None, Tensor]:
    """s_{k+1} (B, V), in float32 at least, and its embedding d_{k+1} (B, d) from h'_k (Eq. 5 and 6). With gradients on
    and a large vocabulary, soft tokens are made chunk by chunk and s_{k+1} is None.

    Args:
        embed, head: the backbone's token embeddings and LM head.
        config: a `GircseConfig`.
        state: (B, d), h'_k.
    """
    embed, head = unsharded(embed), unsharded(head)
    # Under a device map, weights may be on other devices or offloaded (meta); only calls of their modules fetch them.
    direct = type(head).forward is nn.Linear.forward
    direct = direct and {head.weight.device, embed.weight.device} == {state.device}
    # FSDP2 (`unshard`) frees weights after a call of the head's module, and the backward pass of the mix reads
    # them: the chunked way, which makes no such call, is taken for any vocabulary.
    chunked = len(embed.weight) >= SMALLEST_CHUNKED_VOCABULARY or hasattr(head, "unshard")
    if torch.is_grad_enabled() and config.step_token == "soft" and direct and chunked:
        probabilities = None
        mixed = SoftEmbedding.apply(state, head.weight, head.bias, embed.weight, functools.partial(scores, config))
    else:
        probabilities = torch.softmax(scores(config, head(state)), dim=-1)
        if config.step_token == "hard":
            return probabilities, embed(probabilities.argmax(dim=-1))
        if embed.weight.is_meta and not state.is_meta:
            table = embed(torch.arange(embed.num_embeddings, device=state.device))  # with the module's scale
            return probabilities, probabilities.to(table) @ table
        mixed = probabilities.to(embed.weight) @ embed.weight
    # Autocast makes the product half precision, while the prompt entered the decoder in the embeddings' dtype.
    mixed = mixed.to(embed.weight.dtype)
    # Gemma 3's embedding module multiplies by a scale, which a product with its weight alone lacks.
    scale = getattr(embed, "embed_scale", None)
    return probabilities, mixed if scale is None else mixed * torch.as_tensor(scale).to(mixed)


def scores(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """What softmax is taken of, in float32 at least, from the LM head's output. Each entry depends on its own logit
    only, so that chunks of the vocabulary can be scored by themselves."""
    logits = after_head(config.text_config, logits)
    return at_least_float32(logits) / config.logit_temperature


def after_head(text_config: PretrainedConfig, logits: Tensor) -> Tensor:
    """What the backbone's own forward pass does to the LM head's output."""
    if getattr(text_config, "logit_scale", None) is not None:  # Cohere
        logits = logits * text_config.logit_scale
    if getattr(text_config, "logits_scaling", None) is not None:  # Granite
        logits = logits / text_config.logits_scaling
    cap = getattr(text_config, "final_logit_softcapping", None)  # Gemma 2
    return logits if cap is None else torch.tanh(logits / cap) * cap


class SoftEmbedding(torch.autograd.Function):
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
        for rows in chunks(len(weight), ctx.chunk):
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
            for rows in chunks(len(weight), ctx.chunk):
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


def chunks(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]
