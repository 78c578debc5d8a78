"""Writes in place: as new values where that is the same, and else told apart from what was before.

    before                                    after
    z = f(x);  z += g(z);  h(z)               z = f(x);  z_1 = z + g(z);  h(z_1)
    x += f(x);  x.add_(g(x));  return x       x_1 = x + f(x);  x_2 = x_1 + g(x_1)
      (x an input)                            c = x.copy_(x_2);  return c
    torch.add(x, y, out=x)                    x_1 = x + y;  x.copy_(x_1)
    x[:, 0] = 0;  y = x + f(x)                x[:, 0] = 0;  x_1 = after_write(x);  y = x_1 + f(x_1)

A write becomes a new value if nothing but later readers of what is written can see it. Into an
input it is seen by the caller as well: one copy behind the last of its writes does that. What a
view sees, what is written in part, and what is written where no gradients are recorded but was
computed where they are (which leaves its gradient as it was) stays a write. Then whatever shows
that memory is another value behind it than in front, and gets another node: no pass can take
the one for the other.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.multiprocessing.reductions import StorageWeakRef

from ..graph.dataflow import memory_roots, memory_shown_by, writes
from ..graph.modes import Modes
from ..graph.operators import (
    Kind,
    after_write,
    dtype_of,
    holds_tensor,
    is_float_tensor,
    op_of,
    same_shape,
    value_of,
)
from ..graph.writer import Writer, marker

__all__ = ["join_versions", "remove_in_place", "separate_versions"]

_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def remove_in_place(graph: fx.Graph, grad: bool) -> int:
    """Make writes functional where nobody can tell; how many.

    Args:
        graph: a captured graph.
        grad: whether gradients are recorded where it is entered.
    """
    count = sum(_remove_out(graph, node) for node in list(graph.nodes))
    return count + _Functional(graph, grad).run()


def separate_versions(graph: fx.Graph) -> int:
    """Give what shows written memory another node behind each write; how many writes there are."""
    root, position = memory_roots(graph), {node: i for i, node in enumerate(graph.nodes)}
    shown: dict[fx.Node, list[fx.Node]] = {}
    count = 0
    for node in list(graph.nodes):
        memory = root[node]
        if writes(node):
            count += 1
            views = shown.get(memory, [])
            shown[memory] = [_version(graph, v, node, position) for v in views]
        shown.setdefault(memory, []).append(node)
    return count


def _version(
    graph: fx.Graph, view: fx.Node, write: fx.Node, position: dict[fx.Node, int]
) -> fx.Node:
    """What a node is behind a write; the node itself where nobody asks."""
    later = [u for u in view.users if position[u] > position[write] and u.op != "output"]
    if not later or not is_float_tensor(view):
        return view
    with graph.inserting_after(write):
        new = marker(after_write, view)
    position[new] = position[write]
    for user in later:
        user.replace_input_with(view, new)
    return new


def join_versions(graph: fx.Graph) -> None:
    """Undo ``separate_versions``."""
    for node in graph.find_nodes(op="call_function", target=after_write):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)


# --- out= -----------------------------------------------------------------------------------------


def _remove_out(graph: fx.Graph, node: fx.Node) -> bool:
    """``torch.add(x, y, out=z)`` becomes a sum, and a copy of it into z."""
    out = node.kwargs.get("out")
    if not isinstance(out, fx.Node) or node.op != "call_function" or not is_float_tensor(out):
        return False
    if not is_float_tensor(node) or not same_shape(out, node) or dtype_of(out) != dtype_of(node):
        return False
    kwargs: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "out"}
    write = Writer(node.prev, node)
    new = write.call(node.target, *node.args, **kwargs)
    node.replace_all_uses_with(write.call("copy_", out, new))
    graph.erase_node(node)
    return True


# --- writes as new values -------------------------------------------------------------------------


class _Functional:
    """Makes writes functional, in order; knows what shows which memory so far.

    Attributes:
        home: from memory to the input that is to hold in the end what that memory holds.
    """

    def __init__(self, graph: fx.Graph, grad: bool) -> None:
        self.graph = graph
        self.output = graph.output_node()
        self.modes = Modes(graph, grad)
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self.root: dict[fx.Node, fx.Node] = {}
        self.aliases: dict[fx.Node, list[fx.Node]] = {}
        self.home = {node: node for node in graph.find_nodes(op="placeholder")}
        first: dict[object, fx.Node] = {}
        for node in self.home:
            self._show(node, first.setdefault(_storage(node), node))
        self.in_view = set(self._returned_views())

    def run(self) -> int:
        """Make every write functional for which that is the same; how many."""
        count = 0
        for node in [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]:
            if self._is_private(node):
                self._replace(node)
                count += 1
            else:
                self._add(node)
        for memory, entered in self.home.items():
            if memory is not entered:
                self._write_back(entered, memory)
        return count

    def _add(self, node: fx.Node) -> None:
        source = memory_shown_by(node)
        self._show(node, node if source is None else self.root[source])

    def _show(self, node: fx.Node, memory: fx.Node) -> None:
        self.root[node] = memory
        self.aliases.setdefault(memory, []).append(node)

    def _returned_views(self) -> Iterator[fx.Node]:
        """The inputs of which a view is returned: the caller may write through it."""
        root = memory_roots(self.graph)
        for node in self.output.all_input_nodes:
            whole = node
            while writes(whole):
                whole = whole.args[0]  # type: ignore[assignment]
            if whole is not root[node]:
                yield root[node]

    def _is_private(self, write: fx.Node) -> bool:
        """Whether a write can be a new value: only readers of the written node itself see it."""
        if _functional_form(write) is None:
            return False
        written, here = write.args[0], self.index[write]
        assert isinstance(written, fx.Node)
        memory = self.root[written]
        if memory.op == "get_attr" or not self._keeps_gradients(write, memory):
            return False
        if memory in self.home and not self._can_be_copied(write, memory):
            return False
        others = (alias for alias in self.aliases[memory] if alias is not written)
        return not any(self.index.get(u, -1) > here for alias in others for u in alias.users)

    def _keeps_gradients(self, write: fx.Node, memory: fx.Node) -> bool:
        """Whether the write is recorded, or nothing is that could be written here.

        Written where no gradients are recorded, a tensor keeps the gradient that it had.
        """
        return self.modes.of(write).grad or not self.modes.of(memory).grad

    def _can_be_copied(self, write: fx.Node, memory: fx.Node) -> bool:
        """Whether one copy at the end, of all of it, tells the caller what was written."""
        in_view = self.home[memory] in self.in_view
        at_end = self.modes.of(write) == self.modes.of(self.output)
        return write.args[0] is memory and at_end and not in_view

    def _replace(self, node: fx.Node) -> None:
        written, functional = node.args[0], _functional_form(node)
        assert isinstance(written, fx.Node) and functional is not None
        target, args, kwargs = functional
        write = Writer(node.prev, node)
        made = write.call(target, *args, **kwargs)
        self._add(made)
        new = write.cast(made, dtype_of(node))  # a write keeps the dtype of what it writes into
        if new is not made:
            self._show(new, new)
        self.index[new] = self.index[node]
        self.modes.set(new, self.modes.of(node))
        node.replace_all_uses_with(new)
        for user in [u for u in written.users if self.index.get(u, -1) > self.index[new]]:
            user.replace_input_with(written, new)
        if self.root[written] in self.home:
            self.home[new] = self.home.pop(self.root[written])
        self.graph.erase_node(node)

    def _write_back(self, entered: fx.Node, value: fx.Node) -> None:
        """Give the caller what was written; who returns the input returns that very tensor."""
        copied = Writer(self.output.prev, self.output).call("copy_", entered, value)
        self.output.replace_input_with(value, copied)


def _storage(node: fx.Node) -> object:
    """What is equal for two inputs that show the same memory."""
    value = value_of(node)
    return StorageWeakRef(value.untyped_storage()) if isinstance(value, torch.Tensor) else node


def _functional_form(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Target and arguments of an in-place pointwise operation that does not write."""
    if not node.args or not is_float_tensor(node.args[0]) or not holds_tensor(node):
        return None
    op, kwargs = op_of(node), dict(node.kwargs)
    if (functional := _OPERATORS.get(node.target)) is not None:
        return functional, node.args, kwargs
    name = op.name
    if name == "copy_" and len(node.args) == 2 and not kwargs:
        into, source = node.args
        same = is_float_tensor(source) and same_shape(into, source)  # type: ignore[arg-type]
        same = same and dtype_of(source) == dtype_of(into)  # type: ignore[arg-type]
        return ("clone", (source,), {}) if same else None
    if node.kwargs.get("inplace") or (name == "dropout" and node.args[3:4] == (True,)):
        kwargs["inplace"] = False
        return node.target, node.args[:3] if name == "dropout" else node.args, kwargs
    if op.in_place and name.endswith("_"):
        plain = name[:-1]
        known = op.kind in (Kind.POINTWISE, Kind.DROPOUT)
        if known and hasattr(torch.Tensor, plain):
            return plain, node.args, kwargs
        if known and hasattr(F, plain):
            return getattr(F, plain), node.args, kwargs
    return None
