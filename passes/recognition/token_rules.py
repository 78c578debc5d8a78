"""What single operations do to tokens: the rules by which ``evaluation`` runs a part of a graph.

    x.unflatten(-1, (4, 4))        [TOKENS, 16] -> [TOKENS, 4, 4]
    x.view(2, 5, 4, 4)             the same, of [2, 5, 16]
    x.sum(0)                       no rule, if dimension 0 holds tokens

Note [Tokens]
    A tensor of a graph is ``[*tokens, *tail]``. Here its leading dimensions, however many and
    whatever their sizes (static, symbolic, zero), are ONE dimension of ``TOKENS`` random tokens.
    ``Value.lead`` says how many dimensions that one stands for; a tensor without tokens
    (a parameter) has lead 0 and one "token" that broadcasts.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import reference
from ..graph.operators import holds_tensor, is_float_tensor, op_of, same_sizes, shape_of

__all__ = ["TOKENS", "Known", "Value", "evaluate", "has_rule"]

TOKENS = 3


@dataclass(frozen=True)
class Value:
    """A tensor of the graph on random tokens: ``[TOKENS, *tail]``; ``[1, *shape]`` for lead 0."""

    data: Tensor
    lead: int

    @property
    def tail(self) -> tuple[int, ...]:
        return tuple(self.data.shape[1:])


Known = dict[fx.Node, Any]
"""From a node to its ``Value``, or to a tuple of them."""


def evaluate(node: fx.Node, known: Known) -> Any:
    """The value of a node from those of its operands; None where there is no rule for it."""
    rule = _RULES.get(op_of(node).name)
    tensors = [n for n in node.all_input_nodes if holds_tensor(n)]
    if rule is None or not tensors or any(n not in known for n in tensors):
        return None
    try:
        value = rule(_Call(node, known))
    except _NoRule:
        return None
    return value if _is_consistent(node, value, known) else None


def has_rule(node: fx.Node) -> bool:
    """Whether some uses of a node's operation are known."""
    return op_of(node).name in _RULES


def _is_consistent(node: fx.Node, value: Any, known: Known) -> bool:
    """Whether a value has the shape of its node, and operands were not broadcast over tokens."""
    if not isinstance(value, Value):
        return True
    if not same_sizes(shape_of(node)[value.lead :], value.tail):
        return False
    if _RULES[op_of(node).name] is _view:
        return True
    return all(
        same_sizes(shape_of(n)[: value.lead], shape_of(node)[: value.lead])
        for n in node.all_input_nodes
        if isinstance(known.get(n), Value) and known[n].lead
    )


class _NoRule(Exception):
    """An operation, or a use of it, whose effect on single tokens is not known."""


class _Call:
    """One node with its operands as values; dimensions come out counted from the end."""

    def __init__(self, node: fx.Node, known: Known) -> None:
        self.node, self.known = node, known

    def value(self, argument: Any) -> Value:
        found = self.known.get(argument) if isinstance(argument, fx.Node) else None
        if not isinstance(found, Value):
            raise _NoRule
        return found

    @property
    def first(self) -> Value:
        return self.value(self.node.args[0] if self.node.args else self.node.kwargs.get("input"))

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """A further argument, by position or by name; graph values are refused."""
        args, kwargs = self.node.args, self.node.kwargs
        found: Any = args[position] if len(args) > position else default
        found = next((kwargs[name] for name in names if name in kwargs), found)
        if any(isinstance(part, fx.Node) for part in _flat(found)):
            raise _NoRule
        return found

    def dim(self, position: int, value: Value, *, new: int = 0, default: Any = None) -> int:
        return _from_end(self.argument(position, "dim", default=default), value, new)


def _flat(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _from_end(dim: Any, value: Value, new: int = 0) -> int:
    """A dimension of the tail, counted from the end; ``new`` counts dimensions to be added."""
    rank = len(value.tail) + new
    if type(dim) is not int:
        raise _NoRule
    found = dim if dim < 0 else dim - rank - value.lead
    if not -rank <= found < 0:
        raise _NoRule
    return found


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[_Call], Value]:
    def rule(call: _Call) -> Value:
        if len(call.node.args) != 1 or call.node.kwargs:
            raise _NoRule
        return Value(function(call.first.data), call.first.lead)

    return rule


