"""Who computes from whom: the data flow of an fx graph, values only.

Sizes are not data (``zeros_like(x)`` does not depend on x), and a write into a tensor
(``out[i] = v``, ``out.index_add_(...)``) is data for every later reader of that tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch import fx

from .operators import UNKNOWN, Kind, holds_tensor, op_name, op_of, value_of

__all__ = [
    "DataFlow",
    "erase_dead_code",
    "is_mutation",
    "memory_roots",
    "memory_shown_by",
    "unread",
    "writes",
    "written",
]


def is_mutation(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    op = op_of(node)
    if op is not UNKNOWN:
        return op.in_place
    # An operation that is not known says it by its name, as all of torch do.
    name = op_name(node)
    return name.endswith("_") and not name.startswith("_") and not name.endswith("__")


def memory_shown_by(node: fx.Node) -> fx.Node | None:
    """The node whose memory a node may show: views, writes, casts that change nothing."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return None
    op = op_of(node)
    if op.kind is Kind.CAST and _dtype(node) != _dtype(node.args[0]):
        return None
    shows = op.shows or op.in_place or node.kwargs.get("inplace")
    return node.args[0] if shows or (op is UNKNOWN and is_mutation(node)) else None


def _dtype(node: fx.Node) -> object:
    return getattr(value_of(node), "dtype", None)


def memory_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """From every node to the first that shows the memory which it may show."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = memory_shown_by(node)
        root[node] = node if source is None else root[source]
    return root


def written(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that show memory into which something writes."""
    writers = [node for node in graph.nodes if writes(node)]
    if not writers:
        return frozenset()
    root = memory_roots(graph)
    roots = {root[node] for node in writers}
    return frozenset(node for node in graph.nodes if root[node] in roots)


def writes(node: fx.Node) -> bool:
    """Whether a node writes into memory that its first argument shows."""
    if node.kwargs.get("inplace"):
        return True
    op = op_of(node)
    if op.kind is Kind.DROPOUT and True in node.args[3:4]:
        return True
    return bool(node.args) and (op.in_place or (op is UNKNOWN and is_mutation(node)))


def unread(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that nobody reads as captured: each is there for its effect (writes, modes)."""
    return frozenset(node for node in graph.nodes if not node.users)


def erase_dead_code(graph: fx.Graph, keep: frozenset[fx.Node]) -> None:
    """Erase what nobody reads any more, except what nobody read before (``unread``).

    Dropout stays: it moves the random state, on which all later draws depend.
    """

    for node in reversed(graph.nodes):
        if node.users or node in keep or node.is_impure():
            continue
        if op_of(node).kind is not Kind.DROPOUT and not is_mutation(node):
            graph.erase_node(node)


class DataFlow:
    """The data-flow graph of an fx graph, with the queries that detection asks.

    Args:
        graph: an fx graph whose nodes carry ``meta["example_value"]``.

    ``flow`` is a ``networkx.DiGraph`` over the nodes; its edges run from a tensor to each of
    its readers. ``index`` is the position of a node in the graph, a topological order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order: list[fx.Node] = list(graph.nodes)
        self.index: dict[fx.Node, int] = {node: i for i, node in enumerate(self.order)}
        self.flow = nx.DiGraph()
        self.flow.add_nodes_from(self.order)
        self._reached: dict[fx.Node, _Reach] = {}
        self._connect()

    def _connect(self) -> None:
        root: dict[fx.Node, fx.Node] = {}  # a view -> the tensor whose memory it shows
        written: dict[fx.Node, fx.Node] = {}  # a tensor -> the last write into it
        for node in self.order:
            is_data = op_of(node).kind is not Kind.SHAPE and (
                holds_tensor(node) or is_mutation(node)
            )
            if not is_data and node.op != "output":
                continue
            inputs = [n for n in node.all_input_nodes if holds_tensor(n)]
            for source in inputs:
                self.flow.add_edge(source, node)
                last = written.get(root.get(source, source))
                if last is not None:
                    self.flow.add_edge(last, node)
            shown = memory_shown_by(node)
            if shown is not None:
                root[node] = root.get(shown, shown)
            if writes(node) and inputs:
                written[root.get(node, node)] = node

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads, writes into them included."""
        return list(self.flow.predecessors(node))

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that read a tensor."""
        return list(self.flow.successors(node))

    def depends(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a node's value depends on a source's (a node depends on itself)."""
        return node is source or node in self._reach(source, node).reached

    def computes_from(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether real computation (an operation that mixes) lies between source and node."""
        return node is not source and node in self._reach(source, node).mixed

    def region(self, source: fx.Node, sinks: Iterable[fx.Node]) -> set[fx.Node]:
        """All nodes after ``source`` that the sinks are computed from, the sinks included."""
        first = self.index[source]
        pending = [n for n in sinks if self.index[n] > first]
        found = set(pending)
        while pending:
            for node in self.flow.predecessors(pending.pop()):
                if node not in found and self.index[node] > first:
                    found.add(node)
                    pending.append(node)
        return found

    def used(self) -> set[fx.Node]:
        """The nodes that an output, a write or an operation without a result depends on."""
        found = {n for n in self.order if n.op == "output" or is_mutation(n)}
        for node in self.order:
            if not node.users and not holds_tensor(node):
                found.update([node, *node.all_input_nodes])
        pending = list(found)
        while pending:
            for node in self.flow.predecessors(pending.pop()):
                if node not in found:
                    found.add(node)
                    pending.append(node)
        return found

    def _reach(self, source: fx.Node, node: fx.Node) -> _Reach:
        reach = self._reached.get(source)
        if reach is None:
            reach = self._reached[source] = _Reach(self, source)
        reach.extend(self.index[node])
        return reach


class _Reach:
    """The nodes reached from one source, found in graph order and only as far as asked.

    Most questions are about a source a few dozen nodes back, so each source costs the length
    of its own neighbourhood, and the whole of detection stays near-linear in the graph.
    """

    def __init__(self, flow: DataFlow, source: fx.Node) -> None:
        self._flow = flow
        self._done = flow.index[source]
        self.reached: set[fx.Node] = {source}
        self.mixed: set[fx.Node] = set()

    def extend(self, last: int) -> None:
        order, predecessors = self._flow.order, self._flow.flow.pred
        for position in range(self._done + 1, last + 1):
            node = order[position]
            sources = predecessors[node]
            if not sources or self.reached.isdisjoint(sources):
                continue
            self.reached.add(node)
            if op_of(node).kind is Kind.MIXING or not self.mixed.isdisjoint(sources):
                self.mixed.add(node)
        self._done = max(self._done, last)
