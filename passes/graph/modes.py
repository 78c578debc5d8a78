"""The modes that a model switches inside its forward, and what may not cross such a switch.

    with torch.no_grad():                 _set_grad_enabled(False)
        y = x @ w                         y = x @ w
    z = y + b                             _set_grad_enabled(True)
                                          z = y + b

What an operation computes, or what of it gets a gradient, depends on the mode in which it runs. A
pass that replaces several operations by one puts all of them into one mode, so it may only do that
to operations of one mode. Passes find what to replace by following values; inside ``kept_apart``
no value can be followed into another mode, so that no pattern needs to know about modes.

Three switches change nothing that a pass touches, and are left out: which kernels attention may
use, whether hooks of saved tensors may be registered, and whether ``requires_grad_`` may be called
under ``torch.func`` (Dynamo puts it around every such call, wherever that stands).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .dataflow import is_mutation, written
from .operators import Kind, holds_tensor, in_another_mode, op_name, op_of
from .writer import marker

__all__ = ["Mode", "Modes", "behind_switches", "is_read_in_another_mode", "kept_apart"]

_SWITCH = re.compile(r"_*(enter|exit|set|push|pop|exchange|maybe_exchange)_|.*_nesting$")
_LEFT_OUT = "set_inplace_requires_grad_allowed"
_UNKNOWN = (Kind.OTHER, Kind.MIXING)
_GRAD, _AUTOCAST = "_set_grad_enabled", "_enter_autocast"


@dataclass(frozen=True)
class Mode:
    """What is in force at a place of a graph.

    Attributes:
        grad: whether gradients are recorded.
        autocast: the arguments of the autocast regions around it.
        others: every other switch in force: inference mode, levels of ``torch.func``, devices.
    """

    grad: bool = True
    autocast: tuple[Any, ...] = ()
    others: tuple[Any, ...] = ()


class Modes:
    """The mode of every node of a graph as it is now.

    Args:
        graph: a captured graph.
        grad: whether gradients are recorded where it is entered.
    """

    def __init__(self, graph: fx.Graph, grad: bool) -> None:
        self.set_grad: Any = None  # the function that switches it, if the graph calls it
        self._mode: dict[fx.Node, Mode] = {}
        self._entered = mode = Mode(grad)
        before: dict[fx.Node, Mode] = {}  # what was in force where a switch was entered
        if not _has_switches(graph):
            return
        for node in graph.nodes:
            if _is_switch(node):
                before[node] = mode
                mode = self._behind(node, mode, before)
            self._mode[node] = mode

    def _behind(self, switch: fx.Node, mode: Mode, before: dict[fx.Node, Mode]) -> Mode:
        name = op_name(switch)
        entered = switch.args[0] if switch.args else None
        if name == _GRAD:
            self.set_grad = switch.target
            return replace(mode, grad=bool(entered))
        if isinstance(entered, fx.Node) and entered in before:
            return _left(mode, op_name(entered), before[entered])
        if name == _AUTOCAST:
            return replace(mode, autocast=(*mode.autocast, str(switch.args)))
        return replace(mode, others=(*mode.others, (switch.name, str(switch.args))))

    def of(self, node: fx.Node) -> Mode:
        """The mode of a node; inputs have that in which the graph is entered."""
        return self._mode.get(node, self._entered)

    def set(self, node: fx.Node, mode: Mode) -> None:
        """Say in which mode a new node stands."""
        self._mode[node] = mode

    @property
    def is_one(self) -> bool:
        """Whether the whole graph has one mode."""
        return len(set(self._mode.values())) < 2


def _left(mode: Mode, name: str, before: Mode) -> Mode:
    """The mode behind the end of a region."""
    if name == _AUTOCAST:
        return replace(mode, autocast=before.autocast)
    return replace(mode, others=before.others)


def _has_switches(graph: fx.Graph) -> bool:
    """Whether some function of a graph has the name of a switch; most graphs have none."""
    called = {node.target: node for node in graph.nodes if node.op == "call_function"}
    return any(_SWITCH.match(op_name(n)) for n in called.values() if op_of(n).kind in _UNKNOWN)


def _is_switch(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and _SWITCH.match(op_name(node)) is not None
        and op_name(node) != _LEFT_OUT
        and not any(holds_tensor(n) for n in (node, *node.all_input_nodes))
    )


# --- what no pass follows -------------------------------------------------------------------------


@contextmanager
def kept_apart(graph: fx.Graph, grad: bool) -> Iterator[None]:
    """No value can be followed from one mode into another, while this is in force.

    Args:
        graph: what a pass is about to change.
        grad: whether gradients are recorded where it is entered.
    """
    modes = Modes(graph, grad)
    if not modes.is_one:
        _separate(graph, modes)
    try:
        yield
    finally:
        for node in graph.find_nodes(op="call_function", target=in_another_mode):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _separate(graph: fx.Graph, modes: Modes) -> None:
    overwritten = written(graph)
    made: dict[tuple[fx.Node, Mode], fx.Node] = {}
    for reader in list(graph.nodes):
        if reader.op == "output" or _is_switch(reader):
            continue
        for value in reader.all_input_nodes:
            mode = modes.of(reader)
            is_target = is_mutation(reader) and reader.args[0] is value
            if value.op in ("placeholder", "get_attr") or is_target or modes.of(value) == mode:
                continue
            if (value, mode) not in made:
                with graph.inserting_before(reader):
                    new = marker(in_another_mode, value)
                new.meta["is_written"] = value in overwritten
                made[value, mode] = new
            reader.replace_input_with(value, made[value, mode])


def is_read_in_another_mode(node: fx.Node) -> bool:
    """Whether something reads a value in another mode than its own, inside ``kept_apart``."""
    return any(user.target is in_another_mode for user in node.users)


def behind_switches(node: fx.Node) -> fx.Node:
    """The value that stands behind switches of mode, inside ``kept_apart``."""
    while node.target is in_another_mode:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node
