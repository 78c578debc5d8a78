"""lower: who computes each ``mhc::`` operator; nothing that cannot run is left behind.

    torch.ops.mhc.coefficients(X, φ, α, b, ...)     C++ for CPUs, Triton for GPUs, else PyTorch

The choice is that of ``kernels/backends.py``, made again at every call from device, dtype, n and
variant, so a graph stays the same when a model moves. Made here for the tensors of the capture, it
builds what has to be built before the first step, and is there to be read. The graph then runs
eagerly or goes to Inductor, which sees each operator as one opaque node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx

from ...kernels import backends
from ..context import Context, PassResult
from ..graph.operators import op_name, shape_of, value_of
from ..open_form.widen import branch_input

__all__ = ["emitted", "lower"]


def lower(gm: fx.GraphModule, context: Context) -> PassResult:
    """Check that the graph can run, and report who computes its operators."""
    left = [n.name for n in gm.graph.nodes if n.target is branch_input or op_name(n) == "declare"]
    if left:
        raise AssertionError(f"nodes that cannot run are left in the graph: {left}")
    nodes = (n for n in gm.graph.nodes if str(n.target).startswith("mhc."))
    operators = Counter((str(n.target), _implementation(n)) for n in nodes)
    notes = [f"{count} x {name}: {how}" for (name, how), count in sorted(operators.items())]
    return PassResult(gm, changed=False, notes=notes)


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
    make = _PLANS.get(op_name(node))
    args = [value_of(a) if isinstance(a, fx.Node) else a for a in node.args]
    return None if make is None or not isinstance(args[0], Tensor) else make(*args)


def _plan(
    X: Tensor, coefficient: Tensor, *dtypes: torch.dtype, variant: str | None = None
) -> backends.Plan:
    n = int(X.shape[-2])
    return backends.plan(X.device, n, coefficient.dtype, (X.dtype, *dtypes), variant)


_PLANS: dict[str, Callable[..., backends.Plan]] = {
    "coefficients": lambda X, phi, alpha, bias, variant, eps: _plan(X, phi, variant=variant),
    "pre": lambda H_pre, X, dtype: _plan(X, H_pre, dtype),
    "post_res": lambda H_res, H_post, X, f: _plan(X, H_res, f.dtype),
}
