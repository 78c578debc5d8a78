"""widen: every chain of residual adds becomes a chain of n-stream connections, in the open.

    before                        after
    z = x + F(norm(x))            X = expand(x)                                      # [..., n, C]
                                  H_pre, H_post, H_res = coefficients(X, phi, alpha, b)
                                  h = H_pre X
                                  X' = H_res X + H_post^T F(norm(h))     (P eq. 1)
    logits = head(z)              z = readout(X');  logits = head(z)

The n-stream mathematics is written into the graph by calling ``kernels.reference`` on proxies,
so the graph says literally what the oracle says (arXiv:2512.24880, eq. 14-19).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ...kernels import reference
from ..context import Context, PassResult
from ..graph import _torch
from ..graph.dataflow import DataFlow, erase_dead_code, unread
from ..graph.modes import Modes
from ..graph.operators import (
    Kind,
    after_write,
    branch_input,
    holds_tensor,
    hooked_tensor,
    op_of,
    value_of,
)
from ..graph.streamwise import apply_streamwise, lay_as, move_tokens, transfer_axis
from ..graph.writer import SITE_TAG, compute_value, marker, tracing
from ..sites.find import is_reduction_of
from ..sites.in_place import join_versions
from ..sites.records import Detection, OpenEnd, OpenSite, Site, stack_of

__all__ = ["widen"]


def widen(gm: fx.GraphModule, context: Context) -> PassResult:
    """Rewrite every accepted site; ``context.detection`` must describe this graph."""
    detection = context.detection
    if detection is None or not detection.sites:
        return PassResult(gm, changed=False, notes=["no sites in this graph"])
    effects = unread(gm.graph)
    widener = _Widener(gm.graph, detection, context)
    widener.run()
    context.open_sites, context.open_ends = widener.open_sites, widener.open_ends
    join_versions(gm.graph)
    erase_dead_code(gm.graph, keep=effects)
    streams = f"{len(detection.chains)} chains of {context.options.n} streams"
    return PassResult(gm, changed=True, notes=[f"{len(detection.sites)} sites widened, {streams}"])


def every_site_is_open(gm: fx.GraphModule, context: Context) -> list[str]:
    """No site is a plain add any more, no marker is left, and what was written is in the graph."""
    sites, nodes = context.detection.sites if context.detection else [], set(gm.graph.nodes)
    problems = [f"{s.name} is still a plain add" for s in sites if not nodes.isdisjoint(s.adds)]
    problems += [f"{n.name} is left" for n in nodes if n.target in (branch_input, after_write)]
    opened = {open_site.site for open_site in context.open_sites}
    wanted = [s for s in sites if not s.excluded]
    return problems + [f"{s.name} was not opened" for s in wanted if s not in opened]


class _Widener:
    def __init__(self, graph: fx.Graph, detection: Detection, context: Context) -> None:
        self.graph = graph
        self.sites = detection.sites
        self.options = context.options
        self.tracer = _torch.GraphAppendingTracer(graph)
        self.flow = DataFlow(graph)
        self.modes = Modes(graph, context.grad_enabled)
        self.site_at = {site.node: site for site in detection.sites}
        self.regions = {s: self.flow.region(s.x, s.branch) for s in detection.sites}
        # Where each site's branch begins, and what is added, while markers are put in front.
        self.x = {s: s.x for s in detection.sites}
        self.skip = {s: s.skip for s in detection.sites}
        self.terms = {s: list(s.branch) for s in detection.sites}
        self.heads = {c[0].chain: c[-1].parameters[3:] for c in detection.chains}
        # Stream-wise steps on the chains: from a state to the state that it is made from.
        self.steps = _steps(detection)
        self.reading: dict[fx.Node, list[Site]] = {}  # a state or marker -> the sites that read it
        for site in self.sites:
            self.reading.setdefault(site.x, []).append(site)
        self.branch_inputs: dict[fx.Node, Site] = {}  # a marker -> the site whose branch begins
        self.recorded: dict[fx.Node, bool] = {}  # markers in another gradient mode than the site
        self.inputs: dict[fx.Node, fx.Node] = {}  # a marker -> h
        self.streams: dict[fx.Node, fx.Node] = {}  # a state -> its n streams [..., n, C]
        self.origin: dict[fx.Node, tuple[Site, int]] = {}  # a state -> a site, its channel axis
        self.opening: dict[Site, tuple[fx.Node, tuple[fx.Node, fx.Node, fx.Node], fx.Node]] = {}
        self.open_sites: list[OpenSite] = []
        self.open_ends: list[OpenEnd] = []
        self.starts: set[fx.Node] = set()

    def run(self) -> None:
        for site in self.sites:
            site.node.meta[SITE_TAG] = site.name
        # Outer branches first: a chain inside a branch begins at that branch's input.
        for site in sorted(self.sites, key=lambda s: -self.flow.index[s.node]):
            self._mark_branch(site)
        for node in list(self.graph.nodes):
            if node in self.branch_inputs:
                self._open_site(node, self.branch_inputs[node])
            elif node in self.site_at:
                self._close_site(self.site_at[node])
            elif node in self.steps:
                self._step(node, self.steps[node])
        self._read_out_everywhere()

    # --- where a branch begins ----------------------------------------------------------------

    def _mark_branch(self, site: Site) -> None:
        """Put a marker between x and the operations of F that read it, right behind x."""
        region = self.regions[site]
        readers = [u for u in self.x[site].users if u in region and u not in site.skip_path]
        with self.graph.inserting_after(_last_input(self.graph, self.x[site])):
            mark = marker(branch_input, self.x[site])
        self.modes.set(mark, self.modes.of(mark.prev))
        recorded = any(self.modes.of(node).grad for node in (site.node, *readers))
        if recorded != self.modes.of(mark).grad:
            self.recorded[mark] = recorded
        for user in [*readers, *self._read_along(site, mark)]:
            user.replace_input_with(self.x[site], mark)
        self.branch_inputs[mark] = site
        inside = [s for s in self.reading[self.x[site]] if s is not site and s.node in region]
        for inner in inside:
            self.reading[self.x[site]].remove(inner)
            self._begin_at(inner, mark)
        self.reading[mark] = inside
        self.terms[site] = [mark if term is self.x[site] else term for term in self.terms[site]]

    def _begin_at(self, site: Site, mark: fx.Node) -> None:
        """A chain inside a branch begins at the branch's input."""
        x = self.x[site]
        for node in site.skip_path:
            if self.steps[node] is x:
                self.steps[node] = mark
        self.skip[site] = mark if self.skip[site] is x else self.skip[site]
        self.terms[site] = [mark if term is x else term for term in self.terms[site]]
        self.x[site] = mark

    def _read_along(self, site: Site, mark: fx.Node) -> list[fx.Node]:
        """What else a module of the branch reads of its input: its hooks, a count."""
        region = self.regions[site]
        others = [self.regions[s] for s in self.reading[self.x[site]] if s is not site]
        taken = {mark, *self.site_at, *site.skip_path}.union(region, *others)
        begins = {c for u in self.x[site].users if u in region and (c := _child_call(u, site))}
        behind = [u for u in self.x[site].users if u not in taken and mark < u]
        return [u for u in behind if _child_call(u, site) in begins]

    # --- one site: open where x is known, close where F is ------------------------------------

    def _open_site(self, mark: fx.Node, site: Site) -> None:
        """Coefficients and the branch's input: everything that needs X and not F."""
        dtype = _dtype(self.x[site])
        with self._writing(before=mark, like=site.node, recorded=self.recorded.get(mark)):
            streams = self._proxy(self._streams_at_start(site))
            h: Any
            if site.excluded:
                h = reference.readout(streams, "mean", dtype=dtype, compute_dtype=_exact(dtype))
                self.open_ends.append(OpenEnd("mean", h.node))
            else:
                others = set(streams.node.users)
                compute = _dtype(site.parameters[0])
                phi, alpha, bias = (self._proxy(p) for p in site.parameters[:3])
                coefficients: Any = reference.coefficients(
                    streams,
                    phi,
                    alpha,
                    bias,
                    variant=self.options.variant,
                    n=self.options.n,
                    width=site.width,
                    eps=self.options.eps,
                    compute_dtype=compute,
                )
                for name, value in zip(("H_pre", "H_post", "H_res"), coefficients, strict=True):
                    _torch.rename(value.node, name)
                (flat,) = set(streams.node.users) - others
                H = tuple(value.node for value in coefficients)
                h = reference.pre(coefficients[0], streams, dtype=dtype, compute_dtype=compute)
                self.opening[site] = flat, H, h.node
            h = self._as_in_plain(h, self.x[site], site.channel_in)
            _torch.rename(h.node, "h")
        mark.replace_all_uses_with(h.node)
        self.inputs[mark] = h.node
        self.graph.erase_node(mark)

    def _streams_at_start(self, site: Site) -> fx.Node:
        """The streams of x: those of the chain so far, or the first of a chain."""
        if self.x[site] not in self.streams:
            x = self.inputs.get(self.x[site], self.x[site])
            single = self._proxy(x)
            if site.channel_in != -1:
                single = torch.movedim(single, site.channel_in, -1)
            streams: Any = reference.expand(single, self.options.n)
            self.open_ends.append(OpenEnd("expand", streams.node))
            if self.options.stream_dtype is not None:
                streams = streams.to(self.options.stream_dtype)
            self._set_streams(self.x[site], streams, site, site.channel_in)
            self.starts.add(self.x[site])
        return self.streams[self.x[site]]

    def _close_site(self, site: Site) -> None:
        """X' = H_res X + H_post^T F(h), in place of the sum."""
        dtype = self.options.stream_dtype or _dtype(site.node)
        with self._writing(before=site.node, like=site.node):
            terms = [self._proxy(self.inputs.get(t, t)) for t in self.terms[site]]
            f = terms[0]
            for term in terms[1:]:
                f = operator.add(f, term)
            if site.channel != -1:
                f = torch.movedim(f, site.channel, -1)
            streams = self._proxy(self.streams[self.skip[site]])
            if site.excluded:
                result = (streams + f.unsqueeze(-2)).to(dtype)
            else:
                compute = _dtype(site.parameters[0])
                H_post, H_res = self._where_the_skip_is(site)
                result = reference.post_res(
                    H_res, H_post, streams, f, dtype=dtype, compute_dtype=compute
                )
                self._note_open(site, result.node)  # type: ignore[attr-defined]
        self._set_streams(site.node, result, site, site.channel)

    def _where_the_skip_is(self, site: Site) -> tuple[Any, Any]:
        """H_post and H_res, a token's where z has that token: a skip may move tokens on its way."""
        _, H_post, H_res = map(self._proxy, self.opening[site][1])
        if not any(op_of(node).axes for node in site.skip_path):
            return H_post, H_res
        column, axis, n = H_post.unsqueeze(-1), site.channel_in, self.options.n
        for node in reversed(site.skip_path):
            operand = self.steps[node]
            H_res = move_tokens(node, operand, H_res, axis, n, n)
            column = move_tokens(node, operand, column, axis, n, 1)
            new_axis = transfer_axis(node, operand, axis)
            assert new_axis is not None
            axis = new_axis
        return column.squeeze(-1), H_res

    def _note_open(self, site: Site, end: fx.Node) -> None:
        flat, H, h = self.opening[site]
        phi, alpha, bias = site.parameters[:3]
        variant, eps, parameters = self.options.variant, self.options.eps, (phi, alpha, bias)
        self.open_sites.append(OpenSite(site, variant, eps, flat, parameters, H, h, end))

    def _step(self, node: fx.Node, operand: fx.Node) -> None:
        """A stream-wise operation between two sites, or on a skip, on every stream."""
        site, axis = self.origin[operand]
        new_axis = transfer_axis(node, operand, axis)
        assert new_axis is not None
        if hooked_tensor(node) is operand:
            self._pass_hooks(node, operand)
            return
        self._widen_reductions(node, operand)
        with self._writing(before=node, like=node):
            streams = self._proxy(self.streams[operand])
            physical = self.inputs.get(operand, operand)
            if self.options.stream_dtype is not None:
                streams = streams.to(_dtype(operand))
            result = apply_streamwise(node, physical, streams, axis, self.options.n)
            if self.options.stream_dtype is not None:
                result = result.to(self.options.stream_dtype)
        self._set_streams(node, result, site, new_axis)

    def _pass_hooks(self, node: fx.Node, operand: fx.Node) -> None:
        """All streams past the backward hooks that one passed: ``hook_enter([X, y], ...)[0]``."""
        site, axis = self.origin[operand]
        call, index = node.args
        assert isinstance(call, fx.Node) and isinstance(index, int)
        streams, kept = self.streams[operand], self.options.stream_dtype
        if kept is not None:
            with self._writing(before=call, like=node):
                streams = self._proxy(streams).to(_dtype(operand)).node
        tensors, axes, values = (list(v) for v in (call.args[0], call.args[-2], value_of(call)))  # type: ignore[call-overload]
        tensors[index], axes[index], values[index] = streams, axis, value_of(streams)
        call.args = (tensors, *call.args[1:-2], axes, call.args[-1])
        call.meta["example_value"] = values
        with self._writing(before=node, like=node):
            result = self._proxy(call)[index]
            if kept is not None:
                result = result.to(kept)
        self._set_streams(node, result, site, axis)

    def _widen_reductions(self, node: fx.Node, operand: fx.Node) -> None:
        """Scalars such as ``isinf(x).any()`` are computed once, over all streams."""
        for scalar in node.all_input_nodes:
            if scalar is operand or not is_reduction_of(self.flow, scalar, operand):
                continue
            region = self.flow.region(operand, [scalar])
            for user in list(operand.users):
                if user in region:
                    user.replace_input_with(operand, self.streams[operand])
            for part in sorted(region):
                part.meta["example_value"] = compute_value(part)

    def _set_streams(self, state: fx.Node, streams: Any, site: Site, axis: int) -> None:
        _torch.rename(streams.node, "X")
        self.streams[state] = streams.node
        self.origin[state] = (site, axis)

    # --- where a chain is read ----------------------------------------------------------------

    def _read_out_everywhere(self) -> None:
        """Give every reader outside the branches the state of one stream, then drop the rest."""
        gone = {node for site in self.sites for node in site.adds} | set(self.steps)
        for state in [s for s in self.streams if s not in self.starts]:
            readers = [u for u in state.users if u not in gone]
            sizes = [u for u in readers if op_of(u).kind is Kind.SHAPE and not holds_tensor(u)]
            site = self.origin[state][0]
            if state is site.node:  # F has the shape of z: sizes need no readout
                term = self.inputs.get(self.terms[site][0], self.terms[site][0])
                for user in sizes:
                    user.replace_input_with(state, term)
                readers = [u for u in readers if u not in sizes]
            if readers:
                single = self._read_out(state)
                for user in readers:
                    user.replace_input_with(state, single)
        for node in reversed(list(self.graph.nodes)):
            if node in gone and not node.users:
                self.graph.erase_node(node)

    def _read_out(self, state: fx.Node) -> fx.Node:
        site, axis = self.origin[state]
        dtype = _dtype(state)
        with self._writing(before=state, like=state):
            streams = self._proxy(self.streams[state])
            if self.options.readout == "head":
                phi, alpha, bias = (self._proxy(p) for p in self.heads[site.chain])
                single: Any = reference.head_readout(
                    streams,
                    phi,
                    alpha,
                    bias,
                    n=self.options.n,
                    width=site.width,
                    eps=self.options.eps,
                    dtype=dtype,
                    compute_dtype=_dtype(phi.node),
                )
                given = tuple(self.heads[site.chain])
                self.open_ends.append(OpenEnd("head", single.node, given, self.options.eps))
            else:
                single = reference.readout(
                    streams, self.options.readout, dtype=dtype, compute_dtype=_exact(dtype)
                )
                self.open_ends.append(OpenEnd(self.options.readout, single.node))
            single = self._as_in_plain(single, state, axis)
        return single.node

    # --- writing nodes --------------------------------------------------------------------------

    def _proxy(self, node: fx.Node) -> Any:
        """A node as an operand of the functions in ``kernels.reference``, which take tensors."""
        return fx.Proxy(node, self.tracer)

    def _as_in_plain(self, single: Any, state: fx.Node, axis: int) -> Any:
        """One stream ``[..., C]`` with the channels and the order in memory of a plain state."""
        if axis != -1:
            single = torch.movedim(single, -1, axis)
        return lay_as(state, single)

    @contextmanager
    def _writing(
        self, *, before: fx.Node, like: fx.Node, recorded: bool | None = None
    ) -> Iterator[None]:
        """Nodes written inside stand before a node, with the origin and recompute tags of another.

        Autocast around them needs no care: the functions of ``reference`` keep their precision.

        Args:
            recorded: the gradient mode that they need, None for that in which they stand.
        """
        if recorded is not None:
            self._set_grad(recorded, before)
        with tracing(before, like):
            yield
        if recorded is not None:
            self._set_grad(not recorded, before)

    def _set_grad(self, recorded: bool, before: fx.Node) -> None:
        with self.graph.inserting_before(before):
            self.graph.call_function(self.modes.set_grad, (recorded,))


def _steps(detection: Detection) -> dict[fx.Node, fx.Node]:
    """The stream-wise operations between the sites of the chains and on their skips."""
    steps: dict[fx.Node, fx.Node] = {}
    for site in detection.sites:
        for node in site.skip_path:
            steps[node] = detection.streamwise[node]
        state = site.x
        while site.previous is not None and state is not site.previous:
            steps[state] = detection.streamwise[state]
            state = detection.streamwise[state]
    return steps


def _child_call(node: fx.Node, site: Site) -> str:
    """The module call by a site's owner that a node stands in, "" if there is none."""
    keys = ["", *(key for key, _ in stack_of(node))]  # "": the root of the capture
    after = keys.index(site.place.owner_key) + 1 if site.place.owner_key in keys else len(keys)
    return keys[after] if after < len(keys) else ""


def _last_input(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node itself or, for an input, the last of all inputs."""
    if node.op != "placeholder":
        return node
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


def _dtype(node: fx.Node) -> torch.dtype:
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return value.dtype


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over streams accumulate."""
    return torch.float64 if dtype is torch.float64 else torch.float32
