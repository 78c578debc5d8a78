"""Which axis of a stream holds the channels: the one that the branch's weights act on."""

from __future__ import annotations

from collections import Counter, deque

from torch import fx

from ..graph.dataflow import DataFlow
from ..graph.operators import Kind, op_of, shape_of
from ..graph.streamwise import streamwise_operands, transfer_axis
from .records import Site

__all__ = ["channel_axis", "set_axes"]


def channel_axis(flow: DataFlow, site: Site) -> int | None:
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


def set_axes(chain: list[Site], up: dict[fx.Node, fx.Node]) -> bool:
    """Set the channel axes and widths of a chain's sites; False if the axis gets lost.

    A chain has one channel axis. The first site's is the one that most sites vote for; each later
    site inherits it through the stream-wise operations in between. Where these move axes, the vote
    may be in another layout than the first site's: then it is the axis that becomes a voted one.
    """
    votes = [-1 if site.revealed is None else site.revealed for site in chain]
    common = max(dict.fromkeys(votes), key=votes.count)
    if all(_set_axes(site, up, common) for site in chain):
        return True
    return any(
        all(_set_axes(site, up, axis) for site in chain)
        and any(site.channel_in == site.revealed for site in chain)
        for axis in range(-1, -len(shape_of(chain[0].x)), -1)
    )


def _set_axes(site: Site, up: dict[fx.Node, fx.Node], first: int) -> bool:
    axis: int | None = first
    path: list[fx.Node] = []
    if site.previous is not None:
        axis, node = site.previous.channel, site.x
        while node is not site.previous.node:
            path.append(node)
            node = up[node]
    for node in reversed(path):
        axis = None if axis is None else transfer_axis(node, up[node], axis)
    if axis is None or -axis > len(shape_of(site.x)):
        return False
    site.channel_in = axis
    for node in reversed(site.skip_path):
        axis = None if axis is None else transfer_axis(node, up[node], axis)
    if axis is None:
        return False
    site.channel = axis
    # A size that Dynamo first took for dynamic is an expression that became a number.
    widths = str(shape_of(site.x)[site.channel_in]), str(shape_of(site.node)[site.channel])
    if not widths[0].isdecimal() or widths[0] != widths[1]:
        return False
    site.width = int(widths[0])
    return True
