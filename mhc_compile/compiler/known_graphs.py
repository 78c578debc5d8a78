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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .. import _torch
from ..capture import relabelled
from ..errors import MhcError
from ..passes.sites.records import identity_of, stack_of
from .request import Request, Runner, caller, run_eagerly

__all__ = ["asking"]


def asking(runner: Runner, fits: Callable[[nn.Module | None], bool], request: Request) -> Runner:
    """A runner that is only run for whom it fits: see Note [Graphs that others run]."""
    known = _Known.of(request)

    def run(*inputs: Any) -> Any:
        return (runner if fits(caller()) else known.compile_again(inputs))(*inputs)

    return run


@dataclass(frozen=True)
class _Known:
    """A graph as the backend was given it, to be compiled for other callers.

    What it says of modules is said anew for others by their paths, from the module whose code it
    is: whoever calls that one may have it under another name.

    Attributes:
        gm, options, compile: see ``Request``, which is not kept: it knows the first caller.
        code: the class of the module whose code it is, for messages.
        modules: from the identity of each module in the graph to its path.
        names: of each input, the names by which the module has it.
    """

    gm: fx.GraphModule
    options: Mapping[str, Any] | None
    compile: Callable[..., Runner]
    code: str
    modules: Mapping[str, str]
    names: Sequence[frozenset[str]]

    @classmethod
    def of(cls, request: Request) -> _Known:
        graphs = [m.graph for m in request.gm.modules() if isinstance(m, fx.GraphModule)]
        met = {identity_of(k) for g in graphs for node in g.nodes for k, _ in stack_of(node)}
        module = _torch.innermost_module()
        paths = {} if module is None else {str(id(m)): p for p, m in module.named_modules()}
        return cls(
            request.gm,
            request.options,
            request.compile,
            type(module).__name__,
            {identity: path for identity, path in paths.items() if identity in met},
            _names_in(module, request.inputs),
        )

    def compile_again(self, inputs: Sequence[Any]) -> Runner:
        """What the backend makes of this graph for whoever is calling now, for one call.

        Raises:
            MhcError: its modules are others; or any other error of the backend.
        """
        module = _torch.innermost_module()
        theirs = {} if module is None else dict(module.named_modules(remove_duplicate=False))
        same_modules = theirs.keys() >= set(self.modules.values())
        if not same_modules or self.names != _names_in(module, inputs):
            raise MhcError(
                f"backend 'mhc' has met the code of {self.code} before, in a model whose modules "
                f"or parameters have other names than those of this {type(module).__name__}, and "
                "Dynamo does not capture it again. Call mhc_compile.transform(model) before it is "
                "compiled, or torch.compiler.reset() before its first call."
            )
        new = {known: str(id(theirs[path])) for known, path in self.modules.items()}
        return self.compile(relabelled(self.gm, new), list(inputs), self.options, run_eagerly)


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
