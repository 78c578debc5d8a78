"""The rewritten graphs of a model, for those who want to read them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from .. import _torch
from ..config import Config
from ..errors import MhcError, NotCapturedError, NotTransformedError
from ..model.connection import StreamParameters
from ..model.pending import refuse_pending
from ..passes.context import Context
from ..passes.fusion.fused_sites import fused_sites
from ..passes.fusion.report_kernels import emitted
from ..passes.runner import NOT_KEPT, HistoryEntry
from ..passes.sites.records import FusedSite

__all__ = ["RewrittenGraph", "graphs", "kept", "record"]


@dataclass(frozen=True)
class RewrittenGraph:
    """One captured graph of a transformed model.

    Attributes:
        after: the graph that runs (``.code`` is Python).
        history: one entry for each pass: ``.name``, ``.milliseconds``, ``.notes``, ``.operators``,
            and with ``Config(history="full")`` ``.code``. When Inductor has compiled a forward,
            backward or inference graph of it, and not taken it from a cache, the entries of that
            one follow (``.graph`` says which).
        sites: the sites that were rewritten in this graph.
    """

    captured: fx.GraphModule | None = field(repr=False)
    after: fx.GraphModule
    history: Sequence[HistoryEntry] = field(repr=False)
    sites: Sequence[FusedSite] = field(repr=False)

    @property
    def before(self) -> fx.GraphModule:
        """The graph as Dynamo captured it.

        Raises:
            MhcError: it was not kept.
        """
        if self.captured is None:
            raise MhcError(NOT_KEPT)
        return self.captured

    @property
    def sources(self) -> dict[str, str]:
        """The generated kernels of this graph, C++ or Triton; keys say of what and for what."""
        return emitted(self.after)


# Keyed by the parameters that a graph takes as inputs: it lives as long as they do.
_graphs: Any = _torch.WeakTensorKeyDictionary()
_number = itertools.count()


def kept(entries: Sequence[HistoryEntry], config: Config) -> list[HistoryEntry]:
    """What is kept of a run of the passes, once PyTorch's trace has the rest."""
    _trace(entries)
    return [e if config.history == "full" else e.without_code() for e in entries]


def record(
    before: fx.GraphModule | None,
    after: fx.GraphModule,
    history: Sequence[HistoryEntry],
    context: Context,
    inputs: Sequence[Any],
) -> None:
    """Remember a graph under the mHC parameters among its inputs.

    Those of a model with hyper-connections of its own are not known by name: a graph with some is
    remembered under all parameters among its inputs.

    Args:
        before: the graph as it was captured, where that is kept.
        history: kept as it is, because Inductor compiles a backward graph only when it is run.
    """
    sites = context.detection.sites if context.detection is not None else ()
    graph = RewrittenGraph(before, after, history, fused_sites(after.graph, context))
    names = [n.name for n in after.graph.nodes if n.op == "placeholder"]
    values, number = dict(zip(names, inputs, strict=True)), next(_number)
    declared = [d for group in (context.declarations or {}).values() for d in group]
    for owner in declared or sites:
        for parameter in owner.parameters:
            value = values[parameter.name]
            if isinstance(value, Tensor):
                _graphs.setdefault(value, {})[number] = graph
    for value in inputs if context.own else ():
        if isinstance(value, nn.Parameter):
            _graphs.setdefault(value, {})[number] = graph


def _trace(entries: Sequence[HistoryEntry]) -> None:
    """Put every version of a graph that differs from the one before into PyTorch's trace."""
    for number, entry in enumerate(entries):
        if entry.changed:
            name = f"mhc_compile_{entry.graph}_{number}_{entry.name}"
            _torch.trace_artifact(name, entry.__str__)


def graphs(model: nn.Module) -> list[RewrittenGraph]:
    """The rewritten graphs of a model, in the order of their capture.

    There is one for each mode and shape that the model was called in. The model is transformed, or
    it has hyper-connections of its own and was compiled with ``backend="mhc"``.

    Raises:
        NotTransformedError: it is neither.
        NotCapturedError: it was not called yet.
    """
    refuse_pending(model)
    found: dict[int, RewrittenGraph] = {}
    for parameter in model.parameters():
        found |= _graphs.get(parameter, {})
    if found:
        return [found[number] for number in sorted(found)]
    name = type(model).__name__
    if not any(isinstance(m, StreamParameters) for m in model.modules()):
        raise NotTransformedError(
            f"{name} is not transformed; call mhc_compile.transform(model) first. (A model with "
            "hyper-connections of its own has graphs once it was compiled with backend='mhc' and "
            "called.)"
        )
    raise NotCapturedError(
        f"{name} has not been called since it was transformed; graphs are captured at the first "
        "call"
    )
