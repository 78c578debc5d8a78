"""detect: the residual adds of a graph and the chains that they form, by data flow alone.

    hidden_states_5 = hidden_states_0 + attn_output_4     site 0 of chain 0, branch self_attn
    hidden_states_9 = hidden_states_5 + down_proj         site 1 of chain 0, branch mlp
    q_embed = q * cos + rotate_half(q) * sin              rejected: the branch mixes neither ...

Note [What is a site]
    z = s + f_1 + f_2 + ... is residual if s comes from a state x through *stream-wise*
    operations (each acts on one stream alone: casts, dropout, scaling, activations, norms over
    the channels, views) and some f is computed from x through *real computation* (something
    that mixes channels or tokens). The sum may be associated in any way; x is the nearest such
    state, and of several candidates the earliest. Sites whose x comes stream-wise from an
    earlier site's z form a chain. (Definition of the residual stream in arXiv:2512.24880, eq. 1,
    extended to post-norm and parallel branches.)

    A term computed from x that is a later state of its stream makes the sum one of two states. A
    weight may be the first state of a stream (learned queries, z = q + f(q)), but not once it was
    added to another: a position embedding in a block that runs twice would be taken for a stream,
    because the second time all that it is added to was computed from it.

Note [Linear time]
    All questions about reachability are local (see ``dataflow._Reach``): the cost of a site is
    that of its neighbourhood, so a model of 1,000 layers costs 1,000 times one layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise

import networkx as nx
import torch
from torch import fx

from ..context import Context, Declaration, PassResult
from ..errors import ChainBrokenError
from ..graph.dataflow import DataFlow, is_mutation, written
from ..graph.modes import Modes
from ..graph.operators import (
    Kind,
    hooked_tensor,
    is_float_tensor,
    op_name,
    op_of,
    same_shape,
    shape_of,
    value_of,
)
from ..graph.streamwise import is_linear, streamwise_operands
from .channel_axis import channel_axis, set_axes
from .records import Detection, Reason, Rejected, Site, identity_of, location_of, stack_of

__all__ = ["detect", "every_add_has_one_reason"]


def detect(gm: fx.GraphModule, context: Context) -> PassResult:
    """Find every residual add; leaves the graph unchanged and ``context.detection`` set."""
    found = context.detection = _find(gm.graph, context)
    notes = [
        f"{len(found.sites)} sites in {len(found.chains)} chains, {len(found.rejected)} rejected"
    ]
    return PassResult(gm, changed=False, notes=notes)


def every_add_has_one_reason(gm: fx.GraphModule, context: Context) -> list[str]:
    """Each add of two tensors is a site or has one reason for being none; names are unique."""
    found = context.detection
    if found is None:
        return ["no detection"]
    taken = [site.node for site in found.sites]
    seen = Counter(
        [*taken, *(r.node for r in found.rejected if r.reason is not Reason.CONTROL_FLOW)]
    )
    problems = [f"{n.name} is counted {k} times" for n, k in seen.items() if k > 1]
    problems += [
        f"{n.name} was not looked at" for n in gm.graph.nodes if _is_add(n) and not seen[n]
    ]
    names = Counter(site.name for site in found.sites)
    return problems + [f"{k} sites are called {name}" for name, k in names.items() if k > 1]


def _find(graph: fx.Graph, context: Context) -> Detection:
    detector = _Detector(graph, context)
    try:
        return detector.run()
    except ChainBrokenError:
        if detector.missing:
            with suppress(ChainBrokenError):
                return _Detector(graph, context, ablated=detector.missing).run()
        raise


class _Detector:
    """One look at a graph.

    Args:
        ablated: identity of the owner and name of declared sites that were not found without it:
            the constant that a hook put in the place of such a branch's result is one, too.
    """

    def __init__(
        self, graph: fx.Graph, context: Context, ablated: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        self.graph, self.context, self.ablated = graph, context, ablated
        self.missing: frozenset[tuple[str, str]] = frozenset()
        self.flow = DataFlow(graph)
        self.modes = Modes(graph, context.grad_enabled)
        self.written = written(graph)
        # What was declared is a site in every graph, whatever that graph returns.
        self.used = self.flow.used() if context.declarations is None else set(self.flow.order)
        self.up: dict[fx.Node, fx.Node] = {}
        self.carriers: dict[fx.Node, list[fx.Node]] = {}  # the operands that ``up`` can lead to
        self.base: dict[fx.Node, fx.Node] = {}
        self.sites: dict[fx.Node, Site] = {}
        self.terms: dict[fx.Node, list[fx.Node]] = {}
        self.positions: set[fx.Node] = set()  # weights that were added to a stream
        self.rejected: dict[fx.Node, Rejected] = {}
        self.undeclared: list[Site] = []  # found in this call, but not when it was transformed

    def run(self) -> Detection:
        for node in self.flow.order:
            if _is_add(node):
                self._visit_add(node)
            if node not in self.sites:
                self._visit_streamwise(node)
        self._name()
        self._reject_shared_branches()
        self._keep_declared()
        chains = self._chains()
        self._mark_excluded()
        self._check_declared(chains)
        ordered = sorted(self.sites.values(), key=lambda s: self.flow.index[s.node])
        rejected = sorted(self.rejected.values(), key=lambda r: self.flow.index[r.node])
        return Detection(ordered, rejected + _in_control_flow(self.flow.order), chains, self.up)

    # --- one node at a time, in the order of the graph ---

    def _visit_streamwise(self, node: fx.Node) -> None:
        """Note from which operand a node carries streams, and where those begin."""
        self.base[node] = node
        if not is_float_tensor(node) or node in self.written or self._is_recurrent(node):
            return
        candidates = streamwise_operands(node)
        if not candidates:
            return
        hooked = hooked_tensor(node) is not None  # it is read by way of its hooks
        free = [
            u
            for u in candidates
            if u in self.base
            and not any(
                self.flow.depends(o, self.base[u]) and not self._is_global(o, self.base[u])
                for o in self.flow.inputs(node)
                if o is not u and not hooked
            )
        ]
        activations = [u for u in free if not self._is_weight(self.base[u])]
        if activations and node in self.used:
            self.positions.update(self.base[u] for u in free if u not in activations)
        carriers = activations or free
        if carriers:
            operand = max(carriers, key=self._looks_like_a_stream)
            self.carriers[node] = carriers
            self.up[node] = operand
            self.base[node] = self.base[operand]

    def _looks_like_a_stream(self, node: fx.Node) -> tuple[bool, bool]:
        """Of ``gate * x`` the stream is what comes from a site, or what others read too."""
        return self.base[node] in self.sites, len(node.users) > 1

    def _is_weight(self, node: fx.Node) -> bool:
        return node.name in self.context.trainable

    def _is_global(self, node: fx.Node, base: fx.Node) -> bool:
        """Whether a scalar is a reduction over the whole stream (``isinf(x).any()``).

        It is computed once, over all streams, so it does not tie the streams together.
        """
        return is_reduction_of(self.flow, node, base)

    def _visit_add(self, node: fx.Node) -> None:
        if is_mutation(node) or "out" in node.kwargs:
            self._reject(node, Reason.IN_PLACE)
            return
        a, b = _operands(node)
        if not (same_shape(a, node) and same_shape(b, node)):
            self._reject(node, Reason.BROADCAST)
            return
        if node not in self.used:
            self._reject(node, Reason.UNUSED)
            return
        terms, adds = self._gather_terms(node)
        self.terms[node] = terms
        choice = self._find_skip(terms)
        ablated = isinstance(choice, Reason) and self._find_ablated(node, terms)
        choice = ablated or choice
        if isinstance(choice, Reason):
            self._reject(node, choice)
            return
        skip, x, path = choice
        if not self._in_one_mode(x, adds):
            for add in adds:
                self.sites.pop(add, None)
                self._reject(add, Reason.MODE)
            return
        branch = [t for t in terms if t is not skip]
        self._go_along([*path, x])
        self.base[node] = node
        self.sites[node] = Site(node, x, skip, path, branch, adds, ablated=bool(ablated))
        for inner in adds[:-1]:
            self.sites.pop(inner, None)
            self._reject(inner, Reason.PART_OF_SITE)

    def _in_one_mode(self, x: fx.Node, adds: list[fx.Node]) -> bool:
        """Whether a connection can take the place of some adds on what is recorded of them.

        Its coefficients are computed where x is, or anywhere between x and the sum.
        """
        summed = {(m.grad, m.others) for m in map(self.modes.of, adds)}
        return len(summed) == 1 and self.modes.of(x).others == self.modes.of(adds[0]).others

    def _gather_terms(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
        """The terms of the sum that ends in ``node``, in order, and its adds (``node`` last)."""
        terms: list[fx.Node] = []
        adds: list[fx.Node] = []
        pending: list[tuple[fx.Node, list[fx.Node]]] = [(node, [])]  # a term, what stands beside
        while pending:
            term, beside = pending.pop()
            if term is not node and not self._merges(term, beside):
                terms.append(term)
                continue
            adds.append(term)
            a, b = _operands(term)
            pending += [(b, [*beside, a]), (a, [*beside, b])]
        return terms, sorted(adds, key=self.flow.index.__getitem__)

    def _merges(self, inner: fx.Node, beside: list[fx.Node]) -> bool:
        """Whether a term is an add that is a part of the sum, not a site of another stream."""
        used_once = len(inner.users) == 1 and inner not in beside
        if inner not in self.terms or not used_once:
            return False
        site = self.sites.get(inner)
        return site is None or any(self.flow.computes_from(t, site.x) for t in beside)

    def _find_skip(self, terms: list[fx.Node]) -> tuple[fx.Node, fx.Node, list[fx.Node]] | Reason:
        """The term that carries the stream, x, and the path between them; or why there is none."""
        found: list[tuple[int, fx.Node, fx.Node, list[fx.Node]]] = []
        reason = Reason.INDEPENDENT
        for skip in dict.fromkeys(terms):
            others = [t for t in terms if t is not skip]
            for way in self._ways(skip):
                first = way[-1]
                if first in self.positions or not any(self.flow.depends(t, first) for t in others):
                    continue
                reason = Reason.POINTWISE_BRANCH
                for position, state in enumerate(way):
                    computed = [t for t in others if self.flow.computes_from(t, state)]
                    if not computed:
                        continue
                    problem = self._not_a_branch(state, computed)
                    if problem is None:
                        found.append((self.flow.index[state], skip, state, way[:position]))
                    else:
                        reason = problem
                    break
        if not found:
            return reason if reason is not Reason.INDEPENDENT else self._why_not(terms)
        _, skip, x, path = min(found, key=lambda f: f[0])
        return skip, x, path

    def _find_ablated(
        self, node: fx.Node, terms: list[fx.Node]
    ) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
        """The skip of a declared add whose branch a hook replaced by a constant, if it is one."""
        key, _ = self._owner_of(node)
        if not self.ablated or len(terms) != 2 or self._child_within(node, key):
            return None
        for skip, branch in (terms, terms[::-1]):
            made = self.base.get(branch, branch)
            name = self._child_within(made, key)
            if _is_constant(made) and (identity_of(key), name) in self.ablated:
                return skip, skip, []
        return None

    def _ways(self, skip: fx.Node) -> Iterator[list[fx.Node]]:
        """The stream-wise ways back from a term, that along ``up`` first."""
        seen: set[fx.Node] = set()
        pending = [[skip]]
        while pending:
            way = pending.pop()
            if way[-1] in seen:
                continue
            while True:
                last = way[-1]
                seen.add(last)
                up = self.up.get(last)
                others = [u for u in self.carriers.get(last, ()) if u is not up and u not in seen]
                pending += [[*way, other] for other in others]
                if up is None or up in seen:
                    break
                way.append(up)
            yield way

    def _go_along(self, way: list[fx.Node]) -> None:
        """Let the streams take this way, where an operation could carry those of two operands."""
        for node, operand in reversed(list(pairwise(way))):
            self.up[node] = operand
            self.base[node] = self.base[operand]

    def _not_a_branch(self, x: fx.Node, computed: list[fx.Node]) -> Reason | None:
        if any(self._is_later_state(t, x) for t in computed):
            return Reason.SUM_OF_STATES
        base = self.base.get(x, x)
        begins = _is_constant(base) or self._is_recurrent(base)
        if begins and not self._is_learned(x, computed):
            return Reason.RECURRENT_STATE
        return None

    def _is_recurrent(self, node: fx.Node) -> bool:
        record = self.rejected.get(node)
        return record is not None and record.reason is Reason.RECURRENT_STATE

    def _is_later_state(self, node: fx.Node, x: fx.Node) -> bool:
        """Whether x reaches a node along its stream: through stream-wise steps and skips only."""
        first = self.flow.index[x]
        seen: set[fx.Node] = set()
        pending = [node]
        while pending:
            state = pending.pop()
            if state is x:
                return True
            if state in seen or self.flow.index[state] < first:
                continue
            seen.add(state)
            site = self.sites.get(state)
            pending += [site.skip] if site is not None else self.carriers.get(state, [])
        return False

    def _is_learned(self, x: fx.Node, terms: list[fx.Node]) -> bool:
        region = [n for n in self.flow.region(x, terms) if self.flow.depends(n, x)]
        return any(self._is_weight(i) for n in region for i in n.all_input_nodes)

    def _why_not(self, terms: list[fx.Node]) -> Reason:
        """Tell a transformed skip from operands that have nothing to do with each other."""
        if any(self._is_weight(self.base[t]) for t in terms):
            return Reason.WEIGHT
        for skip in terms:
            others = [t for t in terms if t is not skip]
            state = skip
            while state in self.up:
                if self._shares_stream(self._activations(state), others, but=self.up[state]):
                    return Reason.GATED_SKIP
                state = self.up[state]
            mixes = False
            while True:  # back through what was done to the skip: a convolution, its norm
                mixes = mixes or op_of(state).kind is Kind.MIXING
                sources = self._activations(state)
                if self._shares_stream(sources, others):
                    return Reason.PROJECTED_SKIP if mixes else Reason.GATED_SKIP
                if len(sources) != 1 or op_of(state).kind is Kind.MIXING:
                    break
                state = self.base.get(sources[0], sources[0])
        return Reason.INDEPENDENT

    def _activations(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that are neither learned nor statistics: of the node's rank."""
        return [
            source
            for source in self.flow.inputs(node)
            if is_float_tensor(source)
            and not self._is_weight(source)
            and len(shape_of(source)) == len(shape_of(node))
        ]

    def _shares_stream(
        self, sources: list[fx.Node], terms: list[fx.Node], but: fx.Node | None = None
    ) -> bool:
        """Whether some term is computed from the state that one of the sources comes from."""
        states = [self.base.get(s, s) for s in sources if s is not but]
        return any(self.flow.computes_from(t, state) for state in states for t in terms)

    def _reject(self, node: fx.Node, reason: Reason) -> None:
        self.base[node] = node
        self.rejected[node] = Rejected(node, reason, location=location_of(node))

    # --- names -------------------------------------------------------------------------------

    def _name(self) -> None:
        """Owner and branch of every add; a repeat in the same owner gets ``_1``, ``_2``."""
        seen: dict[tuple[str, str], int] = {}
        taken: dict[str, set[str]] = {}
        for node in self.flow.order:
            site = self.sites.get(node)
            if site is not None:
                key, path = self._owner_of(node)
                region = self.flow.region(site.x, site.branch)
                branch = self._branch_name(key, path, region)
                owner_id = identity_of(key)
                number = seen.get((owner_id, branch), 0)
                seen[owner_id, branch] = number + 1
                name = branch if number == 0 else f"{branch}_{number}"
                while name in taken.setdefault(owner_id, set()):
                    name += "_"
                taken[owner_id].add(name)
                site.owner, site.owner_key, site.branch_name = path, key, name
                site.location = location_of(node)
            elif node in self.rejected:
                record = self.rejected[node]
                record.owner = self._owner_of(node)[1]
                record.branch_name = node.name
        for site in self.sites.values():
            site.revealed = channel_axis(self.flow, site)

    def _owner_of(self, node: fx.Node) -> tuple[str, str]:
        """(stack key, path) of the innermost module call that can own parameters."""
        known = self.context.owners
        for key, _ in reversed(stack_of(node)):
            if paths := known.get(identity_of(key)):
                return key, paths[0]
        return "", ""

    def _child_within(self, node: fx.Node, owner_key: str) -> str:
        """Name of the module called directly by the owner's forward, "" if there is none."""
        calls = stack_of(node)
        keys = ["", *(key for key, _ in calls)]  # "": the root of the capture
        if owner_key not in keys or keys.index(owner_key) == len(calls):
            return ""
        position = keys.index(owner_key)
        key, text = calls[position]
        name = self._held_as(identity_of(owner_key), identity_of(key))
        if name is None:  # not registered with its owner: as the code calls it
            prefix = f"{calls[position - 1][1]}." if position else ""
            name = text[len(prefix) :] if text.startswith(prefix) else text.rsplit(".", 1)[-1]
        return name.replace(".", "_").replace("[", "_").replace("]", "").replace("'", "")

    def _held_as(self, owner: str, child: str) -> str | None:
        """The path of a module within another one, however the code reaches it."""
        known = self.context.owners
        above = [f"{path}." if path else "" for path in known.get(owner, ("",))]
        return next(
            (
                path[len(prefix) :]
                for path in known.get(child, ())
                for prefix in above
                if path.startswith(prefix)
            ),
            None,
        )

    def _branch_name(self, key: str, owner: str, region: set[fx.Node]) -> str:
        ordered = sorted(region, key=self.flow.index.__getitem__)
        mixing = [n for n in ordered if op_of(n).kind is Kind.MIXING]
        for node in mixing:
            child = self._child_within(node, key)
            if child:
                return child
        for node in filter(_is_constant, ordered) if self.ablated and not mixing else ():
            return self._child_within(node, key) or "branch"
        for node in mixing:
            for source in node.all_input_nodes:
                if self._is_weight(source):
                    return _last_name(source)
        return op_name(mixing[0]) if mixing else "branch"

    # --- what is taken -------------------------------------------------------------------------

    def _demote(self, site: Site, reason: Reason) -> None:
        del self.sites[site.node]
        self.rejected[site.node] = Rejected(
            site.node, reason, site.owner, site.branch_name, site.location, site.width
        )

    def _reject_shared_branches(self) -> None:
        """Two branches that read one state through one operation cannot have an input each."""
        readers: dict[fx.Node, list[tuple[Site, set[fx.Node]]]] = {}
        for site in list(self.sites.values()):
            region = self.flow.region(site.x, site.branch)
            users = {u for u in self.flow.readers(site.x) if u in region}
            for other, theirs in readers.get(site.x, []):
                nested = other.node in region
                if users & theirs and not nested:
                    self._demote(site, Reason.SHARED_BRANCH)
                    break
            else:
                readers.setdefault(site.x, []).append((site, users))

    def _keep_declared(self) -> None:
        """Whether a site is taken was decided once, when the model was transformed."""
        if self.context.declarations is None:
            return
        for site in list(self.sites.values()):
            declared = self._declaration_of(site)
            if declared is None:
                self.undeclared.append(site)
                self._demote(site, Reason.UNDECLARED)
            else:
                site.parameters = declared.parameters
                site.chain = declared.chain
        self._relink()

    def _declaration_of(self, site: Site) -> Declaration | None:
        declarations = self.context.declarations or {}
        declared = declarations.get(identity_of(site.owner_key), ())
        return next((d for d in declared if d.name == site.branch_name), None)

    def _relink(self) -> None:
        """A demoted add may still pass streams on (``x + c``): look at it again as such."""
        for node in self.flow.order:
            if _is_add(node) and node in self.rejected and node not in self.sites:
                if self.rejected[node].reason is Reason.UNDECLARED:
                    self.base[node] = node
            elif node in self.up:
                self.base[node] = self.base[self.up[node]]

    def _chains(self) -> list[list[Site]]:
        """Link sites by their streams; drop chains of one unless they are declared."""
        links = nx.Graph()
        inside = self._first_in_branch()
        for site in self.sites.values():
            links.add_node(site.node)
            if site not in inside:
                site.previous = self.sites.get(self.base.get(site.x, site.x))
            if site.previous is not None:
                links.add_edge(site.previous.node, site.node)
        index = self.flow.index
        components = [sorted(c, key=index.__getitem__) for c in nx.connected_components(links)]
        chains: list[list[Site]] = []
        for component in sorted(components, key=lambda c: index[c[0]]):
            chain = [self.sites[n] for n in component]
            if len(chain) == 1 and self.context.declarations is None:
                self._demote(chain[0], Reason.CHAIN_OF_ONE)
                continue
            if self._describe_chain(chain, number=len(chains)):
                chains.append(chain)
            else:
                for site in chain:
                    self._demote(site, Reason.LAYOUT)
        return chains

    def _first_in_branch(self) -> set[Site]:
        """Sites whose stream enters the branch of another site: there a new chain begins."""
        inside: set[Site] = set()
        for outer in self.sites.values():
            for node in self.flow.region(outer.x, outer.branch):
                site = self.sites.get(node)
                state = site.x if site is not None else None
                while site is not None and state is not None:
                    if state is outer.x:
                        inside.add(site)
                    state = self.up.get(state)
        return inside

    def _describe_chain(self, chain: list[Site], number: int) -> bool:
        """Fill in what a site knows of its chain; False if the channel axis gets lost."""
        linear = True
        for site in chain:
            between: list[fx.Node] = list(site.skip_path)
            state = site.x
            while site.previous is not None and state is not site.previous.node:
                between.append(state)
                state = self.up[state]
            linear = linear and all(is_linear(n) for n in between)
        for position, site in enumerate(chain):
            site.chain = site.chain if site.chain >= 0 else number
            site.position, site.linear = position, linear
            site.reason = f"site {position + 1} of {len(chain)} in chain {site.chain}"
        return set_axes(chain, self.up)

    def _mark_excluded(self) -> None:
        options = self.context.options
        for site in self.sites.values():
            if self.context.declarations is not None:
                site.excluded = not site.parameters
                continue
            included = any(fnmatchcase(site.name, p) for p in options.include)
            excluded = any(fnmatchcase(site.name, p) for p in options.exclude)
            site.excluded = excluded or not included

    # --- what was declared must be there, whole -----------------------------------------------

    def _check_declared(self, chains: list[list[Site]]) -> None:
        if self.context.declarations is None:
            return
        self._check_undeclared()
        found = {(identity_of(s.owner_key), s.branch_name) for s in self.sites.values()}
        missing = [
            (owner, entry)
            for owner, declared in self.context.declarations.items()
            for entry in declared
            if (owner, entry.name) not in found
        ]
        self.missing = frozenset((owner, entry.name) for owner, entry in missing)
        run = self._branches_run() if missing else set()
        for owner, entry in missing:
            if self.context.broken_at or (owner, entry.name) in run:
                raise ChainBrokenError(self._lost_site(owner, entry))
        self._check_whole(chains)

    def _branches_run(self) -> set[tuple[str, str]]:
        """Owner and name of every branch of which the graph computes something."""
        return {
            (identity_of(key), self._child_within(node, key))
            for node in self.flow.order
            if op_of(node).kind is Kind.MIXING
            for key in ("", *(key for key, _ in stack_of(node)))  # "": the root of the capture
        }

    def _lost_site(self, owner: str, entry: Declaration) -> str:
        where = next(iter(self.context.owners.get(owner, ())), "")
        broken = self.context.broken_at
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

    def _check_whole(self, chains: list[list[Site]]) -> None:
        """Every chain must lie in one graph: streams cannot cross a graph break."""
        declared = {
            d.chain: 0 for group in (self.context.declarations or {}).values() for d in group
        }
        ends: dict[int, tuple[bool, bool]] = {}
        for site in self.sites.values():
            entry = self._declaration_of(site)
            assert entry is not None
            first, last = ends.get(entry.chain, (False, False))
            ends[entry.chain] = (first or entry.first, last or entry.last)
        for number, (first, last) in ends.items():
            home = number in self.context.homes and not self.context.broken_at
            if not (first and last) and not home:
                raise ChainBrokenError(self._part_of_chain(number))
        pieces = [c[0].chain for c in chains]
        for number in declared:
            if pieces.count(number) > 1:
                raise ChainBrokenError(
                    self._split_chain([c for c in chains if c[0].chain == number])
                )

    def _check_undeclared(self) -> None:
        """No residual add on declared streams, or in the place of a whole chain, may be plain.

        What the example inputs did not show is an error; what was seen then and left out is not.
        """
        on_streams = self._undeclared_on_streams()
        if not on_streams:
            return
        as_new = replace(self.context, declarations=None, homes=frozenset())
        accepted = {s.node for s in _Detector(self.graph, as_new).run().sites}
        if new := [s for s in on_streams if s.node in accepted]:
            raise ChainBrokenError(self._foreign(new))

    def _undeclared_on_streams(self) -> list[Site]:
        """Undeclared adds that stand in front of, between or behind declared sites.

        Where nothing of a chain is left, those that would be a chain of their own.
        """
        declared = {s.chain for s in self.sites.values()}
        gone = self.context.homes - declared
        streams = nx.Graph()
        streams.add_nodes_from(self.sites)
        for site in (*self.sites.values(), *self.undeclared):
            streams.add_edge(site.node, self.base.get(site.x, site.x))
        known = set(self.sites)
        added = {s.node for s in self.undeclared}
        found = []
        for component in nx.connected_components(streams):
            if component & known or (gone and len(component & added) > 1):
                found += [s for s in self.undeclared if s.node in component]
        return found

    def _foreign(self, adds: list[Site]) -> str:
        named = ", ".join([f"'{s.name}' ({s.location})" for s in adds[:4]])
        return (
            f"Residual adds among those of this model were no sites when it was transformed, and "
            f"would be plain: {named}. A submodule was exchanged or added since, its forward was "
            "replaced, or this call takes another path: call mhc_compile.revert and transform "
            "again, with example inputs that take it."
        )

    def _part_of_chain(self, number: int) -> str:
        sites = [s for s in self.sites.values() if s.chain == number]
        broken = self.context.broken_at
        where = f" The capture was broken at {broken}." if broken else ""
        names = ", ".join([s.name for s in sites[:4]] + ["..."] * (len(sites) > 4))
        return (
            f"A captured graph holds only a part of chain {number} ({names}): its streams would "
            f"be collapsed in the middle.{where} Either the model has a graph break between two "
            "of its residual adds (make that code traceable: no print, no .item(), no random "
            "layer dropping in Python; TORCH_LOGS=graph_breaks shows where), or a module that "
            "owns a part of the chain was called by itself (call the module that contains the "
            "whole chain)."
        )

    def _split_chain(self, parts: list[list[Site]]) -> str:
        at = parts[1][0]
        return (
            f"The streams of chain {at.chain} do not reach the residual add '{at.name}' "
            f"({at.location}): this call takes another path than the one that was transformed. "
            "Call revert, then transform with example inputs that take this path."
        )


