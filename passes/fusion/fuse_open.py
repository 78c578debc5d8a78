"""What ``widen`` wrote, as operators: which nodes mean what is known, so nothing is searched for.

    x⃗ = X.flatten(-2); ...; H_pre, H_post, H_res    ->  mhc.coefficients(X, φ, α, b, variant, eps)
    h = mhc.matmul(H_pre, X).to(dtype)              ->  mhc.pre(H_pre, X, dtype)
    X' = mhc.matmul(H_res, X) + H_post fᵀ           ->  mhc.post_res(H_res, H_post, X, f)
    X = x.unsqueeze(-2).tile((n, 1))                ->  mhc.expand(x, n)
    x = X.mean(-2);  x = weights(X) X               ->  mhc.readout(X, "mean", dtype); mhc.head(...)

Operands are read from the nodes as they are now (``OpenSite``): passes in between may have put
others in their place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...kernels.ops import ends, site  # noqa: F401  (registers the operators)
from ..context import Context
from ..graph.operators import dtype_of, op_of, shape_of
from ..graph.writer import Writer
from ..sites.records import OpenEnd, OpenSite, Rejected, location_of, stack_of

__all__ = ["Report", "fuse_open"]


@dataclass
class Report:
    """What was fused and what was not, equal cases counted."""

    made: dict[str, int] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    refused: list[Rejected] = field(default_factory=list)

    def add(self, operator_name: str) -> None:
        self.made[operator_name] = self.made.get(operator_name, 0) + 1

    def refuse(self, what: str, reason: object, node: fx.Node) -> str:
        """Note what is left open, and why; returns that without its place."""
        stack, note = stack_of(node), f"{what} left open: {reason}"
        place = " ".join(p for p in (stack[-1][1] if stack else "", location_of(node)) if p)
        self.left.setdefault(note, []).append(place or node.name)
        return note

    def notes(self) -> list[str]:
        made = [f"{count} x mhc.{name}" for name, count in self.made.items()]
        return made + [
            f"{len(places)} x {reason} (at {places[0]}{', ...' if len(places) > 1 else ''})"
            for reason, places in self.left.items()
        ]


def fuse_open(graph: fx.Graph, context: Context, report: Report) -> None:
    """Make operators of every open site and of both ends of every chain."""
    there = set(graph.nodes)  # a part that nothing reads is gone
    left: dict[OpenSite, str] = {}
    for open_site in [o for o in context.open_sites if o.flat in there]:
        if (obstacle := _obstacle(open_site)) is None:
            _fuse_site(open_site, there, report)
        else:
            left[open_site] = report.refuse("mapping", obstacle, open_site.flat)
    context.left_open = left
    for end in context.open_ends:
        if end.node in there:
            report.add(_fuse_end(end))


def _obstacle(open_site: OpenSite) -> str | None:
    """Why the operators would not compute what the open form does; None if they do."""
    X = _operand(open_site.flat)
    dtypes = {dtype_of(parameter) for parameter in open_site.parameters}
    exact = {torch.float64} if dtype_of(X) is torch.float64 else {torch.float32, torch.float64}
    if len(dtypes) == 1 and dtypes <= exact:
        return None
    names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
    return f"computed in {names} from {dtype_of(X)} streams"


def _fuse_site(open_site: OpenSite, there: set[fx.Node], report: Report) -> None:
    flat = open_site.flat
    write, X = Writer(flat, flat), _operand(flat)
    variant, eps = open_site.variant.text, open_site.eps
    made = write.call(
        *(torch.ops.mhc.coefficients.default, X, *open_site.parameters, variant, eps),
        name="coefficients",
    )
    for role, node in enumerate(open_site.H):
        H = write.call(operator.getitem, made, role, name=("H_pre", "H_post", "H_res")[role])
        if role == 0:
            H_pre = H
        node.replace_all_uses_with(H)
    report.add(f"coefficients {variant}")
    if open_site.h in there:
        h = write.call(torch.ops.mhc.pre.default, H_pre, X, dtype_of(open_site.h), name="h")
        _put(h, open_site.h)
        report.add("pre")
    if open_site.end in there:
        _fuse_sum(open_site)
        report.add("post_res")


def _fuse_sum(open_site: OpenSite) -> None:
    end = open_site.end
    write = Writer(end, end)
    mixed, spread = _operand(end).all_input_nodes
    X, f = _operand(mixed.args[1]), _operand(_operand(spread.args[1]))
    H_res, H_post = mixed.args[0], _operand(spread.args[0])
    if dtype_of(end) != dtype_of(X):  # the operator rounds to X's, which the open form did not
        X = write.cast(X, dtype_of(mixed))
    new = write.call(torch.ops.mhc.post_res.default, H_res, H_post, X, f, name="X")
    end.replace_all_uses_with(write.cast(new, dtype_of(end)), lambda user: user is not new)


def _fuse_end(end: OpenEnd) -> str:
    """The operator in the place of an end of a chain; its name."""
    node = end.node
    write = Writer(node, node)
    if end.kind == "expand":
        n = int(shape_of(node)[-2])  # type: ignore[call-overload]
        new = write.call(torch.ops.mhc.expand.default, _operand(_operand(node)), n, name="X")
    elif end.kind == "head":
        streams = _operand(_operand(node)).all_input_nodes[1]
        given = (_operand(streams), *end.parameters, end.eps, 0.0, dtype_of(node))
        made = write.call(torch.ops.mhc.head.default, *given, name="head")
        new = write.call(operator.getitem, made, 0)
    else:
        X = _operand(_operand(_operand(node)))
        new = write.call(torch.ops.mhc.readout.default, X, end.kind, dtype_of(node))
    _put(new, node)
    return "readout" if end.kind in ("mean", "sum") else end.kind


def _operand(node: Any) -> fx.Node:
    """The first operand of a node that ``widen`` wrote."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _put(new: fx.Node, old: fx.Node) -> None:
    """A contiguous result in the place of a node, and of its sole reader ``contiguous()``."""
    users = [u for u in old.users if u is not new]
    if len(users) == 1 and op_of(users[0]).name == "contiguous" and len(users[0].args) == 1:
        users[0].replace_all_uses_with(new)
    old.replace_all_uses_with(new, lambda user: user is not new)
