"""The step loop of ONNX graphs that were traced apart: each part becomes an ONNX function, the loop calls them, and the
calls are inlined."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

DOMAIN = "gircse"


def unroll(parts: dict[str, ir.Model], k: int, shared: set[str]) -> ir.Model:
    """The parts `enter`, `decode`, `advance` and `leave` of a `StepGraph` -> the graph of all k steps.

    Args:
        parts: each one's graph; they are changed.
        k: the number of steps.
        shared: names of the weights, which are the same tensors in each part. Other constants are a part's own.
    """
    weights: dict[str, ir.Value] = {}
    read = {name: take_weights(name, part.graph, shared, weights) for name, part in parts.items()}
    functions = {name: ir.Function(DOMAIN, name, graph=part.graph, attributes=[]) for name, part in parts.items()}
    nodes = []

    def call(name: str, *inputs: ir.Value) -> list[ir.Value]:
        node = ir.Node(DOMAIN, name, [*inputs, *read[name]], num_outputs=len(functions[name].outputs))
        nodes.append(node)
        return list(node.outputs)

    ids = [ir.Value(name=f"ids_{i}", shape=x.shape, type=x.type) for i, x in enumerate(parts["enter"].graph.inputs[:2])]
    inputs, mask, positions, *past = call("enter", *ids)
    state, *past = call("decode", inputs, mask, positions, *past)
    states = [state]
    for _ in range(k):
        inputs, mask, positions = call("advance", states[-1], mask, positions)
        state, *past = call("decode", inputs, mask, positions, *past)
        states.append(state)
    outputs = call("leave", *states)

    opsets = {**parts["decode"].opset_imports, DOMAIN: 1}
    graph = ir.Graph(ids, outputs, nodes=nodes, initializers=list(weights.values()), opset_imports=opsets, name=DOMAIN)
    model = ir.Model(graph, ir_version=parts["decode"].ir_version, functions=list(functions.values()))
    passes.InlinePass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    return model


def take_weights(part: str, graph: ir.Graph, shared: set[str], weights: dict[str, ir.Value]) -> list[ir.Value]:
    """Makes a part's constants inputs, as functions have none, and returns what the calls give for them: the values of
    `weights`, to which it adds those that are missing."""
    read = []
    for name, constant in list(graph.initializers.items()):
        key = name if name in shared else f"{part}.{name}"
        if key not in weights:
            value = constant.const_value
            weights[key] = ir.Value(name=key, shape=constant.shape, type=constant.type, const_value=value)
        del graph.initializers[name]
        graph.inputs.append(constant)
        read.append(weights[key])
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                # The name of a free size stands for one size in all of a graph, and each call has its own.
                value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])
    return read
