"""fuse_coefficients: the open form of a site becomes three operators.

    x = X.flatten(-2).to(K)                          # eq. 14-19 of arXiv:2512.24880
    y = mhc.matmul(x, φ) * rsqrt(mean(x²) + eps)     # or mhc.matmul(rms_norm(x), φ)
    H_pre = σ(y[:n] * α[0] + b[:n]); ...         ->  H_pre, H_post, H_res =
    H_res = mhc.sinkhorn_knopp(..., 20)                  mhc.coefficients(X, φ, α, b, variant, eps)
    h = mhc.matmul(H_pre, X).to(dtype)           ->  h = mhc.pre(H_pre, X, dtype)
    X' = mhc.matmul(H_res, X) + H_post fᵀ        ->  X' = mhc.post_res(H_res, H_post, X, f)

What a group of nodes computes is found by running it (see ``evaluation``), so neither names nor
order nor spelling matter, and n, eps and the variant come from the graph itself: a hand-written
site of the same mathematics becomes the same operators. The projection may stand with its norm or
in the form that ``defer_norm`` gives it. What does not match stays as it is, and the notes say why.

Numerics are those of the open form. Coefficients are float32, or float64 with a float64 φ, and
sums over streams accumulate in that dtype: a group that rounds in between is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.ops import site as site_ops  # noqa: F401  (registers the operators)
from ..context import Context, PassResult
from ..graph.dataflow import erase_dead_code, unread
from ..graph.modes import behind_switches, is_read_in_another_mode, kept_apart
from ..graph.operators import (
    Kind,
    dtype_of,
    is_float_tensor,
    op_of,
    same_sizes,
    shape_of,
)
from ..graph.writer import OWN_TAG, SITE_TAG, Writer
from ..recognition.coefficients import Refused
from ..recognition.evaluation import Region, close, evaluate_down, grow, random, strip_casts, way_up
from ..recognition.mapping import (
    Mapping,
    Reading,
    is_widened,
    mappings,
    place_of,
    read,
    require_one_precision,
    require_one_tag,
)
from ..recognition.token_rules import TOKENS, Known, Value
from ..sites.records import FusedSite, Reason, Rejected, location_of
from .fuse_open import Report, fuse_open

__all__ = ["every_site_is_fused", "fuse_coefficients"]

_NEARBY = 150
"""Nodes between coefficients and the streams they are applied to; a bound on the search."""

_PRE, _POST, _RES = range(3)


def fuse_coefficients(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fuse every mapping that is one, then what its coefficients are applied to."""
    effects, report = unread(gm.graph), Report()
    fuse_open(gm.graph, context, report)
    if report.made:
        erase_dead_code(gm.graph, keep=effects)
    with kept_apart(gm.graph, context.grad_enabled):
        return _fuse(gm, context, effects, report)


def every_site_is_fused(gm: fx.GraphModule, context: Context) -> list[str]:
    """What ``widen`` wrote is operators now, or there is a reason."""
    nodes, left = set(gm.graph.nodes), {s.site.name for s in context.left_open}
    open_sites = [s for s in context.open_sites if s not in context.left_open]
    problems = [f"{s.site.name} is still open" for s in open_sites if s.flat in nodes]
    if context.open_sites:  # a product of the open form, whose node another pass has put away
        products = gm.graph.find_nodes(op="call_function", target=torch.ops.mhc.matmul.default)
        names = {n.meta.get(SITE_TAG) for n in products} - left - {None}
        problems += [f"a part of {name} is still open" for name in sorted(names)]
    return problems + [f"{e.node.name} is still open" for e in context.open_ends if e.node in nodes]


