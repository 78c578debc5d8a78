"""What every operation does to residual streams: one table, from the function itself to a record.

    torch.relu, F.relu, Tensor.relu, x.relu(), aten.relu.default   -> Op("relu", Kind.POINTWISE)
    mylib::relu, a function of the user's called relu              -> UNKNOWN: real computation

A name says nothing: only functions of torch and of Python's ``operator``, methods of plain tensors,
and the operators of ``aten``, ``prims`` and ``mhc`` are in the table. Whatever is not in it counts
as real computation (``Kind.MIXING``), so a custom attention kernel needs no entry. Spellings of one
operation share a record: ``torch.multiply`` and ``*`` are ``mul``; in place all of them are
``mul_``.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from . import _torch

__all__ = [
    "UNKNOWN",
    "Axes",
    "Kind",
    "Op",
    "after_write",
    "branch_input",
    "dtype_of",
    "holds_tensor",
    "hooked_tensor",
    "in_another_mode",
    "is_float_tensor",
    "memory_order",
    "op_name",
    "op_of",
    "same_shape",
    "same_sizes",
    "shape_of",
    "value_of",
]


class Kind(enum.Enum):
    """How an operation treats channels and tokens."""

    POINTWISE = "pointwise"
    CAST = "cast"
    DROPOUT = "dropout"
    NORM = "norm"
    VIEW = "view"
    MOVEMENT = "movement"  # reads other positions, computes nothing: cat, roll, gather
    REDUCTION = "reduction"
    SHAPE = "shape"  # looks at the shape only, never at the values
    MIXING = "mixing"  # matmul, convolution, attention, scan, FFT, pooling, and all unknown
    OTHER = "other"  # placeholders, outputs, modes


class Axes(enum.Enum):
    """What a view does to the axes of a tensor."""

    RESHAPE = "reshape"
    PERMUTE = "permute"
    RESIZE = "resize"  # adds or drops axes of size 1


@dataclass(frozen=True)
class Op:
    """What is known of an operation.

    Attributes:
        name: of all its spellings, with an underscore behind it in place; "" for what is not in the
            table.
        kind: how it treats channels and tokens.
        in_place: whether it writes into its first argument.
        linear: whether it commutes with mixing the streams.
        shows: whether its result may show the memory of its first argument.
        creates: whether it makes a tensor out of nothing but sizes.
        product: whether it is a matrix product.
        axes: what it does to the axes, of a view.
        channels: the axis of its input that its weights act on: from the right if negative, else
            from the left; None if it has no weights or does not tell.
        body: whether its first argument is a graph that it runs once, with the other arguments.
    """

    name: str
    kind: Kind
    in_place: bool = False
    linear: bool = False
    shows: bool = False
    creates: bool = False
    product: bool = False
    axes: Axes | None = None
    channels: int | None = None
    body: bool = False


UNKNOWN = Op("", Kind.MIXING)
"""Whatever is not in the table."""

_NO_OPERATION = Op("", Kind.OTHER)
"""Inputs, attributes and the output of a graph."""


# --- markers: functions of ours that return their argument, for the length of some passes ---------


def after_write(value: Any) -> Any:
    """The value itself, as it is behind a write into memory that it shows."""
    return value


def in_another_mode(value: Any) -> Any:
    """The value itself; stands, for the length of a pass, between two modes."""
    return value


def branch_input(x: torch.Tensor) -> torch.Tensor:
    """Stands for the input of a branch until H_pre X takes its place."""
    return x


# --- the table ------------------------------------------------------------------------------------


def _ops(kind: Kind, text: str, **fields: Any) -> Iterator[tuple[Op, list[str]]]:
    """A record for each word, with its names: ``mul=multiply`` has two."""
    for word in text.split():
        names = word.split("=")
        yield Op(names[0], kind, **fields), names


def _table() -> Iterator[tuple[Op, list[str]]]:
    yield from _ops(
        Kind.POINTWISE,
        """
        abs=absolute acos=arccos acosh=arccosh addcdiv addcmul asin=arcsin asinh=arcsinh
        atan=arctan atan2=arctan2 atanh=arctanh bitwise_and=and_ bitwise_not=invert bitwise_or=or_
        bitwise_xor=xor ceil celu clamp=clip clamp_max clamp_min copysign cos cosh elu eq erf erfc
        erfinv exp exp2 expm1 floor floor_divide=floordiv fmod frac ge=greater_equal gelu gt=greater
        hardshrink hardsigmoid hardswish hardtanh heaviside isfinite isinf isnan le=less_equal
        leaky_relu lerp log log10 log1p log2 logaddexp logical_and logical_not logical_or
        logical_xor logit logsigmoid lt=less masked_fill maximum minimum mish nan_to_num
        ne=not_equal pow reciprocal relu relu6 remainder=mod round rrelu rsqrt selu sgn
        sigmoid sign silu sin sinc sinh softplus softshrink softsign sqrt square tan tanh
        tanhshrink threshold trunc
        where xlogy lift_fresh_copy hook_enter hook_leave
        """,
    )
    yield from _ops(
        Kind.POINTWISE, "add mul=multiply sub=subtract div=divide=true_divide=truediv", linear=True
    )
    yield from _ops(Kind.POINTWISE, "neg=negative positive=pos clone", linear=True)
    yield from _ops(Kind.POINTWISE, "rsub rdiv")
    yield from _ops(Kind.POINTWISE, "prelu", channels=1)
    yield from _ops(Kind.POINTWISE, "contiguous detach identity", linear=True, shows=True)
    yield from _ops(Kind.POINTWISE, "alias")
    yield from _ops(
        Kind.CAST,
        "to double float half bfloat16 type type_as _to_copy convert_element_type cpu cuda",
        linear=True,
        shows=True,
    )
    yield from _ops(
        Kind.DROPOUT,
        "dropout dropout1d dropout2d dropout3d feature_dropout",
        linear=True,
        shows=True,
    )
    yield from _ops(Kind.NORM, "layer_norm rms_norm native_layer_norm", channels=-1)
    yield from _ops(Kind.NORM, "batch_norm group_norm instance_norm native_group_norm", channels=1)
    yield from _ops(
        Kind.NORM,
        "normalize local_response_norm native_batch_norm _native_batch_norm_legit",
    )
    yield from _views()
    yield from _ops(
        Kind.MOVEMENT,
        """
        cat=concat=concatenate stack hstack vstack roll flip fliplr flipud repeat tile
        repeat_interleave pad constant_pad_nd index_select index gather take take_along_dim
        rot90 scatter scatter_add index_add index_put index_copy tril triu masked_select
        masked_scatter one_hot select_scatter slice_scatter broadcast_tensors meshgrid
        """,
    )
    yield from _ops(Kind.MOVEMENT, "setitem copy_ fill_ zero_", in_place=True)
    yield from _ops(
        Kind.REDUCTION,
        """
        mean sum amax amin max min argmax argmin var std var_mean std_mean norm vector_norm prod
        softmax _softmax log_softmax softmin logsumexp all any topk sort argsort median nansum
        nanmean count_nonzero linalg_norm linalg_vector_norm kthvalue mode aminmax cross_entropy
        mse_loss
        """,
    )
    yield from _ops(
        Kind.SHAPE,
        "zeros_like ones_like full_like new_zeros new_ones new_full",
        creates=True,
    )
    yield from _ops(Kind.MIXING, "zeros ones full empty", creates=True)
    yield from _ops(
        Kind.SHAPE,
        """
        size dim ndimension numel nelement stride empty_like rand_like randn_like randint_like
        new_empty new_tensor sym_size sym_numel sym_stride is_floating_point is_complex get_device
        _log_api_usage_once bernoulli
        """,
    )
    yield from _ops(Kind.MIXING, "linear matmul mm bmm addmm", product=True, channels=-1)
    yield from _ops(Kind.MIXING, "einsum baddbmm", product=True)
    for k in (1, 2, 3):
        yield from _ops(Kind.MIXING, f"conv{k}d conv_transpose{k}d", channels=-1 - k)
    yield from _ops(Kind.MIXING, "convolution", channels=1)
    yield from _ops(Kind.MIXING, "diag_embed sinkhorn_knopp autograd_function_apply")
    yield from _ops(Kind.MIXING, "tag_activation_checkpoint invoke_subgraph wrap", body=True)
    yield from _ops(
        Kind.OTHER,
        """
        inference_mode manual_seed declare lift_fresh requires_grad_
        set_inplace_requires_grad_allowed
        _enter_autocast _exit_autocast _set_grad_enabled _enter_inference_mode
        _exit_inference_mode _saved_tensors_hooks_disable _saved_tensors_hooks_enable
        """,
    )


def _views() -> Iterator[tuple[Op, list[str]]]:
    known = {"linear": True, "shows": True}
    reshapes = "view reshape flatten unflatten _unsafe_view"
    permutes = "transpose=swapaxes=swapdims permute movedim=moveaxis t"
    yield from _ops(Kind.VIEW, reshapes, axes=Axes.RESHAPE, **known)
    yield from _ops(Kind.VIEW, permutes, axes=Axes.PERMUTE, **known)
    yield from _ops(Kind.VIEW, "squeeze unsqueeze", axes=Axes.RESIZE, **known)
    yield from _ops(
        Kind.VIEW,
        """
        T mT adjoint view_as reshape_as expand expand_as getitem narrow chunk split
        split_with_sizes tensor_split unbind select slice real imag view_as_real view_as_complex
        broadcast_to diagonal unfold_copy getattr
        """,
        **known,
    )


_MARKERS = {
    after_write: Op("after_write", Kind.OTHER, shows=True),
    in_another_mode: Op("in_another_mode", Kind.OTHER, shows=True),
}
_NAMESPACES = {"aten", "prims", "mhc"}
_OpOverload = type(torch.ops.aten.add.Tensor)
_PYTHON = {"lt", "le", "eq", "ne", "ge", "gt"}
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
_REVERSED = {"radd": "add", "rmul": "mul", "rsub": "rsub", "rtruediv": "rdiv", "rdiv": "rdiv"}


class _Targets(dict[Any, Op]):
    """From functions to records; operators are looked up by their namespace when they are met."""

    def __missing__(self, target: Any) -> Op:
        if isinstance(target, _OpOverload):
            found = UNKNOWN
            if target.namespace in _NAMESPACES:
                found = _BY_NAME.get(target.overloadpacket.__name__, UNKNOWN)
            self[target] = found
            return found
        name = getattr(target, "__name__", None)
        if name is not None and _torch.is_higher_order(target, name):
            return _BY_NAME.get(name, UNKNOWN)
        if (getattr(target, "__module__", None) or "").startswith("torch"):
            self[target] = UNKNOWN  # no object of a user's, which would live as long as this
        return UNKNOWN


def _written(op: Op) -> Op:
    """An operation in place: ``add_``."""
    return replace(op, name=f"{op.name}_", in_place=True)


def _named() -> dict[str, Op]:
    """Every spelling with its record; in place with an underscore behind it (``relu_``)."""
    named: dict[str, Op] = {}
    for op, names in _table():
        for name in names:
            named[name] = op
    for name, op in list(named.items()):
        if not name.endswith("_") and op.kind not in (Kind.SHAPE, Kind.OTHER):
            named.setdefault(f"{name}_", _written(op))
    return named


_BY_NAME = _named()


def _functions() -> Iterator[tuple[Any, Op]]:
    """The functions of torch that have these names, and the methods of ``torch.Tensor``."""
    for name, op in _BY_NAME.items():
        places = [torch, F, torch.Tensor]
        if name.startswith("linalg_"):
            places, name = [torch.linalg], name.removeprefix("linalg_")
        for place in places:
            if (function := getattr(place, name, None)) is not None and callable(function):
                yield function, op
    yield from ((function, _BY_NAME[name]) for name, function in _torch.private_functions(_BY_NAME))
    yield getattr, _BY_NAME["getattr"]


def _python_operators() -> Iterator[tuple[str, Op]]:
    """``add``, ``iadd``, ``radd``: functions of ``operator``, and ``__add__`` of tensors."""
    names = {**{name: name for name in _BY_NAME}, "inv": "invert"}
    for name, known in names.items():
        if hasattr(operator, name):
            yield name, _BY_NAME[known]
    for name in _IN_PLACE:
        full = _BY_NAME.get(name) or _BY_NAME[f"{name}_"]
        yield f"i{name}", _written(full)
    for name in ("and", "or"):
        yield name, _BY_NAME[f"{name}_"]
    for name, known in _REVERSED.items():
        yield name, _BY_NAME[known]


def _methods() -> dict[str, Op]:
    """What a method of a plain tensor is, by its name."""
    found = {name: op for name, op in _BY_NAME.items() if hasattr(torch.Tensor, name)}
    return found | {f"__{name}__": op for name, op in _python_operators()}


def _targets() -> _Targets:
    found = _Targets(_MARKERS)
    for name, op in _python_operators():
        for place, attribute in ((operator, name), (torch.Tensor, f"__{name}__")):
            if (function := getattr(place, attribute, None)) is not None:
                found[function] = op
    for function, op in _functions():
        found[function] = op
    return found


_METHODS = _methods()
_TARGETS = _targets()


def op_of(node: fx.Node) -> Op:
    """What is known of a node's operation."""
    if node.op == "call_function":
        try:
            return _TARGETS[node.target]
        except TypeError:  # a callable object that cannot be hashed
            return UNKNOWN
    if node.op != "call_method":
        return _NO_OPERATION
    found = _METHODS.get(str(node.target), UNKNOWN)
    meta = node.args[0].meta if node.args and isinstance(node.args[0], fx.Node) else {}
    owner = type(meta.get("example_value"))
    return found if owner in _torch.PLAIN_TENSORS else _of_a_subclass(owner, node, found)


