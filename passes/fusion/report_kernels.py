"""report_kernels: who computes each ``mhc::`` operator; the graph stays as it is.

    torch.ops.mhc.coefficients(X, φ, α, b, ...)     C++ for CPUs, Triton for GPUs, else PyTorch

The choice is that of ``kernels/backends.py``, made again at every call from device, dtype, n and
variant, so a graph stays the same when a model moves. Made here for the tensors of the capture, it
builds what has to be built before the first step, and is there to be read. The graph then runs
eagerly or goes to Inductor, which sees each operator as one opaque node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import backends
from ...kernels.dtypes import compute_dtype
from ...kernels.ops import ends, site  # noqa: F401  (registers the operators)
from ..context import Context, PassResult
from ..graph.operators import shape_of, value_of

__all__ = ["emitted", "every_operator_is_reported", "report_kernels"]


def report_kernels(gm: fx.GraphModule, context: Context) -> PassResult:
    """Report who computes the operators of a graph, and build what has to be built."""
    found = context.operators = _counted(_ours(gm))
    notes = [f"{count} x {name}: {how}" for (name, how), count in sorted(found.items())]
    return PassResult(gm, changed=False, notes=notes)


def every_operator_is_reported(gm: fx.GraphModule, context: Context) -> list[str]:
    """As many operators were reported as there are."""
    there, reported = len(list(_ours(gm))), sum(context.operators.values())
    return [] if there == reported else [f"of {there} operators {reported} were reported"]


def _counted(nodes: Iterator[fx.Node]) -> Counter[tuple[str, str]]:
    """How many there are of each operator and implementation."""
    return Counter((str(node.target), _implementation(node)) for node in nodes)


def _ours(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in gm.graph.nodes if str(node.target).startswith("mhc."))


def emitted(gm: fx.GraphModule) -> dict[str, str]:
    """The source that is generated for the coefficients of a graph, by what it is for."""
    found = {}
    for node in gm.graph.nodes:
        plan = _plan_of(node)
        if plan is not None and plan.variant is not None:
            n = int(shape_of(node.args[0])[-2])  # type: ignore[call-overload]
            text = plan.kernels.source(plan.variant, n, plan.dtype)
            if text is not None:
                found[f"{plan.variant.text}, n = {n}, {plan.kernels.LANGUAGE}"] = text
    return found


def _implementation(node: fx.Node) -> str:
    plan = _plan_of(node)
    return "PyTorch" if plan is None else plan.kernels.LANGUAGE


def _plan_of(node: fx.Node) -> backends.Plan | None:
    """The plan that the operator makes; None for operators that are PyTorch on every device."""
    make = _PLANS.get(node.target)
    args = [value_of(a) if isinstance(a, fx.Node) else a for a in node.args]
    return None if make is None or not isinstance(args[0], Tensor) else make(*args)


def _plan(
    X: Tensor, exact: torch.dtype, n: int, *dtypes: torch.dtype, variant: str | None = None
) -> backends.Plan:
    return backends.plan(X.device, int(n), exact, (X.dtype, *dtypes), variant)


_PLANS: dict[Any, Callable[..., backends.Plan]] = {
    torch.ops.mhc.coefficients.default: lambda X, phi, alpha, bias, variant, eps: _plan(
        X, phi.dtype, X.shape[-2], variant=variant
    ),
    torch.ops.mhc.pre.default: lambda H_pre, X, dtype: _plan(X, H_pre.dtype, X.shape[-2], dtype),
    torch.ops.mhc.post_res.default: lambda H_res, H_post, X, f: _plan(
        X, H_res.dtype, X.shape[-2], f.dtype
    ),
    torch.ops.mhc.expand.default: lambda x, n: _plan(x, compute_dtype(x.dtype), n),
    torch.ops.mhc.readout.default: lambda X, kind, dtype: _plan(
        X, compute_dtype(X.dtype), X.shape[-2], dtype
    ),
}
