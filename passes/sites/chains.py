"""Chains: residual adds that the same streams pass, one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from ..graph.dataflow import DataFlow
from ..graph.streamwise import is_linear
from .channel_axis import Axes, axes_of, channel_axis
from .find import Finder
from .records import Reason, ResidualAdd

__all__ = ["Chain", "link", "revealed_axes"]


@dataclass(frozen=True)
class Chain:
    """Adds in the order of their streams.

    Attributes:
        previous: of each add the one whose sum it comes from, if any.
        axes: of each add where its channels are.
        linear: whether only linear stream-wise operations stand between them.
    """

    adds: Sequence[ResidualAdd]
    previous: Sequence[fx.Node | None]
    axes: Sequence[Axes]
    linear: bool


def link(finder: Finder, revealed: Mapping[fx.Node, int | None], *, alone: bool) -> list[Chain]:
    """The chains of the adds that were found; those that are in none are forgotten.

    Args:
        revealed: the ``channel_axis`` of each add.
        alone: whether an add may be the only one of its chain.
    """
    links, inside = nx.Graph(), _first_in_branch(finder)
    previous: dict[fx.Node, fx.Node | None] = {}
    for node, add in finder.found.items():
        links.add_node(node)
        before = finder.base.get(add.x, add.x)
        previous[node] = before if node not in inside and before in finder.found else None
        if previous[node] is not None:
            links.add_edge(before, node)
    index = finder.flow.index
    components = [sorted(c, key=index.__getitem__) for c in nx.connected_components(links)]
    chains: list[Chain] = []
    for component in sorted(components, key=lambda c: index[c[0]]):
        if len(component) == 1 and not alone:
            finder.forget(component[0], Reason.CHAIN_OF_ONE)
            continue
        adds = [finder.found[node] for node in component]
        axes = axes_of([(a, previous[a.node], revealed[a.node]) for a in adds], finder.up)
        if axes is None:
            for node in component:
                finder.forget(node, Reason.LAYOUT)
            continue
        linear = all(is_linear(n) for a in adds for n in _between(a, previous[a.node], finder.up))
        chains.append(Chain(adds, [previous[a.node] for a in adds], axes, linear))
    return chains


def _first_in_branch(finder: Finder) -> set[fx.Node]:
    """Adds whose stream enters the branch of another one: there a new chain begins."""
    inside: set[fx.Node] = set()
    for outer in finder.found.values():
        for node in finder.flow.region(outer.x, outer.branch):
            add = finder.found.get(node)
            state = add.x if add is not None else None
            while state is not None:
                if state is outer.x:
                    inside.add(node)
                state = finder.up.get(state)
    return inside


def _between(
    add: ResidualAdd, previous: fx.Node | None, up: Mapping[fx.Node, fx.Node]
) -> list[fx.Node]:
    """The stream-wise operations on the skip, and between an add and the one before."""
    between, state = [*add.skip_path], add.x
    while previous is not None and state is not previous:
        between.append(state)
        state = up[state]
    return between


def revealed_axes(
    flow: DataFlow, found: Mapping[fx.Node, ResidualAdd]
) -> dict[fx.Node, int | None]:
    """The channel axis that each branch tells."""
    return {node: channel_axis(flow, add) for node, add in found.items()}
