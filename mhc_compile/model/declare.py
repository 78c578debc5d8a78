"""``mhc::declare``: how a traced module tells the backend which sites it owns.

The parameters of a site stand on the module that owns it; while Dynamo traces that module's
forward, the operator mentions them, and so they arrive in the captured graph as ordinary,
guarded inputs beside one node that the backend reads and erases. The operator has no result and
must never run: if it does, somebody else compiled the model and its residuals would be plain.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.library import custom_op

from .. import _torch
from ..config import Config
from ..errors import ChainBrokenError, NotCapturedError
from ..passes.context import Context, Declaration
from ..passes.sites.records import identity_of, stack_of

__all__ = ["DeclaredSite", "Spec", "collect", "declaration_nodes", "declare"]


@custom_op("mhc::declare", mutates_args=())
def declare(parameters: Sequence[Tensor], spec: str) -> None:
    """Mention the mHC parameters of one module call in the graph being traced."""
    raise NotCapturedError(
        "A model transformed by mhc_compile was compiled with a backend that does not know it, "
        "and would have run with plain residuals. Use torch.compile(model, backend='mhc') or "
        "model.compile(backend='mhc'), or call the model without compiling it. To leave mHC, call "
        "mhc_compile.revert(model)."
    )


@declare.register_fake
def _(parameters: Sequence[Tensor], spec: str) -> None:
    return None


_torch.register_effectful(torch.ops.mhc.declare.default)


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


@dataclass(frozen=True)
class Spec:
    """What a module declares: the configuration, its sites, the chains it is the home of."""

    config: Config
    sites: tuple[DeclaredSite, ...]
    homes: tuple[int, ...]

    def to_json(self) -> str:
        sites = [[s.name, s.chain, s.first, s.last, s.tensors] for s in self.sites]
        return json.dumps([self.config.to_json(), sites, list(self.homes)])

    @classmethod
    def from_json(cls, text: str) -> Spec:
        config, sites, homes = json.loads(text)
        return cls(Config.from_json(config), tuple(DeclaredSite(*s) for s in sites), tuple(homes))


def declaration_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The ``declare`` nodes of one graph (bodies of higher-order operators not included)."""
    known = (torch.ops.mhc.declare, torch.ops.mhc.declare.default)
    return (n for n in graph.nodes if n.op == "call_function" and n.target in known)


def collect(graph: fx.Graph, context: Context) -> int:
    """Move what the graph's ``declare`` nodes say into a context, and erase them; their number."""
    declarations: dict[str, dict[str, Declaration]] = {}
    homes: set[int] = set()
    nodes = list(declaration_nodes(graph))
    for node in nodes:
        tensors, text = node.args
        spec = Spec.from_json(str(text))
        homes.update(spec.homes)
        stack = stack_of(node)
        owner = identity_of(stack[-1][0]) if stack else ""
        remaining = list(tensors)  # type: ignore[arg-type]
        for site in spec.sites:
            own, remaining = remaining[: site.tensors], remaining[site.tensors :]
            if len(own) < site.tensors:
                path = next(iter(context.owners.get(owner, ())), "")
                raise ChainBrokenError(
                    f"The mHC parameters of site '{site.name}' of module '{path or '<root>'}' are "
                    "gone: its `mhc` was deleted, or a part of it. Put it back, or call "
                    "mhc_compile.revert and transform the model again."
                )
            declared = Declaration(site.name, site.chain, site.first, site.last, own)
            # A module may be called twice, or its forward by another one: it says the same again.
            declarations.setdefault(owner, {}).setdefault(site.name, declared)
        graph.erase_node(node)
    context.declarations = {owner: list(group.values()) for owner, group in declarations.items()}
    context.homes = frozenset(homes)
    return len(nodes)
