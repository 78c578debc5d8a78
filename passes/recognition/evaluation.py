"""match: what a part of a graph computes, found by running it on a few random tokens.

    groups = y.split((4, 4, 16), -1)
    g = groups[0] * alpha[0] + bias[:4]         a region: what is computed from y, α and b
    H_pre = torch.sigmoid(g)                    H_pre(y, α, b) == σ(α[0] · y[:4] + b[:4])?

Note [Matching by evaluation]
    One formula has many spellings: commuted operands, splits or slices, views, casts. So a region
    is not compared with a pattern; it is run, and its values are compared with those of the oracle.
    This is sound because every operation of ``token_rules`` is a view or a composition of analytic
    functions, applied to each token alone. Two such functions that differ at all differ almost
    everywhere, so agreement of float64 values on random tokens means equality, in derivatives as
    well; agreement to 1e-12 does if they do not converge to each other. Sinkhorn-Knopp does, so how
    often it iterates is told by a token on which it has not converged (``Oracle``). Clamps,
    branches, random numbers, ``detach``, and whatever looks at several tokens have no rule: a
    region ends there. The largest of some values may be any number: the results that agree do not
    depend on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph.dataflow import is_mutation
from ..graph.operators import Kind, holds_tensor, op_of, value_of
from .token_rules import Known, Value, evaluate, has_rule

__all__ = [
    "Region",
    "close",
    "evaluate_down",
    "grow",
    "is_view",
    "random",
    "strip_casts",
    "way_up",
]

_CLOSE = 1e-12


@dataclass
class Region:
    """A part of a graph.

    Attributes:
        known: the values of its members and of their operands.
        members: what is computed from the seeds, in order.
        found: the members that were looked for.
        written: whether something writes into one of them, or into memory that one of them shows.
    """

    known: Known
    members: list[fx.Node]
    found: list[fx.Node]
    written: bool = False

    def above(self, node: fx.Node) -> list[fx.Node]:
        """The members that a member is computed from, itself included."""
        inside, above, pending = set(self.members), {node}, [node]
        while pending:
            for operand in pending.pop().all_input_nodes:
                if operand in inside and operand not in above:
                    above.add(operand)
                    pending.append(operand)
        return sorted(above)


def random(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64, the same for the same arguments."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two results of one formula agree up to float64 rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE)


def grow(
    seeds: Known,
    bind: Callable[[fx.Node, Known, fx.Node], None],
    *,
    until: Callable[[Value], bool] = lambda value: False,
    most: int = 10_000,
) -> Region:
    """Everything that is computed from the seeds by operations with a rule.

    Args:
        seeds: nodes with their values.
        bind: called for an operand that has no value yet, and its reader; may give it one.
        until: whether a value is what was looked for; its readers do not belong to the region.
        most: number of nodes behind which to stop.
    """
    known, members, found, written = dict(seeds), list[fx.Node](), list[fx.Node](), False
    pending = [user for seed in seeds for user in seed.users]
    heapq.heapify(pending)
    seen: set[fx.Node] = set(seeds)
    while pending and len(members) < most:
        node = heapq.heappop(pending)
        if node in seen:
            continue
        seen.add(node)
        if op_of(node).kind is Kind.OTHER or not has_rule(node):
            seen_elsewhere = node.meta.get("is_written", False)  # by what reads it in another mode
            written = written or seen_elsewhere or (is_mutation(node) and node.args[0] in known)
            continue
        for operand in node.all_input_nodes:
            if operand not in known and holds_tensor(operand):
                bind(operand, known, node)
        value = evaluate(node, known)
        if value is not None:
            known[node] = value
            members.append(node)
            if isinstance(value, Value) and until(value):
                found.append(node)
                continue
            for user in node.users:
                heapq.heappush(pending, user)
    return Region(known, members, found, written)


def strip_casts(node: fx.Node) -> fx.Node:
    """The node behind casts that change no value: to the same dtype or to a wider one."""
    while (op_of(node).kind is Kind.CAST or op_of(node).name == "contiguous") and is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def way_up(node: fx.Node, until: Callable[[fx.Node], bool] = lambda node: False) -> list[fx.Node]:
    """From an operand through views and casts to what it shows."""
    way = [node]
    while not until(way[-1]) and is_view(way[-1]):
        source = way[-1].args[0]
        assert isinstance(source, fx.Node)
        way.append(source)
    return way


def is_view(node: fx.Node) -> bool:
    """Whether a node shows its first argument, with no value changed."""
    op = op_of(node)
    if op.kind not in (Kind.VIEW, Kind.CAST) and op.name != "contiguous":
        return False
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not holds_tensor(source):
        return False
    before, after = value_of(source), value_of(node)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return True  # a part of a split
    exact = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return exact and before.device == after.device and after.is_floating_point()


def evaluate_down(way: list[fx.Node], known: Known) -> None:
    """Values along ``way_up``, from that of its end."""
    for node in reversed(way[:-1]):
        value = evaluate(node, known)
        if value is None:
            return
        known[node] = value
