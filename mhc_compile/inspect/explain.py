"""``explain``: every residual-looking add of a model, taken or not, why, and where."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ..capture import as_call, capture, copy_graph, infer_inputs, merge
from ..compiler.context import context_of
from ..compiler.routes.own import connections
from ..config import Config
from ..errors import ExampleInputsError
from ..model import swap
from ..model.declare import Spec
from ..passes.pipeline import EXAMINE
from ..passes.recognition.recognize import write_backs
from ..passes.runner import run_pipeline
from ..passes.sites.records import Detection, FusedSite, Reason, Rejected, Site
from .records import Add, Adds
from .report.html import write
from .report.text import table

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation(Adds):
    """What ``transform`` takes, or took, of a model. Prints as a table.

    Nothing is added to a model that was written with hyper-connections: its sites are those that
    run on our operators when it is compiled with ``backend="mhc"``. Attributes: see ``Adds``.
    """

    def __str__(self) -> str:
        return table(self)

    def to_html(self, path: str) -> None:
        """Write the table as one self-contained HTML file."""
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
    own = [] if declared else connections(copy_graph(gm)).own
    context = context_of(gm, inputs, model, config=chosen)
    if declared is not None:
        context.declarations, context.homes = {}, _declared_chains(model)
    run_pipeline(gm, context, EXAMINE)
    found = context.detection
    assert found is not None
    if own:
        return _explain_own(model, own, found, {w.node for w in write_backs(gm.graph)})
    adds = {s: _add(model, s, s.chain, "excluded" if s.excluded else s.reason) for s in found.sites}
    return Explanation(
        model=type(model).__name__,
        n=chosen.n,
        sites=list(adds.values()),
        rejected=[_add(model, r, -1, r.reason) for r in found.rejected],
        chains=[[adds[s] for s in chain] for chain in found.chains],
    )


def _explain_own(
    model: nn.Module, own: Sequence[FusedSite | Rejected], found: Detection, written: set[fx.Node]
) -> Explanation:
    """The connections of a model that was written with some, and every other add.

    Args:
        written: the sums in which these connections end.
    """
    sites = [s for s in own if isinstance(s, FusedSite)]
    adds = [_add(model, s, s.chain, s.reason) for s in sites]
    others = [r for r in found.rejected if r.node not in written]
    plain = [s for s in found.sites if s.node not in written]
    return Explanation(
        model=type(model).__name__,
        n=max((s.n for s in sites), default=1),
        sites=adds,
        rejected=[
            *(_add(model, r, -1, r.reason) for r in own if isinstance(r, Rejected)),
            *(_add(model, s, -1, Reason.OWN_CONNECTIONS) for s in plain),
            *(_add(model, r, -1, r.reason) for r in others),
        ],
        chains=[[a for a in adds if a.chain == k] for k in dict.fromkeys(a.chain for a in adds)],
        own=True,
    )


def _declared_chains(model: nn.Module) -> frozenset[int]:
    """All chains: one call shows them as far as it takes them, whole or not."""
    swapped = (m for m in model.modules() if swap.is_swapped(m))
    return frozenset(s.chain for m in swapped for s in Spec.from_json(m.__dict__[swap.SPEC]).sites)


def _declared_config(model: nn.Module) -> Config | None:
    for module in model.modules():
        if swap.is_swapped(module):
            return Spec.from_json(module.__dict__[swap.SPEC]).config
    return None


def _add(model: nn.Module, found: Site | FusedSite | Rejected, chain: int, reason: str) -> Add:
    location = found.location or _source_of(model, found.owner)
    node = [*found.nodes.values()][-1] if isinstance(found, FusedSite) else found.node
    detail = found.detail if isinstance(found, Rejected) else ""
    return Add(found.name, found.owner, chain, reason, location, found.width, node.name, detail)


def _source_of(model: nn.Module, path: str) -> str:
    """File and class of a module, where the trace has no line to show."""
    module = dict(model.named_modules())[path]
    original = swap.original_class(module)
    try:
        return f"{inspect.getsourcefile(original)} ({original.__name__})"
    except TypeError:
        return original.__name__
