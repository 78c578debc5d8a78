"""find: which adds of a graph are residual, by data flow alone.

    hidden_states_5 = hidden_states_0 + attn_output_4     residual: attn_output_4 is computed from x
    q_embed = q * cos + rotate_half(q) * sin              not: the branch mixes neither ...

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

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import fx

from ..context import Context
from ..graph.dataflow import DataFlow, is_mutation, written
from ..graph.modes import Modes
from ..graph.operators import (
    Kind,
    hooked_tensor,
    is_float_tensor,
    op_of,
    same_shape,
    shape_of,
    value_of,
)
from ..graph.streamwise import streamwise_operands
from .names import Names, is_constant
from .records import Reason, ResidualAdd, identity_of

__all__ = ["Finder", "adds_in_control_flow", "is_add", "is_reduction_of"]


class Finder:
    """One look at a graph.

    Args:
        ablated: identity of the owner and name of declared sites that were not found without it:
            the constant that a hook put in the place of such a branch's result is one, too.

    Attributes:
        found: the residual adds, by z; undeclared: those that no module has declared.
        rejected: why the others are none.
        up: from a node to the operand whose streams it acts on one by one.
        base: from a node to the state that its streams begin at.
    """

    def __init__(
        self, graph: fx.Graph, context: Context, ablated: frozenset[tuple[str, str]] = frozenset()
    ) -> None:
        self.context, self.ablated = context, ablated
        self.flow = DataFlow(graph)
        self.names = Names(context, self.flow, bool(ablated))
        self.modes = Modes(graph, context.grad_enabled)
        self.written = written(graph)
        # What was declared is a site in every graph, whatever that graph returns.
        self.used = self.flow.used() if context.declarations is None else set(self.flow.order)
        self.up: dict[fx.Node, fx.Node] = {}
        self.carriers: dict[fx.Node, list[fx.Node]] = {}  # the operands that ``up`` can lead to
        self.base: dict[fx.Node, fx.Node] = {}
        self.found: dict[fx.Node, ResidualAdd] = {}
        self.terms: dict[fx.Node, list[fx.Node]] = {}
        self.positions: set[fx.Node] = set()  # weights that were added to a stream
        self.rejected: dict[fx.Node, Reason] = {}
        self.undeclared: dict[fx.Node, ResidualAdd] = {}  # found, but no module declared them

    def run(self) -> Finder:
        """Look at every node, in the order of the graph."""
        for node in self.flow.order:
            if is_add(node):
                self._visit_add(node)
            if node not in self.found:
                self._visit_streamwise(node)
        return self

    def forget(self, node: fx.Node, reason: Reason) -> None:
        """A residual add is no site after all."""
        add = self.found.pop(node)
        self.rejected[node] = reason
        if reason is Reason.UNDECLARED:
            self.undeclared[node] = add

    def relink(self) -> None:
        """An add that nobody declared may still pass streams on (``x + c``): look at it as such."""
        for node in self.flow.order:
            if node in self.rejected:
                if self.rejected[node] is Reason.UNDECLARED:
                    self.base[node] = node
            elif node in self.up:
                self.base[node] = self.base[self.up[node]]

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
        activations = [u for u in free if not self.names.is_weight(self.base[u])]
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
        return self.base[node] in self.found, len(node.users) > 1

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
                self.found.pop(add, None)
                self._reject(add, Reason.MODE)
            return
        branch = tuple(t for t in terms if t is not skip)
        self._go_along([*path, x])
        self.base[node] = node
        self.found[node] = ResidualAdd(
            node, x, skip, tuple(path), branch, tuple(adds), bool(ablated)
        )
        for inner in adds[:-1]:
            self.found.pop(inner, None)
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
        site = self.found.get(inner)
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
        key, _ = self.names.owner_of(node)
        if not self.ablated or len(terms) != 2 or self.names.child_within(node, key):
            return None
        for skip, branch in (terms, terms[::-1]):
            made = self.base.get(branch, branch)
            name = self.names.child_within(made, key)
            if is_constant(made) and (identity_of(key), name) in self.ablated:
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
        begins = is_constant(base) or self._is_recurrent(base)
        if begins and not self._is_learned(x, computed):
            return Reason.RECURRENT_STATE
        return None

    def _is_recurrent(self, node: fx.Node) -> bool:
        return self.rejected.get(node) is Reason.RECURRENT_STATE

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
            site = self.found.get(state)
            pending += [site.skip] if site is not None else self.carriers.get(state, [])
        return False

    def _is_learned(self, x: fx.Node, terms: list[fx.Node]) -> bool:
        region = [n for n in self.flow.region(x, terms) if self.flow.depends(n, x)]
        return any(self.names.is_weight(i) for n in region for i in n.all_input_nodes)

    def _why_not(self, terms: list[fx.Node]) -> Reason:
        """Tell a transformed skip from operands that have nothing to do with each other."""
        if any(self.names.is_weight(self.base[t]) for t in terms):
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
            and not self.names.is_weight(source)
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
        self.rejected[node] = reason


def is_reduction_of(flow: DataFlow, node: fx.Node, state: fx.Node) -> bool:
    """Whether a scalar says that any, or all, of a state is so: ``isinf(x).any()``.

    Other reductions (a norm, a mean) have another value over all streams than over one.
    """
    if len(shape_of(node)) or not isinstance(value_of(node), torch.Tensor):
        return False
    allowed = (Kind.POINTWISE, Kind.CAST, Kind.REDUCTION)
    region = flow.region(state, [node])
    dependent = [op_of(n) for n in region if flow.depends(n, state)]
    return all(
        op.kind in allowed and (op.kind is not Kind.REDUCTION or op.name in ("any", "all"))
        for op in dependent
    )


def is_add(node: fx.Node) -> bool:
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


def adds_in_control_flow(order: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Adds in the bodies of cond, scan and the like, where no stream can be followed.

    Each with the node that stands for its body.
    """
    for node in order:
        owner = node.graph.owning_module if node.op == "get_attr" else None
        module = getattr(owner, str(node.target), None)
        if isinstance(module, fx.GraphModule) and not _is_backward(node):
            for n in module.graph.nodes:
                if is_add(n) and same_shape(n.args[0], n) and same_shape(n.args[1], n):
                    yield node, n


def _is_backward(body: fx.Node) -> bool:
    """Whether a body is the backward of a ``torch.autograd.Function``."""
    users = [u for u in body.users if op_of(u).name == "autograd_function_apply"]
    return any(u.args[1] is body for u in users)
