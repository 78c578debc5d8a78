"""The `mhc::` operators at the ends of a chain: one stream to n, and n streams to one.

    mhc::expand(x, n)                                          -> X
    mhc::readout(X, kind, dtype)                               -> x
    mhc::head(X, phi, alpha, bias, eps, offset, dtype)         -> x, weights, y, inv_r
    mhc::readout_backward, mhc::head_backward

`reference` says what they mean (`expand`, `readout`, `head_readout`). Shapes, dtypes and what
else all operators have in common are those of `site`; weights are `[..., n]`. `expand` and
`readout` are linear and may be differentiated any number of times, `head` once.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import eager
from ..dtypes import compute_dtype
from ..operands import Saved
from ..results import Gradients
from .register import Call, described, operator

KINDS = ("mean", "sum")

# --- one stream to n ------------------------------------------------------------------------------


def _keep_width(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _expand_formula(ctx: Any, dX: Tensor) -> tuple[Tensor, None]:
    return torch.ops.mhc.readout.default(dX, "sum", ctx.dtype), None


def _fake_expand(x: Tensor, n: int) -> Tensor:
    return _fake_streams(x, n, "sum", x.dtype)


@operator(fake=_fake_expand, keep=_keep_width, formula=_expand_formula)
def expand(x: Tensor, n: int) -> Tensor:
    """n equal streams, `[..., C]` -> `[..., n, C]`, same dtype."""
    return _copied(x, n, "sum", x.dtype)


# --- n streams to one by their mean or sum --------------------------------------------------------


def _fake_streams(x: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    return x.new_empty(*x.shape[:-1], n, x.shape[-1], dtype=dtype)


def _keep_single(ctx: Any, inputs: tuple[Tensor, int, str, torch.dtype], output: Tensor) -> None:
    dx, _, ctx.kind, _ = inputs
    ctx.dtype = dx.dtype


def _streams_formula(ctx: Any, dX: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.mhc.readout.default(dX, ctx.kind, ctx.dtype), None, None, None


@operator(fake=_fake_streams, keep=_keep_single, formula=_streams_formula)
def readout_backward(dx: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    """dX `[..., n, C]` in `dtype` from dx `[..., C]`."""
    return _copied(dx, n, kind, dtype)


def _fake_readout(X: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if kind not in KINDS:
        _refuse_kind(kind)
    return X.new_empty(*X.shape[:-2], X.shape[-1], dtype=dtype)


def _keep_streams(ctx: Any, inputs: tuple[Tensor, str, torch.dtype], output: Tensor) -> None:
    X, ctx.kind, _ = inputs
    ctx.n, ctx.dtype = X.shape[-2], X.dtype


def _readout_formula(ctx: Any, dx: Tensor) -> tuple[Tensor, None, None]:
    return readout_backward(dx, ctx.n, ctx.kind, ctx.dtype), None, None


@operator(fake=_fake_readout, keep=_keep_streams, formula=_readout_formula)
def readout(X: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The `mean` or `sum` of the streams `[..., n, C]`, `[..., C]` in `dtype`.

    Raises:
        ValueError: for another kind.
    """
    if kind not in KINDS:
        _refuse_kind(kind)
    call = Call(X, _exact(X), dtype)
    (streams,) = call.flat(("X",), X)
    (x,) = call.shaped(call.kernels.readout(streams, kind))
    return x.to(dtype)


# --- n streams to one with learned weights --------------------------------------------------------


@operator(like="X phi alpha bias")
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
) -> Gradients:
    """dX, dφ, dα, db of `mhc::head`.

    Args:
        dweights: gradient of the weights from whatever else reads them.
        found: the weights that forward has returned.
    """
    call = Call(X, phi, dx.dtype)
    dx, dweights, found = call.flat(("dh", "dH_pre", "H_pre"), dx, dweights, found)
    saved = Saved(*call.flat(Saved._fields, X, phi, alpha, bias, y, inv_r))
    return eager.head_backward(dx, dweights, saved, found)


def _fake_head(X: Tensor, phi: Tensor, *others: Any) -> Gradients:
    _check_head(X, phi, *others[:2])
    leading, n = X.shape[:-2], int(X.shape[-2])
    x = X.new_empty(*leading, X.shape[-1], dtype=others[-1])
    return x, phi.new_empty(*leading, n), phi.new_empty(*leading, n), phi.new_empty(leading)


def _keep_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _head_formula(ctx: Any, dx: Tensor, dweights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*head_backward(dx, dweights, *ctx.saved_tensors), None, None, None)


@operator(fake=_fake_head, keep=_keep_head, formula=_head_formula)
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
    streams, *parameters = call.flat(("X", "phi", "alpha", "bias"), X, phi, alpha, bias)
    found = eager.head_weights(streams, *parameters, eps=eps, offset=offset)
    x, *kept = call.shaped(call.kernels.pre(found[0], streams), *found)
    return x.to(dtype), *kept  # type: ignore[return-value]


# --- what they have in common ---------------------------------------------------------------------


def _copied(x: Tensor, n: int, kind: str, dtype: torch.dtype) -> Tensor:
    """x, or an n-th of it for `mean`, in n streams of `dtype`."""
    if kind not in KINDS:
        _refuse_kind(kind)
    call = Call(x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]), _exact(x), dtype)
    (flat,) = call.flat(("f",), x)
    (X,) = call.shaped(call.kernels.readout_backward(flat, n, kind))
    return X.to(dtype)


def _exact(x: Tensor) -> Tensor:
    """What stands for coefficients where there are none: their dtype."""
    return x.new_empty(0, dtype=compute_dtype(x.dtype))


def _refuse_kind(kind: str) -> NoReturn:
    raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")


def _check_head(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> None:
    n, width = (int(X.shape[-2]), X.shape[-1]) if X.dim() >= 2 else (0, 0)
    fits = n and phi.shape == (n * width, n) and alpha.shape == (1,) and bias.shape == (n,)
    exact = torch.float64 if X.dtype is torch.float64 else phi.dtype
    if not fits or {phi.dtype, alpha.dtype, bias.dtype} != {exact}:
        raise ValueError(
            "mhc::head takes X [..., n, C], phi [nC, n], alpha [1] and bias [n], the last three in "
            f"float32 (float64 for float64 X); got {described(X, phi, alpha, bias)}"
        )
