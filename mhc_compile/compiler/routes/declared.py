"""A graph in which modules declare their sites: all passes, and the checks that none is lost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ... import _torch
from ...errors import UnsupportedError
from ...model.attach import DDP_COMES_LAST
from ...passes.context import Context
from ...passes.pipeline import EXAMINE, REPORT, REWRITE
from ...passes.runner import run_pipeline
from ...passes.sites.declared import declaration_nodes
from .. import guard, history
from ..context import context_of
from ..options import agreed
from ..request import Request, Run, Runner

__all__ = ["compile_graph"]


def compile_graph(request: Request) -> Runner:
    """Rewrite the graph for the streams of the model that it comes from."""
    inputs, sites, declared = request.inputs, request.sites, request.declared
    assert declared is not None
    _refuse_constants(request.gm)
    config = agreed(request.options or {}, declared)
    work = request.copy()
    context = context_of(
        work,
        inputs,
        *request.owners,
        config=config,
        grad_enabled=torch.is_grad_enabled(),
        broken_at=_torch.break_reason(request.gm),
        declarations={},
    )
    work, entries = run_pipeline(work, context, EXAMINE)
    guard.require_own_branches(sites, work, context)
    work, entries = run_pipeline(work, context, (*REWRITE, *REPORT), entries)
    entries = history.kept(entries, config)
    undeclared = lambda: guard.undeclared_in(context.detection)  # noqa: E731
    guard.require_alive(sites, work, undeclared, request.broken_at)
    _check_parameters(_declared_values(work, context, inputs), inputs)
    runner = request.lower(work, inputs, Run(config, entries))
    history.record(request.before(config), work, entries, context, inputs)
    return runner


def _refuse_constants(gm: fx.GraphModule) -> None:
    """Parameters must be inputs of the graph."""
    for node in declaration_nodes(gm.graph):
        if any(parameter.op == "get_attr" for parameter in node.args[0]):  # type: ignore[union-attr]
            raise UnsupportedError(
                "torch._inductor.config.freezing makes constants of the parameters of a "
                "transformed model. Turn it off, or use model.compile(backend='mhc') in place of "
                "torch.compile(model, backend='mhc'): it does so for its own calls."
            )


def _declared_values(gm: fx.GraphModule, context: Context, inputs: Sequence[Any]) -> list[Any]:
    """The mHC parameters that a graph was given."""
    names = [n.name for n in gm.graph.find_nodes(op="placeholder")]
    values = dict(zip(names, inputs, strict=True))
    declared = [d for group in (context.declarations or {}).values() for d in group]
    return [values[p.name] for d in declared for p in d.parameters]


def _check_parameters(declared: Sequence[Any], inputs: Sequence[Any]) -> None:
    """DistributedDataParallel must know the mHC parameters, and whoever trains should train them.

    It averages the gradients of what it knew when it was made. And whoever trains other parameters
    alone may not know that the streams stay as they started.
    """
    if not all(map(_torch.is_known_to_ddp, declared)):
        raise UnsupportedError(DDP_COMES_LAST)
    others = any(isinstance(v, nn.Parameter) and v.requires_grad for v in inputs)
    frozen = declared and not any(p.requires_grad for p in declared)
    if torch.is_grad_enabled() and others and frozen:
        warnings.warn(
            "All mHC parameters of this model are frozen (requires_grad is False) while others are "
            "trained: its streams stay as they are. To train them, call p.requires_grad_() for p "
            "in mhc_compile.parameters(model); PEFT freezes whatever LoraConfig(modules_to_save="
            "['mhc']) does not name.",
            stacklevel=2,
        )
