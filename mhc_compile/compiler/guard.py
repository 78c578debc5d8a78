"""The last word on a captured graph: every declared site whose branch ran is n-stream, or an error.

``declare``, ``collect`` and ``detect`` tie the sites of a model to the adds in a graph, by what
Dynamo says of modules. Should that tie ever break, for whatever reason, plain residuals would be
trained in silence. So this is asked without it, from the parameters alone:

    alive   a site whose φ the rewritten graph reads
    ran     a site whose *witness*, a weight of its branch, is applied in the graph

A site that ran and is not alive is lost. A layer that was skipped did not apply its weights. What
a branch without weights did cannot be told from weights; then an undeclared residual add in its
owner tells. And a site must apply its own witness, or its parameters are another site's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..errors import ChainBrokenError
from ..model.connection import Connection, Connections
from ..model.swap import is_swapped
from ..passes.context import Context
from ..passes.graph.dataflow import DataFlow
from ..passes.graph.operators import Kind, holds_tensor, op_of
from ..passes.sites.records import Detection, Reason, Rejected, Site

__all__ = [
    "Sites",
    "Witness",
    "require_alive",
    "require_own_branches",
    "undeclared_in",
    "witnesses",
]


@dataclass(frozen=True)
class Witness:
    """A weight by which a site's branch is known.

    Attributes:
        module, name: where it stands; the tensor may be another at each call (``functional_call``).
        uses: how many operations of the model applied it when the model was transformed.
        sites: how many sites' branches did (more than one where layers share weights).
    """

    module: nn.Module
    name: str
    uses: int
    sites: int

    @property
    def weight(self) -> Any:
        """The tensor as it is now, None if the module has lost it."""
        return self.module._parameters.get(self.name, self.module.__dict__.get(self.name))

    def alive_of(self, uses: int) -> int:
        """How many of the sites ran in a graph with so many uses."""
        return min(self.sites, uses * self.sites // self.uses)


# --- when a model is transformed -------------------------------------------------------------


def witnesses(
    model: nn.Module, graph: fx.Graph, inputs: Sequence[Any], detection: Detection
) -> dict[Site, Witness]:
    """A witness of each site whose branch applies a weight, if possible one of its own.

    Args:
        graph: the examined graph of the plain model, on which ``detection`` was made.
        inputs: the values of its placeholders, real parameters among them.
    """
    places = {id(p): (m, name) for m in model.modules() for name, p in m._parameters.items()}
    values = _placeholders(graph, inputs)
    known = {node: places[id(v)] for node, v in values.items() if id(v) in places}
    applied = _applied(graph, set(known))
    flow = DataFlow(graph)
    of_site = {s: _weights_within(flow, s, applied) for s in detection.sites}
    uses = _count(applied.values())
    sites = _count(of_site.values())
    found: dict[Site, Witness] = {}
    for site, weights in of_site.items():
        if weights:
            best = min(weights, key=lambda w: (sites[w], uses[w], flow.index[w]))
            found[site] = Witness(*known[best], uses[best], sites[best])
    return found


def _placeholders(graph: fx.Graph, inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    return dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))


def _applied(graph: fx.Graph, weights: set[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """From each operation that applies weights to activations to these weights.

    A weight may be reshaped, cast or reparametrised first: what is computed from weights alone
    stands for them. Bodies of higher-order operators count as one operation.
    """
    standing_for = {w: frozenset({w}) for w in weights}
    applied: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in standing_for:
            continue
        inputs = [i for i in node.all_input_nodes if holds_tensor(i)]
        found = frozenset[fx.Node]().union(*[standing_for.get(i, ()) for i in inputs])
        if not found:
            continue
        if _calls_a_body(node):
            applied[node] = found
        elif standing_for.keys() >= set(inputs):
            standing_for[node] = found
        elif op_of(node).kind is Kind.MIXING:
            applied[node] = found
    return applied


def _calls_a_body(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    return any(
        i.op == "get_attr" and isinstance(getattr(owner, str(i.target), None), fx.GraphModule)
        for i in node.all_input_nodes
    )


def _weights_within(
    flow: DataFlow, site: Site, applied: Mapping[fx.Node, frozenset[fx.Node]]
) -> frozenset[fx.Node]:
    region = flow.region(site.x, site.branch)
    within = [applied[n] for n in region if n in applied and flow.depends(n, site.x)]
    return frozenset[fx.Node]().union(*within)


def _count(groups: Iterable[Iterable[fx.Node]]) -> dict[fx.Node, int]:
    counted: dict[fx.Node, int] = {}
    for group in groups:
        for node in group:
            counted[node] = counted.get(node, 0) + 1
    return counted


# --- when a call is captured -----------------------------------------------------------------


@dataclass(eq=False)
class Declared:
    """A site that a module of the model has parameters for.

    Attributes:
        name, owner: paths in the model.
    """

    name: str
    owner: str
    connection: Connection
    phi: fx.Node | None = None
    weight: fx.Node | None = None

    @property
    def can_tell(self) -> bool:
        """Whether its witness still says whether it ran."""
        witness = self.connection.witness
        return witness is not None and witness.weight is not None


@dataclass
class Sites:
    """The declared sites of some models, tied to a graph by the tensors that it is given.

    Attributes:
        parameters: the placeholders, by name, of all parameters that the models have.
    """

    roots: Sequence[nn.Module]
    declared: list[Declared] = field(default_factory=list)
    parameters: frozenset[str] = frozenset()

    @classmethod
    def of(cls, roots: Sequence[nn.Module], graph: fx.Graph, inputs: Sequence[Any]) -> Sites:
        nodes = {id(v): n for n, v in _placeholders(graph, inputs).items() if isinstance(v, Tensor)}
        found: dict[int, Declared] = {}
        for root in roots:
            for owner, module in root.named_modules():
                for key, copies in _copies(module).items():
                    used = next((c for c in copies if id(c.phi) in nodes), copies[0])
                    name = f"{owner}.{key}" if owner else key
                    declared = Declared(name, owner, used, nodes.get(id(used.phi)))
                    if declared.can_tell:
                        declared.weight = nodes.get(id(used.witness.weight))
                    found.setdefault(id(copies[0]), declared)
        held = (p for root in roots for m in root.modules() for p in m._parameters.values())
        parameters = frozenset(nodes[id(p)].name for p in held if id(p) in nodes)
        return cls(roots, list(found.values()), parameters)

    def applied_in(self, graph: fx.Graph) -> dict[fx.Node, frozenset[fx.Node]]:
        """Which weights each operation applies, as when the witnesses were chosen.

        Of all parameters: a witness may be reparametrised together with others (weight_norm).
        """
        nodes = graph.find_nodes(op="placeholder")
        return _applied(graph, {n for n in nodes if n.name in self.parameters})


def _copies(owner: nn.Module) -> dict[str, list[Connection]]:
    """The connections that a module owns, by name: one each, or several of which one is used.

    PEFT's `modules_to_save` keeps the container of the model and one more for each adapter.
    """
    found: dict[str, list[Connection]] = {}
    held = owner._modules.get("mhc")
    within = list(held.modules()) if held is not None else []
    if any(is_swapped(m) for m in within):  # a module that calls a transformed model its `mhc`
        return {}
    for container in within:
        if isinstance(container, Connections):
            for key, part in container._modules.items():
                if isinstance(part, Connection):
                    found.setdefault(key, []).append(part)
    return found


def require_own_branches(sites: Sites, gm: fx.GraphModule, context: Context) -> None:
    """Every site that was found has the parameters of the branch that it applies.

    Args:
        gm: the graph on which ``context.detection`` was just made, before it is rewritten.

    Raises:
        ChainBrokenError: a site would be given the parameters of another.
    """
    detection = context.detection
    by_phi = {d.phi.name: d for d in sites.declared if d.phi is not None}
    nodes = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    applied = sites.applied_in(gm.graph)
    flow = DataFlow(gm.graph)
    for site in detection.sites if detection is not None else ():
        declared = by_phi.get(site.parameters[0].name) if site.parameters else None
        if declared is None or declared.weight is None:
            continue
        own = nodes[declared.weight.name]
        if not site.ablated and own not in _weights_within(flow, site, applied):
            raise ChainBrokenError(
                f"The residual add at {site.location} in module '{site.owner or '<root>'}' was "
                f"about to be given the parameters of '{declared.name}', whose branch it does not "
                f"compute. {_WAY_OUT} Nothing was computed."
            )


def require_alive(
    sites: Sites,
    gm: fx.GraphModule,
    undeclared: Callable[[], Sequence[Rejected]],
    broken_at: str | None = None,
) -> None:
    """Every declared site whose branch ran is n-stream in the rewritten graph.

    Args:
        gm: the graph that is going to run.
        undeclared: finds the residual adds in it that no module declared.
        broken_at: where and why its capture ended early, if it did.

    Raises:
        ChainBrokenError: names the sites, and the adds that stand where they should be.
    """
    nodes = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    dead, alive = [], dict[fx.Node | None, int]()  # how many are alive with a witness
    for site in sites.declared:
        if site.phi is None or not nodes[site.phi.name].users:
            dead.append(site)
        else:
            alive[site.weight] = alive.get(site.weight, 0) + 1
    if not dead:
        return
    uses = _count(sites.applied_in(gm.graph).values())
    lost = []
    for site in dead:
        witness = site.connection.witness
        if witness is None or not site.can_tell:
            ran = any(add.owner in ("", site.owner) for add in undeclared())
        elif site.weight is None:
            ran = False
        else:
            used = uses.get(nodes[site.weight.name], 0)
            ran = alive.get(site.weight, 0) < witness.alive_of(used)
        if ran:
            lost.append(site)
    if lost:
        raise ChainBrokenError(_lost(sites, lost, undeclared(), broken_at))


def _lost(
    sites: Sites, lost: Sequence[Declared], undeclared: Sequence[Rejected], broken_at: str | None
) -> str:
    names = ", ".join([f"'{d.name}'" for d in lost[:4]] + ["..."] * (len(lost) > 4))
    whose = " and ".join(type(root).__name__ for root in sites.roots)
    adds = [f"{a.location or a.node.name} in '{a.owner or '<root>'}'" for a in undeclared[:4]]
    there = (
        f" Residual adds that no module declares stand in the graph: {', '.join(adds)}."
        if adds
        else " Their residual adds were not found in the graph."
    )
    why = _BROKEN.format(broken_at) if broken_at else _WAY_OUT
    return (
        f"{len(lost)} declared site(s) of {whose} ran in this call, and would have computed plain "
        f"residuals: {names}.{there} {why} Nothing was computed."
    )


_WAY_OUT = (
    "This call takes another path through the model than the one that was transformed: the forward "
    "of a module was replaced, a hook replaces what passes through it, a submodule was exchanged, "
    "or the adds are reached in another way. Put that in place before mhc_compile.transform, or "
    "call mhc_compile.revert and transform again."
)
_BROKEN = (
    "Dynamo broke the graph at {}, so that no graph holds the residual stream whole: no print, "
    ".item() or other graph break may stand between residual adds (TORCH_LOGS=graph_breaks shows "
    "them). Layers that are dropped at random in training are such: set layerdrop=0, or write "
    "x + mask * F(x)."
)


def undeclared_in(detection: Detection | None) -> list[Rejected]:
    """What detection found and no module had declared."""
    found = [] if detection is None else detection.rejected
    return [r for r in found if r.reason is Reason.UNDECLARED]
