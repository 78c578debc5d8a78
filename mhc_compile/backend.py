"""The backends: what becomes of a captured graph.

``mhc`` is the public one (``torch.compile(model, backend="mhc")``, through the entry point):
all passes, then Inductor. ``eager`` runs the same graph operation by operation; a transformed
model that is called plainly uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from . import _torch
from .compiler.options import check_options, split_options
from .compiler.partitioned import PartitionedPasses
from .compiler.request import (
    Lowering,
    Request,
    Run,
    Runner,
    caller,
    run_eagerly,
    transformed_modules,
)
from .compiler.routes import route_of
from .errors import UnsupportedError
from .model import callbacks
from .model.hooks import errors_name_hooks

__all__ = ["check_options", "eager", "mhc"]


def mhc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Runner:
    """The backend of ``torch.compile(model, backend="mhc")``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs.
        options: fields of ``Config`` (for a model that was not transformed), and any of
            Inductor's own options.
        mode: a ``torch.compile`` mode, for Inductor.

    Raises:
        ValueError: an option that neither ``Config`` nor Inductor knows.
        MhcError: see ``transform``.
    """
    own, patches = split_options(options or {}, mode)
    place = "post_grad_custom_pre_pass"
    after = patches.get(place, _torch.inductor_setting(place))

    def lower(graph: fx.GraphModule, inputs: Sequence[Any], run: Run) -> Runner:
        passes = PartitionedPasses(run.config, run.history, after)
        runner = _torch.compile_inductor(graph, inputs, {**patches, place: passes})
        passes.note_cache()
        return runner

    return _compile(gm, list(example_inputs), own, lower)


def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Runner:
    """Run the rewritten graph as it is, every operation on its own."""
    return _compile(gm, list(example_inputs), None, run_eagerly)


def _compile(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Mapping[str, Any] | None,
    lower: Lowering,
) -> Runner:
    """Make a graph runnable; ``options`` are those of this library, None for a plain call."""
    root = caller()

    def roots() -> list[nn.Module]:
        return [root] if root is not None else transformed_modules(gm, None)

    with errors_name_hooks(roots):
        _refuse_pieces(gm)
        _torch.require_constant_floats(gm)
        request = Request(gm, example_inputs, options, lower, root, _compile)
        return route_of(request)(request)


def _refuse_pieces(gm: fx.GraphModule) -> None:
    if _torch.is_cut_for_ddp(gm):
        raise UnsupportedError(
            "torch.compile of a DistributedDataParallel model is cut at its gradient buckets, in "
            "the middle of the residual streams, before any backend sees it. Compile the model "
            "inside: model.compile(backend='mhc'), then DistributedDataParallel(model); or set "
            "torch._dynamo.config.optimize_ddp = False."
        )


callbacks.eager, callbacks.mhc, callbacks.check_options = eager, mhc, check_options
