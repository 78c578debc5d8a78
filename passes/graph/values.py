"""Whether a pass left a graph whose values are what the nodes compute, and whose outputs fit.

    before = Snapshot(graph)
    ...                             a pass
    before.violations(graph)        of every node that was written or has other operands: its shape
                                    and dtype against those on its meta; and those of the outputs

A node with the value of another is how a wrong rewrite begins: everything behind it is decided by
shapes. Only what changed is computed again, on fake tensors, and no guard is installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from .operators import op_of, same_sizes, value_of
from .writer import compute_value

__all__ = ["Snapshot"]


class Snapshot:
    """The operands of every node of a graph, and what its outputs are."""

    def __init__(self, graph: fx.Graph) -> None:
        self._operands = {node: (node.target, node.args, node.kwargs) for node in graph.nodes}
        self._outputs = _outputs(graph)

    def violations(self, graph: fx.Graph) -> list[str]:
        """What does not fit in the graph as it is now, in words."""
        found = [text for node in graph.nodes if self._changed(node) for text in _check(node)]
        for i, (before, now) in enumerate(zip(self._outputs, _outputs(graph), strict=True)):
            if not _alike(before, now):
                found.append(f"output {i} was {_said(before)} and is {_said(now)}")
        return found

    def _changed(self, node: fx.Node) -> bool:
        target, args, kwargs = self._operands.get(node, (None, None, None))
        same = target is node.target and args is node.args and kwargs is node.kwargs
        return not same and node.op in ("call_function", "call_method")


def _outputs(graph: fx.Graph) -> list[Any]:
    return [value_of(node) for node in graph.output_node().all_input_nodes]


def _check(node: fx.Node) -> Iterator[str]:
    have = value_of(node)
    if not _is_checkable(node, have):
        return
    mode = next((t.fake_mode for t in _tensors(have) if hasattr(t, "fake_mode")), None)
    shapes = getattr(mode, "shape_env", None)
    with shapes.suppress_guards() if shapes is not None else nullcontext():
        try:
            now = compute_value(node)
        except Exception as error:
            yield f"{node.name} ({node.target}) cannot be computed: {error}"
            return
    if not _alike(have, now):
        yield f"{node.name} ({node.target}) is {_said(now)}, its value says {_said(have)}"


def _is_checkable(node: fx.Node, value: Any) -> bool:
    """Whether a node computes tensors from values, of sizes that do not depend on data."""
    tensors = _tensors(value)
    if not tensors or op_of(node).body or any(n.op == "get_attr" for n in node.all_input_nodes):
        return False
    return not any("u" in str(size) for t in tensors for size in t.shape)  # unbacked symbols


def _alike(a: Any, b: Any) -> bool:
    left, right = _tensors(a), _tensors(b)
    return len(left) == len(right) and all(
        x.dtype == y.dtype and same_sizes(x.shape, y.shape)
        for x, y in zip(left, right, strict=True)
    )


def _said(value: Any) -> str:
    return ", ".join(f"{t.dtype} {list(t.shape)}" for t in _tensors(value)) or "no tensor"


def _tensors(value: Any) -> list[torch.Tensor]:
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]
