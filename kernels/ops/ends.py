"""The `mhc::` operators at the ends of a chain: one stream to n, and n streams to one.

    mhc::expand(x, n)                                          -> X
    mhc::readout(X, kind, dtype)                               -> x
    mhc::head(X, phi, alpha, bias, eps, offset, dtype)         -> x, weights, y, inv_r
    mhc::readout_backward, mhc::head_backward

`reference` says what they mean (`expand`, `readout`, `head_readout`). Shapes, dtypes and what
else all operators have in common are those of `site`; weights are `[..., n]`. `expand` and
`readout` are linear and may be differentiated any number of times, `head` once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from .. import eager
from ..dtypes import compute_dtype
from .site import Call, empty_like, refuse_double_backward, weights, without_autocast

KINDS = ("mean", "sum")

# --- one stream to n ------------------------------------------------------------------------------


@custom_op("mhc::expand", mutates_args=())
def expand(x: Tensor, n: int) -> Tensor:
    """n equal streams, `[..., C]` -> `[..., n, C]`, same dtype."""
    return _copied(x, n, "sum", x.dtype)


@expand.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return _fake_streams(x, n, x.dtype)


def _keep_width(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _expand_formula(ctx: Any, dX: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mhc.readout.default(dX, "sum", ctx.dtype), None


expand.register_autograd(_expand_formula, setup_context=_keep_width)


# --- n streams to one by their mean or sum --------------------------------------------------------


@custom_op("mhc::readout", mutates_args=())
def readout(X: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The `mean` or `sum` of the streams `[..., n, C]`, `[..., C]` in `dtype`.

    Raises:
        ValueError: for another kind.
    """
    _check_kind(kind)
    call = Call(X, _exact(X), dtype)
    return call.shaped(call.kernels.readout(call.streams(X), kind), dtype)


@readout.register_fake
def _(X: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    _check_kind(kind)
    return X.new_empty(*X.shape[:-2], X.shape[-1], dtype=dtype)


@custom_op("mhc::readout_backward", mutates_args=())
def readout_backward(dx: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    """dX `[..., n, C]` in `dtype` from dx `[..., C]`."""
    return _copied(dx, n, kind, dtype)


@readout_backward.register_fake
def _(dx: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    return _fake_streams(dx, n, dtype)


def _keep_streams(ctx: Any, inputs: tuple[Tensor, str, torch.dtype], output: Tensor) -> None:
    X, ctx.kind, _ = inputs
    ctx.n, ctx.dtype = X.shape[-2], X.dtype


def _keep_single(ctx: Any, inputs: tuple[Tensor, int, str, torch.dtype], output: Tensor) -> None:
    dx, _, ctx.kind, _ = inputs
    ctx.dtype = dx.dtype


readout.register_autograd(
    lambda ctx, dx: (readout_backward(dx, ctx.n, ctx.kind, ctx.dtype), None, None),
    setup_context=_keep_streams,
)
readout_backward.register_autograd(
    lambda ctx, dX: (readout(dX, ctx.kind, ctx.dtype), None, None, None),
    setup_context=_keep_single,
)


# --- n streams to one with learned weights --------------------------------------------------------


@custom_op("mhc::head", mutates_args=())
@without_autocast
def head(
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x = weights X with weights = σ(α · (x⃗ φ) / r + b) + offset, DeepSeek-V4's readout.

    Args:
        X: `[..., n, C]`.
        phi, alpha, bias: `[nC, n]`, `[1]`, `[n]`, float32 (float64 for float64 streams).
        eps: added to mean(x⃗²).
        offset: 1e-6 in DeepSeek-V4.
        dtype: of x `[..., C]`.

    Returns:
        x, weights `[..., n]`, and y = x⃗ φ and inv_r = 1 / r, which the backward needs.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    _check_head(X, phi, alpha, bias)
    call = Call(X, phi, dtype)
    found, y, inv_r = eager.head_weights(
        call.streams(X), *weights(phi, alpha, bias), eps=eps, offset=offset
    )
    x = call.kernels.pre(found, call.streams(X))
    return call.shaped(x, dtype), call.shaped(found), call.shaped(y), call.shaped(inv_r)


@head.register_fake
def _(
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_head(X, phi, alpha, bias)
    leading, n = X.shape[:-2], int(X.shape[-2])
    x = X.new_empty(*leading, X.shape[-1], dtype=dtype)
    return x, phi.new_empty(*leading, n), phi.new_empty(*leading, n), phi.new_empty(leading)


@custom_op("mhc::head_backward", mutates_args=())
@without_autocast
def head_backward(
    dx: Tensor,
    dweights: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    found: Tensor,
    y: Tensor,
    inv_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dφ, dα, db of `mhc::head`.

    Args:
        dweights: gradient of the weights from whatever else reads them.
        found: the weights that forward has returned.
    """
    call = Call(X, phi, dx.dtype)
    dH, H, y, inv_r = call.flat(dweights, found, y, inv_r)
    phi, alpha, bias = weights(phi, alpha, bias)
    dX, dphi, dalpha, dbias = eager.head_backward(
        call.branch(dx), dH, call.streams(X), phi, alpha, bias, H, y, inv_r
    )
    return call.shaped(dX, X.dtype), dphi, dalpha, dbias


@head_backward.register_fake
def _(
    dx: Tensor,
    dweights: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    found: Tensor,
    y: Tensor,
    inv_r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_like(X), empty_like(phi), empty_like(alpha), empty_like(bias)


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _head_formula(ctx: Any, dx: Tensor, dweights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*head_backward(dx, dweights, *ctx.saved_tensors), None, None, None)


head.register_autograd(_head_formula, setup_context=_keep_head)
head_backward.register_autograd(refuse_double_backward)


# --- what they have in common ---------------------------------------------------------------------


def _copied(x: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    """x, or an n-th of it for `mean`, in n streams of `dtype`."""
    _check_kind(kind)
    call = Call(x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]), _exact(x), dtype)
    return call.shaped(call.kernels.readout_backward(call.branch(x), n, kind), dtype)


def _fake_streams(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], n, x.shape[-1], dtype=dtype)


def _exact(x: Tensor) -> Tensor:
    """What stands for coefficients where there are none: their dtype."""
    return x.new_empty(0, dtype=compute_dtype(x.dtype))


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")


def _check_head(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> None:
    n, width = (int(X.shape[-2]), X.shape[-1]) if X.dim() >= 2 else (0, 0)
    fits = n and phi.shape == (n * width, n) and alpha.shape == (1,) and bias.shape == (n,)
    exact = torch.float64 if X.dtype is torch.float64 else phi.dtype
    if not fits or {phi.dtype, alpha.dtype, bias.dtype} != {exact}:
        given = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in (X, phi, alpha, bias))
        raise ValueError(
            "mhc::head takes X [..., n, C], phi [nC, n], alpha [1] and bias [n], the last three in "
            f"float32 (float64 for float64 X); got {given.replace('torch.', '')}"
        )
