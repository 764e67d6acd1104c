"""The step loop of ONNX graphs that were traced apart. First the parts lie side by side in one graph, for what is done
to nodes and weights; then they become the prefill and an ONNX Loop of k steps, so that neither a file nor the memory
that runs it grows with k."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

DOMAIN = "gircse"
# Of a step and what the next one takes from it: h'_k, the mask, the position. The cache follows.
CARRIED = ("state", "mask", "positions")


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
                # The name of a free size stands for one size in all of a graph, and each part has its own.
                free(value)
        for kind, values, all_values in (("in", graph.inputs, inputs), ("out", graph.outputs, outputs)):
            for i, value in enumerate(values):
                value.name = f"{part}/{kind}_{i}"
                free(value)
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


def free(value: ir.Value) -> None:
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

    step: list[ir.Node] = []
    passed = [functions["decode"].outputs[0], *functions["advance"].outputs[1:], *functions["decode"].outputs[1:]]
    state, mask, positions, *past = carried = [
        ir.Value(name=f"step/{name}", shape=value.shape, type=value.type)
        for name, value in zip([*CARRIED, *(f"past_{i}" for i in range(len(passed)))], passed, strict=False)
    ]
    number = ir.Value(name="step/number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    going_on = ir.Value(name="step/going_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    inputs, mask, positions = call(step, "advance", state, mask, positions)
    state, *past = call(step, "decode", inputs, mask, positions, *past)
    # An output of a graph that is one of its inputs, or another of its outputs, needs a node of its own.
    same = [ir.node("Identity", [value]) for value in (going_on, state)]
    step += same
    going_on_still, kept = (node.outputs[0] for node in same)
    body = ir.Graph(
        [number, going_on, *carried],
        [going_on_still, state, mask, positions, *past, kept],
        nodes=step,
        opset_imports=opsets,
        name="step",
    )

    ids = [ir.Value(name=f"ids_{i}", shape=x.shape, type=x.type) for i, x in enumerate(graphs["enter"].inputs[:2])]
    steps = ir.Value(name="k", shape=ir.Shape([]), type=number.type, const_value=ir.Tensor(np.array(k), name="k"))
    nodes: list[ir.Node] = []
    inputs, mask, positions, *past = call(nodes, "enter", *ids)
    first, *past = call(nodes, "decode", inputs, mask, positions, *past)
    loop = ir.node(
        "Loop", [steps, None, first, mask, positions, *past], attributes={"body": body}, num_outputs=len(passed) + 1
    )
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
