"""Stream-wise operations: which they are, and how they act on n streams at once.

A state of one stream has the shape ``[..., C, ...]`` that the model gave it; n streams are held
as ``[..., n, C]`` (channels last). An operation is applied in the *front layout*
``[n, ..., C, ...]``: there every operand that broadcast against one stream (a scale ``[C]``, a
mask ``[B, 1, 1]``) broadcasts against n of them unchanged, and a norm over the last axis is the
same norm. Operations on the last axis alone skip that change of layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .operators import (
    Axes,
    Kind,
    Op,
    hooked_tensor,
    is_float_tensor,
    memory_order,
    op_of,
    same_shape,
    shape_of,
    value_of,
)

__all__ = [
    "apply_streamwise",
    "is_linear",
    "lay_as",
    "move_tokens",
    "streamwise_operands",
    "transfer_axis",
]


def streamwise_operands(node: fx.Node) -> list[fx.Node]:
    """The operands whose streams a node could act on one by one, by its operation alone."""
    op = op_of(node)
    first = node.args[0] if node.args else None
    if (carried := hooked_tensor(node)) is not None:
        return [carried] if is_float_tensor(carried) else []
    if op.kind is Kind.POINTWISE:
        floats: list[Any] = [a for a in node.args if is_float_tensor(a)]
        return [a for a in dict.fromkeys(floats) if same_shape(a, node)]
    if not is_float_tensor(first):
        return []
    assert isinstance(first, fx.Node)
    if op.kind is Kind.CAST or op.kind is Kind.DROPOUT:
        return [first]
    if op.kind is Kind.NORM:
        return [first] if _is_row_norm(op) or op.name == "group_norm" else []
    if op.axes in (Axes.PERMUTE, Axes.RESIZE):
        return [first]
    keeps_rows = str(shape_of(first)[-1:]) == str(shape_of(node)[-1:])
    retyped = any(isinstance(a, torch.dtype) for a in node.args)
    return [first] if op.axes is Axes.RESHAPE and keeps_rows and not retyped else []


def is_linear(node: fx.Node) -> bool:
    """Whether a stream-wise operation commutes with mixing the streams."""
    return op_of(node).linear


def transfer_axis(node: fx.Node, operand: fx.Node, axis: int) -> int | None:
    """Where a stream-wise operation takes the channel axis (from the right); None if lost."""
    op, rank = op_of(node), len(shape_of(operand))
    if op.axes is Axes.RESHAPE:
        return -1 if axis == -1 else None
    if op.axes is Axes.PERMUTE:
        return _permutation(node, rank).index(axis % rank) - rank
    if op.name == "unsqueeze":
        new = _dims(node)[0] % (rank + 1)
        return axis - 1 if new > axis % rank else axis
    if op.name == "squeeze":
        gone = [d % rank for d in _dims(node)] or list(range(rank))
        sizes = shape_of(operand)
        dropped = [d for d in gone if str(sizes[d]) == "1"]
        if axis % rank in dropped:
            return None
        return axis + sum(d > axis % rank for d in dropped)
    return axis


def apply_streamwise(
    node: fx.Node, operand: fx.Node, streams: Any, axis: int, n: int, width: int | None = None
) -> Any:
    """Write a stream-wise operation on n streams into the graph.

    Args:
        node: the operation on one stream.
        operand: its argument that carries the stream.
        streams: the operand's streams ``[..., n, C]``.
        axis: position of the channel axis in the operand, from the right.
        n: number of streams.
        width: how many channels there are; by default as many as the operand has.

    Returns:
        The result's streams ``[..., n, C]``.
    """
    if _acts_on_rows(node, operand, axis):
        return _substitute(node, operand, streams)
    if axis == -1 and op_of(node).axes is Axes.RESHAPE:
        reshaped = _tokens_reshaped(node, operand, streams, n, width)
        if reshaped is not None:
            return reshaped
    front = to_front(streams, axis)
    op = op_of(node)
    new_axis = transfer_axis(node, operand, axis)
    assert new_axis is not None
    if op.kind is Kind.DROPOUT:
        # One mask for all streams, the one that the plain model draws.
        ones: Any = torch.ones_like(front[0], memory_format=torch.contiguous_format)
        result = front * _substitute(node, operand, lay_as(node, ones))
    elif op.axes is not None:
        result = _moved(node, operand, front, n, new_axis, width)
    elif op.channels == 1 or (op.kind is Kind.NORM and not _norms_rows(node)):
        result = torch.stack([_substitute(node, operand, front[i]) for i in range(n)])
    else:
        result = _substitute(node, operand, front)
    return from_front(result, new_axis)


def move_tokens(node: fx.Node, operand: fx.Node, values: Any, axis: int, n: int, width: int) -> Any:
    """Numbers of each token, ``[..., n, width]``, where an operation takes the tokens."""
    if op_of(node).axes is None:  # each token stays where it is
        return values
    return apply_streamwise(node, operand, values, axis, n, width)


def lay_as(plain: fx.Node, tensor: Any) -> Any:
    """Give a tensor the order in memory that the plain model's has.

    A ``view`` needs it, and random numbers are drawn in it.
    """
    value = value_of(plain)
    assert isinstance(value, torch.Tensor)
    if value.is_contiguous():
        return tensor.contiguous()
    order, back = memory_order(value)
    return tensor.permute(order).contiguous().permute(back)


def to_front(streams: Any, axis: int) -> Any:
    """``[..., n, C]`` -> ``[n, ..., C, ...]`` with the channels at ``axis`` from the right."""
    front = torch.movedim(streams, -2, 0)
    return front if axis == -1 else torch.movedim(front, -1, axis)


def from_front(front: Any, axis: int) -> Any:
    """The inverse of ``to_front``."""
    streams = front if axis == -1 else torch.movedim(front, axis, -1)
    return torch.movedim(streams, 0, -2)


def _acts_on_rows(node: fx.Node, operand: fx.Node, axis: int) -> bool:
    """Whether an operation may act on ``[..., n, C]`` as it is."""
    kind = op_of(node).kind
    if kind is Kind.CAST:
        return True
    if axis != -1 or kind not in (Kind.POINTWISE, Kind.NORM) or op_of(node).channels == 1:
        return False
    if kind is Kind.NORM:
        return _norms_rows(node)
    others = [n for n in node.all_input_nodes if n is not operand]
    return all(isinstance(value_of(n), torch.Tensor) and len(shape_of(n)) <= 1 for n in others)


def _norms_rows(node: fx.Node) -> bool:
    """Whether a norm acts on the last axis alone."""
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape")
    is_row = isinstance(shape, int) or (isinstance(shape, (tuple, list)) and len(shape) == 1)
    return _is_row_norm(op_of(node)) and is_row


def _is_row_norm(op: Op) -> bool:
    """Whether a norm may be one over the last axis alone."""
    return op.name in ("layer_norm", "rms_norm")


def _substitute(node: fx.Node, operand: fx.Node, value: Any) -> Any:
    """The same operation on another operand."""

    def swap(n: fx.Node) -> fx.Node:
        return value.node if n is operand else n

    args, kwargs = fx.map_arg(node.args, swap), fx.map_arg(node.kwargs, swap)
    made = value.node.graph.create_node(node.op, node.target, args, kwargs)
    return fx.Proxy(made, value.tracer)


def _tokens_reshaped(
    node: fx.Node, operand: fx.Node, streams: Any, n: int, width: int | None
) -> Any | None:
    """Tokens in another shape, streams and channels untouched; None if the channels take part."""
    name, last, channels = op_of(node).name, len(shape_of(operand)) - 1, shape_of(node)[-1]
    if name == "flatten":
        start, end = _flattened(node, last + 1)
        return streams.flatten(start, end) if end != last else None
    if name == "unflatten":
        dim = _dims(node)[0] % (last + 1)
        sizes = _sizes(node, streams, first=2, names=("sizes",))
        return streams.unflatten(dim, sizes) if dim != last else None
    if not isinstance(channels, int):
        return None
    sizes = _sizes(node, streams, first=1, names=("shape", "size"))
    return streams.reshape(*sizes[:-1], n, width or channels)


def _moved(
    node: fx.Node, operand: fx.Node, front: Any, n: int, new_axis: int, width: int | None
) -> Any:
    """A view of one stream as a view of the front layout."""
    place = len(shape_of(node)) + new_axis
    op, rank = op_of(node), len(shape_of(operand))
    name = op.name
    if op.axes is Axes.PERMUTE:
        return front.permute(0, *(d + 1 for d in _permutation(node, rank)))
    if name == "unsqueeze":
        return front.unsqueeze(_dims(node)[0] % (rank + 1) + 1)
    if name == "squeeze":
        dims = [d % rank for d in _dims(node)] or range(rank)
        gone = [d + 1 for d in dims if str(shape_of(operand)[d]) == "1"]
        return front.squeeze(tuple(gone))
    if name == "flatten":
        start, end = _flattened(node, rank)
        return front.flatten(start + 1, end + 1)
    if name == "unflatten":
        dim = _dims(node)[0] % rank
        sizes = _sizes(node, front, first=2, names=("sizes",))
        return front.unflatten(dim + 1, _resized(sizes, place - dim, width))
    sizes = _sizes(node, front, first=1, names=("shape", "size"))
    return front.reshape(n, *_resized(sizes, place, width))


def _resized(sizes: list[Any], place: int, width: int | None) -> list[Any]:
    """Sizes with another number of channels."""
    known = width is not None and 0 <= place < len(sizes)
    return [width if known and i == place else size for i, size in enumerate(sizes)]


def _sizes(node: fx.Node, front: Any, *, first: int, names: tuple[str, ...]) -> Any:
    """The sizes among a view's arguments, symbolic ones as proxies."""
    given: Any = next((node.kwargs[k] for k in names if k in node.kwargs), node.args[first:])
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = given[0]
    if len(given) == 1 and isinstance(given[0], fx.Node):
        whole = value_of(given[0])
        if isinstance(whole, (tuple, list)):  # x.view(y.shape) where sizes are symbols
            proxy: Any = fx.Proxy(given[0], front.tracer)
            return [s if type(s) is int else proxy[i] for i, s in enumerate(whole)]
    return [fx.Proxy(s, front.tracer) if isinstance(s, fx.Node) else s for s in given]