def _of_a_subclass(owner: type, call: fx.Node, op: Op) -> Op:
    """A method that a subclass of ``torch.Tensor`` has in the place of its own is not known."""
    name = str(call.target)
    own = getattr(owner, name, None) is not getattr(torch.Tensor, name, None)
    return UNKNOWN if issubclass(owner, torch.Tensor) and own else op


_PACKAGES = {"torch", "operator", "_operator", "builtins", "math", __name__.partition(".")[0]}


def op_name(node: fx.Node) -> str:
    """How an operation is called, for people and in the names of branches.

    Of torch and Python the bare name (``Tensor.__iadd__`` is ``iadd``), of others with their
    namespace or module: ``mylib::add``.
    """
    target = node.target
    if isinstance(target, str):
        return _bare(target) if node.op == "call_method" else node.op
    if isinstance(target, _OpOverload):
        name = target.overloadpacket.__name__
        known = target.namespace in _NAMESPACES
        return _bare(name) if known else f"{target.namespace}::{name}"
    name = getattr(target, "__name__", type(target).__name__)
    module = getattr(target, "__module__", None) or "builtins"  # of torch.add it is None
    known = module.partition(".")[0] in _PACKAGES
    return _bare(name) if known else f"{module}::{name}"


def _bare(name: str) -> str:
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name.startswith("r") and name[1:] in ("add", "mul", "sub", "truediv"):
            name = {"radd": "add", "rmul": "mul", "rsub": "rsub", "rtruediv": "rdiv"}[name]
    return name


