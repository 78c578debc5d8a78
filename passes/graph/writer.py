"""New nodes with what every node carries: origin, recompute tags, an example value.

Example values are computed on the fake tensors that the capture left behind.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from . import _torch
from .operators import dtype_of, value_of

__all__ = ["INHERITED", "Writer", "set_example_value"]

INHERITED = ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id")
"""What a new node takes over from the node whose work it does."""


class Writer:
    """Writes nodes one behind the other, all with the origin and the recompute tags of one.

    Args:
        place: the node behind which the first is written.
        like: the node whose work they do.
    """

    def __init__(self, place: fx.Node, like: fx.Node) -> None:
        self.place, self.like = place, like

    def call(self, target: Any, *args: Any, name: str | None = None) -> fx.Node:
        """A call of a function, or of the method so called of the first argument."""
        graph, op = self.place.graph, "call_method" if isinstance(target, str) else "call_function"
        with graph.inserting_after(self.place):
            self.place = graph.create_node(op, target, args, name=name)
        self.place.meta = {k: self.like.meta[k] for k in INHERITED if k in self.like.meta}
        set_example_value(self.place)
        return self.place

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node itself if it has the dtype."""
        return node if dtype_of(node) == dtype else self.call("to", node, dtype)


def set_example_value(node: fx.Node) -> None:
    """Compute ``meta["example_value"]`` of a node from its inputs' values, without data."""
    if node.op not in ("call_function", "call_method") or "example_value" in node.meta:
        return
    values = [value_of(n) for n in node.all_input_nodes]
    mode = next((v.fake_mode for v in _tensors(values) if hasattr(v, "fake_mode")), None)
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    # With the decompositions in Python, as Dynamo has it: the one of matmul in C++ asks symbolic
    # sizes for a number (torch 2.11).
    with torch.no_grad(), _torch.enable_python_dispatcher(), mode or nullcontext():
        if isinstance(node.target, str):
            node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)


def _value(node: fx.Node) -> Any:
    return value_of(node)


def _tensors(values: list[Any]) -> list[Any]:
    flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [v for v in flat if isinstance(v, torch.Tensor)]
