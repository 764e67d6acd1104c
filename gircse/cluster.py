"""How many models the nodes of a Ray cluster have room for."""

from __future__ import annotations

import ray


def resources(num_gpus: float | None) -> tuple[list[tuple[int, float]], float]:
    """CPU cores and GPUs of each node, and the GPUs of a model: `num_gpus`, or without it 1 where there are any."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(node.get("CPU", 0)), node.get("GPU", 0)) for node in nodes]
    return nodes, float(any(gpu for _, gpu in nodes)) if num_gpus is None else num_gpus


def room_on_gpus(there: float, each: float) -> int:
    """How many models of `each` > 0 GPUs fit on as many as are there; Ray gives a part of a GPU from one alone."""
    return int(there // each) if each >= 1 else int(there) * int(1 / each + 1e-6)  # 1 / 0.1 may be 9.99..