def hooked_tensor(node: fx.Node) -> fx.Node | None:
    """The tensor that a node is on its way past backward hooks: ``hook_enter([x, y], ...)[0]``."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    call, index = node.args
    if op_of(call).name not in ("hook_enter", "hook_leave"):  # type: ignore[arg-type]
        return None
    tensors: Any = call.args[0]  # type: ignore[union-attr]
    return tensors[index] if index < len(tensors) else None  # type: ignore[operator]


def value_of(node: fx.Node) -> object:
    """The fake value that the capture left on a node (``None`` if it has none)."""
    return node.meta.get("example_value", node.meta.get("val"))


def holds_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a tuple or list with one."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def is_float_tensor(node: object) -> bool:
    """Whether a graph value is a floating-point tensor."""
    if not isinstance(node, fx.Node):
        return False
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return value.dtype


def shape_of(node: fx.Node) -> tuple[object, ...]:
    """The shape of a tensor node, sizes as ints or SymInts; an int where a symbol is known."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return ()
    sizes = tuple(value.shape)
    return sizes if {*map(type, sizes)} <= {int} else tuple(map(_known_size, sizes))


def _known_size(size: object) -> object:
    """A symbolic size that a guard has made a number prints as that number."""
    if type(size) is int:
        return size
    text = str(size)
    return int(text) if text.isdecimal() else size


def memory_order(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutation after which a dense tensor is contiguous, and the one that undoes it."""
    order = tuple(value.dim_order())
    return order, tuple(sorted(range(len(order)), key=order.__getitem__))


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors are known to have one shape; installs no guard."""
    return same_sizes(shape_of(a), shape_of(b))


def same_sizes(a: Iterable[object], b: Iterable[object]) -> bool:
    """Whether sizes are known to be equal; installs no guard.

    Symbolic ones are where they are one expression, or where what the capture has assumed (that two
    operands of an add fit) says so: ``s // 4`` and ``(s // 4) ** 2 // (s // 4)``.
    """
    left, right = list(a), list(b)
    return len(left) == len(right) and all(map(_same_size, left, right))


def _same_size(a: Any, b: Any) -> bool:
    if str(a) == str(b):
        return True
    are_sizes = isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt))
    return are_sizes and _torch.statically_known_true(a == b)
