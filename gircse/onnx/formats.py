"""The graph in float16 and in int8, by onnxruntime's own converters. They see each part of the loop on its own, so that
a step's nodes are converted once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from .graph import quiet

# A protobuf holds 2 GB. Weights of more bytes than this go to a file of their own beside it.
MOST_IN_ONE_FILE = 1_900_000_000
QUANTIZED = ("quantized", "scale", "zero_point")  # how the quantiser calls the parts of a matrix


def save(model: ir.Model, path: Path) -> None:
    """Writes a graph; weights above [`MOST_IN_ONE_FILE`] beside it, under the name that transformers.js looks for."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=f"{path.name}_data" if size > MOST_IN_ONE_FILE else None)


def to_float16(source: Path, exact: list[str]) -> ir.Model:
    """A file's graph in float16, but for softmax, the nodes named in `exact`, and what goes in and out of parts other
    than keys and values."""
    whole = onnx.load(source)
    with quiet():
        half = convert_float_to_float16(
            whole,
            keep_io_types=[value.name for value in (*whole.graph.input, *whole.graph.output) if not is_cache(value)],
            disable_shape_infer=True,  # the exporter wrote all types, and inference takes no model above 2 GB
            op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"],
            node_block_list=exact,
        )
    model = ir.from_proto(half)
    model.graph.sort()  # the converter puts casts at the end
    keep_float32(model)
    return model


def is_cache(value: onnx.ValueInfoProto) -> bool:
    return len(value.type.tensor_type.shape.dim) == 4


def keep_float32(model: ir.Model) -> None:
    """Between two nodes in float32 the converter goes through float16, where a sum of squares overflows: these pairs
    of casts go."""
    for node in model.graph:
        before = node.inputs[0].producer() if node.op_type == "Cast" else None
        if before is None or before.op_type != "Cast" or node.attributes["to"].as_int() != ir.DataType.FLOAT:
            continue
        source = before.inputs[0]
        if before.attributes["to"].as_int() == ir.DataType.FLOAT16 and source.dtype == ir.DataType.FLOAT:
            node.replace_input_with(0, source)
            if not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(source)
    RemoveUnusedNodesPass()(model)


def to_int8(source: Path, table: str, complete: Callable[[ir.Model], ir.Model]) -> ir.Model:
    """A file's graph, completed, with the decoder's weights, the LM head and the token embeddings in int8. Activations
    are quantised as they come.

    Two kinds of products stay products of floats, of int8 weights' values. The mix s E of a soft token: in steps of a
    batch's largest probability, a flat distribution beside a peaked one would become zero. And those that make vectors
    narrower, as the second product of an MLP: what goes in has a few values hundreds of times the others.

    Args:
        table: the name of the token embeddings.
        complete: makes the graph to run of the parts. What makes floats of int8 weights comes after, once for all.
    """
    graph = onnx.load(source, load_external_data=False).graph
    sizes, nodes = {tensor.name: tensor.dims for tensor in graph.initializer}, graph.node
    read = {name for node in nodes if node.op_type == "MatMul" for name in node.input} & set(sizes) - {table}
    narrowing = {name for name in read if len(sizes[name]) == 2 and sizes[name][0] > sizes[name][1]}
    tied = any(node.op_type == "Gemm" and table in node.input for node in nodes)
    kept = [node.name for node in nodes if node.op_type == "MatMul" and {table, *narrowing} & set(node.input)]
    kept += [node.name for node in nodes if node.op_type == "Gather" and (tied or table not in node.input)]
    external = source.with_name(f"{source.name}_data").exists()
    raw = source.with_name(f"int8_{source.name}")
    with quiet():
        quantize_dynamic(
            source,
            raw,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QUInt8,  # with QInt8, sums overflow on CPUs without VNNI
            nodes_to_exclude=kept,
            use_external_data_format=external,
        )
    model = complete(ir.from_proto(onnx.load(raw)))
    for name in sorted(narrowing & set(model.graph.initializers)):
        store_int8(model, name)
    if tied:
        read_head(model, table)
    else:  # the quantised lookup has made the table int8, and the quantiser reads it so for the mix
        for node in [*model.graph.all_nodes()]:
            if node.op_type == "DequantizeLinear" and node.inputs[0].name == f"{table}_quantized":
                node.outputs[0].replace_all_uses_with(values_of(model, list(node.inputs)).outputs[0])
    RemoveUnusedNodesPass()(model)
    return model


def store_int8(model: ir.Model, name: str) -> None:
    """Stores a matrix in int8, with a scale and a zero for each column; products read its values."""
    weights = model.graph.initializers
    array = weights[name].const_value.numpy()
    least, most = np.minimum(array.min(0), 0), np.maximum(array.max(0), 0)
    scale = np.maximum((most - least) / 255, np.finfo(np.float32).tiny).astype(np.float32)
    zero = np.round(-least / scale)
    stored = (np.round(array / scale) + zero).clip(0, 255).astype(np.uint8), scale, zero.astype(np.uint8)
    parts = []
    for part, values in zip(QUANTIZED, stored, strict=True):
        value = ir.Value(name=f"{name}_{part}", const_value=ir.Tensor(values, name=f"{name}_{part}"))
        value.shape, value.type = ir.Shape(values.shape), ir.TensorType(ir.DataType.from_numpy(values.dtype))
        model.graph.register_initializer(value)
        parts.append(value)
    weights[name].replace_all_uses_with(values_of(model, parts).outputs[0])
    del weights[name]


def read_head(model: ir.Model, table: str) -> None:
    """What reads a tied table in float32 reads the int8 one of the head instead, so that one is stored."""
    weights = model.graph.initializers
    values = values_of(model, [weights[f"{table}_Transposed_{part}"] for part in QUANTIZED])
    rows = ir.node("Transpose", [values.outputs[0]], attributes={"perm": [1, 0]})
    model.graph.insert_after(values, [rows])
    weights[table].replace_all_uses_with(rows.outputs[0])
    del weights[table]


def values_of(model: ir.Model, parts: list[ir.Value]) -> ir.Node:
    """The float32 values of an int8 matrix, of which each column has its scale and zero. Not by DequantizeLinear, which
    onnxruntime runs at each call, but by operators that it runs once, when it loads the file."""
    stored, scale, zero = parts
    floats = [ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}) for value in (stored, zero)]
    shifted = ir.node("Sub", [node.outputs[0] for node in floats])
    values = ir.node("Mul", [shifted.outputs[0], scale])
    model.graph.insert_before(model.graph[0], [*floats, shifted, values])
    return values
