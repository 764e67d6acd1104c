"""The step loop as a static graph: with k fixed, ids go in and embeddings come out, and keys and values go from step to
step inside. It is traced in parts, each once; `assemble.py` makes the loop of them."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes import common as passes
from torch import Tensor, nn
from transformers import DynamicCache

from .assemble import side_by_side, step_loop

INPUTS, OUTPUT = ("input_ids", "attention_mask"), "last_hidden_state"
# torch.onnx's operators are written for 18, and onnxruntime takes what came later.
OLDEST_OPSET, OPSET = 18, 20
KINDS = {"full_attention", "sliding_attention"}
# Initializers of up to this many bytes are compared to find equal ones. Larger ones are not copied by the exporter.
MOST_COMPARED = 2**26


class StepGraph(nn.Module):
    """Token ids of texts -> their embeddings after k steps, with nothing that depends on values.

    It is traced in parts: `enter`, `decode`, `advance` and `leave`, of which `forward` runs the one that [`part`]
    names. A model that generates nothing has one part, `single_pass`.

    Args:
        model: a `GircseModel` in eager attention and eval mode.
        k: the number of steps; 1 with `step_token="none"`.
        suffix_ids: token ids that are put behind each text.
        empty_id: the token that a text without any gets, if there are no suffix ids.

    Raises:
        ValueError: if the backbone has no KV cache that a later call can continue, or layers that see otherwise than in
            full or in a sliding window.
    """

    def __init__(self, model: Any, k: int, suffix_ids: list[int], empty_id: int) -> None:
        super().__init__()
        self.model, self.k, self.part = model, k, "single_pass"
        self.generates = model.config.step_token in ("soft", "hard")
        self.empty_id = None if suffix_ids else empty_id
        self.register_buffer("suffix_ids", torch.tensor([suffix_ids], dtype=torch.long), persistent=False)
        config = model.language_model.config
        self.kinds = set(getattr(config, "layer_types", None) or ())
        if unknown := sorted(self.kinds - KINDS):
            raise unfit(model, f"how far its layers of the kind {', '.join(unknown)} see is not known")
        self.cache_name = model._find_way(torch.device("cpu")).cache
        if self.cache_name is None and self.generates:
            raise unfit(model, "it has no KV cache that the steps inside the graph could continue")
        slides = "sliding_attention" in self.kinds or not self.kinds and getattr(config, "use_sliding_window", True)
        # A mask of both directions is the same for all layers in PyTorch, too: see `single_pass_gircse`.
        slides = slides and model.config.attention == "causal"
        self.window = getattr(config, "sliding_window", None) if slides else None
        self.sizes: list[torch.Size] = []  # of the cached tensors, keys and values by turns

    def forward(self, *inputs: Tensor) -> Any:
        return getattr(self, self.part)(*inputs)

    def enter(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """(B, N) int64 each, padded on either side -> embeddings (B, N, d), mask and positions (B, N), and the cache
        before the first call, tensors (B, heads, 0, size)."""
        ids, mask = self.padded_left(input_ids, (attention_mask != 0).long())
        backbone = remote_module(self.model, "backbone_gircse")
        inputs = backbone.embed_tokens(self.model.language_model, ids, mask)
        past = [inputs.new_zeros(inputs.shape[0], size[1], 0, size[3]) for size in self.sizes]
        return inputs, mask, backbone.positions_of(mask), *past

    def decode(self, inputs: Tensor, mask: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """n positions over a cache of P: (B, n, d), (B, P + n), (B, n), keys and values by turns -> the last position's
        state (B, d), and the cache of P + n positions."""
        backbone, cache = remote_module(self.model, "backbone_gircse"), DynamicCache()
        for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(*pair, layer)
        seen = self.seen(mask, inputs.shape[1])
        decoder = backbone.decoder_of(self.model.language_model)
        state = backbone.decode(decoder, inputs, seen, positions, {self.cache_name: cache})
        return state, *(tensor for pair in backbone.keys_and_values(cache) for tensor in pair)

    def advance(self, state: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """h'_{k-1} -> what `decode` takes for step k: d_k as (B, 1, d), the mask, and its position, (B, 1)."""
        return self.model._next_token(state)[1][:, None], F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1

    def leave(self, state: Tensor, states: Tensor) -> Tensor:
        """h'_0, (B, d), and g_1..g_k, (k, B, d) -> (B, 1, d) float32 of unit norm."""
        return F.normalize(self.model._pool(state, states.transpose(0, 1))[:, -1:], dim=-1)

    def single_pass(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N) int64 each -> (B, 1, d), for models that generate nothing; see `single_pass_gircse`."""
        model, config = self.model, self.model.config
        inputs, mask, _ = self.enter(input_ids, attention_mask)
        if config.step_token == "learned":
            learned = model.learned_tokens.weight[: self.k].expand(inputs.shape[0], -1, -1)
            inputs, mask = torch.cat([inputs, learned], dim=1), F.pad(mask, (0, self.k), value=1)
        backbone = remote_module(model, "backbone_gircse")
        decoder, positions = backbone.decoder_of(model.language_model), backbone.positions_of(mask)
        states = decoder(
            inputs_embeds=inputs, attention_mask=self.seen(mask), position_ids=positions, use_cache=False
        ).last_hidden_state
        if config.step_token == "learned":
            states = model._pool(None, states[:, -self.k :])[:, -1:]
        elif config.pooling == "last":
            states = states[:, -1:]
        else:
            weights = mask[..., None].to(states.dtype)
            states = (states * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return F.normalize(states, dim=-1)

    def padded_left(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's tokens, then the suffix, moved to the right: generated tokens follow their text, and sliding
        windows see true distances. By cumulated sums, since ONNX has no stable sorting."""
        length = mask.sum(1, keepdim=True)
        if self.empty_id is not None:
            ids = torch.cat([torch.full_like(length, self.empty_id), ids], dim=1)
            mask = torch.cat([(length == 0).long(), mask], dim=1)
            length = mask.sum(1, keepdim=True)
        token = mask.shape[1] - length + mask.cumsum(1) - 1
        place = torch.where(mask == 1, token, (1 - mask).cumsum(1) - 1)  # a permutation of 0..N-1
        ids = torch.zeros_like(ids).scatter(1, place, ids * mask)
        mask = torch.zeros_like(mask).scatter(1, place, mask)
        if self.empty_id is None:
            ids = torch.cat([ids, self.suffix_ids.expand(ids.shape[0], -1)], dim=1)
            mask = F.pad(mask, (0, self.suffix_ids.shape[1]), value=1)
        return ids, mask

    def seen(self, mask: Tensor, last: int | None = None) -> Any:
        """What is added to attention scores, (B, 1, n, N), of all positions or the last ones; by kind of layer where a
        backbone has several. Padding sees itself, as a softmax over nothing would be NaN in float16."""
        length = mask.shape[1]
        keys = torch.arange(length)
        queries = keys[:, None] if last is None else keys[length - last :, None]
        itself = queries == keys
        if self.model.config.attention == "bidirectional":
            seen = mask[:, None].bool() | itself
        else:
            seen = (keys <= queries) & mask[:, None].bool() | itself
        add = remote_module(self.model, "backbone_gircse").additive_mask
        full = add(seen, torch.float32)[:, None]
        if self.window is None:
            return full
        near = add(seen & (queries - keys < self.window), torch.float32)[:, None]
        return {"full_attention": full, "sliding_attention": near} if self.kinds else near