def _same(call: _Call) -> Value:
    if not is_float_tensor(call.node):
        raise _NoRule
    return call.first


def _binary(function: Callable[[Any, Any], Tensor]) -> Callable[[_Call], Value]:
    def rule(call: _Call) -> Value:
        if len(call.node.args) != 2 or call.node.kwargs:
            raise _NoRule
        operands = [a if type(a) in (int, float) else call.value(a) for a in call.node.args]
        values = [o for o in operands if isinstance(o, Value)]
        leads = {v.lead for v in values if v.lead}
        if len(leads) > 1:
            raise _NoRule
        lead = max(v.lead for v in values)
        rank = len(shape_of(call.node)) - lead
        data = [_aligned(o, lead, rank) if isinstance(o, Value) else o for o in operands]
        return Value(function(*data), lead)

    return rule


def _aligned(value: Value, lead: int, rank: int) -> Tensor:
    """The data with as many tail dimensions as the result has."""
    tail = value.tail
    while lead and value.lead == 0 and len(tail) > rank and tail[0] == 1:
        tail = tail[1:]
    if len(tail) > rank:
        raise _NoRule
    return value.data.reshape(-1, *(1,) * (rank - len(tail)), *tail)


def _reduction(function: Callable[..., Tensor], *, keeps: bool) -> Callable[[_Call], Value]:
    """Over tail dimensions. ``keeps``: the shape stays (softmax)."""

    def rule(call: _Call) -> Value:
        x, given = call.first, call.argument(1, "dim")
        dims = [_from_end(d, x) for d in _flat(given)]
        if not dims or (keeps and len(dims) > 1):
            raise _NoRule
        if keeps:
            return Value(function(x.data, dims[0]), x.lead)
        keepdim = call.argument(2, "keepdim", default=False)
        return Value(function(x.data, dims, keepdim=keepdim), x.lead)

    return rule


def _unsqueeze(call: _Call) -> Value:
    return Value(call.first.data.unsqueeze(call.dim(1, call.first, new=1)), call.first.lead)


def _squeeze(call: _Call) -> Value:
    x = call.first
    return Value(x.data.squeeze([_from_end(d, x) for d in _flat(call.argument(1, "dim"))]), x.lead)


def _transpose(call: _Call) -> Value:
    x = call.first
    names = (("dim0", "axis0"), ("dim1", "axis1"))
    dims = [_from_end(call.argument(i + 1, *names[i]), x) for i in range(2)]
    return Value(x.data.transpose(*dims), x.lead)


def _matrix_transpose(call: _Call) -> Value:
    attribute = call.node.args[1] if op_of(call.node).name == "getattr" else "mT"
    if attribute not in ("mT", "T") or len(call.first.tail) != 2:
        raise _NoRule
    if attribute == "T" and call.first.lead:
        raise _NoRule
    return Value(call.first.data.mT, call.first.lead)


def _permute(call: _Call) -> Value:
    x = call.first
    given = call.argument(1, "dims")
    order: list[Any] = list(given if isinstance(given, (tuple, list)) else call.node.args[1:])
    if any(type(d) is not int for d in order):
        raise _NoRule
    order = [d % len(order) for d in order]
    if order[: x.lead] != list(range(x.lead)):
        raise _NoRule
    return Value(x.data.permute(0, *(d - x.lead + 1 for d in order[x.lead :])), x.lead)


def _unflatten(call: _Call) -> Value:
    sizes = call.argument(2, "sizes")
    return Value(call.first.data.unflatten(call.dim(1, call.first), sizes), call.first.lead)


def _flatten(call: _Call) -> Value:
    start = _from_end(call.argument(1, "start_dim", default=0), call.first)
    end = _from_end(call.argument(2, "end_dim", default=-1), call.first)
    return Value(call.first.data.flatten(start, end), call.first.lead)


def _view(call: _Call) -> Value:
    """Any reshape that moves nothing between the leading dimensions and the tail."""
    x = call.first
    shape: tuple[Any, ...] = shape_of(call.node)
    before = shape_of(call.node.args[0])[: x.lead]  # type: ignore[arg-type]
    if any(isinstance(a, torch.dtype) for a in call.node.args):
        raise _NoRule
    lead = x.lead
    if not same_sizes(shape[:lead], before):
        lead, count = len(shape), math.prod(x.tail)
        while lead and _product(shape[lead:]) != count:
            lead -= 1
    if (lead == 0) != (x.lead == 0) or _product(shape[lead:]) != math.prod(x.tail):
        raise _NoRule
    return Value(x.data.reshape(-1, *shape[lead:]), lead)


