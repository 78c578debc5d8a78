"""recognize: a model's own hyper-connections in one spelling, or what differs from ours.

    p = sigmoid(a_1 * (x̂ @ φ_pre) + b_1)           y = x̂ @ cat(φ_pre, φ_post, φ_res)
    q = sigmoid(a_2 * (x̂ @ φ_post) + b_2)    ->    p = sigmoid(a_1 * y[:n] + b_1)
    r = a_3 * linear(x̂, φ_res, b_3)                r = a_3 * (y[2n:] + b_3)

A connection is known by what it writes back: the outer product of n numbers a token, computed
from the streams, with a branch's output, added to what becomes of the streams.
`fuse_coefficients` reads almost any spelling of what stands behind one projection, α and b as one
tensor or as parts. What it cannot read is changed here: several projections of one x̂ are joined,
and a bias inside of one is added behind it. A connection without such a projection is rejected
with what differs.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from ..context import Context, PassResult
from ..graph.dataflow import erase_dead_code, unread
from ..graph.modes import kept_apart
from ..graph.operators import (
    Kind,
    dtype_of,
    holds_tensor,
    in_another_mode,
    is_float_tensor,
    op_of,
    same_sizes,
    shape_of,
)
from ..graph.writer import OWN_TAG, Writer
from ..sites.in_place import join_versions
from ..sites.records import Reason, Rejected, location_of
from .coefficients import residuals
from .evaluation import is_view, strip_casts, way_up
from .mapping import is_widened, mapping_of, place_of

__all__ = ["WriteBack", "every_connection_is_read", "recognize", "write_backs"]

_NEAR = 60
"""Nodes between streams and what is computed from them in one connection; bounds the search."""
_MOST_STREAMS = 16


def recognize(gm: fx.GraphModule, context: Context) -> PassResult:
    """Respell the projections of a model's own connections; record those that are none of ours."""
    join_versions(gm.graph)
    with kept_apart(gm.graph, context.grad_enabled):
        return _recognize(gm, context)


def _recognize(gm: fx.GraphModule, context: Context) -> PassResult:
    found = write_backs(gm.graph)
    if not found:
        return PassResult(gm, changed=False)
    effects = unread(gm.graph)
    split, joined = _respell(gm.graph, found)
    if split or joined:
        erase_dead_code(gm.graph, keep=effects)
        found = write_backs(gm.graph)
    for product in (p for w in found for p in w.products):
        product.meta[OWN_TAG] = product.name
    rejected = [r for w in found if (r := _rejected(w)) is not None]
    _noted(context, rejected)
    notes = [f"{len(found)} connections"]
    notes += [f"{split} biases split off projections"] if split else []
    notes += [f"{joined} projections joined"] if joined else []
    notes += [f"{r.name} left open: {r.detail} (at {r.location})" for r in rejected]
    return PassResult(gm, bool(split or joined), notes)


def every_connection_is_read(gm: fx.GraphModule, context: Context) -> list[str]:
    """Each connection of the model's own can be read, or it was rejected with what differs."""
    said = {r.node for r in context.own if isinstance(r, Rejected)}
    unread = [w for w in write_backs(gm.graph) if said.isdisjoint(w.products) and _rejected(w)]
    return [f"nothing was said of the connection at {w.node.name}" for w in unread]


def _noted(context: Context, rejected: list[Rejected]) -> None:
    context.own += rejected


def _respell(graph: fx.Graph, found: list[WriteBack]) -> tuple[int, int]:
    """How many biases were split off, and how many projections joined."""
    normalised = {strip_casts(_data(product)) for w in found for product in w.products}
    products = [
        node
        for node in graph.nodes
        if op_of(node).name in ("linear", "matmul", "mm") and strip_casts(_data(node)) in normalised
    ]
    split = 0
    for i, product in enumerate(products):
        respelled = _split_bias(product)
        if respelled is not None:
            products[i], split = respelled, split + 1
    return split, sum(_join(group) for group in _groups(products))


# --- one projection -------------------------------------------------------------------------------


def _split_bias(node: fx.Node) -> fx.Node | None:
    """``linear(x̂, φ, b)`` becomes ``linear(x̂, φ) + b``; returns the new product."""
    if op_of(node).name != "linear" or len(node.args) != 3 or node.kwargs:
        return None
    left, phi, bias = node.args
    if not (is_float_tensor(bias) and is_float_tensor(node) and is_float_tensor(left)):
        return None
    assert isinstance(left, fx.Node) and isinstance(bias, fx.Node) and isinstance(phi, fx.Node)
    exact = {dtype_of(n) for n in (left, phi, bias, node)}
    if len(exact) != 1 or not exact <= {torch.float32, torch.float64}:
        return None
    write = Writer(node, node)
    y = write.call(node.target, left, phi)
    node.replace_all_uses_with(write.call(operator.add, y, bias))
    return y