def _fuse(
    gm: fx.GraphModule, context: Context, effects: frozenset[fx.Node], report: Report
) -> PassResult:
    fused = [_fuse_mapping(m, report) for m in _by_hand(gm.graph, context)]
    found = [f for f in fused if f is not None]
    if found:
        erase_dead_code(gm.graph, keep=effects)
    for site in found:
        _fuse_pre(site, report)
        _fuse_post_res(site, report)
    if found:
        erase_dead_code(gm.graph, keep=effects)
    # One that was rejected may have become readable, since its norm was deferred.
    read_now = {made.reading.mapping.y.meta.get(OWN_TAG) for made in found}
    rejected = [r for r in context.own if isinstance(r, Rejected) and r.node.name not in read_now]
    context.own = [*rejected, *_own_sites(found), *report.refused]
    return PassResult(gm, changed=bool(report.made), notes=report.notes())


# --- from the projection to the coefficients ------------------------------------------------------


def _by_hand(graph: fx.Graph, context: Context) -> list[Mapping]:
    """The mappings that ``widen`` did not write: of those, all is known."""
    return [m for m in mappings(graph) if not (context.open_sites and is_widened(m.y))]


@dataclass
class _Coefficients:
    """The coefficients of a site as the graph has them now.

    Attributes:
        operator: the call of ``mhc::coefficients``.
        H_res: None where the streams are not mixed: it is I.
        X: what the site makes of its streams, if that was found.
        applied: the operators that its coefficients are arguments of, by their names.
        remarks: what was left open behind the coefficients.
    """

    reading: Reading
    operator: fx.Node
    H_pre: fx.Node
    H_post: fx.Node
    H_res: fx.Node | None
    X: fx.Node | None = None
    applied: dict[str, fx.Node] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        """C."""
        return self.reading.mapping.width


def _fuse_mapping(mapping: Mapping, report: Report) -> _Coefficients | None:
    try:
        reading = read(mapping)
    except Refused as refused:
        report.refuse("mapping", refused, mapping.y)
        if OWN_TAG in mapping.y.meta:
            place = place_of(mapping.y)
            report.refused.append(
                Rejected(mapping.y, refused.reason, place, mapping.width, detail=str(refused))
            )
        return None
    if reading is None:
        return None
    report.add(f"coefficients {reading.variant.text}")
    return _write(reading)


def _write(reading: Reading) -> _Coefficients:
    m, variant, given = reading.mapping, reading.variant, reading.parameters
    dtype = dtype_of(m.y)
    write = Writer(max(m.y, *given.nodes), m.y)  # all coefficients are computed from these
    X = m.X
    if not same_sizes(shape_of(X)[:-2], shape_of(m.y)[:-1]):
        X = write.call("unflatten", strip_casts(m.flat), -1, (m.n, shape_of(X)[-1]))
    phi = write.call("t", m.phi) if m.by_rows else m.phi
    if m.weight is not None:
        scale = write.call("unsqueeze", write.cast(m.weight, dtype), -1)
        phi = write.call(operator.mul, phi, scale)
    alpha = given.write_alpha(write, phi, dtype)
    bias = given.write_bias(write, phi, dtype, variant.columns(m.n))
    target = torch.ops.mhc.coefficients.default
    made = write.call(target, X, phi, alpha, bias, variant.text, reading.eps, name="coefficients")
    mixed = any(role == _RES for role, _ in reading.chosen.values())
    H = [_result(write, made, role) for role in range(3 if mixed else 2)]
    for node, (role, flipped) in reading.chosen.items():
        new = H[role]
        if flipped:
            new = write.call("transpose", new, -1, -2)
        node.replace_all_uses_with(write.cast(new, dtype_of(node)))
    return _Coefficients(reading, made, H[_PRE], H[_POST], H[_RES] if mixed else None)


def _result(write: Writer, made: fx.Node, role: int) -> fx.Node:
    return write.call(operator.getitem, made, role, name=("H_pre", "H_post", "H_res")[role])


# --- what coefficients are applied to -------------------------------------------------------------


def _fuse_pre(site: _Coefficients, report: Report) -> None:
    products = _Products([site.H_pre], site.width)
    X, (H_pre,) = products.X, products.coefficients
    wanted = [(H_pre.unsqueeze(1) @ X).squeeze(1)]
    for end, write, (H_pre_node, X_node), _ in products.find(wanted, "H_pre X", site, report):
        dtype = dtype_of(end)
        h = site.applied["pre"] = write.call(
            torch.ops.mhc.pre.default, H_pre_node, X_node, dtype, name="h"
        )
        end.replace_all_uses_with(h)
        report.add("pre")


