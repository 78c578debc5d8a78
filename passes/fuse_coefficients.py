"""fuse_coefficients: the open form of a site becomes three operators.

    x = X.flatten(-2).to(K)                          # eq. 14-19 of arXiv:2512.24880
    y = mhc.matmul(x, φ) * rsqrt(mean(x²) + eps)     # or mhc.matmul(rms_norm(x), φ)
    H_pre = σ(y[:n] * α[0] + b[:n]); ...         ->  H_pre, H_post, H_res =
    H_res = mhc.sinkhorn_knopp(..., 20)                  mhc.coefficients(X, φ, α, b, variant, eps)
    h = mhc.matmul(H_pre, X).to(dtype)           ->  h = mhc.pre(H_pre, X, dtype)
    X' = mhc.matmul(H_res, X) + H_post fᵀ        ->  X' = mhc.post_res(H_res, H_post, X, f)

What a group of nodes computes is found by running it (see ``match``), so neither names nor order
nor spelling matter, and n, eps and the variant come from the graph itself: a hand-written site of
the same mathematics becomes the same operators. The projection may stand with its norm or in the
form that ``defer_norm`` gives it. What does not match stays as it is, and the notes say why.

Numerics are those of the open form. Coefficients are float32, or float64 with a float64 φ, and
sums over streams accumulate in that dtype: a group that rounds in between is left alone.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ..kernels import reference, site_ops  # noqa: F401  (registers the operators)
from ..kernels.variants import Variant
from .context import Context, PassResult
from .dataflow import erase_dead_code, unread
from .fake import Writer
from .identify import Refused, Roles, oracle_of, residuals
from .match import Region, close, evaluate_down, grow, random, strip_casts, way_up
from .norms import rms_norm_of, root_mean_square
from .operators import (
    Kind,
    dtype_of,
    is_float_tensor,
    kind_of,
    op_name,
    shape_of,
    value_of,
)
from .sites import location_of, stack_of
from .token_rules import TOKENS, Known, Value, same_sizes

__all__ = ["fuse_coefficients"]

_NEARBY = 60
"""Nodes between coefficients and the streams they are applied to; a bound on the search."""


def fuse_coefficients(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fuse every mapping that is one, then what its coefficients are applied to."""
    effects = unread(gm.graph)
    report = _Report()
    fused = [_fuse_mapping(m, report) for m in _mappings(gm.graph)]
    found = [f for f in fused if f is not None]
    if found:
        erase_dead_code(gm.graph, keep=effects)
    for coefficients in found:
        _fuse_pre(coefficients, report)
        _fuse_post_res(coefficients, report)
    if found:
        erase_dead_code(gm.graph, keep=effects)
    return PassResult(gm, changed=bool(found), notes=report.notes())


@dataclass
class _Report:
    """What was fused and what was not, equal cases counted."""

    made: dict[str, int] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)

    def add(self, operator_name: str) -> None:
        self.made[operator_name] = self.made.get(operator_name, 0) + 1

    def refuse(self, what: str, reason: object, node: fx.Node) -> None:
        stack = stack_of(node)
        place = " ".join(p for p in (stack[-1][1] if stack else "", location_of(node)) if p)
        self.left.setdefault(f"{what} left open: {reason}", []).append(place or node.name)

    def notes(self) -> list[str]:
        made = [f"{count} x mhc.{name}" for name, count in self.made.items()]
        return made + [
            f"{len(places)} x {reason} (at {places[0]}{', ...' if len(places) > 1 else ''})"
            for reason, places in self.left.items()
        ]


# --- the projection -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mapping:
    """A product of flattened streams with a φ that has as many columns as some variant.

    Attributes:
        y: the product, ``[..., columns]``.
        flat: x⃗ ``[..., nC]``, cast to the dtype of the coefficients.
        X: the streams that it shows, ``[..., n, C]``.
        phi: the other factor; ``by_rows`` if it is ``[columns, nC]``, as ``linear`` takes it.
        weight: that the norm multiplies x⃗ with, if any.
        eps: of the norm in front of the product; None if the norm was deferred.
    """

    y: fx.Node
    flat: fx.Node
    X: fx.Node
    phi: fx.Node
    by_rows: bool
    weight: fx.Node | None
    eps: float | None

    @property
    def n(self) -> int:
        return int(shape_of(self.X)[-2])  # type: ignore[call-overload]

    @property
    def columns(self) -> int:
        return int(shape_of(self.y)[-1])  # type: ignore[call-overload]


