"""Compiled steps over a cache of fixed size, for many small batches of few different shapes.

The step is one function for `torch.compile`, and its cache keeps its place in memory from call to call, which CUDA
graphs need.
"""

from __future__ import annotations

import functools
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, Cache, DynamicCache, PreTrainedModel, StaticCache

from .backbone_gircse import (
    REFUSALS,
    additive_mask,
    attention_implementation,
    decode,
    decoder_of,
    exceeds_window,
)
from .step_loop_gircse import StepLoop, checkpoints

# Static caches come in lengths that are multiples of this, so that few shapes are compiled.
STATIC_CACHE_MULTIPLE = 64
# At a time, whatever the thread: a model's calls use the same cache.
ONE_CALL = Lock()


def static_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """h'_0, (B, d), and g_1..g_K, (B, K, d), by a compiled step over a cache of fixed size."""
    slots = -(-(attention_mask.shape[1] + k) // STATIC_CACHE_MULTIPLE) * STATIC_CACHE_MULTIPLE
    check_static(model, slots, input_ids.device)
    loop = StepLoop(model, input_ids, attention_mask, k)
    with ONE_CALL:
        return compiled_loop(model, loop, k, slots)


def compiled_loop(model: PreTrainedModel, loop: StepLoop, k: int, slots: int) -> tuple[Tensor, Tensor]:
    """The rest of `static_states`, after the prefill."""
    mask, positions, prompt = loop.mask, loop.positions, loop.state
    past = {loop.way.cache: fixed_cache(model, loop.past[loop.way.cache], len(mask), slots)}
    hidden = additive_mask(F.pad(mask, (0, slots - mask.shape[1])), model.language_model.dtype)[:, None, None]
    slot = torch.arange(slots, device=mask.device)
    step, states, state = compiled_step(prompt.device.type), [], prompt.contiguous()
    for end in range(mask.shape[1] - k + 1, mask.shape[1] + 1):
        seen = hidden.masked_fill(slot >= end, torch.finfo(hidden.dtype).min)
        # CUDA graphs write each result to the same place: a copy is kept.
        state = step(model, state, seen, positions[:, end - 1 : end].contiguous(), past).clone()
        states.append(state)
    return prompt, torch.stack(states, dim=1)


def check_static(model: PreTrainedModel, slots: int, device: torch.device) -> None:
    """Raises a ValueError that says why a model can't have a cache of so many positions."""
    implementation = attention_implementation(model.language_model)
    reason = None
    if model.config.step_token not in ("soft", "hard"):
        reason = f"step_token={model.config.step_token!r} has no loop to compile; leave it out"
    elif not static_caches_count():
        reason = f"transformers {transformers.__version__} is too old for it; update transformers or leave it out"
    elif model._find_way(device).cache is None or checkpoints(model.language_model):
        reason = "each step runs the whole sequence; leave it out"
    elif implementation not in ("eager", "sdpa"):
        reason = f"attn_implementation={implementation!r} takes no mask of fixed size; load with 'sdpa'"
    elif exceeds_window(model.language_model.config, slots):
        reason = f"its {slots} positions (N + k rounded up) exceed the backbone's sliding window; leave it out"
    if reason is not None:
        raise ValueError(f"cache_implementation='static' is not possible here: {reason}")


def fixed_cache(model: PreTrainedModel, cache: DynamicCache, batch: int, slots: int) -> StaticCache:
    """The prefill's cache, moved into one of fixed size. Its memory must keep its place from call to call for CUDA
    graphs, so that each model's last one is kept and used again as long as the shape stays the same."""
    dtypes = tuple(x.dtype for x in (cache.layers[0].keys, cache.layers[0].values))  # under autocast not the weights'
    key = (batch, slots, dtypes, str(model.device), torch.is_inference_mode_enabled())
    kept, fixed = kept_caches().get(model, (None, None))
    if kept != key:
        kept_caches().pop(model, None)
        fixed = StaticCache(config=model.config.text_config, max_cache_len=slots)
        kept_caches()[model] = (key, fixed)
    fixed.reset()
    for index, layer in enumerate(cache.layers):
        fixed.update(layer.keys, layer.values, index)
        layer.keys = layer.values = None
    return fixed


def one_step(model: PreTrainedModel, state: Tensor, seen: Tensor, position: Tensor, past: dict[str, Cache]) -> Tensor:
    """h'_k from h'_{k-1}, (B, d)."""
    return decode(decoder_of(model.language_model), model._next_token(state)[1][:, None], seen, position, past)


@functools.cache
def static_caches_count() -> bool:
    """Whether a `StaticCache` counts its tokens itself, and so needs no `cache_position`, as in later versions of
    transformers 5. Found by trial."""
    config = CONFIG_MAPPING["qwen2"](num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=1)
    try:
        cache, one = StaticCache(config=config, max_cache_len=3), torch.ones(1, 1, 1, 1)
        for _ in range(2):
            keys, _ = cache.update(one, one, 0)
        return keys.flatten().tolist() == [1, 1, 0] and int(cache.get_seq_length()) == 2
    except REFUSALS:
        return False


@functools.cache
def kept_caches() -> WeakKeyDictionary[PreTrainedModel, tuple[tuple, StaticCache]]:
    """Each model's last static cache, with the key that says what calls it fits. Not an attribute of the model, since
    it would be copied and pickled with it."""
    return WeakKeyDictionary()


@functools.cache
def compiled_step(device_type: str) -> Any:
    return torch.compile(one_step, mode="reduce-overhead" if device_type == "cuda" else None)
