"""``Request``: a captured graph as a backend is given it, and whose it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from .. import _torch
from ..capture import copy_graph
from ..config import Config
from ..errors import ChainBrokenError
from ..model import swap
from ..model.backward_hooks import number_calls
from ..model.declare import Spec
from ..passes.context import Context
from ..passes.pipeline import EXAMINE
from ..passes.runner import HistoryEntry, run_pipeline
from ..passes.sites.declared import declaration_nodes
from ..passes.sites.records import identity_of
from . import guard
from .context import context_of, options_of, owners_in

__all__ = [
    "Lowering",
    "Request",
    "Run",
    "Runner",
    "caller",
    "is_transformed",
    "run_eagerly",
]

Runner = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """What lowering needs to know of the passes that made a graph; it extends the history."""

    config: Config
    history: list[HistoryEntry] = field(default_factory=list)


Lowering = Callable[[fx.GraphModule, Sequence[Any], Run], Runner]


@dataclass(frozen=True)
class Request:
    """One captured graph that a backend is to make something runnable of.

    Attributes:
        gm: as Dynamo gave it; it stays as it is.
        inputs: the values of its placeholders.
        options: those of this library, None for a plain call.
        lower: makes the rewritten graph runnable.
        root: the module whose call is being compiled, None where that is not known.
        compile: what the backend does with ``gm``, ``inputs``, ``options`` and ``lower``.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    options: Mapping[str, Any] | None
    lower: Lowering
    root: nn.Module | None
    compile: Callable[..., Runner]

    def copy(self) -> fx.GraphModule:
        """A copy for the passes, with the calls of hooked modules numbered."""
        work = copy_graph(self.gm)
        number_calls(work, self.root)
        return work

    def before(self, config: Config) -> fx.GraphModule | None:
        """The graph as it was captured, for the history, where that is to be kept."""
        return self.gm if config.history == "full" else None

    @cached_property
    def config(self) -> Config:
        """The configuration that the options describe."""
        return Config(**(self.options or {}))

    @cached_property
    def declared(self) -> Config | None:
        """The configuration that the modules in the graph declare, None if there are none."""
        for module in self.gm.modules():
            if isinstance(module, fx.GraphModule):
                for node in declaration_nodes(module.graph):
                    return Spec.from_json(str(node.args[1])).config
        return None

    @cached_property
    def owners(self) -> list[nn.Module]:
        """The modules with declared sites that the graph may come from, outermost first."""
        owners = transformed_modules(self.gm, self.root)
        _require_one_model(owners, self.root)
        return owners

    @cached_property
    def sites(self) -> guard.Sites:
        """The sites that these have."""
        return guard.Sites.of(self.owners, self.gm.graph, self.inputs)

    @cached_property
    def examined(self) -> tuple[fx.GraphModule, Context, list[HistoryEntry]]:
        """A copy as if it were of a plain model: its sites are found, nothing is rewritten."""
        work, roots = self.copy(), [] if self.root is None else [self.root]
        context = context_of(work, self.inputs, *roots, config=self.config)
        work, entries = run_pipeline(work, context, EXAMINE)
        return work, context, entries

    @property
    def broken_at(self) -> str | None:
        """Where the graph ends early, or begins: Dynamo skips a forward that breaks in a loop."""
        if broken := _torch.break_reason(self.gm) or _torch.break_around():
            return broken
        captured = _torch.innermost_module()
        if self.root is None or captured in (None, self.root):
            return None
        name = next((path for path, m in self.root.named_modules() if m is captured), None)
        return None if name is None else f"a call above module '{name}'"

    def require_nothing_lost(self, work: fx.GraphModule) -> None:
        """In a graph in which nothing is declared no branch of a site may run."""

        def undeclared() -> list[Any]:
            owners = owners_in(*self.owners)
            context = Context(options_of(Config()), owners=owners, declarations={})
            run_pipeline(self.copy(), context, EXAMINE)
            return guard.undeclared_in(context.detection)

        if self.sites.declared:
            guard.require_alive(self.sites, work, undeclared, self.broken_at)


def caller() -> nn.Module | None:
    """The module whose call is being compiled, or runs."""
    return swap.calling_root() or _torch.calling_module()


def is_transformed(module: nn.Module | None) -> bool:
    """Whether a module is transformed, or a part of it is."""
    return module is not None and any(swap.is_swapped(m) for m in module.modules())


def transformed_modules(gm: fx.GraphModule, root: nn.Module | None) -> list[nn.Module]:
    """The modules with declared sites that a graph may come from, outermost first."""
    found = [root] if root is not None and is_transformed(root) else []
    known = {id(m) for root in found for m in root.modules()}
    keys = dict.fromkeys(key for n in gm.graph.nodes for key in n.meta.get("nn_module_stack") or ())
    for key in keys:
        part = swap.find(identity_of(str(key)))
        if part is not None and id(part) not in known:
            found.append(part)
            known |= {id(m) for m in part.modules()}
    return found


def _require_one_model(owners: Sequence[nn.Module], root: nn.Module | None) -> None:
    """A copy may run modules of the model that it was copied from; their sites have one name."""
    if len(owners) > 1 and owners[0] is root:
        raise ChainBrokenError(
            f"This call of {type(root).__name__} runs modules of another transformed model "
            f"({type(owners[1]).__name__}), which it does not hold. A forward that was replaced "
            "may refer to modules of the model from which this one was copied: set it on the copy "
            "anew, or register the other model as a submodule."
        )


def run_eagerly(gm: fx.GraphModule, inputs: Sequence[Any], _: Any = None) -> Runner:
    """A graph as it is, every operation on its own."""
    checkpointed = any("ac_graph_id" in n.meta for n in gm.graph.nodes)
    if checkpointed and torch.is_grad_enabled():
        return _torch.partition_eagerly(gm, inputs)
    return gm.forward
