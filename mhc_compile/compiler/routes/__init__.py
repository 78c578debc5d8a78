"""The four things that become of a captured graph; which of them is decided here alone.

declared      modules in it say which sites they have: all passes
own           a model that was written with hyper-connections: they run on our operators
first call    of a plain model: it is transformed
untouched     a part of a transformed model without a site, or n = 1: the graph as it is
"""

from __future__ import annotations

from collections.abc import Callable

from ..request import Request, Runner, is_transformed
from . import declared, first_call, own, untouched

__all__ = ["Route", "route_of"]

Route = Callable[[Request], Runner]


def route_of(request: Request) -> Route:
    """What becomes of a graph."""
    if request.declared is not None:
        return declared.compile_graph
    if request.options is None:
        return untouched.compile_graph
    if own.has_connections(request):
        return own.compile_graph
    if is_transformed(request.root) or request.config.n == 1:
        return untouched.compile_graph
    return first_call.compile_graph
