"""fuse_seams: what lies between two branches becomes one operator, in forward and in backward.

    X2 = mhc.post_res(H_res, H_post, X, f)
    H_pre, … = mhc.coefficients(X2, φ, α, b)           X2, h, H_pre, … = mhc.seam(H_res, H_post, X,
    h = mhc.pre(H_pre, X2)                        ->                              f, φ, α, b)

    dH_pre, d1 = mhc.pre_backward(dh, H_pre, X2)
    d2, dφ, dα, db = mhc.coefficients_backward(dH_pre, …, X2, …)
    dX2 = partial + d1 + d2                            dφ, dα, db, dH_res, dH_post, dX, df
    dH_res, dH_post, dX, df                       ->       = mhc.seam_backward(dh, …, partial,
        = mhc.post_res_backward(dX2, H_res, …)                                 H_res, …)

Where no post_res stands directly in front of coefficients and pre (at the start of a chain, behind
a post-norm) these two alone become `mhc.coefficients_pre` and `mhc.coefficients_pre_backward`.

The pass works on the graphs that AOTAutograd has partitioned. Only there the gradients of X, which
arrive one by one from its readers, meet in visible additions; and nothing can be kept for backward
that was not kept before, because what a graph returns is decided already. Forward operators are
bit-equal to their parts; in backward the sum of gradients is rounded once instead of at every
addition.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.ops import seam as seam_ops  # noqa: F401  (registers the operators)
from ..context import Context, PassResult
from ..graph.operators import dtype_of, op_name, value_of
from .replace import Fusion, Value, item, items, sum_of

__all__ = ["fuse_seams", "no_seam_is_left"]

Made = tuple[str, str]
"""The operator that was made, and why it is not more than that; each may be empty."""


def fuse_seams(gm: fx.GraphModule, context: Context) -> PassResult:
    """Fuse the operators between branches in a forward, backward or inference graph."""
    found = [_fuse_forward(node) for node in _operators(gm.graph, "coefficients")]
    found += [_fuse_backward(node) for node in _operators(gm.graph, "coefficients_backward")]
    made = Counter(name for name, _ in found if name)
    notes = [f"{count} x mhc.{name}" for name, count in made.items()]
    return PassResult(gm, bool(made), notes + [reason for _, reason in found if reason])


def no_seam_is_left(gm: fx.GraphModule, context: Context) -> list[str]:
    """No coefficients stand beside the pre that reads them, where both could be one operator."""
    pairs = [_pair(node) for node in _operators(gm.graph, "coefficients")]
    fusible = [p for p in pairs if isinstance(p, Fusion) and p.obstacle() is None]
    return [f"{p.members[0].name} and {p.members[1].name} stay apart" for p in fusible]


def _fuse_forward(coefficients: fx.Node) -> Made:
    """Fuse coefficients with the pre that reads them, and with the post_res in front."""
    pair = _pair(coefficients)
    if isinstance(pair, str):
        return "", pair
    X: Any = coefficients.args[0]
    if not _is(X, "post_res"):
        return _make(pair, _way(coefficients, X, lambda n: n.all_input_nodes, "post_res"))
    arguments, outputs = pair.arguments[1:], [(X, None), *pair.outputs]
    seam = _fusion("seam", [X, *pair.members], (*X.args, *arguments), outputs)
    return _make(seam) if (reason := seam.obstacle()) is None else _make(pair, (X, reason))


def _pair(coefficients: fx.Node) -> Fusion | str:
    """Coefficients and the pre that reads them as one operator, or why that cannot be."""
    X, *parameters = coefficients.args
    assert isinstance(X, fx.Node)
    readers = [u for H_pre in items(coefficients, 0) for u in H_pre.users if _is(u, "pre")]
    pre = min((u for u in readers if u.args[1] is X), default=None)
    if pre is None:
        return f"{coefficients} stays alone: no mhc.pre reads its H_pre and the same streams"
    dtype: Any = pre.args[2]
    if torch.promote_types(dtype_of(X), dtype) is not dtype_of(X):
        return f"{coefficients} and {pre} stay apart: h is {dtype}, the streams {dtype_of(X)}"
    arguments = (*parameters, dtype)
    outputs: list[Value] = [(pre, None), *((coefficients, i) for i in range(5))]
    return _fusion("coefficients_pre", [coefficients, pre], (X, *arguments), outputs)


def _fuse_backward(coefficients: fx.Node) -> Made:
    """Fuse coefficients_backward with pre_backward in front and post_res_backward behind."""
    dH_pre, dH_post, dH_res, X, *kept, variant, eps = coefficients.args
    pre = _producer(dH_pre)
    if pre is None or pre.args[2] is not X:
        return "", f"{coefficients} stays alone: H_pre has other readers than one mhc.pre"
    dh, H_pre, _ = pre.args
    parts = [n for n in (item(pre, 1), item(coefficients, 0)) if n is not None]
    total = sum_of(*parts) if len(parts) == 2 else None
    if parts and total is None:
        return "", f"{pre} and {coefficients} stay apart: their gradients of X are not one sum"
    arguments = (dh, dH_post, dH_res, H_pre, X, *kept, total)
    members = [coefficients, pre, *(total.additions if total else ())]
    dX: Value = (total.root, None) if total else (coefficients, 0)
    outputs: list[Value] = [(coefficients, i) for i in (1, 2, 3)]
    pair = _fusion("coefficients_pre_backward", members, (*arguments, variant, eps), [dX, *outputs])
    if total is None:
        return _make(pair)
    behind = [u for u in total.root.users if _is(u, "post_res_backward")]
    if not behind:
        return _make(pair, _way(total.root, total.root, lambda n: n.users, "post_res_backward"))
    seam = _fusion(
        "seam_backward",
        [*members, behind[0]],
        (*arguments, *behind[0].args[1:], variant, eps),
        [*outputs, *((behind[0], i) for i in range(4))],
    )
    return _make(seam) if (reason := seam.obstacle()) is None else _make(pair, (behind[0], reason))


def _make(fusion: Fusion, larger: tuple[fx.Node, str] | None = None) -> Made:
    """Carry out a fusion where it is legal.

    Args:
        larger: a further operator that could not be fused, and why; None if there is none.
    """
    first = fusion.members[0]
    if (obstacle := fusion.obstacle()) is not None:
        return "", f"{first} and {fusion.members[1]} stay apart: {obstacle}"
    fusion.apply()
    reason = f"{first} and {larger[0]} stay apart: {larger[1]}" if larger else ""
    return fusion.name, reason


def _fusion(
    name: str, members: list[fx.Node], arguments: tuple[Any, ...], outputs: list[Value]
) -> Fusion:
    return Fusion(getattr(torch.ops.mhc, name).default, members, arguments, outputs)


def _operators(graph: fx.Graph, name: str) -> list[fx.Node]:
    return graph.find_nodes(op="call_function", target=getattr(torch.ops.mhc, name).default)


def _is(node: Any, name: str) -> bool:
    return isinstance(node, fx.Node) and node.target is getattr(torch.ops.mhc, name).default


def _producer(dH_pre: Any) -> fx.Node | None:
    """The pre_backward of which a gradient is the first result."""
    if isinstance(dH_pre, fx.Node) and dH_pre.target is operator.getitem and dH_pre.args[1] == 0:
        node = dH_pre.args[0]
        if isinstance(node, fx.Node) and _is(node, "pre_backward"):
            return node
    return None


# --- what stands between --------------------------------------------------------------------------


def _way(
    start: fx.Node,
    streams: fx.Node,
    step: Callable[[fx.Node], Iterable[fx.Node]],
    name: str,
) -> tuple[fx.Node, str] | None:
    """The nearest operator of a name that streams lead to, and what stands on the way.

    Args:
        start: where the way starts.
        streams: a node that holds streams or their gradient; what is not as large is no way.
        step: forward along the users of a node, or back along its operands.
    """
    names: dict[fx.Node, tuple[str, ...]] = {start: ()}
    queue = [start]
    for node in queue:
        for following in step(node):
            if _is(following, name):
                return following, f"{' and '.join(dict.fromkeys(names[node]))} between them"
            if following not in names and _holds_streams(following, streams):
                own = () if following.target is operator.getitem else (_name(following),)
                names[following] = names[node] + own
                queue.append(following)
    return None


def _name(node: fx.Node) -> str:
    """The operation that a decomposed one comes from."""
    original = node.meta.get("original_aten")
    return op_name(node) if original is None else str(original).split(".")[1]


def _holds_streams(node: fx.Node, like: fx.Node) -> bool:
    """Whether a node, not one of ours, has a result as large as the streams."""
    if str(node.target).startswith("mhc."):
        return False
    value = value_of(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return _size(like) in [_size(v) for v in values]


def _size(value: Any) -> str:
    """The number of elements; as text, because comparing symbols would install a guard."""
    value = value_of(value) if isinstance(value, fx.Node) else value
    return str(value.numel()) if isinstance(value, Tensor) else ""