def _flattened(node: fx.Node, rank: int) -> tuple[int, int]:
    """The first and the last dimension that a flatten joins."""
    names = ("start_dim", "end_dim")
    given: Any = dict(zip(names, (0, -1), strict=True))
    given |= dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return given["start_dim"] % rank, given["end_dim"] % rank


def _dims(node: fx.Node) -> list[int]:
    """The integer dimensions among an operation's arguments, in order."""
    named = ("dim", "start_dim", "end_dim", "dim0", "dim1")
    found: list[Any] = [*node.args[1:], *(node.kwargs[k] for k in named if k in node.kwargs)]
    flat = [d for f in found for d in (f if isinstance(f, (tuple, list)) else [f])]
    if op_of(node).name == "unflatten":
        flat = flat[:1]
    return [d for d in flat if isinstance(d, int)]


def _permutation(node: fx.Node, rank: int) -> list[int]:
    """The order of input dimensions in a permutation's output."""
    name = op_of(node).name
    order = list(range(rank))
    if name == "permute":
        dims: Any = node.kwargs.get("dims") or node.args[1:]
        if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
            dims = dims[0]
        return [d % rank for d in dims]
    if name == "movedim":
        labelled = torch.empty(*range(2, rank + 2), device="meta")
        moved: Any = torch.movedim
        return [size - 2 for size in moved(labelled, *node.args[1:3]).shape]
    first, second = (0, 1) if name == "t" else _dims(node)[:2]
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order