def _fuse_post_res(site: _Coefficients, report: Report) -> None:
    coefficients = [H for H in (site.H_post, site.H_res) if H is not None]
    products = _Products(coefficients, site.width)
    X, f, (H_post, *H_res) = products.X, products.f, products.coefficients
    added = H_post.unsqueeze(-1) * f.unsqueeze(1)
    wanted = [H_res[0] @ X + added, H_res[0].mT @ X + added] if H_res else [X + added]
    what = "H_res X + H_postᵀ f" if H_res else "X + H_postᵀ f"
    for end, write, operands, form in products.find(wanted, what, site, report):
        H_post_node, *mix, X_node, f_node = operands
        H = mix[0] if mix else _result(write, site.operator, _RES)
        if form == 1:
            H = write.call("transpose", H, -1, -2)
        dtype = dtype_of(end)
        if dtype != dtype_of(X_node):  # the operator rounds to X's, which the open form did not
            X_node = write.cast(X_node, products.dtype)
        new = site.applied["post_res"] = write.call(
            torch.ops.mhc.post_res.default, H, H_post_node, X_node, f_node, name="X"
        )
        site.X = write.cast(new, dtype)
        end.replace_all_uses_with(site.X)
        report.add("post_res")
    if site.X is None and products.left:
        site.X = products.left[0]


_Found = tuple[fx.Node, Writer, list[fx.Node], int]
"""The node to replace, a writer behind it, the operands, and which of the wanted forms it is."""


class _Products:
    """What coefficients, streams X and a branch's output f are combined to.

    Args:
        nodes: the coefficients to begin with, H_pre, or H_post and H_res.
        width: C.
    """

    def __init__(self, nodes: Sequence[fx.Node], width: int) -> None:
        self.dtype, shape = dtype_of(nodes[0]), shape_of(nodes[0])
        self.n, self.width = int(shape[-1]), width  # type: ignore[call-overload]
        lead = len(shape) - 1
        self.seeds: dict[fx.Node, Value] = {
            node: Value(_random_operand(shape_of(node)[lead:], 11 + i), lead)
            for i, node in enumerate(nodes)
        }
        self.X = _random_operand((self.n, width), 7)
        self.f = _random_operand((width,), 6)
        self.others: dict[tuple[int, ...], fx.Node] = {}  # X and f, by the sizes of a token
        self.left: list[fx.Node] = []  # what was found and could not be replaced

    @property
    def coefficients(self) -> list[Tensor]:
        """What stands for each coefficient."""
        return [seed.data for seed in self.seeds.values()]

    def find(
        self, wanted: Sequence[Tensor], what: str, site: _Coefficients, report: Report
    ) -> list[_Found]:
        """The nodes whose value is one of those wanted, each with the cast that follows it."""
        region = grow(
            dict(self.seeds), self._bind, until=lambda v: self._form(v, wanted) is not None,
            most=_NEARBY,
        )  # fmt: skip
        found = []
        for node in region.found:
            try:
                form = self._form(region.known[node], wanted)
                assert form is not None
                found.append((*self._examined(node, region), form))
            except Refused as refused:
                site.remarks.append(report.refuse(what, refused, node))
                self.left.append(node)
        if not region.found:
            first = next(iter(self.seeds))
            elsewhere = any(map(is_read_in_another_mode, region.known))
            reason = "read in another mode" if elsewhere else "not found behind its coefficients"
            site.remarks.append(report.refuse(what, reason, first))
        return found

    @staticmethod
    def _form(value: Value, wanted: Sequence[Tensor]) -> int | None:
        return next((i for i, w in enumerate(wanted) if close(value.data, w)), None)

    def _examined(self, node: fx.Node, region: Region) -> tuple[fx.Node, Writer, list[fx.Node]]:
        if region.written:
            raise Refused("values in between are written in place", Reason.OWN_PLACE)
        used, end = region.above(node), self._rounded(node)
        require_one_precision(used, self.dtype)
        require_one_tag([*used, end])
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
        raise Refused(
            "its coefficients are reshaped in a way that is not known", Reason.OWN_COEFFICIENTS
        )

    def _rounded(self, node: fx.Node) -> fx.Node:
        """The cast of a result, if nothing else reads it."""
        while dtype_of(node) is self.dtype and len(node.users) == 1:
            (user,) = node.users
            if op_of(user).kind is not Kind.CAST or not is_float_tensor(user):
                break
            node = user
        (user, *others) = node.users or (node,)
        plain = op_of(user).name == "contiguous" and len(user.args) == 1 and not user.kwargs
        return user if plain and not others else node

    def _bind(self, operand: fx.Node, known: Known, reader: fx.Node) -> None:
        """Give X and f their values: operands that show ``[..., n, C]``, else ``[..., C]``."""
        leads = {v.lead: shape_of(n)[: v.lead] for n, v in known.items() if isinstance(v, Value)}
        for tail, data in (((self.n, self.width), self.X), ((self.width,), self.f)):
            for lead, tokens in leads.items():
                ends = partial(self._has, tail=tail, tokens=tokens)
                way = way_up(operand, until=ends)
                source = strip_casts(way[-1])
                if ends(way[-1]) and self.others.setdefault(tail, source) is source:
                    known[way[-1]] = Value(data, lead)
                    evaluate_down(way, known)
                    return

    @staticmethod
    def _has(node: fx.Node, tail: tuple[int, ...], tokens: tuple[object, ...]) -> bool:
        return is_float_tensor(node) and same_sizes(shape_of(node), (*tokens, *tail))


