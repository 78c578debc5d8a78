"""lower: name the implementation of every ``mhc::`` operator and leave nothing else behind.

    torch.ops.mhc.sinkhorn_knopp(logits, 20)     PyTorch, tokens in the last axis

The graph then runs eagerly or goes to Inductor, which sees each operator as one opaque node.
"""

from __future__ import annotations

from collections import Counter

from torch import fx

from .context import Context, PassResult
from .operators import op_name
from .widen import branch_input

__all__ = ["lower"]


def lower(gm: fx.GraphModule, context: Context) -> PassResult:
    """Check that the graph can run, and report which operators it runs on."""
    left = [n.name for n in gm.graph.nodes if n.target is branch_input or op_name(n) == "declare"]
    if left:
        raise AssertionError(f"nodes that cannot run are left in the graph: {left}")
    operators = Counter(str(n.target) for n in gm.graph.nodes if str(n.target).startswith("mhc."))
    notes = [f"{count} x {name}: PyTorch" for name, count in sorted(operators.items())]
    return PassResult(gm, changed=False, notes=notes)
