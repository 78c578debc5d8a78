"""Models that were written with hyper-connections: nothing is added, theirs run on our operators.

``torch.compile(model, backend="mhc")`` transforms a plain model. One whose graph has connections of
its own keeps its parameters and its numerics; only those that are read as ours become operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ...capture import copy_graph
from ...config import Config
from ...errors import UnsupportedError
from ...passes.context import Context
from ...passes.graph.operators import after_write
from ...passes.pipeline import OWN, REPORT
from ...passes.recognition.mapping import mappings
from ...passes.recognition.recognize import write_backs
from ...passes.runner import run_pipeline
from ...passes.sites.records import FusedSite
from .. import history
from ..context import options_of
from ..known_graphs import asking
from ..request import Request, Run, Runner, is_transformed

__all__ = ["compile_graph", "connections", "has_connections", "is_known", "may_stay_plain"]

_APPLICABLE = ("defer_norms", "disabled", "history")
"""Options that mean something where nothing is added."""

_OWN = "_mhc_own_connections"
"""On a model that has some: set when the first of its graphs with connections is met."""


def connections(gm: fx.GraphModule) -> Context:
    """The hyper-connections in a graph, in ``.own`` of the context; the graph is rewritten."""
    context = Context(options_of(Config(n=1)))
    run_pipeline(gm, context, OWN)
    return context


def is_known(module: nn.Module | None) -> bool:
    """Whether a model was found to have connections of its own, and so gets no others."""
    return module is not None and _OWN in module.__dict__


def has_connections(request: Request) -> bool:
    """Whether a graph is one of a model with connections of its own.

    That is decided once for a model, by the first of its graphs that shows some (one without is the
    first call of a plain model, which ends with a transformed model or with an error). Then all its
    graphs stay as the model was written.

    Raises:
        UnsupportedError: an option describes connections that would be added.
    """
    known = is_known(request.root)
    found = [] if known or not _may_show_connections(request) else _found_in(request)
    if found and request.root is not None:
        request.root.__dict__[_OWN] = True
        _say_if_none_is_read(request.root, found)
    if found or known:
        _refuse_options(request)
    return bool(found) or known


def _may_show_connections(request: Request) -> bool:
    """False where a closer look at a graph, which takes another copy of it, would find nothing."""
    graph = request.examined[0].graph
    # What is told apart by writes in place, or spelt as the model wrote it, is not seen from here.
    if graph.find_nodes(op="call_function", target=after_write):
        return True
    if write_backs(graph):
        return True
    return next(mappings(graph), None) is not None


def _found_in(request: Request) -> Sequence[Any]:
    return connections(copy_graph(request.gm)).own


def compile_graph(request: Request) -> Runner:
    """The graph with its connections on our operators."""
    config = Config(**{**(request.options or {}), "n": 1})
    context = Context(options_of(config), grad_enabled=torch.is_grad_enabled())
    work, entries = run_pipeline(request.copy(), context, (*OWN, *REPORT))
    entries = history.kept(entries, config)
    request.require_nothing_lost(work)
    runner = request.lower(work, request.inputs, Run(config, entries))
    history.record(request.before(config), work, entries, context, request.inputs)
    return runner if context.own else asking(runner, may_stay_plain, request)


def may_stay_plain(caller: nn.Module | None) -> bool:
    """Whether a graph without a site may be a part of this model."""
    return is_transformed(caller) or is_known(caller)


def _say_if_none_is_read(module: nn.Module, found: Sequence[Any]) -> None:
    """What only looks like connections keeps others from being added: not in silence."""
    if not any(isinstance(site, FusedSite) for site in found):
        warnings.warn(
            f"{type(module).__name__} seems to have hyper-connections of its own, at "
            f"{found[0].location}, but none that backend 'mhc' can read: it adds nothing and "
            "replaces nothing. mhc_compile.explain(model, *inputs) says what differs; "
            "mhc_compile.transform(model, ...) adds connections all the same.",
            stacklevel=2,
        )


def _refuse_options(request: Request) -> None:
    given = [
        name
        for name, value in (request.options or {}).items()
        if name not in _APPLICABLE and not (name == "n" and value == 1)
    ]
    if not given:
        return
    module, found = request.root, _found_in(request)
    whose = "The model" if module is None else type(module).__name__
    first = f", for one {found[0].name} ({found[0].location})" if found else ""
    sites = sum(isinstance(site, FusedSite) for site in found)
    names = ", ".join(f"options[{name!r}]" for name in given)
    raise UnsupportedError(
        f"{whose} has hyper-connections of its own ({sites} recognised{first}), to which backend "
        f"'mhc' adds none: {names} would describe new ones. Leave them out; n, variant and the "
        "rest are read from the model."
    )
