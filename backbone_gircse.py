"""What GIRCSE needs of a causal LM: loading it, checking it, and calling its decoder with masks, positions and a cache.

Architectures and versions of transformers differ in names of arguments, kinds of caches and masks. `find_way` finds out
what the backbone takes by trial on the backbone itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .configuration_gircse import dtype_name

# Arguments of `from_pretrained` that say where files are: those that hold for each repo that is read (an adapter's and
# its backbone's), and those that belong to one repo.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
REPO_ARGUMENTS = ("revision", "subfolder")
# How settings are named that limit how far back layers see: sliding_window, attention_window_size, ...
WINDOW = r"window(_size|_length)?$"
# How much padding is put between tokens to see whether a decoder places them by `position_ids`. ALiBi's steepest slopes
# make a token vanish at this distance.
TRIED_GAP = 16
# What decoders raise for a cache or a mask that they can't take: the next way of calling them is tried then.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
SLOW = (
    "{} has no KV cache in transformers {} that a later call can continue, so each step runs the whole sequence again: "
    "the same vectors, far slower."
)

logger = logging.get_logger(__name__)


class Way(NamedTuple):
    """How a backbone's decoder is called; `find_way` finds the fastest way that works. The defaults run the whole
    sequence at each step, as Algorithm 1 is written: slow, and right for every decoder that takes embeddings and a
    mask.

    Args:
        cache: the name of the decoder's argument for a KV cache that later calls can continue; None if each step runs
            the whole sequence.
        square_masks: whether the decoder takes a mask of its own for each position of the prompt, (B, 1, N, N).
        gaps: whether padding may lie between a row's tokens in the cache. MPT counts distances in slots, whatever
            `position_ids` say, so that its padding has to be on the left.
    """

    cache: str | None = None
    square_masks: bool = False
    gaps: bool = False


def load_backbone(name_or_path: str, needs_head: bool = True, **kwargs: Any) -> PreTrainedModel:
    """Loads a plain causal LM. Raises a ValueError for weights that its checkpoint lacks, which would be random, unless
    they are those of an LM head that is not needed."""
    name_dtype(kwargs)
    model, info = AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if kwargs.get("gguf_file"):  # loading has dequantized the weights; a saved model must not claim otherwise
        drop_quantization(model)
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    lost = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    lost = [key for key in lost if needs_head or key.rpartition(".")[0] not in head]
    if lost:
        raise ValueError(
            f"{name_or_path!r} lacks {len(lost)} weights of {type(model).__name__}, such as {lost[0]!r}, which would "
            "be random: choose a checkpoint of the whole causal LM"
        )
    return model


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with plain weights, in the dtype of those that were not quantized."""
    dtype = model.dtype
    model = model.dequantize()
    drop_quantization(model)
    for module in model.modules():  # else its new linear layers would be initialised, as part of a new GircseModel
        module._is_hf_initialized = True
    return model.to(dtype)


def drop_quantization(model: PreTrainedModel) -> None:
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def name_dtype(kwargs: dict[str, Any]) -> None:
    """Renames `dtype` or `torch_dtype` to the one that the installed transformers takes; `torch_dtype` is there for
    transformers < 5 (before 4.56)."""
    given = [kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs]
    if given:
        kwargs[dtype_name()] = given[-1]


def is_tied(language_model: PreTrainedModel) -> bool:
    head = language_model.get_output_embeddings()
    return head is not None and head.weight is language_model.get_input_embeddings().weight


def check_structure(language_model: PreTrainedModel) -> None:
    """Raises a ValueError that names the backbone if the step loop can't use its parts as they are. Only what the trial
    of `find_way`, on a few tokens, would not show is checked here."""
    config, reason = language_model.config, None
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder"
    elif decoder_of(language_model) is language_model or language_model.get_output_embeddings() is None:
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
        raise unfit(language_model, reason)


def unfit(language_model: PreTrainedModel, reason: str) -> ValueError:
    name = type(language_model).__name__
    return ValueError(f"{name} can't be a GIRCSE backbone: {reason}; choose a decoder-only attention model")