def remote_module(model: Any, name: str) -> ModuleType:
    """The module of the remote code that the model's class is of."""
    return sys.modules[f"{type(model).__module__.rpartition('.')[0]}.{name}"]


def unfit(model: Any, reason: Any) -> ValueError:
    name = type(model.language_model).__name__
    return ValueError(f"{name} can't be exported to ONNX: {reason}. Use the model in PyTorch, or another backbone")


def check_opset(opset: int) -> None:
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"opset={opset!r} must be an int from {OLDEST_OPSET} to {newest}, the newest of this onnx")


def trace(graph: StepGraph, opset: int = OPSET) -> tuple[ir.Model, list[str]]:
    """The graph in ONNX with dynamic batch and length, each weight once, of which `complete` makes that of k steps; and
    the names of the nodes that float16 would spoil.

    Raises:
        ValueError: if torch.onnx can't export the backbone; it names the backbone.
    """
    try:
        with quiet(), torch.no_grad():
            if graph.generates:
                model = side_by_side(trace_parts(graph, opset), set(graph.state_dict()))
            else:
                model = export(graph, "single_pass", example(), ({0, 1}, {0, 1}), opset)
    except Exception as error:  # what torch.export and torch.onnx raise has no common class
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise unfit(graph.model, reason) from error
    found = model.opset_imports[""]
    if found != opset:
        raise ValueError(f"opset={opset}: the exporter wrote {found}; use --opset {found}")
    exact = [node.name for node in model.graph if is_exact(node)]
    passes.ClearMetadataAndDocStringPass()(model)  # each node's says where in which file of this machine it was made
    passes.CommonSubexpressionEliminationPass()(model)
    passes.DeduplicateInitializersPass(size_limit=MOST_COMPARED)(model)  # the exporter folds transposed weights
    transpose_weights(model)
    passes.RemoveUnusedNodesPass()(model)
    return model, exact