def _product(sizes: Iterable[Any]) -> int | None:
    found = list(sizes)
    return math.prod(found) if all(type(size) is int for size in found) else None


def _select(call: _Call) -> Value:
    index = call.argument(2, "index")
    return Value(call.first.data.select(call.dim(1, call.first), index), call.first.lead)


def _narrow(call: _Call) -> Value:
    start, length = call.argument(2, "start"), call.argument(3, "length")
    return Value(call.first.data.narrow(call.dim(1, call.first), start, length), call.first.lead)


def _parts(function: Callable[..., Iterable[Tensor]]) -> Callable[[_Call], tuple[Value, ...]]:
    def rule(call: _Call) -> tuple[Value, ...]:
        x, names = call.first, ("split_size_or_sections", "split_size", "split_sizes", "chunks")
        size, dim = call.argument(1, *names), call.dim(2, call.first, default=0)
        if isinstance(size, tuple):
            size = list(size)
        return tuple(Value(part, x.lead) for part in function(x.data, size, dim))

    return rule


def _unbind(call: _Call) -> tuple[Value, ...]:
    dim = call.dim(1, call.first, default=0)
    return tuple(Value(part, call.first.lead) for part in call.first.data.unbind(dim))


def _getitem(call: _Call) -> Value:
    source, index = call.node.args
    parts = call.known.get(source)  # type: ignore[arg-type]
    if isinstance(parts, tuple):
        if type(index) is not int:
            raise _NoRule
        return parts[index]
    x = call.first
    wanted: list[Any] = list(index) if isinstance(index, tuple) else [index]
    if any(not (w is None or w is ... or type(w) in (int, slice)) for w in wanted):
        raise _NoRule
    if any(isinstance(b, fx.Node) for w in wanted if isinstance(w, slice) for b in _bounds(w)):
        raise _NoRule
    missing = x.lead + len(x.tail) - sum(w is not None and w is not ... for w in wanted)
    place = wanted.index(...) if ... in wanted else len(wanted)
    wanted[place : place + 1] = [slice(None)] * missing
    if any(w != slice(None) for w in wanted[: x.lead]):
        raise _NoRule
    return Value(x.data[(slice(None), *wanted[x.lead :])], x.lead)


