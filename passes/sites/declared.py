"""What the modules in a graph declare: read from its ``mhc::declare`` nodes, which are erased.

    mhc::declare([φ, α, b], '[config, [["self_attn", 0, true, false, 3]], [0]]')
        ->  context.declarations = {module: [Declaration("self_attn", chain=0, first, ...)]}

Dynamo writes such a node where it traces a module that owns sites, so the parameters are inputs of
the graph. Which module it is, is told by the node's ``nn_module_stack``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..context import Context, Declaration, PassResult
from ..errors import ChainBrokenError
from ..graph.operators import op_of
from .records import identity_of, stack_of

__all__ = ["DeclaredSite", "collect", "declaration_nodes", "read_spec", "spec_text"]


@dataclass(frozen=True)
class DeclaredSite:
    """One site in the words of ``declare``: no name of a module, so that equal blocks are equal.

    Attributes:
        name: the branch's name within its owner.
        chain: the chain's number.
        first, last: the site's role in its chain.
        tensors: how many parameters it has (0 for an excluded site, 6 with a readout head).
    """

    name: str
    chain: int
    first: bool
    last: bool
    tensors: int


def spec_text(config: str, sites: tuple[DeclaredSite, ...], homes: tuple[int, ...]) -> str:
    """What a module declares, as one line.

    Args:
        config: the configuration, as text; the passes do not read it.
        homes: the chains whose home the module is.
    """
    listed = [[s.name, s.chain, s.first, s.last, s.tensors] for s in sites]
    return json.dumps([config, listed, list(homes)])


def read_spec(text: str) -> tuple[str, tuple[DeclaredSite, ...], tuple[int, ...]]:
    """What ``spec_text`` wrote."""
    config, sites, homes = json.loads(text)
    return config, tuple(DeclaredSite(*site) for site in sites), tuple(homes)


def declaration_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The ``declare`` nodes of one graph (bodies of higher-order operators not included)."""
    return (node for node in graph.nodes if op_of(node).name == "declare")


def collect(gm: fx.GraphModule, context: Context) -> PassResult:
    """Move what the graph's ``declare`` nodes say into a context, and erase them.

    A context without declarations keeps having none where the graph has none: then every site that
    is found is taken.

    Raises:
        ChainBrokenError: a declared parameter is gone.
    """
    nodes = list(declaration_nodes(gm.graph))
    if not nodes:
        return PassResult(gm, changed=False)
    declarations: dict[str, dict[str, Declaration]] = {}
    homes: set[int] = set()
    for node in nodes:
        tensors: Any = node.args[0]
        _, sites, its_homes = read_spec(str(node.args[1]))
        homes.update(its_homes)
        stack = stack_of(node)
        owner = identity_of(stack[-1][0]) if stack else ""
        remaining = list(tensors)
        for site in sites:
            own, remaining = remaining[: site.tensors], remaining[site.tensors :]
            if len(own) < site.tensors:
                raise ChainBrokenError(_gone(site, owner, context))
            declared = Declaration(site.name, site.chain, site.first, site.last, own)
            # A module may be called twice, or its forward by another one: it says the same again.
            declarations.setdefault(owner, {}).setdefault(site.name, declared)
        gm.graph.erase_node(node)
    context.declarations = {owner: list(group.values()) for owner, group in declarations.items()}
    context.homes |= homes
    return PassResult(gm, True, [f"{len(nodes)} declarations read"])


def _gone(site: DeclaredSite, owner: str, context: Context) -> str:
    path = next(iter(context.owners.get(owner, ())), "")
    return (
        f"The mHC parameters of site '{site.name}' of module '{path or '<root>'}' are gone: its "
        "`mhc` was deleted, or a part of it. Put it back, or call mhc_compile.revert and transform "
        "the model again."
    )
