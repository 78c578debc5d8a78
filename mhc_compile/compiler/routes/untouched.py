"""A graph without a site of a transformed model, or of a plain one that is to stay so (n = 1)."""

from __future__ import annotations

from ..known_graphs import asking
from ..request import Request, Run, Runner, is_transformed
from .own import may_stay_plain

__all__ = ["compile_graph"]


def compile_graph(request: Request) -> Runner:
    """The graph as it is."""
    work = request.copy()
    request.require_nothing_lost(work)
    runner = request.lower(work, request.inputs, Run(request.config))
    # A plain call has a cache of its own, and n = 1 leaves every model plain.
    if request.options is None or not is_transformed(request.root):
        return runner
    return asking(runner, may_stay_plain, request)