def _mappings(graph: fx.Graph) -> Iterator[_Mapping]:
    for node in list(graph.nodes):
        mapping = _mapping(node)
        if mapping is not None and residuals(mapping.n, mapping.columns - 2 * mapping.n):
            yield mapping


def _mapping(y: fx.Node) -> _Mapping | None:
    name = op_name(y)
    if name not in ("matmul", "mm", "linear") or len(y.args) != 2 or y.kwargs:
        return None
    left, phi = y.args
    if not (is_float_tensor(left) and is_float_tensor(phi) and is_float_tensor(y)):
        return None
    assert isinstance(left, fx.Node) and isinstance(phi, fx.Node)
    if len(shape_of(phi)) != 2 or not all(type(size) is int for size in shape_of(phi)):
        return None
    norm = rms_norm_of(strip_casts(left))
    flat = left if norm is None else norm.x
    X = _streams_of(flat)
    if X is None:
        return None
    weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
    return _Mapping(y, flat, X, phi, name == "linear", weight, eps)


def _streams_of(flat: fx.Node) -> fx.Node | None:
    """X ``[..., n, C]`` of x⃗ = flatten(X), whatever it is cast to in between."""
    view = flat
    while kind_of(view) is Kind.CAST and is_float_tensor(view.args[0]):
        view = view.args[0]  # type: ignore[assignment]
    if op_name(view) not in ("flatten", "view", "reshape") or not is_float_tensor(view.args[0]):
        return None
    source: Any = view.args[0]
    tail, width = shape_of(source)[-2:], shape_of(view)[-1]
    if len(tail) < 2 or any(type(size) is not int for size in (*tail, width)):
        return None
    return strip_casts(source) if math.prod(tail) == width and tail[0] > 1 else None  # type: ignore


# --- from the projection to the coefficients ------------------------------------------------------


@dataclass(frozen=True)
class _Coefficients:
    """The coefficients of a site as the graph has them now."""

    H_pre: fx.Node
    H_post: fx.Node
    H_res: fx.Node

    @property
    def width(self) -> int:
        """C."""
        X: Any = self.H_res.args[0].args[0]  # type: ignore[union-attr]
        return shape_of(X)[-1]  # type: ignore[return-value]


def _fuse_mapping(mapping: _Mapping, report: _Report) -> _Coefficients | None:
    try:
        return _Mapper(mapping).fuse(report)
    except Refused as reason:
        report.refuse("mapping", reason, mapping.y)
        return None


