"""The first call of a plain model through the backend: it is transformed.

The graph at hand has no inputs for the new parameters, so this first call runs eagerly with the
parameters handed over; it leaves the model transformed, Dynamo notices the new classes, and the
second call is captured and compiled like that of any transformed model. Whoever comes upon the
graph after that is plain again, and has a first call too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ... import _torch
from ...errors import GraphBreakError, MhcError, NoSitesError
from ...model.attach import attach
from ...passes.pipeline import REPORT, REWRITE
from ...passes.runner import run_pipeline
from ...passes.sites.records import Detection, Site
from .. import guard, history
from ..known_graphs import asking
from ..request import Request, Runner, run_eagerly

__all__ = ["compile_graph"]


def compile_graph(request: Request) -> Runner:
    """Transform the model when it is called."""
    root, config = request.root, request.config
    if root is None:
        raise MhcError(
            "backend 'mhc' cannot find the module that a compiled plain function calls, so it has "
            "nowhere to put the mHC parameters. Call mhc_compile.transform(model) before "
            "torch.compile, or compile the module itself."
        )
    _require_whole(request, root)
    graph, context, entries = request.examined
    detection = context.detection
    if detection is None or not detection.sites:
        raise NoSitesError(
            f"The first graph that Dynamo captured of {type(root).__name__} has no chain of at "
            "least two residual adds x + F(x); mhc_compile.explain(model, *inputs) lists every add "
            "with its reason. If graph breaks cut the model into several graphs "
            "(TORCH_LOGS=graph_breaks shows them), call mhc_compile.transform(model) first."
        )
    # Dynamo keeps the runner: what belongs to this module must not stay in it.
    waiting = [(root, request, graph, context, entries, detection)]

    def first_call(*inputs: Any) -> Any:
        model, request, graph, context, entries, detection = waiting.pop()
        witnesses = guard.witnesses(model, graph.graph, request.inputs, detection)
        new = attach(model, graph, detection, witnesses, config)
        extra, places = _add_inputs(graph, detection, new)
        values = [*request.inputs, *extra]
        context.detection = detection.with_parameters(places)
        graph, entries = run_pipeline(graph, context, (*REWRITE, *REPORT), entries)
        entries = history.kept(entries, config)
        history.record(request.before(config), graph, entries, context, values)
        return run_eagerly(graph, values)(*inputs, *extra)

    def is_waiting(caller: nn.Module | None) -> bool:
        return bool(waiting) and waiting[0][0] is caller

    return asking(first_call, is_waiting, request)


def _require_whole(request: Request, root: nn.Module) -> None:
    """A plain model is transformed at once or not at all: its graph must be one."""
    if broken := request.broken_at:
        raise GraphBreakError(
            f"Dynamo breaks the graph of {type(root).__name__} at {broken}; a model that was not "
            "transformed must be captured whole. Call mhc_compile.transform(model) first (breaks "
            "outside the residual streams are then allowed), or remove the break "
            "(torch.compile(..., fullgraph=True) shows it). Has it hyper-connections of its own, "
            "pass options={'n': 1}: nothing is added."
        )


def _add_inputs(
    gm: fx.GraphModule, detection: Detection, parameters: Mapping[Site, list[nn.Parameter]]
) -> tuple[list[nn.Parameter], dict[Site, list[fx.Node]]]:
    """Give a graph one more input for each new parameter: their values, and those of each site."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    values: list[nn.Parameter] = []
    known: dict[int, fx.Node] = {}
    mode = _fake_mode_of(gm)
    places: dict[Site, list[fx.Node]] = {site: [] for site in detection.sites}
    for site in detection.sites:
        for number, value in enumerate(parameters[site]):
            if id(value) not in known:
                with gm.graph.inserting_after(last):
                    last = gm.graph.placeholder(f"mhc_{len(values)}_{number}")
                last.meta["example_value"] = mode.from_tensor(value)
                known[id(value)] = last
                values.append(value)
            places[site].append(known[id(value)])
    return values, places


def _fake_mode_of(gm: fx.GraphModule) -> Any:
    values = (n.meta.get("example_value") for n in gm.graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, _torch.FakeTensor))