def is_reduction_of(flow: DataFlow, node: fx.Node, state: fx.Node) -> bool:
    """Whether a node is a scalar made from a state by pointwise operations and full reductions."""
    if len(shape_of(node)) or not isinstance(value_of(node), torch.Tensor):
        return False
    allowed = (Kind.POINTWISE, Kind.CAST, Kind.REDUCTION)
    region = flow.region(state, [node])
    dependent = [n for n in region if flow.depends(n, state)]
    return all(op_of(n).kind in allowed for n in dependent)


def _is_add(node: fx.Node) -> bool:
    return (
        op_of(node).name in ("add", "add_")
        and len(node.args) == 2
        and all(is_float_tensor(a) for a in node.args)
        and is_float_tensor(node)
        and len(shape_of(node)) > 0
    )


def _operands(add: fx.Node) -> tuple[fx.Node, fx.Node]:
    a, b = add.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    return a, b


def _is_constant(node: fx.Node) -> bool:
    """Whether a node creates a tensor out of nothing but sizes."""
    return op_of(node).creates


def _last_name(placeholder: fx.Node) -> str:
    """``l_self_parameters_w_`` and ``l_self_modules_a_parameters_weight_`` -> w, weight."""
    name = str(placeholder.target).rstrip("_")
    return name.rsplit("parameters_", 1)[-1] or name


def _in_control_flow(order: list[fx.Node]) -> list[Rejected]:
    """Adds in the bodies of cond, scan and the like, where no stream can be followed."""
    found = []
    for node in order:
        body = node.op == "get_attr" and node.graph.owning_module is not None
        module = getattr(node.graph.owning_module, str(node.target), None) if body else None
        if isinstance(module, fx.GraphModule) and not _is_backward(node):
            found += [
                Rejected(node, Reason.CONTROL_FLOW, branch_name=n.name, location=location_of(n))
                for n in module.graph.nodes
                if _is_add(n) and same_shape(n.args[0], n) and same_shape(n.args[1], n)
            ]
    return found


def _is_backward(body: fx.Node) -> bool:
    """Whether a body is the backward of a ``torch.autograd.Function``."""
    users = [u for u in body.users if op_of(u).name == "autograd_function_apply"]
    return any(u.args[1] is body for u in users)
