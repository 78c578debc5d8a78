"""Where the connections of a graph are, in the graph that runs: by the tags that nodes carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import fx

from ..context import Context
from ..graph.writer import SITE_TAG
from ..sites.records import FusedSite, Site

__all__ = ["fused_sites"]

_OPERATORS = ("coefficients", "pre", "post_res")


def fused_sites(graph: fx.Graph, context: Context) -> list[FusedSite]:
    """The sites that were rewritten, and the model's own that were recognised.

    Args:
        graph: what the passes have made of it.
    """
    detected = context.detection.sites if context.detection is not None else ()
    own = (site for site in context.own if isinstance(site, FusedSite))
    names = {site.node: site.name for site in detected}
    sites = [*(_of(site, names, context) for site in detected), *own]
    nodes = _tagged(graph.nodes)
    return [replace(site, nodes=nodes.get(site.name, {})) for site in sites]


def _of(site: Site, names: Mapping[fx.Node, str], context: Context) -> FusedSite:
    return FusedSite(
        place=site.place,
        n=context.options.n,
        width=site.width,
        chain=site.chain,
        position=site.position,
        reason=site.reason,
        parameters=site.parameters,
        previous=None if site.previous is None else names[site.previous],
        excluded=site.excluded,
    )


def _tagged(nodes: Iterable[fx.Node]) -> dict[str, dict[str, fx.Node]]:
    """The operators of each site."""
    found: dict[str, dict[str, fx.Node]] = {}
    for node in nodes:
        packet = getattr(node.target, "overloadpacket", None)
        name = getattr(packet, "__name__", "") if str(node.target).startswith("mhc.") else ""
        if name in _OPERATORS and SITE_TAG in node.meta:
            found.setdefault(node.meta[SITE_TAG], {})[name] = node
    return found