def complete(graph: StepGraph, model: ir.Model) -> ir.Model:
    """The graph to run, of what `trace` returned and a format has made of it."""
    if graph.generates:
        model = step_loop(model, graph.k)
    for value, name in zip((*model.graph.inputs, *model.graph.outputs), (*INPUTS, OUTPUT), strict=True):
        value.name = name
    model.metadata_props["k"] = str(graph.k)
    return model


def example() -> tuple[Tensor, Tensor]:
    """Ids and mask, (2, 6) each."""
    return torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)


def trace_parts(graph: StepGraph, opset: int) -> dict[str, ir.Model]:
    """Each part of the step loop in ONNX, from what the parts before it give for the example."""
    graph.sizes = []
    inputs, mask, positions = graph.enter(*example())
    state, *past = graph.decode(inputs, mask, positions)
    graph.sizes = [tensor.shape for tensor in past]
    embedding, mask, positions = graph.advance(state, mask, positions)
    # Not one position, which torch.export would take for a constant.
    several, more = embedding.expand(-1, 3, -1), F.pad(mask, (0, 2), value=1)
    after = positions + torch.arange(3)
    both, batch = {0, 1}, {0}
    return {
        "enter": export(graph, "enter", example(), (both, both), opset),
        "decode": export(
            graph, "decode", (several, more, after, *past), (both, both, both, *({0, 2} for _ in past)), opset
        ),
        "advance": export(graph, "advance", (state, more, after), (batch, both, both), opset),
        "leave": export(graph, "leave", (state, torch.stack([state] * graph.k)), (batch, {1}), opset),
    }


def export(graph: StepGraph, part: str, inputs: tuple[Tensor, ...], dynamic: tuple, opset: int) -> ir.Model:
    """A part in ONNX; `dynamic` has the dimensions of each input that may be of any size."""
    graph.part = part
    shapes = tuple(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC) for dimensions in dynamic)
    return torch.onnx.export(
        graph, inputs, dynamo=True, dynamic_shapes={"inputs": shapes}, opset_version=opset, verbose=False
    ).model


def is_exact(node: ir.Node) -> bool:
    """Whether a node is part of a normalisation, of rotary positions, or of what is between the calls of the backbone's
    modules: soft-max, masks and pooling. The mix s E is there too, and is not."""
    scopes = node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
    outside = scopes.count("'") // 2 <= 2 and node.op_type != "MatMul"  # this module's class, and the operator
    return outside or "Norm" in scopes or "Rotary" in scopes


def transpose_weights(model: ir.Model) -> None:
    """Stores weights as the products read them: quantisers look for products by a stored matrix. A tied table stays,
    since it is read both ways."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        array = np.ascontiguousarray(weight.const_value.numpy().transpose(node.attributes["perm"].as_ints()))
        stored = ir.Value(name=f"{weight.name}.T", const_value=ir.Tensor(array, name=f"{weight.name}.T"))
        stored.shape, stored.type = ir.Shape(array.shape), weight.type
        model.graph.register_initializer(stored)
        node.outputs[0].replace_all_uses_with(stored)
        model.graph.remove(node, safe=True)
        model.graph.initializers.pop(weight.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what exporters and quantisers say of packages that are not installed, deprecations and clipped masks."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
