"""The one place that writes nodes: each has a value that was computed, and an origin.

    write = Writer(place, like)                behind `place`, in the name of `like`
    write.call(torch.mul, a, b)                a node behind the one before, with its value
    with tracing(before, like) as tracer:      whatever is done to proxies of this tracer
        fx.Proxy(a, tracer) * fx.Proxy(b, tracer)
    marker(branch_input, x)                    a function of ours that returns x itself

Values are computed on the fake tensors that the capture left behind, never copied from another
node, under the key that the graph has: Dynamo's graphs ``example_value``, those of AOTAutograd
``val``. Origin and tags (module, line, recomputation, site) come from the node whose work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from . import _torch
from .operators import dtype_of, value_of

__all__ = ["OWN_TAG", "SITE_TAG", "Writer", "compute_value", "marker", "tracing"]

_INHERITED = (
    *("nn_module_stack", "stack_trace", "source_fn_stack", "seq_nr"),
    *("recompute", "ac_graph_id"),
    SITE_TAG := "mhc_site",
    OWN_TAG := "mhc_own",
)
"""What a new node takes over from the node whose work it does.

``SITE_TAG`` is the name of the connection that a node belongs to; ``OWN_TAG`` is on the products
with which hyper-connections of the model's own are computed, the name of the first of them.
"""


class Writer:
    """Writes nodes one behind the other, all with the origin and the tags of one.

    Args:
        place: the node behind which the first is written.
        like: the node whose work they do.
    """

    def __init__(self, place: fx.Node, like: fx.Node) -> None:
        self.place, self.like = place, like

    def call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """A call of a function, or of the method so called of the first argument."""
        graph, op = self.place.graph, "call_method" if isinstance(target, str) else "call_function"
        with graph.inserting_after(self.place):
            self.place = graph.create_node(op, target, args, kwargs, name=name)
        _complete(self.place, self.like)
        return self.place

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node itself if it has the dtype."""
        return node if dtype_of(node) == dtype else self.call("to", node, dtype)

    def move(self, node: fx.Node) -> None:
        """Put a node of the graph behind what was written, where writing goes on."""
        self.place.append(node)
        self.place = node


@contextmanager
def tracing(before: fx.Node, like: fx.Node) -> Iterator[_torch.GraphAppendingTracer]:
    """Write what is done to proxies in front of a node, in the name of another."""
    graph, previous = before.graph, before.prev
    with graph.inserting_before(before):
        yield _torch.GraphAppendingTracer(graph)
    node = previous.next
    while node is not before:
        _complete(node, like)
        node = node.next


def marker(function: Callable[[Any], Any], value: fx.Node) -> fx.Node:
    """A call of a function that returns its argument, where the graph is being written."""
    node = value.graph.call_function(function, (value,))
    node.meta = dict(value.meta)
    return node


def compute_value(node: fx.Node) -> Any:
    """What a node computes, on fake tensors, from the values of its inputs."""
    mode: Any = None
    for operand in node.all_input_nodes:
        value = value_of(operand)
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            mode = mode or getattr(tensor, "fake_mode", None)
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)  # type: ignore[arg-type]
    # With the decompositions in Python, as Dynamo has it: the one of matmul in C++ asks symbolic
    # sizes for a number (torch 2.11).
    python, regions = _torch.enable_python_dispatcher(), ExitStack()
    for device, dtype, enabled, *_ in _autocast_around(node):
        regions.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
    with torch.no_grad(), python, mode or nullcontext(), regions:
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def _autocast_around(node: fx.Node) -> list[Any]:
    """Arguments of the autocast regions that a node stands in: dtypes depend on them."""
    entered: dict[fx.Node, Any] = {}
    if node.graph.find_nodes(op="call_function", target=_torch.enter_autocast):
        for other in node.graph.nodes:
            if other is node:
                break
            if other.target is _torch.enter_autocast:
                entered[other] = other.args
            elif other.args and other.args[0] in entered:  # its end
                del entered[other.args[0]]
    return list(entered.values())


def _complete(node: fx.Node, like: fx.Node) -> None:
    node.meta.update({k: like.meta[k] for k in _INHERITED if k in like.meta})
    if node.op in ("call_function", "call_method") and value_of(node) is None:
        node.meta["val" if "val" in like.meta else "example_value"] = compute_value(node)
