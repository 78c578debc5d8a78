"""``transform``: find the residual adds of a model once, and put their parameters on it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from torch import fx, nn

from . import _torch
from .capture import (
    GRAPH_NUMBER,
    CapturedGraph,
    as_call,
    capture,
    first_break,
    infer_inputs,
    merge,
)
from .compiler.context import context_of
from .compiler.guard import witnesses
from .config import Config
from .errors import (
    DoubleTransformError,
    ExampleInputsError,
    GraphBreakError,
    MhcError,
    NoSitesError,
    NotTransformedError,
    UnsupportedError,
)
from .model import swap
from .model.attach import DDP_COMES_LAST, attach
from .model.connection import StreamParameters
from .model.pending import Action, is_pending, postpone, refuse_pending, withdraw
from .passes.context import Context
from .passes.graph.dataflow import DataFlow
from .passes.pipeline import EXAMINE
from .passes.recognition.recognize import write_backs
from .passes.runner import run_pipeline
from .passes.sites.records import Detection, location_of

__all__ = ["parameters", "revert", "transform"]

M = TypeVar("M", bound=nn.Module)


def transform(
    model: M, n: int | None = None, *, example_inputs: Any = None, config: Config | None = None
) -> M:
    """Turn a residual model into an mHC model, in place (arXiv:2512.24880).

    Every chain of residual adds ``x + F(x)`` becomes a chain of n-stream connections
    ``H_res X + H_post^T F(H_pre X)``. With the default ``init="preserve"`` the model computes
    what it computed before; the new parameters stand on the modules that own the adds, as
    ``<owner>.mhc.<branch>.phi | alpha | bias``, in float32.

    Args:
        model: any ``nn.Module``; its source, keys and parameters are not touched.
        n: number of streams, ``config.n`` (4) by default; 1 leaves the model as it is.
        example_inputs: what the model's forward takes: a tuple, a dict, or a pair of both, of
            real, meta or fake tensors. Only shapes are read, nothing is computed. Left out, they
            are taken from the model (``dummy_inputs``, a Hugging Face config); where that is not
            possible the parameters are made at the first call, as a warning says, and until then
            ``parameters()`` and ``state_dict()`` raise.
        config: everything else; see ``Config``.

    Returns:
        The same object, of a subclass of its class.

    Raises:
        ValueError: an argument is out of range.
        NoSitesError: no chain of at least two residual adds was found.
        GraphBreakError: Dynamo splits the model between two residual adds of one stream.
        ExampleInputsError: the inputs do not fit the model.
        DoubleTransformError: the model, or a part of it, is transformed already.
        UnsupportedError: the model has hyper-connections of its own.

    The model is unchanged after every error.
    """
    config = _resolve(n, config)
    _check_model(model)
    if config.n == 1:
        return model
    given = None if example_inputs is None else as_call(example_inputs)
    call = given or infer_inputs(model)
    if call is None:
        _say_postponed(model, "does not say what its forward takes")
        return postpone(model, partial(_first_call, config=config))
    try:
        gm, inputs, context, graphs = _examine(model, *call, config)
    except ExampleInputsError as error:
        if given is not None:
            raise
        _say_postponed(model, f"does not take what it seems to ({error})")
        return postpone(model, partial(_first_call, config=config))
    detection = context.detection
    assert detection is not None
    _refuse_own_connections(model, gm, detection)
    _check_unbroken(model, gm, detection, graphs, call)
    if not detection.sites or all(s.excluded for s in detection.sites):
        raise NoSitesError(_no_sites(model, gm, detection))
    attach(model, gm, detection, witnesses(model, gm.graph, inputs, detection), config)
    return model


def revert(model: M) -> M:
    """Give a model its original classes, parameters and state-dict keys back, in place.

    Raises:
        NotTransformedError: the model is not transformed.
    """
    if is_pending(model):
        return withdraw(model)
    swapped = [m for m in model.modules() if swap.is_swapped(m)]
    if not swapped:
        raise NotTransformedError(f"{type(model).__name__} is not transformed: nothing to revert.")
    for module in swapped:
        swap.restore(module)
    model.__dict__.pop(_torch.COMPILED_CALL, None)  # compiled from the graphs that are gone
    return model


def parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The mHC parameters of a transformed model alone, for an optimizer group of their own.

    Raises:
        NotTransformedError: the model has none.
        ExampleInputsError: they are made at its first call.
    """
    refuse_pending(model)
    found = [m for m in model.modules() if isinstance(m, StreamParameters)]
    if not found:
        raise NotTransformedError(
            f"{type(model).__name__} has no mHC parameters: call mhc_compile.transform(model) first"
        )
    return (p for module in found for p in module.parameters())


def _first_call(model: nn.Module, call: Any, action: Action | None, *, config: Config) -> None:
    """What a postponed transform does; the model is plain again where it fails."""
    transform(model, example_inputs=call, config=config)
    try:
        if action is not None:
            action(model)
    except BaseException:
        revert(model)
        raise


