"""defer_norm: the division by r moves behind the matmul, where it acts on few numbers.

    x̂ = rms_norm(x, (C,), g, eps)        inv_r = rsqrt(mean(x²) + eps)
    q = linear(x̂, W, b)              ->  q = linear(x, W · g) * inv_r + b      (eq. 14-16: H̃ / r)
    k = linear(x̂, V)                     k = linear(x, V · g) * inv_r

This holds for every RMSNorm that nothing but matmuls reads. It is done to the mappings of mHC
(nC channels become n² + 2n), and with ``Options.defer_norms`` to the user's own norms as well.
``fuse_coefficients`` reads a mapping in both forms and does not need this pass; without it, the
open form is the cheaper one. Each of the two is exact by itself, and both together.

Note [Rounding]
    Mappings are float32 or float64: the result differs by the order of roundings. A user's norm in
    bfloat16 is rounded at other places, and about as often: x, W · g and the product instead of
    x̂, x̂ · g and the product. Products that autocast computes in another dtype than that of their
    operands stay as they are.

Note [Range]
    x · W must not overflow where x̂ · W does not. By Cauchy-Schwarz an entry of it is at most
    √C · r · |w|, w a column of W · g. Where x and the product have the range of float32 (bfloat16
    has) or float64, and r does not overflow itself, that is finite unless |w| exceeds 10¹⁹ / √C.
    Beyond, at |x| > 10¹⁹ in float32, no spelling is right: mean(x²) is infinite and x̂ · W zero;
    x · W / r is zero too, or NaN where x · W overflows as well. Refused are products in float16,
    and products in a narrower dtype than a float64 x: an ordinary x can exceed the range of those.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...kernels.ops import basic as ops  # noqa: F401  (registers mhc::matmul)
from ..context import Context, PassResult
from ..graph.dataflow import erase_dead_code, unread, written
from ..graph.modes import is_read_in_another_mode, kept_apart
from ..graph.norms import RMSNorm, rms_norm_of
from ..graph.operators import (
    Kind,
    dtype_of,
    is_float_tensor,
    op_of,
    same_sizes,
    shape_of,
)
from ..graph.writer import Writer

__all__ = ["defer_norm", "no_mapping_is_normalised"]

_MAPPING = torch.ops.mhc.matmul.default


@dataclass(frozen=True)
class _Product:
    """A matmul that reads a normalised value.

    Attributes:
        node: the product.
        left: the normalised value as it reads it.
        scales: what the value was multiplied with on the way, one factor for each channel.
    """

    node: fx.Node
    left: fx.Node
    scales: tuple[fx.Node, ...]


def defer_norm(gm: fx.GraphModule, context: Context) -> PassResult:
    """Defer every norm that may be deferred; the notes say what became of the user's own."""
    with kept_apart(gm.graph, context.grad_enabled):
        done = _defer_all(gm.graph, context)
    changed = any(note.endswith("deferred") for note in done)
    return PassResult(gm, changed, [f"{count} {note}" for note, count in done.items()])


def _defer_all(graph: fx.Graph, context: Context) -> Counter[str]:
    """Defer what may be deferred; what became of each norm, counted."""
    effects, overwritten = unread(graph), written(graph)
    done: Counter[str] = Counter()
    for node in [n for n in graph.nodes if op_of(n).name == "rms_norm"]:
        norm = rms_norm_of(node)
        if norm is None or not node.users:
            continue
        products = list(_products(node, () if norm.weight is None else (norm.weight,)))
        mapping = all(p is not None and p.node.target is _MAPPING for p in products)
        if not (mapping or context.options.defer_norms):
            continue
        obstacle = _obstacle(norm, products, overwritten, is_read_in_another_mode(node))
        if obstacle is None:
            _defer(node, norm, [p for p in products if p is not None])
        done[f"of {'mappings' if mapping else 'norms'} {obstacle or 'deferred'}"] += 1
    if any(note.endswith("deferred") for note in done):
        erase_dead_code(graph, keep=effects)
    return done


