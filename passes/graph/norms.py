"""RMSNorm in a graph: as one call, written out, or as the factor 1 / r alone.

F.rms_norm(x, (C,), weight, eps)                    `rms_norm_of`
x * torch.rsqrt(x.pow(2).mean(-1, True) + eps)      `spelled_out_rms_norm`
torch.rsqrt(x.pow(2).mean(-1, True) + eps)          `root_mean_square`, inverse
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .operators import (
    Kind,
    is_float_tensor,
    op_of,
    same_shape,
    same_sizes,
    shape_of,
    value_of,
)

__all__ = ["RMSNorm", "rms_norm_of", "root_mean_square", "spelled_out_rms_norm"]


@dataclass(frozen=True)
class RMSNorm:
    """A call of ``rms_norm`` over the last axis.

    Attributes:
        x: what it normalises.
        weight: one factor for each channel, or None.
        eps: added to mean(x²).
    """

    x: fx.Node
    weight: fx.Node | None
    eps: float


def rms_norm_of(node: fx.Node) -> RMSNorm | None:
    """What a call of ``rms_norm`` does, None for any other node."""
    if op_of(node).name != "rms_norm" or not node.args or not is_float_tensor(node):
        return None
    names = ("input", "normalized_shape", "weight", "eps")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, shape, eps = given["input"], given.get("normalized_shape"), given.get("eps")
    if not isinstance(x, fx.Node) or not isinstance(shape, (tuple, list)):
        return None
    if not same_sizes(shape, shape_of(x)[-1:]):
        return None
    value = value_of(x)
    assert isinstance(value, torch.Tensor)
    computed_in = torch.promote_types(value.dtype, torch.float32)
    eps = torch.finfo(computed_in).eps if eps is None else eps
    return RMSNorm(x, given.get("weight"), float(eps)) if isinstance(eps, (int, float)) else None


def root_mean_square(node: fx.Node) -> tuple[fx.Node, float, bool] | None:
    """x, eps and whether it is the inverse, of ``sqrt(mean(x²) + eps)`` over the last axis.

    The result has size 1 in the last axis; all its steps have one dtype.
    """
    for inverse in (True, False):
        found = _mean_square(_root_argument(_without_idle_casts(node), inverse=inverse))
        if found is not None:
            x, eps, mean = found
            return (x, eps, inverse) if _dtype(mean) == _dtype(node) else None
    return None


def spelled_out_rms_norm(node: fx.Node) -> tuple[fx.Node, float] | None:
    """``x * rsqrt(mean(x ** 2, -1, keepdim=True) + eps)`` in its spellings -> (x, eps)."""
    name = op_of(node).name
    if name not in ("mul", "div") or len(node.args) != 2:
        return None
    multiplies = name == "mul"
    pairs: list[Any] = [node.args, node.args[::-1]] if multiplies else [node.args]
    for x, factor in pairs:
        if not (is_float_tensor(x) and isinstance(factor, fx.Node) and same_shape(x, node)):
            continue
        found = _mean_square(_root_argument(_without_idle_casts(factor), inverse=multiplies))
        if found is None:
            continue
        base, eps, mean = found
        if _dtype(mean) != _dtype(node):
            continue  # rounded in between: joined, it would be another function
        if _uncast(base) is _uncast(x):
            return (x, eps) if isinstance(shape_of(x)[-1], int) else None
    return None


def _mean_square(shifted: fx.Node | None) -> tuple[fx.Node, float, fx.Node] | None:
    """x, eps and the mean of ``mean(x ** 2, -1, keepdim=True) + eps``."""
    if shifted is None or op_of(shifted).name != "add" or len(shifted.args) != 2:
        return None
    mean, eps = shifted.args
    if isinstance(mean, (int, float)):
        mean, eps = eps, mean
    if not isinstance(mean, fx.Node) or not isinstance(eps, (int, float)):
        return None
    squared = _mean_over_last(mean)
    base = None if squared is None else _square_argument(squared)
    return None if base is None else (base, float(eps), mean)


def _root_argument(node: fx.Node, *, inverse: bool) -> fx.Node | None:
    """v of ``rsqrt(v)``, ``v ** -0.5``, ``1 / sqrt(v)`` (inverse) or of ``sqrt(v)``."""
    name, args = op_of(node).name, node.args
    if inverse and name == "rsqrt":
        return args[0]  # type: ignore[return-value]
    power = -0.5 if inverse else 0.5
    if name == "pow" and len(args) == 2 and args[1] == power:
        return args[0]  # type: ignore[return-value]
    if not inverse:
        return args[0] if name == "sqrt" else None  # type: ignore[return-value]
    if name == "reciprocal" and isinstance(args[0], fx.Node):
        return _root_argument(args[0], inverse=False)
    if name == "div" and args[0] in (1, 1.0) and isinstance(args[1], fx.Node):
        return _root_argument(args[1], inverse=False)
    return None


def _mean_over_last(node: fx.Node) -> fx.Node | None:
    if op_of(node).name != "mean" or not node.args:
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    source = node.args[0]
    last = dim in (-1, (-1,), [-1]) or (
        isinstance(source, fx.Node)
        and isinstance(value_of(source), torch.Tensor)
        and dim == value_of(source).dim() - 1  # type: ignore[attr-defined]
    )
    return source if keepdim and last else None  # type: ignore[return-value]


def _square_argument(node: fx.Node) -> fx.Node | None:
    name, args = op_of(node).name, node.args
    if name == "square" or (name == "pow" and len(args) == 2 and args[1] in (2, 2.0)):
        return args[0]  # type: ignore[return-value]
    if name == "mul" and len(args) == 2 and args[0] is args[1]:
        return args[0]  # type: ignore[return-value]
    return None


def _without_idle_casts(node: fx.Node) -> fx.Node:
    """The node behind casts to the dtype that it has already."""
    while op_of(node).kind is Kind.CAST and is_float_tensor(node.args[0]):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if _dtype(source) != _dtype(node):
            break
        node = source
    return node


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(value_of(node), "dtype", None)


def _uncast(node: fx.Node) -> fx.Node:
    while op_of(node).kind is Kind.CAST and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
