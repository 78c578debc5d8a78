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
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import backends
from ...kernels.ops.site import Call
from ...kernels.variants import parse_variant
from ..context import Context, PassResult
from ..graph.operators import branch_input, op_of, value_of

__all__ = ["emitted", "lower"]


def lower(gm: fx.GraphModule, context: Context) -> PassResult:
    """Check that the graph can run, and report who computes its operators."""
    left = [
        n.name for n in gm.graph.nodes if n.target is branch_input or op_of(n).name == "declare"
    ]
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
        if str(node.target) == "mhc.coefficients.default":
            call, variant = _call_of(node), parse_variant(node.args[4])
            text = backends.source(call.kernels, call.dtype, call.n, variant)
            if text is not None:
                found[f"{variant.text}, n = {call.n}, {backends.language(call.kernels)}"] = text
    return found


def _implementation(node: fx.Node) -> str:
    call = _call_of(node)
    return "PyTorch" if call is None else backends.language(call.kernels)


def _call_of(node: fx.Node) -> Any:
    """The call as the operator makes it; None for operators that are PyTorch on every device."""
    make = _CALLS.get(node.target)
    args = [value_of(a) if isinstance(a, fx.Node) else a for a in node.args]
    return None if make is None or not isinstance(args[0], Tensor) else make(*args)


_CALLS: dict[Any, Callable[..., Call]] = {
    torch.ops.mhc.coefficients.default: lambda X, phi, alpha, bias, variant, eps: Call(
        X, phi, variant=parse_variant(variant)
    ),
    torch.ops.mhc.pre.default: lambda H_pre, X, dtype: Call(X, H_pre, dtype),
    torch.ops.mhc.post_res.default: lambda H_res, H_post, X, f: Call(X, H_res, f.dtype),
}
