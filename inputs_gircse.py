"""Checks of what a `GircseModel` is called with. Rows of tokens are brought into one form, padded on the left."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .backbone_gircse import max_positions


def check_inputs(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, k: int | None
) -> tuple[Tensor, Tensor, int]:
    """The checked inputs, with each row's tokens moved to the right and columns of nothing but padding removed."""
    k = check_k(model, k)
    if not isinstance(input_ids, Tensor):
        raise TypeError(
            f"input_ids must be a tensor, not {type(input_ids).__name__}: call generate_embedding(**processor(texts))"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(attention_mask.shape)} must be (B, N)"
        )
    if input_ids.shape[0] == 0:
        return input_ids, attention_mask, k
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be int64, not {str(input_ids.dtype).removeprefix('torch.')}")
    if not attention_mask.is_meta and (wrong := (attention_mask != 0) & (attention_mask != 1)).any():
        raise ValueError(
            f"attention_mask holds {attention_mask[wrong][0].item()}: it must be 1 for tokens and 0 for padding, "
            "neither a mask that is added to scores nor one of texts packed into a row"
        )
    mask = attention_mask.to(torch.bool)
    # Generated tokens follow the last column, so padding goes to the left, whichever side the caller has padded:
    # distances between cache slots are then the distances between positions, which sliding windows rely on.
    order = torch.argsort(mask, dim=1, stable=True)
    input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    if not input_ids.is_meta:
        longest = check_values(model, input_ids, mask)
        input_ids, mask = input_ids[:, -longest:], mask[:, -longest:]
    most = model.text_limit(k=k)
    if most is not None and mask.shape[1] > most:
        positions = max_positions(model.config.text_config)
        raise ValueError(
            f"N + k = {mask.shape[1]} + {positions - most} exceeds the backbone's {positions} positions: truncate "
            f"the text to {most} tokens or use a smaller k"
        )
    return input_ids, mask.to(torch.long), k


def check_k(model: Any, k: int | None) -> int:
    """k, or the config's number of steps; 1 where nothing is generated."""
    if model.config.step_token == "none":
        if k is not None:
            raise ValueError(f"k={k!r} has no meaning with step_token='none', which generates nothing: leave it out")
        return 1
    name, k = ("config.num_steps", model.config.num_steps) if k is None else ("k", k)
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"{name}={k!r} must be an int >= 1, not {type(k).__name__}")
    k = operator.index(k)  # takes numpy's integers, too
    if k < 1:
        raise ValueError(f"{name}={k} must be an int >= 1")
    if model.config.step_token == "learned" and k > model.config.num_steps:
        raise ValueError(f"k={k} exceeds the {model.config.num_steps} learned tokens of this model (num_steps)")
    return k


def check_values(model: Any, input_ids: Tensor, mask: Tensor) -> int:
    """The longest row's number of tokens; raises a ValueError for an empty row and for ids outside the vocabulary."""
    lengths = mask.sum(1)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise ValueError(f"attention_mask: row {row} has no token; give every text at least one (such as eos)")
    embed = model.get_input_embeddings()
    if not hasattr(embed, "num_embeddings"):
        raise ValueError(
            f"the token embeddings are wrapped as {type(embed).__name__}, and soft tokens are mixed from the table "
            "itself: leave it out of the adapter, or merge that"
        )
    vocabulary = embed.num_embeddings
    outside = mask & ((input_ids < 0) | (input_ids >= vocabulary))
    if outside.any():
        raise ValueError(
            f"input_ids holds {int(input_ids[outside][0])}, outside the vocabulary 0..{vocabulary - 1}; "
            "use the tokenizer that belongs to this model"
        )
    return int(lengths.max())


def check_options(model: Any, tolerance: float | None, cache_implementation: str | None) -> None:
    """Raises a ValueError for options of `generate_embedding` that are unknown or don't go together."""
    if cache_implementation not in (None, "static"):
        raise ValueError(f"cache_implementation={cache_implementation!r} is unknown; use 'static' or leave it out")
    if tolerance is None:
        return
    if cache_implementation is not None:
        raise ValueError(
            f"cache_implementation={cache_implementation!r} keeps all texts to the end, and "
            f"tolerance={tolerance!r} does not: leave one of them out"
        )
    if not model._generates:
        raise ValueError(f"tolerance={tolerance!r} needs step_token 'soft' or 'hard', not {model.config.step_token!r}")
    if not 0 < tolerance <= 2:
        raise ValueError(f"tolerance={tolerance!r} must be in (0, 2]: texts stop at cosine > 1 - tolerance")