def _groups(products: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """Products of the same flattened streams, which have together a variant's columns."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in products:
        if mapping_of(node) is not None:
            groups.setdefault(strip_casts(_data(node)), []).append(node)
    for group in groups.values():
        if any(_is_switched(node) for node in group):
            continue
        n = mapping_of(group[0]).n  # type: ignore[union-attr]
        sizes = [_columns(node) for node in group]
        whole = residuals(n, sum(sizes) - 2 * n)
        same = len({(dtype_of(node), dtype_of(_data(node))) for node in group}) == 1
        if len(group) in (2, 3) and sizes.count(n) >= 2 and whole and same:
            yield group


def _is_switched(product: fx.Node) -> bool:
    """Whether φ is brought to its form in another mode than the product's."""
    phi: Any = product.args[1]
    return any(node.target is in_another_mode for node in way_up(phi))


def _data(product: fx.Node) -> fx.Node:
    """The first factor of a product."""
    return next(n for n in product.all_input_nodes if is_float_tensor(n))


def _columns(product: fx.Node) -> int:
    return int(shape_of(product)[-1])  # type: ignore[call-overload]


def _join(group: list[fx.Node]) -> int:
    """One product in the place of those of pre, post and res, in this order; how many they were."""
    first = min(group)
    write = Writer(first, first)
    ordered = _in_order(group)
    phis = [_phi(product, write) for product in ordered]
    y = write.call(torch.matmul, _data(first), write.call(torch.cat, phis, -1))
    y.meta["nn_module_stack"] = _common_stack(group)
    parts = write.call("split", y, [_columns(product) for product in ordered], -1)
    for i, product in enumerate(ordered):
        product.replace_all_uses_with(write.call(operator.getitem, parts, i))
    return len(group)


def _common_stack(products: list[fx.Node]) -> dict[str, Any]:
    """The module calls around all of some products."""
    stacks = [list((p.meta.get("nn_module_stack") or {}).items()) for p in products]
    calls = takewhile(lambda each: len(set(each)) == 1, zip(*stacks, strict=False))
    return dict(each[0] for each in calls)


def _phi(product: fx.Node, write: Writer) -> fx.Node:
    """φ ``[nC, columns]`` of a product, computed in front of where the writer stands."""
    phi: Any = product.args[1]
    way = [phi]
    while (
        way[-1] > write.place and way[-1].op != "placeholder" and len(way[-1].all_input_nodes) == 1
    ):
        way.append(way[-1].all_input_nodes[0])
    copies = {way[-1]: way[-1]}
    for node in reversed(way[:-1]):
        args = fx.map_arg(node.args, lambda n: copies[n])
        copies[node] = write.call(node.target, *args)
    return write.call("t", copies[phi]) if op_of(product).name == "linear" else copies[phi]


def _in_order(group: list[fx.Node]) -> list[fx.Node]:
    """pre, post, res: by their columns, and by what the first two are applied to."""
    mapping = mapping_of(group[0])
    assert mapping is not None
    gates = sorted(p for p in group if _columns(p) == mapping.n)
    others = sorted(p for p in group if _columns(p) != mapping.n)
    gates.sort(key=lambda p: not _meets(p, (mapping.n, mapping.width)))
    return gates + others


def _meets(product: fx.Node, tail: tuple[int, int]) -> bool:
    """Whether what is computed from a product multiplies something that ends in these sizes."""
    queue, seen = deque([product]), {product}
    while queue and len(seen) < _NEAR:
        node = queue.popleft()
        for user in node.users:
            if _multiplies(user):
                others = [n for n in user.all_input_nodes if n not in seen]
                if any(same_sizes(shape_of(n)[-2:], tail) for n in others):
                    return True
            small = not same_sizes(shape_of(user)[-1:], tail[1:])
            if (
                small
                and user not in seen
                and op_of(user).kind in (Kind.POINTWISE, Kind.VIEW, Kind.CAST)
            ):
                seen.add(user)
                queue.append(user)
    return False


# --- what connections write back ------------------------------------------------------------------


@dataclass(frozen=True)
class WriteBack:
    """An outer product of n numbers a token with a branch's output, added to streams.

    Attributes:
        node: the sum.
        n, width: sizes of the outer product: streams and channels.
        products: the nearest matrix products that the n numbers are computed with.
        X: the streams that they and the sum are computed from.
    """

    node: fx.Node
    n: int
    width: int
    products: tuple[fx.Node, ...]
    X: fx.Node


def write_backs(graph: fx.Graph) -> list[WriteBack]:
    """What looks like the end of a hand-written connection, in the order of the graph."""
    products = [node for node in graph.nodes if (op := op_of(node)).product or op.name == "mul"]
    return [w for node in products if (w := _write_back(node)) is not None]


def _write_back(node: fx.Node) -> WriteBack | None:
    outer = _outer(node)
    if outer is None:
        return None
    post, n, width = outer
    term, total = _sum_behind(node)
    if total is None:
        return None
    products = tuple(p for p in _above([post], stop=_is_product) if _is_product(p))
    if any(is_widened(product) for product in products):
        return None
    around = _above([other for other in total.all_input_nodes if other is not term])
    for product in products:
        for X in _above([_data(product)]):
            if _shows(X, n, width) and X in around:
                return WriteBack(total, n, width, products, X)
    return None


def _outer(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The n numbers of an outer product with C others for each token, n and C."""
    if not is_float_tensor(node):
        return None
    operands = [n for n in node.all_input_nodes if is_float_tensor(n)]
    if len(operands) != 2:
        return None
    for post, f in (operands, operands[::-1]):
        *tokens, n = _sizes(post) or [None]
        *same, width = _sizes(f) or [None]
        if not (type(n) is int and type(width) is int and 1 < n <= _MOST_STREAMS and width > 1):
            continue
        if str(tokens) == str(same) and str(_sizes(node)) == str([*tokens, n, width]):
            return post, n, width
    return None


def _sizes(node: fx.Node) -> list[Any]:
    """The shape without ones; sizes may be symbolic, and comparing those would install guards."""
    return [size for size in shape_of(node) if not (type(size) is int and size == 1)]


def _sum_behind(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The addition that reads a node behind views and casts, and the term that it reads."""
    while True:
        added = next((u for u in node.users if op_of(u).name == "add"), None)
        shown = [u for u in node.users if _shows_again(u)]
        if added is not None or len(shown) != 1:
            return node, added
        node = shown[0]


def _shows_again(node: fx.Node) -> bool:
    return op_of(node).kind in (Kind.VIEW, Kind.CAST) or node.target is in_another_mode


def _above(
    nodes: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda node: False
) -> list[fx.Node]:
    """The nearest nodes that some are computed from, themselves included, the nearest first."""
    queue = deque(nodes)
    seen = dict.fromkeys(queue)
    while queue and len(seen) < _NEAR:
        node = queue.popleft()
        for operand in () if stop(node) else node.all_input_nodes:
            if operand not in seen and operand.op != "placeholder" and holds_tensor(operand):
                seen[operand] = None
                queue.append(operand)
    return list(seen)


def _is_product(node: fx.Node) -> bool:
    return op_of(node).product


def _multiplies(node: fx.Node) -> bool:
    return op_of(node).product or op_of(node).name == "mul"


def _shows(node: fx.Node, n: int, width: int) -> bool:
    """Whether a node holds n streams, side by side or one behind the other."""
    sizes = _sizes(node)
    return sizes[-2:] == [n, width] or sizes[-1:] == [n * width]


# --- what differs ---------------------------------------------------------------------------------


def _rejected(found: WriteBack) -> Rejected | None:
    """A connection that cannot be read, with what differs; None where a mapping can be tried."""
    if any((m := mapping_of(p)) and residuals(m.n, m.columns - 2 * m.n) for p in found.products):
        return None
    reason, detail = _difference(found)
    node = found.products[0]
    place = replace(place_of(node), location=location_of(found.node))
    return Rejected(node, reason, place, found.width, detail)


def _difference(found: WriteBack) -> tuple[Reason, str]:
    """The kind of difference from our operators, and the difference."""
    n, width = found.n, found.width
    data = [_data(product) for product in found.products]
    way = _above(data, stop=_is_product)
    normalised = {_normalised(node) for node in way}
    if any(node.target is in_another_mode for node in way):
        return Reason.OWN_MODE, "its projection and its streams are computed in different modes"
    alone = []
    if width in normalised and n * width not in normalised:
        alone.append("normalised")
    if data and all(same_sizes(shape_of(node)[-1:], (width,)) for node in data):
        alone.append("projected")
    if alone:
        reason = Reason.OWN_NORM if "normalised" in alone else Reason.OWN_PROJECTION
        return reason, f"each of its {n} streams is {' and '.join(alone)} by itself"
    rounded = next(
        (node for node in way if op_of(node).kind is Kind.CAST and not is_view(node)), None
    )
    if rounded is not None:
        what = f"its streams are rounded to {dtype_of(rounded)} in front of the projection"
        return Reason.OWN_PRECISION, what
    columns = sum(_columns(product) for product in found.products)
    if residuals(n, columns - 2 * n):
        return Reason.OWN_PROJECTION, f"what it projects are not its {n} streams side by side"
    return (
        Reason.OWN_PROJECTION,
        f"its {n} streams are projected to {columns} numbers, which no variant has "
        f"(H_pre and H_post {2 * n}, with H_res {2 * n + n * n})",
    )


def _normalised(node: fx.Node) -> int | None:
    """The number of channels that a norm, or a mean of squares, is taken over."""
    if op_of(node).name not in ("rms_norm", "layer_norm", "normalize", "mean"):
        return None
    source: Any = node.args[0] if node.args else node.kwargs.get("input")
    size = shape_of(source)[-1:] if is_float_tensor(source) else ()
    return size[0] if size and type(size[0]) is int else None
