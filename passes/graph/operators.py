"""What an operation does to a residual stream, by the operation's name.

One vocabulary for every spelling: ``torch.relu(x)``, ``x.relu()``, ``F.relu(x)`` and
``aten.relu.default(x)`` all have the name ``relu``. An operation that is not listed counts as
real computation (``Kind.MIXING``): a custom attention kernel needs no entry here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

__all__ = [
    "Kind",
    "dtype_of",
    "holds_tensor",
    "hooked_tensor",
    "is_float_tensor",
    "kind_of",
    "memory_order",
    "op_name",
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


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KINDS: dict[Kind, frozenset[str]] = {
    Kind.POINTWISE: _names(
        """
        abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and
        bitwise_not bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min clip clone
        contiguous copysign cos cosh detach div divide elu eq erf erfc erfinv exp exp2 expm1
        floor floor_divide fmod frac ge gelu greater greater_equal gt hardshrink hardsigmoid
        hardswish hardtanh heaviside identity invert isfinite isinf isnan le leaky_relu lerp less
        less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or logical_xor
        logit logsigmoid lt masked_fill maximum minimum mish mod mul multiply nan_to_num ne
        neg negative not_equal pos positive pow prelu reciprocal relu relu6 remainder round
        rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign
        sqrt square sub subtract swish tan tanh tanhshrink threshold true_divide truediv trunc
        where xlogy and_ or_ xor floordiv scalar_tensor_mul lift_fresh_copy alias
        hook_enter hook_leave
        """
    ),
    Kind.CAST: _names(
        "to float double half bfloat16 type type_as _to_copy convert_element_type cpu cuda"
    ),
    Kind.DROPOUT: _names("dropout dropout1d dropout2d dropout3d feature_dropout"),
    Kind.NORM: _names(
        """
        layer_norm rms_norm group_norm instance_norm batch_norm normalize local_response_norm
        native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit
        """
    ),
    Kind.VIEW: _names(
        """
        view reshape flatten unflatten squeeze unsqueeze transpose permute swapaxes swapdims
        movedim moveaxis t T mT adjoint view_as reshape_as expand expand_as getitem narrow chunk
        split split_with_sizes tensor_split unbind select slice _unsafe_view real imag
        view_as_real view_as_complex broadcast_to diagonal unfold_copy getattr
        """
    ),
    Kind.MOVEMENT: _names(
        """
        cat concat concatenate stack hstack vstack roll flip fliplr flipud repeat tile
        repeat_interleave pad constant_pad_nd index_select index gather take take_along_dim
        rot90 scatter scatter_add scatter_add_ index_add index_add_ index_put index_put_
        index_copy index_copy_ setitem copy_ tril triu masked_select masked_scatter
        one_hot select_scatter slice_scatter broadcast_tensors meshgrid fill_ zero_
        """
    ),
    Kind.REDUCTION: _names(
        """
        mean sum amax amin max min argmax argmin var std var_mean std_mean norm vector_norm prod
        softmax log_softmax softmin logsumexp all any topk sort argsort median nansum nanmean
        count_nonzero linalg_norm linalg_vector_norm _softmax kthvalue mode aminmax cross_entropy
        mse_loss
        """
    ),
    Kind.SHAPE: _names(
        """
        size dim ndimension numel nelement stride zeros_like ones_like empty_like full_like
        rand_like randn_like randint_like new_zeros new_ones new_empty new_full new_tensor
        sym_size sym_numel sym_stride is_floating_point is_complex get_device _log_api_usage_once
        bernoulli
        """
    ),
    Kind.OTHER: _names(
        """
        _enter_autocast _exit_autocast _set_grad_enabled inference_mode _enter_inference_mode
        _exit_inference_mode manual_seed declare after_write in_another_mode
        _saved_tensors_hooks_disable _saved_tensors_hooks_enable lift_fresh
        requires_grad_ set_inplace_requires_grad_allowed
        """
    ),
}
_OpOverload = type(torch.ops.aten.add.Tensor)
_KIND_OF_NAME = {name: kind for kind, names in _KINDS.items() for name in names}


_NAMESPACES = {"aten", "prims", "mhc"}
_OURS = __name__.partition(".")[0]
_PACKAGES = {"torch", "operator", "_operator", "builtins", "math", _OURS}


def op_name(node: fx.Node) -> str:
    """The operation's bare name: ``operator.iadd``, ``Tensor.__iadd__`` -> ``iadd``.

    Only what Python, torch and this library define has one. Others may call theirs alike and mean
    something else: those have their namespace or module in front, ``mylib::add``, which no pass
    knows.
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


def kind_of(node: fx.Node) -> Kind:
    """The kind of a node's operation; anything unknown is real computation."""
    if node.op not in ("call_function", "call_method"):
        return Kind.OTHER
    name = op_name(node)
    kind = _KIND_OF_NAME.get(name)
    if kind is None and name.endswith("_") and not name.endswith("__"):
        kind = _KIND_OF_NAME.get(name[:-1])
    if kind is None and name.startswith("i") and name[1:] in ("add", "mul", "sub", "truediv"):
        kind = Kind.POINTWISE
    return Kind.MIXING if kind is None else kind


def hooked_tensor(node: fx.Node) -> fx.Node | None:
    """The tensor that a node is on its way past backward hooks: ``hook_enter([x, y], ...)[0]``."""
    if op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
        return None
    call, index = node.args
    if op_name(call) not in ("hook_enter", "hook_leave"):  # type: ignore[arg-type]
        return None
    tensors: Any = call.args[0]  # type: ignore[union-attr]
    return tensors[index] if index < len(tensors) else None  # type: ignore[operator]


def value_of(node: fx.Node) -> object:
    """The fake value that the capture left on a node (``None`` if it has none)."""
    meta = node.meta
    return meta["example_value"] if "example_value" in meta else meta.get("val")


def holds_tensor(node: fx.Node) -> bool:
    """Whether a node's value is a tensor or a tuple or list with one."""
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def is_float_tensor(node: object) -> bool:
    """Whether a graph value is a floating-point tensor."""
    if not isinstance(node, fx.Node):
        return False
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor node."""
    value = value_of(node)
    assert isinstance(value, torch.Tensor)
    return value.dtype


def shape_of(node: fx.Node) -> tuple[object, ...]:
    """The shape of a tensor node, sizes as ints or SymInts; an int where a symbol is known."""
    value = value_of(node)
    return tuple(map(_known_size, value.shape)) if isinstance(value, torch.Tensor) else ()


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
    return are_sizes and statically_known_true(a == b)
