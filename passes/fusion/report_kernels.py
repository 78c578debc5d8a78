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
from ...kernels.ops.site import Call
from ...kernels.variants import parse_variant
from ..context import Context, PassResult
from ..graph.operators import value_of

__all__ = ["emitted", "every_operator_is_reported", "report_kernels"]


def report_kernels(gm: fx.GraphModule, context: Context) -> PassResult:
    """Report who computes the operators of a graph, and build what has to be built."""
    found = context.operators = Counter((str(n.target), _implementation(n)) for n in _ours(gm))
    notes = [f"{count} x {name}: {how}" for (name, how), count in sorted(found.items())]
    return PassResult(gm, changed=False, notes=notes)


def every_operator_is_reported(gm: fx.GraphModule, context: Context) -> list[str]:
    """As many operators were reported as there are."""
    there, reported = len(list(_ours(gm))), sum(context.operators.values())
    return [] if there == reported else [f"of {there} operators {reported} were reported"]


def _ours(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for node in gm.graph.nodes if str(node.target).startswith("mhc."))


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