@cache
def _random_operand(tail: tuple[int, ...], seed: int) -> Tensor:
    return random(TOKENS, *tail, seed=seed)


# --- what was recognised --------------------------------------------------------------------------


def _own_sites(found: Sequence[_Coefficients]) -> list[FusedSite]:
    """The sites that were written by hand, in the order of the graph."""
    ends: dict[fx.Node, FusedSite] = {}
    for made in found:
        site = _own_site(made, ends)
        ends[made.X or made.operator] = site
    return list(ends.values())


def _own_site(made: _Coefficients, before: dict[fx.Node, FusedSite]) -> FusedSite:
    reading = made.reading
    X, _, alpha, bias, *_ = made.operator.args
    assert isinstance(X, fx.Node)
    previous = before.get(way_up(behind_switches(X))[-1])
    place = place_of(reading.mapping.y)
    others = [s.place for s in before.values() if s.owner == place.owner]
    same = sum(o.branch_name.partition(":")[0] == place.branch_name for o in others)
    name = f"{place.branch_name}_{same}" if same else place.branch_name
    location = location_of(made.X or made.operator)
    nodes = {"coefficients": made.operator, **made.applied}
    site = FusedSite(
        place=replace(place, branch_name=name, location=location),
        n=reading.mapping.n,
        width=made.width,
        chain=previous.chain if previous else len({s.chain for s in before.values()}),
        position=previous.position + 1 if previous else 0,
        reason="; ".join((f"recognised: {reading.variant.text}", *made.remarks)),
        parameters=tuple(_placeholders([reading.mapping.phi, alpha, bias])),
        previous=previous.name if previous else None,
        nodes=nodes,
    )
    for node in nodes.values():
        node.meta[SITE_TAG] = site.name
    return site


def _placeholders(nodes: Sequence[Any]) -> list[fx.Node]:
    """The inputs of the graph that parameters show or are put together from."""
    found: dict[fx.Node, None] = {}
    pending = list(nodes)
    while pending:
        node = pending.pop(0)
        if node.op == "placeholder":
            found[node] = None
        pending += node.all_input_nodes
    return list(found)
