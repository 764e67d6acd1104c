"""The step loop of ONNX graphs that were traced apart. First the parts lie side by side in one graph, for what is done
to nodes and weights; then they become the prefill and an ONNX Loop of k steps, so that neither a file nor the memory
that runs it grows with k."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

DOMAIN = "gircse"


def side_by_side(parts: dict[str, ir.Model], shared: set[str]) -> ir.Model:
    """One graph of all parts, each with its own inputs and outputs, called `part/in_0`, `part/out_0` and so on.

    Args:
        parts: each one's graph by name; they are used up.
        shared: names of the weights, which are the same tensors in each part. Other constants are a part's own.
    """
    weights: dict[str, ir.Value] = {}
    inputs, outputs, nodes = [], [], []
    for part, model in parts.items():
        graph = model.graph
        for name, constant in list(graph.initializers.items()):
            del graph.initializers[name]
            constant.name = name if name in shared else f"{part}/{name}"
            if weights.setdefault(constant.name, constant) is not constant:
                constant.replace_all_uses_with(weights[constant.name])
        for node in graph:
            node.name = f"{part}/{node.name}"
            for value in node.outputs:
                value.name = f"{part}/{value.name}"
                unname_sizes(value)
        for kind, values, all_values in (("in", graph.inputs, inputs), ("out", graph.outputs, outputs)):
            for i, value in enumerate(values):
                value.name = f"{part}/{kind}_{i}"
                unname_sizes(value)
            all_values.extend(values)
        taken = list(graph)
        graph.inputs.clear()
        graph.outputs.clear()
        graph.remove(taken)
        nodes += taken
    first = next(iter(parts.values()))
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=[*weights.values()], opset_imports=first.opset_imports, name=DOMAIN
    )
    return ir.Model(graph, ir_version=first.ir_version)


def unname_sizes(value: ir.Value) -> None:
    """The name of a size that is free stands for one size in all of a graph, and each part has its own."""
    if value.shape is not None:
        value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape])


def step_loop(parts: ir.Model, k: int) -> ir.Model:
    """The graph of k steps from the parts `enter`, `decode`, `advance` and `leave` of a `StepGraph`, side by side."""
    graphs = {name: cut_out(parts.graph, name) for name in ("enter", "decode", "advance", "leave")}
    weights: dict[str, ir.Value] = {}
    read = {name: take_weights(graph, weights) for name, graph in graphs.items()}
    functions = {name: ir.Function(DOMAIN, name, graph=graph, attributes=[]) for name, graph in graphs.items()}
    opsets = {**parts.opset_imports, DOMAIN: 1}

    def call(nodes: list[ir.Node], name: str, *inputs: ir.Value) -> list[ir.Value]:
        node = ir.Node(DOMAIN, name, [*inputs, *read[name]], num_outputs=len(functions[name].outputs))
        nodes.append(node)
        return list(node.outputs)

    body = loop_body(call, functions, opsets)
    ids = [ir.Value(name=f"ids_{i}", shape=x.shape, type=x.type) for i, x in enumerate(graphs["enter"].inputs[:2])]
    steps = scalar("k", ir.DataType.INT64)
    steps.const_value = ir.Tensor(np.array(k), name="k")
    nodes: list[ir.Node] = []
    inputs, mask, positions, *past = call(nodes, "enter", *ids)
    first, *past = call(nodes, "decode", inputs, mask, positions, *past)
    into = [steps, None, first, mask, positions, *past]
    loop = ir.node("Loop", into, attributes={"body": body}, num_outputs=len(body.outputs) - 1)
    nodes.append(loop)
    outputs = call(nodes, "leave", first, loop.outputs[-1])
    graph = ir.Graph(
        ids, outputs, nodes=nodes, initializers=[steps, *weights.values()], opset_imports=opsets, name=DOMAIN
    )
    model = ir.Model(graph, ir_version=parts.ir_version, functions=list(functions.values()))
    passes.InlinePass()(model)
    passes.NameFixPass()(model)  # the loop's own names must differ from those around it
    passes.RemoveUnusedOpsetsPass()(model)
    return model


def loop_body(call: Callable, functions: dict[str, ir.Function], opsets: dict[str, int]) -> ir.Graph:
    """A step. From one to the next go its state, the mask, the position and the cache; the states are collected."""
    decode, advance = functions["decode"], functions["advance"]
    passed = [decode.outputs[0], *advance.outputs[1:], *decode.outputs[1:]]
    carried = [ir.Value(name=f"step/{i}", shape=value.shape, type=value.type) for i, value in enumerate(passed)]
    number, going_on = scalar("step/number", ir.DataType.INT64), scalar("step/going_on", ir.DataType.BOOL)
    nodes: list[ir.Node] = []
    state, mask, positions, *past = carried
    inputs, mask, positions = call(nodes, "advance", state, mask, positions)
    state, *past = call(nodes, "decode", inputs, mask, positions, *past)
    # An output that is an input, or another output, needs a node of its own.
    copies = [ir.node("Identity", [value]) for value in (going_on, state)]
    go_on, collected = (node.outputs[0] for node in copies)
    outputs = [go_on, state, mask, positions, *past, collected]
    inputs = [number, going_on, *carried]
    return ir.Graph(inputs, outputs, nodes=[*nodes, *copies], opset_imports=opsets, name="step")


def scalar(name: str, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(dtype))


def cut_out(graph: ir.Graph, part: str) -> ir.Graph:
    """A part's own graph: a copy, of the same tensors."""
    inputs = [value for value in graph.inputs if value.name.startswith(f"{part}/")]
    outputs = [value for value in graph.outputs if value.name.startswith(f"{part}/")]
    return ir.convenience.extract(graph, inputs, outputs)


def take_weights(graph: ir.Graph, weights: dict[str, ir.Value]) -> list[ir.Value]:
    """Makes a part's constants inputs, as functions have none, and returns what calls give for them: the values of
    `weights`, to which it adds those that are missing."""
    read = []
    for name, constant in list(graph.initializers.items()):
        if name not in weights:
            shape, value = constant.shape, constant.const_value
            weights[name] = ir.Value(name=name, shape=shape, type=constant.type, const_value=value)
        del graph.initializers[name]
        graph.inputs.append(constant)
        read.append(weights[name])
    return read