def _bounds(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step


def _flip(call: _Call) -> Value:
    dims = [_from_end(d, call.first) for d in _flat(call.argument(1, "dims"))]
    return Value(call.first.data.flip(dims), call.first.lead)


def _triangle(function: Callable[..., Tensor]) -> Callable[[_Call], Value]:
    def rule(call: _Call) -> Value:
        if len(call.first.tail) < 2:
            raise _NoRule
        return Value(
            function(call.first.data, call.argument(1, "diagonal", default=0)), call.first.lead
        )

    return rule


def _joined(function: Callable[..., Tensor], *, new: int) -> Callable[[_Call], Value]:
    def rule(call: _Call) -> Value:
        given = call.node.args[0]
        if not isinstance(given, (tuple, list)):
            raise _NoRule
        values = [call.value(v) for v in given]
        if len({(v.lead, len(v.tail)) for v in values}) != 1:
            raise _NoRule
        dim = call.dim(1, values[0], new=new, default=0)
        return Value(function([v.data for v in values], dim), values[0].lead)

    return rule


def _matmul(call: _Call) -> Value:
    if len(call.node.args) != 2:
        raise _NoRule
    a, b = (call.value(v) for v in call.node.args)
    if a.lead != b.lead or len(a.tail) != 2 or len(b.tail) != 2:
        raise _NoRule
    return Value(a.data @ b.data, a.lead)


def _einsum(call: _Call) -> Value:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    values = [call.value(o) for o in operands]
    if not isinstance(equation, str) or len({v.lead for v in values}) != 1:
        raise _NoRule
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = [*inputs.split(","), output]
    if not arrow or len(terms) != len(values) + 1:
        raise _NoRule
    if not all(term.startswith("...") for term in terms):
        lead = values[0].lead
        if len({term[:lead] for term in terms}) != 1 or any("." in term for term in terms):
            raise _NoRule
        if set(terms[0][:lead]) & set("".join(term[lead:] for term in terms)):
            raise _NoRule
        terms = [f"...{term[lead:]}" for term in terms]
    spelled = f"{','.join(terms[:-1])}->{terms[-1]}"
    tails = [len(term) - 3 for term in terms[:-1]]
    if tails != [len(v.tail) for v in values]:
        raise _NoRule
    return Value(torch.einsum(spelled, *(v.data for v in values)), values[0].lead)


def _largest(call: _Call) -> Any:
    """The largest over tail dimensions, as ANY numbers: what is right for all is right for these.

    It is no analytic function, but where it is subtracted from logits for the range of exp, the
    result does not depend on it. ``max`` gives indices beside.
    """
    x, dims = call.first, [_from_end(d, call.first) for d in _flat(call.argument(1, "dim"))]
    shape = list(x.data.shape)
    for dim in dims:
        shape[dim] = 1
    seed = zlib.crc32(call.node.name.encode())
    drawn = torch.randn(shape, dtype=x.data.dtype, generator=torch.Generator().manual_seed(seed))
    if not call.argument(2, "keepdim", default=False):
        drawn = drawn.squeeze(dims)
    value = Value(drawn, x.lead)
    return (value, value) if op_of(call.node).name == "max" else value


def _detach(call: _Call) -> Value:
    """Of a value on which, as ``_largest`` has it, nothing depends; elsewhere it cuts gradients."""
    source = call.node.args[0]
    while isinstance(source, fx.Node) and op_of(source).name == "getitem":
        source = source.args[0]
    if not isinstance(source, fx.Node) or op_of(source).name not in ("amax", "max"):
        raise _NoRule
    return call.first


def _sinkhorn_knopp(call: _Call) -> Value:
    iterations, eps = call.argument(1, "iters"), call.argument(2, "eps", default=0.0)
    return Value(reference.sinkhorn_knopp(call.first.data, iterations, eps), call.first.lead)


def _names(text: str, rule: Callable[[_Call], Any]) -> dict[str, Callable[[_Call], Any]]:
    return dict.fromkeys(text.split(), rule)


_RULES: dict[str, Callable[[_Call], Any]] = {
    "sigmoid": _unary(torch.sigmoid),
    "tanh": _unary(torch.tanh),
    "exp": _unary(torch.exp),
    "neg": _unary(torch.neg),
    "reciprocal": _unary(torch.reciprocal),
    "square": _unary(torch.square),
    "zeros_like": _unary(torch.zeros_like),
    "ones_like": _unary(torch.ones_like),
    "diag_embed": _unary(torch.diag_embed),
    "contiguous": _unary(lambda x: x),
    "clone": _unary(lambda x: x),
    **_names("to float double half bfloat16 type type_as", _same),
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "rsub": _binary(lambda a, b: b - a),
    "mul": _binary(torch.mul),
    "div": _binary(torch.true_divide),
    "rdiv": _binary(lambda a, b: b / a),
    "sum": _reduction(torch.sum, keeps=False),
    "mean": _reduction(torch.mean, keeps=False),
    "logsumexp": _reduction(torch.logsumexp, keeps=False),
    "softmax": _reduction(torch.softmax, keeps=True),
    "log_softmax": _reduction(torch.log_softmax, keeps=True),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "transpose": _transpose,
    **_names("mT adjoint getattr", _matrix_transpose),
    "permute": _permute,
    "unflatten": _unflatten,
    "flatten": _flatten,
    **_names("view reshape view_as reshape_as", _view),
    "select": _select,
    "narrow": _narrow,
    **_names("split split_with_sizes", _parts(torch.split)),
    "chunk": _parts(torch.chunk),
    "unbind": _unbind,
    "getitem": _getitem,
    "flip": _flip,
    "tril": _triangle(torch.tril),
    "triu": _triangle(torch.triu),
    "cat": _joined(torch.cat, new=0),
    "stack": _joined(torch.stack, new=1),
    **_names("matmul bmm", _matmul),
    "einsum": _einsum,
    **_names("amax max", _largest),
    "detach": _detach,
    "sinkhorn_knopp": _sinkhorn_knopp,
}