def max_positions(config: PretrainedConfig) -> int | None:
    """How many positions a text and its steps may take in a backbone; None if it has no limit.

    With LongRoPE, the original limit holds. Beyond it, one longer text changes the rotary frequencies of the whole
    batch, and a step that passes it would go on from a cache of other frequencies: vectors would depend on the
    batch."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        original = rope.get("original_max_position_embeddings")
        return original or config.original_max_position_embeddings
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # MPT's


def decoder_of(language_model: PreTrainedModel) -> nn.Module:
    """f: the causal LM without its head."""
    decoder = language_model.get_decoder() if hasattr(language_model, "get_decoder") else language_model
    # `get_decoder` returns the whole causal LM for GPT-2 (transformers < 5), and the head for ModernBERT: the base
    # model is taken instead.
    if decoder is language_model or not isinstance(decoder, PreTrainedModel):
        decoder = language_model.base_model
    return getattr(language_model, "model", decoder) if decoder is language_model else decoder


def decode(
    decoder: nn.Module, inputs: Tensor, mask: Tensor | None, positions: Tensor, past: dict[str, Cache]
) -> Tensor:
    """The last position's state, (B, d), after `inputs` (B, n, d) have run over the cache. `past` holds the cache under
    the name of the decoder's argument, or is empty."""
    output = decoder(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=bool(past), **past)
    return output.last_hidden_state[:, -1].to(positions.device)


def unsharded(module: nn.Module) -> nn.Module:
    """The module with its weights gathered: FSDP2 gathers them when the module is called, and the step loop reads the
    weights without a call."""
    if hasattr(module, "unshard"):
        module.unshard()
    return module


@contextmanager
def attention_of_any_device(language_model: PreTrainedModel) -> Iterator[None]:
    """Runs a pass on the CPU in eager attention if flash attention, which needs a GPU, is chosen for later."""
    config, device = language_model.config, language_model.get_input_embeddings().weight.device
    chosen = attention_implementation(language_model)
    if device.type != "cpu" or chosen in ("eager", "sdpa", None):
        yield
        return
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def attention_implementation(language_model: PreTrainedModel) -> str | None:
    return getattr(language_model.config, "_attn_implementation", None)


def embed_tokens(language_model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, N, d). Ids under the mask may be anything (-100 is common), and become 0."""
    return unsharded(language_model.get_input_embeddings())(input_ids * attention_mask)


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token in its text, (B, N), from the attention mask; 0 for the padding on its left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def prompt_mask(language_model: PreTrainedModel, mask: Tensor, way: Way, start: int = 0) -> Tensor:
    """The attention mask of the prompt's positions from `start` on. With `way.square_masks`, padding sees itself: where
    the sum of scores and mask overflows (float16), eager attention makes NaN of a position that sees nothing, and then
    of all positions, which multiply its values by 0."""
    length = mask.shape[1]
    if not way.square_masks or mask.is_meta or mask.all() or exceeds_window(language_model.config, length):
        return mask  # (B, N), from which the backbone makes what it needs
    earlier = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    seen = earlier & mask[:, None].bool() | itself
    return additive_mask(seen, language_model.dtype)[:, None, start:]  # (B, 1, N - start, N)


def step_mask(language_model: PreTrainedModel, mask: Tensor) -> Tensor | None:
    """The attention mask of the generated positions over the cache; step k takes its first N + k columns. Made once,
    since the backbone would make one of its own at each step, and for that read the mask's values back from a GPU."""
    implementation = attention_implementation(language_model)
    if implementation not in ("eager", "sdpa") or exceeds_window(language_model.config, mask.shape[1]):
        return mask  # (B, N + K), from which the backbone makes what it needs
    if implementation == "sdpa" and not mask.is_meta and mask.all():
        return None  # a single position sees all that is in the cache
    return additive_mask(mask, language_model.dtype)[:, None, None]  # (B, 1, 1, N + K)


def exceeds_window(config: PretrainedConfig, length: int) -> bool:
    """Whether some layer may not see all of `length` positions, so that masks are left to the backbone."""
    windows = [value for name, value in vars(config).items() if re.search(WINDOW, name) and type(value) is int]
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "attention"} and not windows:
        return True  # how far these layers see is not known
    return any(length > window for window in windows)