def no_mapping_is_normalised(gm: fx.GraphModule, context: Context) -> list[str]:
    """No norm stands in front of a mapping alone, unless something is in the way."""
    with kept_apart(gm.graph, context.grad_enabled):
        overwritten = written(gm.graph)
        return [
            f"{node.name} stands in front of a mapping"
            for node in gm.graph.nodes
            if op_of(node).name == "rms_norm"
            and (norm := rms_norm_of(node)) is not None
            and node.users
            and all(user.target is _MAPPING for user in node.users)
            and _obstacle(norm, list(_products(node, ())), overwritten, False) is None
        ]


def _products(value: fx.Node, scales: tuple[fx.Node, ...]) -> Iterator[_Product | None]:
    """All matmuls that read a normalised value; None for each other reader."""
    for user in value.users:
        if _multiplies(user, value):
            yield _Product(user, value, scales)
        elif op_of(user).kind is Kind.CAST and is_float_tensor(user):
            yield from _products(user, scales)
        elif (scale := _scale(user, value)) is not None:
            yield from _products(user, (*scales, scale))
        else:
            yield None


def _multiplies(node: fx.Node, left: fx.Node) -> bool:
    """Whether a node is a product of ``left`` with a matrix."""
    if op_of(node).name not in ("linear", "matmul", "mm") or len(node.args) < 2 or node.kwargs:
        return False
    matrix: Any = node.args[1]
    is_matrix = is_float_tensor(matrix) and len(shape_of(matrix)) == 2
    return node.args[0] is left and is_matrix and left not in node.args[1:]


def _scale(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The factor of a product with one number for each channel."""
    if op_of(node).name != "mul" or len(node.args) != 2 or node.kwargs:
        return None
    other: Any = node.args[1] if node.args[0] is value else node.args[0]
    is_row = is_float_tensor(other) and same_sizes(shape_of(other), shape_of(value)[-1:])
    return other if is_row else None


def _obstacle(
    norm: RMSNorm,
    products: list[_Product | None],
    overwritten: frozenset[fx.Node],
    elsewhere: bool,
) -> str | None:
    """Why a norm with these readers stays; None if nothing is in the way.

    Args:
        elsewhere: whether something reads it in another mode than its own.
    """
    found = [p for p in products if p is not None]
    if len(found) < len(products):
        return f"kept: {'read in another mode' if elsewhere else 'not only matmuls read them'}"
    if not overwritten.isdisjoint([norm.x, *(scale for p in found for scale in p.scales)]):
        return "kept: what they read is written in place, perhaps before the products read it"
    dtypes = {(dtype_of(p.left), dtype_of(p.node)) for p in found}
    if any(before != after for before, after in dtypes):
        return "kept: autocast computes their products in another dtype"
    narrow = {torch.float16}
    if dtype_of(norm.x) is torch.float64:
        narrow |= {torch.bfloat16, torch.float32}
    if too_narrow := sorted(str(after) for _, after in dtypes if after in narrow):
        return f"kept: {too_narrow[0]} products could overflow before the division"
    return None


def _defer(node: fx.Node, norm: RMSNorm, products: list[_Product]) -> None:
    write = Writer(node, node)
    exact = torch.promote_types(dtype_of(norm.x), torch.float32)
    x = write.cast(norm.x, exact)
    square = write.call(operator.mul, x, x)
    mean = write.call("mean", square, -1, True)
    inv_r = write.call("rsqrt", write.call(operator.add, mean, norm.eps))
    for product in products:
        _divide_behind(product, norm.x, inv_r)


def _divide_behind(product: _Product, x: fx.Node, inv_r: fx.Node) -> None:
    """The product of x itself, times 1 / r."""
    node = product.node
    matrix, bias = (*node.args[1:], None)[:2]
    assert isinstance(matrix, fx.Node)
    write, dtype = Writer(node, node), dtype_of(node)
    for scale in product.scales:
        if op_of(node).name != "linear":
            scale = write.call("unsqueeze", scale, -1)
        matrix = write.call(operator.mul, matrix, scale)
    y = write.call(node.target, write.cast(x, dtype), write.cast(matrix, dtype))
    result = write.call(operator.mul, y, inv_r)
    if isinstance(bias, fx.Node):
        result = write.call(operator.add, result, bias)
    node.replace_all_uses_with(write.cast(result, dtype))