def _say_postponed(model: nn.Module, why: str) -> None:
    warnings.warn(
        f"{type(model).__name__} {why}: it is transformed at its first call, and until then "
        "parameters() and state_dict() raise. Pass example_inputs to have the mHC parameters now.",
        stacklevel=3,
    )


# --- finding -------------------------------------------------------------------------------------


def _examine(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: Config
) -> tuple[fx.GraphModule, list[Any], Context, list[CapturedGraph]]:
    """Capture one call of a plain model and detect its sites; the model is not changed."""
    graphs = capture(model, args, kwargs)
    gm, inputs = merge(graphs)
    context = context_of(gm, inputs, model, config=config)
    gm, _ = run_pipeline(gm, context, EXAMINE)
    return gm, inputs, context, graphs


def _refuse_own_connections(model: nn.Module, gm: fx.GraphModule, detection: Detection) -> None:
    """Streams that a model has already get no others, though their sums look like residual adds."""
    adds = {add for site in detection.sites for add in site.adds}
    found = next((w for w in write_backs(gm.graph) if w.node in adds), None)
    if found is not None:
        raise UnsupportedError(
            f"{type(model).__name__} has hyper-connections of its own, of {found.n} streams "
            f"({location_of(found.node)}); transform adds none on top of them. {_OWN_WAY}"
        )


_OWN_WAY = (
    'model.compile(backend="mhc") runs a model as it is, its connections on the operators of this '
    "library; mhc_compile.explain(model, *inputs) lists them."
)


def _check_unbroken(
    model: nn.Module,
    gm: fx.GraphModule,
    detection: Detection,
    graphs: list[CapturedGraph],
    call: Any,
) -> None:
    """A chain must lie in one graph; otherwise its streams would be collapsed at the break."""
    if len(graphs) == 1:
        return
    flow = DataFlow(gm.graph)
    runs = Counter(id(g.gm) for g in graphs)
    for chain in detection.chains:
        inside = (n for s in chain for n in flow.region(s.x, s.adds) if flow.depends(n, s.x))
        parts = {n.meta[GRAPH_NUMBER] for n in inside if GRAPH_NUMBER in n.meta}
        # A graph that ran for several modules says of one of them only which they are.
        if len(parts) > 1 or any(runs[id(graphs[part].gm)] > 1 for part in parts):
            where = next((g.broken_at for g in graphs if g.broken_at), None)
            raise GraphBreakError(
                f"Dynamo breaks the graph of {type(model).__name__} inside a residual stream, or "
                f"between several runs of it (adds from {chain[0].location} to "
                f"{chain[-1].location}), at {where or first_break(model, *call)}. Remove the "
                "break: no print or .item() between residual adds; a randomly dropped layer "
                "becomes x + mask * F(x) with a tensor mask, or layerdrop=0."
            )


def _resolve(n: int | None, config: Config | None) -> Config:
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config must be a mhc_compile.Config, got {type(config).__name__}")
    if config is None:
        return Config() if n is None else Config(n=n)
    return config if n is None else replace(config, n=n)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"transform needs an nn.Module, got {type(model).__name__}")
    tensors = (t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    if any(t is not None and nn.parameter.is_lazy(t) for t in tensors):
        raise MhcError(
            f"{type(model).__name__} has parameters whose shape is not known yet (lazy modules); "
            "call it once before mhc_compile.transform"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise UnsupportedError(DDP_COMES_LAST)
    if is_pending(model):
        raise DoubleTransformError(
            f"{type(model).__name__} is waiting for its first call to be transformed; call "
            "mhc_compile.revert(model) before another transform."
        )
    for name, module in model.named_modules():
        if swap.is_swapped(module) or is_pending(module):
            what = f"its module '{name}'" if name else "it"
            raise DoubleTransformError(
                f"{type(model).__name__} cannot be transformed: {what} is transformed already. "
                "Call mhc_compile.revert first."
            )


def _no_sites(model: nn.Module, gm: fx.GraphModule, detection: Detection) -> str:
    reasons: dict[str, int] = {}
    for rejected in detection.rejected:
        reasons[rejected.reason] = reasons.get(rejected.reason, 0) + 1
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    excluded = " Config.include and Config.exclude leave none." if detection.sites else ""
    own = next(iter(write_backs(gm.graph)), None) if not detection.sites else None
    way = "mhc_compile.explain(model, *inputs) lists each with its place."
    if own is not None:
        way = f"It seems to have hyper-connections of its own ({location_of(own.node)}). {_OWN_WAY}"
    return (
        f"{type(model).__name__} has no chain of at least two residual adds x + F(x).{excluded} "
        f"Adds of two tensors that were looked at: {listed or 'none'}. {way}"
    )
