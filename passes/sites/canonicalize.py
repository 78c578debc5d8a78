"""canonicalize: one spelling for each thing that detection looks for.

    before                                         after
    x = tag_activation_checkpoint(body, h)         the body's nodes, tagged for recompute
    x += f;  x.add_(f);  torch.add(x, f, alpha=a)  x_1 = x + f;  x + f * a
    torch.addcmul(x, a, b); torch.addmm(x, a, b)   x + a * b;    x + a @ b
    h * rsqrt(mean(h ** 2, -1) + eps)              rms_norm(h, (C,), None, eps)
    relu(x, inplace=True)                          relu(x), later readers of x read the result

What becomes of writes that others can see: ``in_place``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..context import Context, PassResult
from ..graph.dataflow import erase_dead_code, unread
from ..graph.modes import kept_apart
from ..graph.norms import spelled_out_rms_norm
from ..graph.operators import (
    dtype_of,
    is_float_tensor,
    memory_order,
    op_of,
    same_shape,
    shape_of,
    value_of,
)
from ..graph.writer import Writer
from .in_place import remove_in_place, separate_versions

__all__ = ["adds_have_one_spelling", "canonicalize"]


def canonicalize(gm: fx.GraphModule, context: Context) -> PassResult:
    """Bring every spelling of a residual add and of RMSNorm to one form."""
    steps = {
        "bodies inlined": _inline_bodies(gm),
        "writes made functional": remove_in_place(gm.graph, context.grad_enabled),
        "adds respelled": _unify_adds(gm.graph, context),
    }
    effects = unread(gm.graph)
    with kept_apart(gm.graph, context.grad_enabled):
        steps["RMSNorms joined"] = _join_rms_norms(gm.graph)
        erase_dead_code(gm.graph, keep=effects)
    steps["writes left in place"] = separate_versions(gm.graph)
    notes = [f"{count} {what}" for what, count in steps.items() if count]
    return PassResult(gm, changed=bool(notes), notes=notes)


def adds_have_one_spelling(gm: fx.GraphModule, context: Context) -> list[str]:
    """Every sum of two floating-point tensors is ``operator.add`` of them."""
    return [f"{n.name} is another spelling of an add" for n in gm.graph.nodes if _is_other_add(n)]


def _is_other_add(node: fx.Node) -> bool:
    name, tensors = op_of(node).name, [a for a in node.args if isinstance(a, fx.Node)]
    if name not in ("add", "addcmul") or "out" in node.kwargs or not is_float_tensor(node):
        return False
    if name == "addcmul":
        return len(tensors) > 2
    return len(node.args) == len(tensors) == 2 and node.target is not operator.add


# --- bodies of user checkpoints and nested compile regions ---------------------------------


def _inline_bodies(gm: fx.GraphModule) -> int:
    count = 0
    while node := next((n for n in gm.graph.nodes if _is_body_call(gm, n)), None):
        _inline_body(gm, node, recompute_id=count)
        count += 1
    return count


def _is_body_call(gm: fx.GraphModule, node: fx.Node) -> bool:
    if not op_of(node).body or not node.args:
        return False
    body = node.args[0]
    return isinstance(body, fx.Node) and body.op == "get_attr"


def _inline_body(gm: fx.GraphModule, call: fx.Node, recompute_id: int) -> None:
    name = op_of(call).name
    source = call.args[0]
    assert isinstance(source, fx.Node)
    body = gm.get_submodule(str(source.target))
    assert isinstance(body, fx.GraphModule)
    arguments = list(call.args[2:] if name == "invoke_subgraph" else call.args[1:])
    copied: dict[fx.Node, Any] = {}
    result: Any = None
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copied[node] = arguments.pop(0)
            elif node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: copied[n])
            else:
                new = gm.graph.node_copy(node, lambda n: copied[n])
                copied[node] = new
                if node.op == "get_attr":
                    new.target = _adopt_attribute(gm, body, str(node.target))
                elif name == "tag_activation_checkpoint" and "recompute" not in new.meta:
                    new.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                    new.meta["ac_graph_id"] = recompute_id
    for reader in list(call.users):
        if op_of(reader).name == "getitem" and isinstance(reader.args[1], int):
            reader.replace_all_uses_with(result[reader.args[1]])
            gm.graph.erase_node(reader)
    if call.users:
        call.replace_all_uses_with(result)
    gm.graph.erase_node(call)
    if not source.users:
        gm.graph.erase_node(source)


def _adopt_attribute(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    value = getattr(body, name)
    new, number = name, 0
    while hasattr(gm, new) and getattr(gm, new) is not value:
        number += 1
        new = f"{name}_{number}"
    if not hasattr(gm, new):
        setattr(gm, new, value)
    return new


# --- spellings of add ---------------------------------------------------------------------------


def _unify_adds(graph: fx.Graph, context: Context) -> int:
    count = 0
    for node in list(graph.nodes):
        form = _ADD_FORMS.get(op_of(node).name)
        if form is None or "out" in node.kwargs or not is_float_tensor(node):
            continue
        new = form(Writer(node.prev, node), node, context)
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            count += 1
    return count


def _add(write: Writer, node: fx.Node, context: Context) -> fx.Node | None:
    if len(node.args) != 2:
        return None
    a, b = node.args
    for zero, kept in ((a, b), (b, a)):  # sum([x, y]) begins with 0 + x
        if type(zero) is int and zero == 0 and is_float_tensor(kept):
            return kept  # type: ignore[return-value]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    alpha = node.kwargs.get("alpha", 1)
    if node.target is operator.add and alpha == 1:
        return None
    return write.call(operator.add, a, _scaled(write, b, alpha))


def _addcmul(write: Writer, node: fx.Node, context: Context) -> fx.Node | None:
    if len(node.args) < 3:
        return None
    product = write.call(operator.mul, *node.args[1:3])
    product = _scaled(write, product, node.kwargs.get("value", 1))
    return write.call(operator.add, node.args[0], product)


def _addmm(write: Writer, node: fx.Node, context: Context) -> fx.Node | None:
    x = node.args[0] if len(node.args) >= 3 else None
    if not isinstance(x, fx.Node) or not same_shape(x, node) or x.name in context.trainable:
        return None  # a weight of full shape is a bias, not a stream
    product = write.call(torch.matmul, *node.args[1:3])
    product = _scaled(write, product, node.kwargs.get("alpha", 1))
    return write.call(operator.add, _scaled(write, x, node.kwargs.get("beta", 1)), product)


_ADD_FORMS = {"add": _add, "addcmul": _addcmul, "addmm": _addmm, "baddbmm": _addmm}


def _scaled(write: Writer, value: fx.Node, factor: Any) -> fx.Node:
    if not isinstance(factor, fx.Node) and factor == 1:
        return value
    return write.call(operator.mul, value, factor)


# --- RMSNorm written out ------------------------------------------------------------------------


def _join_rms_norms(graph: fx.Graph) -> int:
    count = 0
    for node in list(graph.nodes):
        match = spelled_out_rms_norm(node)
        if match is None:
            continue
        x, eps = match
        write = Writer(node.prev, node)
        x = write.cast(x, dtype_of(node))
        new = write.call(F.rms_norm, x, (shape_of(x)[-1],), None, eps)
        value = value_of(node)
        assert isinstance(value, torch.Tensor)
        if not value.is_contiguous():
            new = _laid_as(value, new, write)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    return count


def _laid_as(value: torch.Tensor, norm: fx.Node, write: Writer) -> fx.Node:
    """The result of ``rms_norm``, which is contiguous, in the order in memory that it had.

    Spelled out it lies as x does, and random numbers are drawn in that order.
    """
    order, back = memory_order(value)
    ordered = write.call("contiguous", write.call("permute", norm, order))
    return write.call("permute", ordered, back)
