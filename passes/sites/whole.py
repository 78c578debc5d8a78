"""What was declared must be in a graph: every site whose branch ran, every chain in one piece.

A skipped layer is told from a lost one by whether the graph computes something of its branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import networkx as nx
from torch import fx

from ..context import Context, Declaration
from ..errors import ChainBrokenError
from ..graph.operators import Kind, op_of
from .find import Finder
from .records import Place, Reason, Site, identity_of, stack_of

__all__ = ["Missing", "require_declared", "undeclared_on_streams"]


class Missing(Exception):
    """Something is wrong with a graph, and declared sites are missing in it.

    Attributes:
        sites: identity of the owner and name of every declared site that was not found.
    """

    def __init__(self, what: str, sites: frozenset[tuple[str, str]]) -> None:
        super().__init__(what)
        self.sites = sites


def undeclared_on_streams(
    finder: Finder, chains: Sequence[Sequence[Site]], context: Context
) -> list[fx.Node]:
    """Undeclared adds that stand in front of, between or behind declared sites.

    Where nothing of a chain is left, those that would be a chain of their own.
    """
    known = {site.node: site.x for chain in chains for site in chain}
    gone = context.homes - {chain[0].chain for chain in chains}
    undeclared = {node: add.x for node, add in finder.undeclared.items()}
    streams = nx.Graph()
    streams.add_nodes_from(known)
    for node, x in (known | undeclared).items():
        streams.add_edge(node, finder.base.get(x, x))
    found: list[fx.Node] = []
    for component in nx.connected_components(streams):
        added = [node for node in undeclared if node in component]
        if component & known.keys() or (gone and len(added) > 1):
            found += added
    return found


def require_declared(
    finder: Finder,
    chains: Sequence[Sequence[Site]],
    declared: Mapping[fx.Node, Declaration],
    places: Mapping[fx.Node, Place],
    context: Context,
) -> None:
    """Raise where something that was declared is missing.

    Raises:
        Missing: of a site, though its branch ran, or of other sites in a chain that is not whole.
        ChainBrokenError: of a chain, without a site missing.
    """
    declarations = context.declarations or {}
    sites = [site for chain in chains for site in chain]
    found = {(identity_of(s.place.owner_key), s.branch_name) for s in sites}
    missing = [
        (owner, entry)
        for owner, entries in declarations.items()
        for entry in entries
        if (owner, entry.name) not in found
    ]
    _refuse_lost(finder, places, declared)
    if not missing:
        _require_whole(sites, chains, declared, context)
        return
    run = _branches_run(finder)
    try:
        for owner, entry in missing:
            if context.broken_at or (owner, entry.name) in run:
                raise ChainBrokenError(_lost_site(owner, entry, context))
        _require_whole(sites, chains, declared, context)
    except ChainBrokenError as error:
        raise Missing(str(error), frozenset((o, e.name) for o, e in missing)) from None


def _refuse_lost(
    finder: Finder, places: Mapping[fx.Node, Place], declared: Mapping[fx.Node, Declaration]
) -> None:
    """What was declared and found must not be left out for another reason."""
    for node in declared:
        if (reason := finder.rejected.get(node)) is not None:
            place = places[node]
            raise ChainBrokenError(
                f"The residual add '{place.name}' ({place.location}) is declared, but cannot be "
                f"n-stream in this call: {reason}. {_WHY.get(reason, '')}".rstrip()
            )


_WHY = {
    Reason.LAYOUT: "The number of channels must be a number: where Dynamo has made it a symbol, "
    "mark it static (torch._dynamo.mark_static(x, -1)), or compile with dynamic=False."
}


def _branches_run(finder: Finder) -> set[tuple[str, str]]:
    """Owner and name of every branch of which the graph computes something."""
    return {
        (identity_of(key), finder.names.child_within(node, key))
        for node in finder.flow.order
        if op_of(node).kind is Kind.MIXING
        for key in ("", *(key for key, _ in stack_of(node)))  # "": the root of the capture
    }


def _lost_site(owner: str, entry: Declaration, context: Context) -> str:
    where, broken = next(iter(context.owners.get(owner, ())), ""), context.broken_at
    cause = (
        f"The capture was broken at {broken}; remove that graph break "
        "(a print, a data-dependent branch, an unsupported call)."
        if broken
        else "Its forward may have taken another path than when the model was transformed; "
        "call revert and transform again with example inputs that take this path."
    )
    return (
        f"The residual add of branch '{entry.name}' of module '{where or '<root>'}' is "
        f"declared but is not in the captured graph. {cause}"
    )


def _require_whole(
    sites: Sequence[Site],
    chains: Sequence[Sequence[Site]],
    declared: Mapping[fx.Node, Declaration],
    context: Context,
) -> None:
    """Every chain must lie in one graph: streams cannot cross a graph break."""
    ends: dict[int, tuple[bool, bool]] = {}
    for site in sites:
        entry = declared[site.node]
        first, last = ends.get(entry.chain, (False, False))
        ends[entry.chain] = (first or entry.first, last or entry.last)
    for number, (first, last) in ends.items():
        home = number in context.homes and not context.broken_at
        if not (first and last) and not home:
            raise ChainBrokenError(_part_of_chain(number, sites, context.broken_at))
    for number in {d.chain for group in (context.declarations or {}).values() for d in group}:
        pieces = [chain for chain in chains if chain[0].chain == number]
        if len(pieces) > 1:
            raise ChainBrokenError(_split_chain(pieces))


def _part_of_chain(number: int, sites: Sequence[Site], broken: str | None) -> str:
    own = [s for s in sites if s.chain == number]
    where = f" The capture was broken at {broken}." if broken else ""
    names = ", ".join([s.name for s in own[:4]] + ["..."] * (len(own) > 4))
    return (
        f"A captured graph holds only a part of chain {number} ({names}): its streams would "
        f"be collapsed in the middle.{where} Either the model has a graph break between two "
        "of its residual adds (make that code traceable: no print, no .item(), no random "
        "layer dropping in Python; TORCH_LOGS=graph_breaks shows where), or a module that "
        "owns a part of the chain was called by itself (call the module that contains the "
        "whole chain)."
    )


def _split_chain(parts: Sequence[Sequence[Site]]) -> str:
    at = parts[1][0]
    return (
        f"The streams of chain {at.chain} do not reach the residual add '{at.name}' "
        f"({at.location}): this call takes another path than the one that was transformed. "
        "Call revert, then transform with example inputs that take this path."
    )
