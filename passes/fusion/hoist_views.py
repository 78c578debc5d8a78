"""hoist_views: another shape of the tokens moves in front of the post_res that it follows.

    X' = mhc.post_res(H_res, H_post, X, f)       X, f, H_res, H_post in [T, ...] (views)
    X'.reshape(T, n, C)                     ->   mhc.post_res(H_res, H_post, X, f)

A model that flattens ``[B, S, C]`` to ``[B * S, C]`` between two residual adds (OPT around its MLP)
has such a view between two connections, where ``fuse_seams`` could not join them. Every token is
computed by itself, so the shape in which they lie changes nothing; in front, the view costs nothing
either (a branch's output that is not contiguous is copied: C numbers a token). In the backward
graph the views lie behind post_res_backward, for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ...kernels.ops import site as site_ops  # noqa: F401  (registers the operators)
from ..context import Context, PassResult
from ..graph.dataflow import written
from ..graph.modes import kept_apart
from ..graph.operators import op_of, same_sizes, shape_of
from ..graph.writer import Writer

__all__ = ["hoist_views", "no_view_is_left"]

_POST_RES = torch.ops.mhc.post_res.default


def hoist_views(gm: fx.GraphModule, context: Context) -> PassResult:
    """Move every view of tokens that alone reads a post_res in front of it."""
    with kept_apart(gm.graph, context.grad_enabled):
        moved = _hoist_all(gm.graph)
    notes = [f"{moved} views of tokens moved in front of mhc.post_res"] if moved else []
    return PassResult(gm, bool(moved), notes)


def _hoist_all(graph: fx.Graph) -> int:
    moved = 0
    for view, post_res in _behind_post_res(graph):  # a second view then reads the new post_res
        _hoist(view, post_res)
        moved += 1
    return moved


def no_view_is_left(gm: fx.GraphModule, context: Context) -> list[str]:
    """No view of tokens alone reads a post_res."""
    with kept_apart(gm.graph, context.grad_enabled):
        return [f"{view.name} is behind {node.name}" for view, node in _behind_post_res(gm.graph)]


def _behind_post_res(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Every view of tokens that alone reads a post_res, and that."""
    overwritten = written(graph)
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.target is not _POST_RES:
            continue
        touched = overwritten.intersection([source, *source.all_input_nodes])
        if _reshapes_tokens(node, source) and len(source.users) == 1 and not touched:
            yield node, source


def _reshapes_tokens(node: fx.Node, streams: fx.Node) -> bool:
    """Whether a node is another shape of the tokens of ``[..., n, C]``."""
    dims: Any = node.args[1:]
    if node.kwargs or not dims:
        return False
    axes = len(shape_of(streams)) - 2
    name = op_of(node).name
    if name in ("flatten", "unflatten"):
        dims = dims if name == "flatten" else dims[:1]
        return all(0 <= d < axes for d in dims) and len(node.args) == 3
    shape, rows = shape_of(node), shape_of(streams)[-2:]
    kept = same_sizes(shape[-2:], rows) and all(isinstance(size, int) for size in rows)
    return name in ("reshape", "view") and kept and len(_sizes(node)) == len(shape)


def _sizes(node: fx.Node) -> list[Any]:
    """The sizes that a reshape is given; none where it is given a dtype."""
    given: Any = node.args[1:]
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    return [] if any(isinstance(s, torch.dtype) for s in given) else list(given)


def _hoist(view: fx.Node, post_res: fx.Node) -> None:
    write = Writer(view, post_res)
    axes = len(shape_of(post_res)) - 2
    operands = [_viewed(write, view, operand, axes) for operand in post_res.args]
    view.replace_all_uses_with(write.call(_POST_RES, *operands, name=post_res.name))
    view.graph.erase_node(view)
    post_res.graph.erase_node(post_res)


def _viewed(write: Writer, view: fx.Node, operand: Any, axes: int) -> fx.Node:
    """An operand with its tokens in the view's shape."""
    name = op_of(view).name
    if name in ("flatten", "unflatten"):
        return write.call(name, operand, *view.args[1:])
    return write.call("reshape", operand, (*_sizes(view)[:-2], *shape_of(operand)[axes:]))
