"""Which axis of a stream holds the channels: the one that the branch's weights act on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ..graph.dataflow import DataFlow
from ..graph.operators import Kind, op_of, shape_of
from ..graph.streamwise import streamwise_operands, transfer_axis
from .records import ResidualAdd

__all__ = ["Axes", "axes_of", "channel_axis"]


def channel_axis(flow: DataFlow, site: ResidualAdd) -> int | None:
    """The axis (from the right) of x that the first weighted operations of F act on.

    A linear layer and a LayerNorm act on the last axis, a convolution and a BatchNorm on the
    second; the votes of all first encounters are counted, transposes in between followed back.
    None if no operation tells (mixing over tokens alone).
    """
    region = flow.region(site.x, site.branch)
    votes: Counter[int] = Counter()
    seen: set[fx.Node] = {site.x}
    # A node with the map from its axes (from the right) to those of x.
    pending = deque([(site.x, {-i: -i for i in range(1, len(shape_of(site.x)) + 1)})])
    while pending:
        node, axes = pending.popleft()
        for reader in flow.readers(node):
            if reader not in region or reader in seen:
                continue
            revealed = _revealed_axis(reader, node)
            if revealed is not None:
                if axes.get(revealed) is not None:
                    votes[axes[revealed]] += 2 if op_of(reader).kind is Kind.NORM else 1
                if op_of(reader).kind is not Kind.NORM:
                    continue
            follow = _followed(reader, node, axes)
            if follow is not None:
                seen.add(reader)
                pending.append((reader, follow))
    if not votes:
        return None
    best = max(votes.values())
    return max(axis for axis, count in votes.items() if count == best)


def _revealed_axis(reader: fx.Node, node: fx.Node) -> int | None:
    channels = op_of(reader).channels
    if channels is None or not reader.args or reader.args[0] is not node:
        return None
    return channels if channels < 0 else channels - len(shape_of(node))


def _followed(reader: fx.Node, node: fx.Node, axes: dict[int, int]) -> dict[int, int] | None:
    """The map of axes behind an operation that neither mixes nor reduces."""
    kind = op_of(reader).kind
    if kind is Kind.NORM:
        return axes
    if kind is Kind.POINTWISE:
        same_rank = len(shape_of(reader)) == len(shape_of(node))
        return axes if same_rank else None
    if node not in streamwise_operands(reader):
        return None
    moved = {}
    for axis, origin in axes.items():
        new = transfer_axis(reader, node, axis)
        if new is not None:
            moved[new] = origin
    return moved


@dataclass(frozen=True)
class Axes:
    """Where the channels of a site are: in x, in z (from the right), and how many there are."""

    of_x: int
    of_z: int
    width: int


def axes_of(
    chain: Sequence[tuple[ResidualAdd, fx.Node | None, int | None]],
    up: Mapping[fx.Node, fx.Node],
) -> list[Axes] | None:
    """The channel axes of a chain's sites; None if the axis gets lost.

    A chain has one channel axis. The first site's is the one that most sites vote for; each later
    site inherits it through the stream-wise operations in between. Where these move axes, the vote
    may be in another layout than the first site's: then it is the axis that becomes a voted one.

    Args:
        chain: each site with the sum that it comes from, if any, and its ``channel_axis``.
    """
    votes = [-1 if revealed is None else revealed for *_, revealed in chain]
    common = max(dict.fromkeys(votes), key=votes.count)
    if (found := _inherited(chain, up, common)) is not None:
        return found
    for axis in range(-1, -len(shape_of(chain[0][0].x)), -1):
        found = _inherited(chain, up, axis)
        if found is not None and any(
            a.of_x == site[2] for a, site in zip(found, chain, strict=True)
        ):
            return found
    return None


def _inherited(
    chain: Sequence[tuple[ResidualAdd, fx.Node | None, int | None]],
    up: Mapping[fx.Node, fx.Node],
    first: int,
) -> list[Axes] | None:
    found: dict[fx.Node, Axes] = {}
    for add, previous, _ in chain:
        axis = first if previous is None else found[previous].of_z
        axes = _axes(add, previous, up, axis)
        if axes is None:
            return None
        found[add.node] = axes
    return list(found.values())


def _axes(
    add: ResidualAdd, previous: fx.Node | None, up: Mapping[fx.Node, fx.Node], before: int
) -> Axes | None:
    """The axes of a site whose streams have their channels at ``before`` where they come from."""
    path, node = list[fx.Node](), add.x
    while previous is not None and node is not previous:
        path.append(node)
        node = up[node]
    of_x = _carried(path, up, before)
    if of_x is None or -of_x > len(shape_of(add.x)):
        return None
    of_z = _carried(add.skip_path, up, of_x)
    if of_z is None:
        return None
    widths = shape_of(add.x)[of_x], shape_of(add.node)[of_z]
    if type(widths[0]) is not int or widths[0] != widths[1]:
        return None
    return Axes(of_x, of_z, widths[0])


def _carried(path: Sequence[fx.Node], up: Mapping[fx.Node, fx.Node], axis: int) -> int | None:
    """Where stream-wise operations take an axis, the last of them first; None if it gets lost."""
    now: int | None = axis
    for node in reversed(path):
        now = None if now is None else transfer_axis(node, up[node], now)
    return now