def additive_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of 0 and 1 -> what is added to attention scores, of the same shape."""
    hidden = attention_mask == 0
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 -> float32, in which softmax, pooling and normalisation run; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def keys_and_values(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, (B, heads, N, size) each."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))  # transformers < 5 (before 4.54)


@torch.compiler.disable
@torch.no_grad()
def find_way(
    language_model: PreTrainedModel,
    states: Callable[[Tensor, Tensor, Way], Tensor],
    check: Callable[[Tensor, Way], None],
    generates: bool,
    device: torch.device,
) -> Way:
    """The fastest way of calling the decoder in which a padded row beside another one gets the states that Algorithm 1
    gives that row alone.

    Names of arguments, kinds of caches and masks differ between architectures and between versions of transformers:
    what the installed one takes is found by trial, not looked up.

    Args:
        states: a function of ids, mask and a way, which returns the model's states of them, (B, n, d).
        check: a function of ids, (1, N), and a way, which raises a ValueError for vectors that would be wrong all the
            same.
        generates: whether positions are generated after the text, for which a cache is wanted.

    Raises:
        ValueError: if no way gives these states, so that vectors would be wrong.
    """
    ids = torch.arange(8, device=device).reshape(2, 4) % language_model.get_input_embeddings().num_embeddings
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    training = [module for module in language_model.modules() if module.training]
    language_model.eval()  # with dropout, no two passes would agree
    problem = "its states depend on padding, or a later call can't continue them"
    try:
        expected = states(ids[1:, 1:], mask[1:, 1:], Way())
        other = states(ids[1:, -1:], mask[1:, -1:], Way())
        check_finite(expected, language_model)
        for way in possible_ways(language_model, ids, generates):
            try:
                found = states(ids, mask, way)[1:]
            except REFUSALS as error:
                problem = str(error)
                continue
            rounding = rounding_of(language_model, device)
            if agree(found, expected, other, rounding):
                if way.cache is not None:
                    found = with_gap(states, ids[1:, 1:], way)
                    way = way._replace(gaps=found is not None and agree(found, expected, other, rounding))
                elif generates:
                    logger.warning(SLOW.format(type(language_model).__name__, transformers.__version__))
                check(ids[:1], way)
                return way
    except TypeError as error:  # an unknown argument; other errors of a plain pass are the machine's
        problem = str(error)
    finally:
        for module in training:
            module.training = True
        # Older versions of torch would go on with the weights that autocast cast in these passes, without gradients.
        torch.clear_autocast_cache()
    raise unfit(language_model, f"with transformers {transformers.__version__}, {problem}")


def check_finite(states: Tensor, language_model: PreTrainedModel) -> None:
    if not (states.is_meta or states.isfinite().all()):
        dtype = str(language_model.dtype).removeprefix("torch.")
        raise ValueError(
            f"{type(language_model).__name__}'s states are not finite in {dtype}: load the model in another dtype, as "
            "bfloat16. If they never are, its weights are not"
        )


def with_gap(states: Callable[[Tensor, Tensor, Way], Tensor], ids: Tensor, way: Way) -> Tensor | None:
    """The states of a row (1, N) with padding after its first token, (1, n, d); None if the decoder takes no such."""
    gap = ids.new_zeros(1, TRIED_GAP)
    padded = torch.cat([ids[:, :1], gap, ids[:, 1:]], dim=1)
    mask = torch.ones_like(ids)
    with suppress(*REFUSALS):
        return states(padded, torch.cat([mask[:, :1], gap, mask[:, 1:]], dim=1), way)
    return None


def possible_ways(language_model: PreTrainedModel, ids: Tensor, generates: bool) -> list[Way]:
    """The ways to call the decoder that are tried: fastest first, `Way()` last."""
    squares = [True, False] if attention_implementation(language_model) == "eager" else [False]
    names: list[str | None] = [None]
    if generates:
        inputs = embed_tokens(language_model, ids, torch.ones_like(ids))
        with suppress(*REFUSALS):
            # A decoder returns the cache that it has made under the name of the argument that takes one. Gemma 2 makes
            # one of fixed length, which needs masks of that length: it is passed over (transformers < 5).
            output = decoder_of(language_model)(inputs_embeds=inputs, use_cache=True)
            names = [name for name, value in output.items() if isinstance(value, DynamicCache)] + names
    return [Way(name, square) for name in names for square in squares]


def is_quantized(language_model: PreTrainedModel) -> bool:
    return any(not x.is_floating_point() or type(x.data) is not Tensor for x in language_model.parameters())


def rounding_of(language_model: PreTrainedModel, device: torch.device) -> float:
    """How far rounding may take states from each other, as a share of their distance to those of another text. The
    states' own dtype does not tell: they may have been averaged in float32."""
    if is_quantized(language_model):
        return 0.3  # activations may be rounded by row, or with all others of the batch (LLM.int8)
    if torch.finfo(language_model.dtype).eps > 1e-6 or torch.is_autocast_enabled(device.type):
        return 0.1
    return 0.01


def agree(found: Tensor, expected: Tensor, other: Tensor, rounding: float) -> bool:
    """Whether states (1, n, d) are the same up to rounding: far nearer to each other than to those of another text. On
    the meta device there are no values to compare."""
    if found.is_meta:
        return True
    found, expected, other = (x.float() for x in (found, expected, other))
    error, difference, size = (x.norm() for x in (found - expected, other - expected, expected))
    return bool(error <= max(rounding * difference, 1e-4 * size))
