"""``explain``: every residual-looking add of a model, taken or not, why, and where."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import swap
from .capture import as_call, capture, merge
from .config import Config
from .declare import Spec, collect
from .passes.canonicalize import canonicalize
from .passes.detect import detect
from .passes.errors import ExampleInputsError
from .passes.sites import Reason, Rejected, Site
from .transform import context_of, infer_inputs

__all__ = ["Add", "Explanation", "explain"]


@dataclass(frozen=True)
class Add:
    """One add of two tensors.

    Attributes:
        name: owner and branch (``model.layers.0.self_attn``); the node's name if rejected.
        owner: path of the module whose forward contains the add.
        chain: number of its chain, -1 for a rejected add.
        reason: in words for a site, a ``Reason`` for a rejected add.
        location: ``file:line``.
        width: C, the size of the channel axis; 0 for a rejected add.
        node: name of the add in the captured graph.
    """

    name: str
    owner: str
    chain: int
    reason: str | Reason
    location: str
    width: int
    node: str


@dataclass(frozen=True)
class Explanation:
    """What ``transform`` takes, or took, of a model. Prints as a table.

    Attributes:
        model: the model's class name.
        n: number of streams.
        sites: the accepted adds, in the order of the forward.
        rejected: the others.
        chains: the accepted adds of each chain.
    """

    model: str
    n: int
    sites: Sequence[Add]
    rejected: Sequence[Add]
    chains: Sequence[Sequence[Add]] = field(repr=False)

    def __str__(self) -> str:
        from .report.text import table

        return table(self)

    def to_html(self, path: str) -> None:
        """Write the table as one self-contained HTML file."""
        from .report.html import write

        write(self, path)


def explain(
    model: nn.Module, *args: Any, config: Config | None = None, **kwargs: Any
) -> Explanation:
    """Find every residual-looking add in one call of a model, without computing anything.

    Args:
        model: plain or transformed.
        *args, **kwargs: what the model's forward takes; left out, they are inferred as in
            ``transform``.
        config: for a plain model, what ``transform`` would be given.

    Raises:
        ExampleInputsError: the arguments do not fit, or none were given and none can be inferred.
        MhcError: see ``transform``.
    """
    call = as_call((args, kwargs)) if args or kwargs else infer_inputs(model)
    if call is None:
        raise ExampleInputsError(
            f"explain needs the inputs of {type(model).__name__}: explain(model, *args, **kwargs)"
        )
    declared = _declared_config(model)
    chosen = declared or config or Config()
    gm, inputs = merge(capture(model, *call))
    context = context_of(gm, inputs, model, chosen)
    canonicalize(gm, context)
    if declared is not None:
        collect(gm.graph, context)
        context.homes = frozenset(d.chain for g in (context.declarations or {}).values() for d in g)
    detect(gm, context)
    found = context.detection
    assert found is not None
    adds = {s: _add(model, s, s.chain, "excluded" if s.excluded else s.reason) for s in found.sites}
    return Explanation(
        model=type(model).__name__,
        n=chosen.n,
        sites=list(adds.values()),
        rejected=[_add(model, r, -1, r.reason) for r in found.rejected],
        chains=[[adds[s] for s in chain] for chain in found.chains],
    )


def _declared_config(model: nn.Module) -> Config | None:
    for module in model.modules():
        if swap.is_swapped(module):
            return Spec.from_json(module.__dict__[swap.SPEC]).config
    return None


def _add(model: nn.Module, found: Site | Rejected, chain: int, reason: str) -> Add:
    location = found.location or _source_of(model, found.owner)
    node = found.node.name
    return Add(found.name, found.owner, chain, reason, location, found.width, node)


def _source_of(model: nn.Module, path: str) -> str:
    """File and class of a module, where the trace has no line to show."""
    module = model.get_submodule(path)
    original = swap.original_class(module)
    try:
        return f"{inspect.getsourcefile(original)} ({original.__name__})"
    except TypeError:
        return original.__name__
