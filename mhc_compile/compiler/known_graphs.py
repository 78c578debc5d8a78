"""Graphs of plain residuals, which Dynamo may run for others than those they were compiled for.

Note [Graphs that others run]
    Dynamo keeps a graph for the code that it was captured from: other instances of the class run it
    without our being asked, and so does one that was reverted. That is right where a graph says
    itself what it is, by what it declares or by connections of its own. A graph of plain residuals
    does not: for whom it is the first call of a plain model, and for whom a part without a site,
    depends on who calls. Such a graph asks at every call, and is given to the backend again for a
    caller that it was not made for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from .. import _torch
from ..capture import relabelled
from ..errors import MhcError
from ..passes.sites.records import identity_of, stack_of
from .request import Request, Runner, caller, run_eagerly

__all__ = ["asking"]


def asking(runner: Runner, fits: Callable[[nn.Module | None], bool], request: Request) -> Runner:
    """A runner that is only run for whom it fits: see Note [Graphs that others run].

    What the graph says of modules is said anew for others by their paths, from the module whose
    code it is: whoever calls that one may have it under another name.
    """
    # Not the request itself, which holds the first caller and its tensors.
    gm, options, compile_graph = request.gm, request.options, request.compile
    module = _torch.innermost_module()
    code, paths = type(module).__name__, _paths_of(gm, module)
    names = _names_in(module, request.inputs)
    del module, request

    def compile_again(inputs: Sequence[Any]) -> Runner:
        """What the backend makes of this graph for whoever is calling now, for one call."""
        other = _torch.innermost_module()
        theirs = {} if other is None else dict(other.named_modules(remove_duplicate=False))
        if not theirs.keys() >= set(paths.values()) or names != _names_in(other, inputs):
            raise MhcError(
                f"backend 'mhc' has met the code of {code} before, in a model whose modules "
                f"or parameters have other names than those of this {type(other).__name__}, and "
                "Dynamo does not capture it again. Call mhc_compile.transform(model) before it is "
                "compiled, or torch.compiler.reset() before its first call."
            )
        new = {known: str(id(theirs[path])) for known, path in paths.items()}
        return compile_graph(relabelled(gm, new), list(inputs), options, run_eagerly)

    def run(*inputs: Any) -> Any:
        return (runner if fits(caller()) else compile_again(inputs))(*inputs)

    return run


def _paths_of(gm: fx.GraphModule, module: nn.Module | None) -> dict[str, str]:
    """From the identity of each part of a module that a graph comes from to its path."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    met = {identity_of(k) for g in graphs for node in g.nodes for k, _ in stack_of(node)}
    parts = [] if module is None else module.named_modules()
    return {str(id(m)): path for path, m in parts if str(id(m)) in met}


def _names_in(module: nn.Module | None, inputs: Sequence[Any]) -> list[frozenset[str]]:
    """The names that each input has as a parameter or buffer of a module."""
    names: dict[int, set[str]] = {}
    if module is not None:
        for name, value in (
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ):
            names.setdefault(id(value), set()).add(name)
    return [frozenset(names.get(id(value), ())) for value in inputs]
