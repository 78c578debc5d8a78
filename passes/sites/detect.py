"""detect: the sites of a graph and the chains that they form.

    hidden_states_5 = hidden_states_0 + attn_output_4     site 0 of chain 0, branch self_attn
    hidden_states_9 = hidden_states_5 + down_proj         site 1 of chain 0, branch mlp
    q_embed = q * cos + rotate_half(q) * sin              rejected: the branch mixes neither ...

Residual adds are found (``find``), named (``names``) and linked (``chains``). Where modules have
declared their sites, those and no others are taken, and all of them must be there (``whole``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import fx

from ..context import Context, Declaration, Options, PassResult
from ..errors import ChainBrokenError
from .chains import Chain, link, revealed_axes
from .find import Finder, adds_in_control_flow, is_add
from .records import (
    Detection,
    Place,
    Reason,
    Rejected,
    ResidualAdd,
    Site,
    identity_of,
    location_of,
)
from .whole import Missing, require_declared, undeclared_on_streams

__all__ = ["detect", "every_add_has_one_reason"]


def detect(gm: fx.GraphModule, context: Context) -> PassResult:
    """Find every residual add; leaves the graph unchanged and ``context.detection`` set.

    Raises:
        ChainBrokenError: what was declared is not there as a whole.
    """
    found = context.detection = _detect(gm.graph, context)
    notes = [
        f"{len(found.sites)} sites in {len(found.chains)} chains, {len(found.rejected)} rejected"
    ]
    return PassResult(gm, changed=False, notes=notes)


def every_add_has_one_reason(gm: fx.GraphModule, context: Context) -> list[str]:
    """Each add of two tensors is a site or has one reason for being none; names are unique."""
    found = context.detection
    if found is None:
        return ["no detection"]
    rejected = [r for r in found.rejected if r.reason is not Reason.CONTROL_FLOW]
    seen = Counter([*(s.node for s in found.sites), *(r.node for r in rejected)])
    adds = filter(is_add, gm.graph.nodes)
    problems = [f"{n.name} is counted {k} times" for n, k in seen.items() if k > 1]
    problems += [f"{n.name} was not looked at" for n in adds if not seen[n]]
    names = Counter(site.name for site in found.sites)
    return problems + [f"{k} sites are called {name}" for name, k in names.items() if k > 1]


def _detect(graph: fx.Graph, context: Context) -> Detection:
    """What was declared and is not found may be ablated: then a constant stands for its branch."""
    try:
        return _look(graph, context)
    except Missing as missing:
        with suppress(ChainBrokenError, Missing):
            return _look(graph, context, ablated=missing.sites)
        raise ChainBrokenError(str(missing)) from None


def _look(
    graph: fx.Graph, context: Context, ablated: frozenset[tuple[str, str]] = frozenset()
) -> Detection:
    finder = Finder(graph, context, ablated).run()
    places = finder.names.of_adds(finder.found, finder.rejected)
    revealed = revealed_axes(finder.flow, finder.found)
    _reject_shared_branches(finder)
    declared = _keep_declared(finder, places, context)
    chains = link(finder, revealed, alone=context.declarations is not None)
    sites = [_sites_of(c, i, places, declared, context) for i, c in enumerate(chains)]
    ordered = sorted((s for chain in sites for s in chain), key=lambda s: finder.flow.index[s.node])
    if context.declarations is not None:
        _refuse_undeclared(graph, finder, sites, places, context)
        require_declared(finder, sites, declared, places, context)
    return Detection(ordered, _rejected(finder, places), sites, finder.up)


def _reject_shared_branches(finder: Finder) -> None:
    """Two branches that read one state through one operation cannot have an input each."""
    readers: dict[fx.Node, list[tuple[ResidualAdd, set[fx.Node]]]] = {}
    for node, add in list(finder.found.items()):
        region = finder.flow.region(add.x, add.branch)
        users = {u for u in finder.flow.readers(add.x) if u in region}
        for other, theirs in readers.get(add.x, []):
            nested = other.node in region
            if users & theirs and not nested:
                finder.forget(node, Reason.SHARED_BRANCH)
                break
        else:
            readers.setdefault(add.x, []).append((add, users))


def _keep_declared(
    finder: Finder, places: Mapping[fx.Node, Place], context: Context
) -> dict[fx.Node, Declaration]:
    """What is declared of each add; whether one is taken was decided once, by ``transform``."""
    if context.declarations is None:
        return {}
    found: dict[fx.Node, Declaration] = {}
    for node in list(finder.found):
        place = places[node]
        of_owner = context.declarations.get(identity_of(place.owner_key), ())
        declared = next((d for d in of_owner if d.name == place.branch_name), None)
        if declared is None:
            finder.forget(node, Reason.UNDECLARED)
        else:
            found[node] = declared
    finder.relink()
    return found


def _sites_of(
    chain: Chain,
    number: int,
    places: Mapping[fx.Node, Place],
    declared: Mapping[fx.Node, Declaration],
    context: Context,
) -> list[Site]:
    """The adds of a chain with all that is known of them."""
    sites = []
    for position, (add, axes) in enumerate(zip(chain.adds, chain.axes, strict=True)):
        place, own = places[add.node], declared.get(add.node)
        parameters = () if own is None else tuple(own.parameters)
        excluded = _is_excluded(place, context.options) if own is None else not parameters
        sites.append(
            Site(
                **vars(add),
                place=place,
                previous=chain.previous[position],
                channel_in=axes.of_x,
                channel=axes.of_z,
                width=axes.width,
                chain=number if own is None else own.chain,
                position=position,
                length=len(chain.adds),
                linear=chain.linear,
                excluded=excluded,
                parameters=parameters,
            )
        )
    return sites


def _is_excluded(place: Place, options: Options) -> bool:
    included = any(fnmatchcase(place.name, p) for p in options.include)
    return not included or any(fnmatchcase(place.name, p) for p in options.exclude)


def _rejected(finder: Finder, places: Mapping[fx.Node, Place]) -> list[Rejected]:
    found = [Rejected(node, reason, places[node]) for node, reason in finder.rejected.items()]
    found.sort(key=lambda r: finder.flow.index[r.node])
    for body, add in adds_in_control_flow(finder.flow.order):
        place = Place(branch_name=add.name, location=location_of(add))
        found.append(Rejected(body, Reason.CONTROL_FLOW, place))
    return found


def _refuse_undeclared(
    graph: fx.Graph,
    finder: Finder,
    chains: Sequence[Sequence[Site]],
    places: Mapping[fx.Node, Place],
    context: Context,
) -> None:
    """No residual add on declared streams, or in the place of a whole chain, may be plain.

    What the example inputs did not show is an error; what was seen then and left out is not.
    """
    if not (on_streams := undeclared_on_streams(finder, chains, context)):
        return
    as_new = _look(graph, replace(context, declarations=None, homes=frozenset()))
    accepted = {site.node for site in as_new.sites}
    if new := [places[node] for node in on_streams if node in accepted]:
        raise ChainBrokenError(_foreign(new, context.broken_at))


def _foreign(adds: Sequence[Place], broken: str | None) -> str:
    named = ", ".join([f"'{a.name}' ({a.location})" for a in adds[:4]])
    cause = (
        f"The capture was broken at {broken}, and the modules that own them are not seen whole: "
        "remove that graph break."
        if broken
        else "A submodule was exchanged or added since, its forward was replaced, or this call "
        "takes another path: call mhc_compile.revert and transform again, with example inputs that "
        "take it. Or a graph break was removed since an earlier call, on which Dynamo gave up for "
        "good: call torch._dynamo.reset()."
    )
    return (
        f"Residual adds among those of this model were no sites when it was transformed, and "
        f"would be plain: {named}. {cause}"
    )