class _Mapper:
    """The region behind one projection: what it computes, and its replacement."""

    def __init__(self, mapping: _Mapping) -> None:
        self.mapping = mapping
        self.eps = mapping.eps
        self.lead = len(shape_of(mapping.y)) - 1
        self.parameters: dict[int, fx.Node] = {}  # by their number of elements: α and b
        self.oracle = oracle_of(mapping.n, mapping.columns)
        self.dtype = dtype_of(mapping.y)

    def fuse(self, report: _Report) -> _Coefficients | None:
        y = self.oracle.y if self.eps is None else self.oracle.mapped
        region = grow({self.mapping.y: Value(y, self.lead)}, self._bind)
        if not any(self._is_small(region.known[member]) for member in region.members):
            return None  # some other product of the user's with as many columns
        if self.eps is None:
            raise Refused("it is not divided by the rms of the flattened streams")
        self._require_dtypes()
        if region.written:
            raise Refused("some of its values are written in place")
        roles = Roles(region, self.oracle, shape_of(self.mapping.y)[:-1])
        variant = roles.variant()
        self._require_uniform(region, roles)
        report.add(f"coefficients {variant.text}")
        return self._write(variant, roles)

    def _is_small(self, value: Any) -> bool:
        """Whether a value has the shape of coefficients."""
        n = self.mapping.n
        return isinstance(value, Value) and value.tail in ((n,), (n, n))

    def _require_dtypes(self) -> None:
        if kind_of(strip_casts(self.mapping.flat)) is Kind.CAST:
            raise Refused(f"its {dtype_of(self.mapping.X)} streams are rounded in front of it")
        exact = torch.float64 if dtype_of(self.mapping.X) is torch.float64 else self.dtype
        given = {dtype_of(n) for n in (self.mapping.y, self.mapping.flat, self.mapping.phi)}
        if given != {exact} or exact not in (torch.float32, torch.float64):
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in given))
            raise Refused(f"computed in {names} from {dtype_of(self.mapping.X)} streams")

    def _bind(self, operand: fx.Node, known: Known) -> None:
        """Give α, b, and the rms of x⃗ their values."""
        if self.mapping.eps is None:
            rms = root_mean_square(operand)
            if rms is not None and strip_casts(rms[0]) is strip_casts(self.mapping.flat):
                self.eps = rms[1]
                inv_r = self.oracle.inv_r
                known[operand] = Value(inv_r if rms[2] else 1 / inv_r, self.lead)
                return
        way = way_up(operand)
        data = self.oracle.parameter(shape_of(way[-1]))
        if data is not None and self.parameters.setdefault(data.numel(), way[-1]) is way[-1]:
            known[way[-1]] = Value(data.unsqueeze(0), 0)
            evaluate_down(way, known)

    def _require_uniform(self, region: Region, roles: Roles) -> None:
        used = {n for role in roles.chosen for n in region.above(role)} | {self.mapping.y}
        _require_one_precision(sorted(used - set(roles.chosen)), self.dtype)
        _require_one_tag(used)

    def _write(self, variant: Variant, roles: Roles) -> _Coefficients:
        m = self.mapping
        alpha, bias = self.parameters[3], self.parameters[m.columns]
        write = Writer(max(m.y, alpha, bias), m.y)  # all coefficients are computed from these three
        X = m.X
        if not same_sizes(shape_of(X)[:-2], shape_of(m.y)[:-1]):
            X = write.call("unflatten", strip_casts(m.flat), -1, (m.n, shape_of(X)[-1]))
        phi = write.call("t", m.phi) if m.by_rows else m.phi
        if m.weight is not None:
            scale = write.call("unsqueeze", write.cast(m.weight, self.dtype), -1)
            phi = write.call(operator.mul, phi, scale)
        alpha, bias = write.cast(alpha, self.dtype), write.cast(bias, self.dtype)
        target = torch.ops.mhc.coefficients.default
        made = write.call(target, X, phi, alpha, bias, variant.text, self.eps, name="coefficients")
        names = ("H_pre", "H_post", "H_res")
        H = [write.call(operator.getitem, made, i, name=name) for i, name in enumerate(names)]
        for node, (role, flipped) in roles.chosen.items():
            new = H[role]
            if flipped:
                new = write.call("transpose", new, -1, -2)
            node.replace_all_uses_with(write.cast(new, dtype_of(node)))
        return _Coefficients(*H)


def _require_one_precision(nodes: Iterable[fx.Node], dtype: torch.dtype) -> None:
    for node in nodes:
        values = value_of(node)
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, Tensor) and value.dtype != dtype:
                raise Refused(f"{node.name} is rounded to {value.dtype}, not {dtype}")


def _require_one_tag(nodes: Iterable[fx.Node]) -> None:
    tags = {(n.meta.get("ac_graph_id"), n.meta.get("recompute")) for n in nodes}
    if len(tags) > 1:
        raise Refused("its nodes belong to different checkpointed regions")


# --- what coefficients are applied to -------------------------------------------------------------


def _fuse_pre(site: _Coefficients, report: _Report) -> None:
    products = _Products([site.H_pre], site.width)
    X, H_pre = products.operand(products.n, products.width), products.operand(products.n)
    wanted = (H_pre.unsqueeze(1) @ X).squeeze(1)
    for end, write, (H_pre_node, X_node) in products.find(wanted, "H_pre X", report):
        dtype = dtype_of(end)
        h = write.call(torch.ops.mhc.pre.default, H_pre_node, X_node, dtype, name="h")
        end.replace_all_uses_with(h)
        report.add("pre")


def _fuse_post_res(site: _Coefficients, report: _Report) -> None:
    products = _Products([site.H_res, site.H_post], site.width)
    n, width = products.n, products.width
    H_res, H_post = products.operand(n, n), products.operand(n)
    X, f = products.operand(n, width), products.operand(width)
    wanted = H_res @ X + H_post.unsqueeze(-1) * f.unsqueeze(1)
    for end, write, operands in products.find(wanted, "H_res X + H_postᵀ f", report):
        H_res_node, H_post_node, X_node, f_node = operands
        dtype = dtype_of(end)
        if dtype != dtype_of(X_node):  # the operator rounds to X's, which the open form did not
            X_node = write.cast(X_node, products.dtype)
        target = torch.ops.mhc.post_res.default
        new = write.call(target, H_res_node, H_post_node, X_node, f_node, name="X")
        end.replace_all_uses_with(write.cast(new, dtype))
        report.add("post_res")


_Found = tuple[fx.Node, Writer, list[fx.Node]]
"""The node to replace, a writer behind it, and the operands of the operator."""


class _Products:
    """What coefficients, streams X and a branch's output f are combined to.

    Args:
        coefficients: the nodes to begin with, H_pre, or H_res and H_post.
        width: C.
    """

    def __init__(self, coefficients: list[fx.Node], width: int) -> None:
        self.dtype, shape = dtype_of(coefficients[-1]), shape_of(coefficients[-1])
        self.n, self.width = int(shape[-1]), width  # type: ignore[call-overload]
        lead = len(shape) - 1
        self.seeds: dict[fx.Node, Value] = {
            node: Value(self.operand(*shape_of(node)[lead:]), lead)  # type: ignore[arg-type]
            for node in coefficients
        }
        self.others: dict[tuple[int, ...], fx.Node] = {}  # X and f, by the sizes of a token

    @staticmethod
    def operand(*tail: int) -> Tensor:
        """What stands for all operands with these sizes behind the leading dimensions."""
        return _random_operand(tail)

    def find(self, wanted: Tensor, what: str, report: _Report) -> list[_Found]:
        """The nodes whose value is the one wanted, each with the cast that follows it."""
        region = grow(
            dict(self.seeds), self._bind, until=lambda v: close(v.data, wanted), most=_NEARBY
        )
        found = []
        for node in region.found:
            try:
                found.append(self._examined(node, region))
            except Refused as reason:
                report.refuse(what, reason, node)
        if not region.found:
            report.refuse(what, "not found behind its coefficients", next(iter(self.seeds)))
        return found

    def _examined(self, node: fx.Node, region: Region) -> _Found:
        if region.written:
            raise Refused("values in between are written in place")
        used, end = region.above(node), self._rounded(node)
        _require_one_precision(used, self.dtype)
        _require_one_tag([*used, end])
        write, lead = Writer(end, end), region.known[node].lead
        coefficients = [self._viewed(seed, lead, region, used, write) for seed in self.seeds]
        tails = ((self.n, self.width), (self.width,))
        return end, write, [*coefficients, *(self.others[t] for t in tails if t in self.others)]

    def _viewed(
        self, seed: fx.Node, lead: int, region: Region, used: list[fx.Node], write: Writer
    ) -> fx.Node:
        """Coefficients with the leading dimensions that X has."""
        if self.seeds[seed].lead == lead:
            return seed
        data = self.seeds[seed].data
        for node in used:
            value = region.known[node]
            if not isinstance(value, Value) or value.lead != lead:
                continue
            if torch.equal(value.data, data):
                return node
            if len(value.tail) == 2 and torch.equal(value.data.mT, data):
                return write.call("transpose", node, -1, -2)
        raise Refused("its coefficients are reshaped in a way that is not known")

    def _rounded(self, node: fx.Node) -> fx.Node:
        """The cast of a result, if nothing else reads it."""
        while dtype_of(node) is self.dtype and len(node.users) == 1:
            (user,) = node.users
            if kind_of(user) is not Kind.CAST or not is_float_tensor(user):
                break
            node = user
        (user, *others) = node.users or (node,)
        plain = op_name(user) == "contiguous" and len(user.args) == 1 and not user.kwargs
        return user if plain and not others else node

    def _bind(self, operand: fx.Node, known: Known) -> None:
        """Give X and f their values: operands that show ``[..., n, C]`` or ``[..., C]``."""
        leads = {v.lead: shape_of(n)[: v.lead] for n, v in known.items() if isinstance(v, Value)}
        for lead, tokens in leads.items():
            way = way_up(operand, until=lambda n: self._tail(n, lead, tokens) is not None)  # noqa: B023
            tail, source = self._tail(way[-1], lead, tokens), strip_casts(way[-1])
            if tail is not None and self.others.setdefault(tail, source) is source:
                known[way[-1]] = Value(self.operand(*tail), lead)
                evaluate_down(way, known)
                return

    def _tail(self, node: fx.Node, lead: int, tokens: tuple[object, ...]) -> tuple[int, ...] | None:
        shape = shape_of(node)
        tail: Any = shape[lead:]
        fits = is_float_tensor(node) and same_sizes(shape[:lead], tokens)
        return tail if fits and tail in ((self.n, self.width), (self.width,)) else None


@cache
def _random_operand(tail: tuple[int, ...]) -> Tensor:
    return random(TOKENS, *tail, seed=5 + len(tail))
