"""The `mhc::` operators of a site: coefficients, pre, post_res, and their backwards.

    mhc::coefficients(X, phi, alpha, bias, variant, eps)   -> H_pre, H_post, H_res, y, inv_r
    mhc::pre(H_pre, X, dtype)                              -> h
    mhc::post_res(H_res, H_post, X, f)                     -> X'
    mhc::coefficients_backward, mhc::pre_backward, mhc::post_res_backward

`reference` says what they mean, `backends` who computes them. Streams X are `[..., n, C]` with any
leading dimensions (tokens), none and zero tokens included; H_pre and H_post `[..., n]`, H_res
`[..., n, n]` (`[out, in]`), y `[..., columns]`, inv_r `[...]`. Coefficients and all that belongs to
them are float32, or float64 with a float64 φ. A variant stands in a graph as `Variant.text`.
Outputs are contiguous; two runs are bit-equal; a backward cannot be differentiated again.

y = x⃗ φ and inv_r = 1 / r are what the backward needs of the projection. They are outputs because
an operator can keep only its inputs and outputs for backward, and are not differentiable.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..operands import Closed, Mapping, Saved
from ..results import Coefficients, Gradients, Pair
from ..variants import parse_variant
from .register import Call, described, empty_like, keep_inputs, operator

_DH = ("dH_pre", "dH_post", "dH_res")

# --- coefficients ---------------------------------------------------------------------------------


@operator(like="X phi alpha bias")
def coefficients_backward(
    dH_pre: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    variant: str,
    eps: float,
) -> Gradients:
    """dX, dφ, dα, db of `mhc::coefficients`, by replaying the finite Sinkhorn iteration."""
    call = Call(X, phi, variant=variant)
    dH_pre, dH_post, dH_res = call.flat(_DH, dH_pre, dH_post, dH_res)
    saved = Saved(*call.flat(Saved._fields, X, phi, alpha, bias, y, inv_r))
    dH = dH_pre, dH_post, dH_res
    return call.kernels.coefficients_backward(dH, saved, variant=call.variant, eps=eps)


def fake_coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str, eps: float
) -> Coefficients:
    check_mapping(X, phi, alpha, bias, variant)
    leading, n = X.shape[:-2], int(X.shape[-2])
    H_pre, H_post = phi.new_empty(*leading, n), phi.new_empty(*leading, n)
    H_res = phi.new_empty(*leading, n, n)
    return H_pre, H_post, H_res, phi.new_empty(*leading, phi.shape[1]), phi.new_empty(leading)


def _keep_mapping(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    X, phi, alpha, bias, ctx.variant, ctx.eps = inputs
    y, inv_r = output[3:]
    ctx.mark_non_differentiable(y, inv_r)
    ctx.save_for_backward(X, phi, alpha, bias, y, inv_r)


def _coefficients_formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = coefficients_backward(*grads[:3], *ctx.saved_tensors, ctx.variant, ctx.eps)
    return (*found, None, None)


@operator(fake=fake_coefficients, keep=_keep_mapping, formula=_coefficients_formula)
def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str, eps: float
) -> Coefficients:
    """The coefficients of a site, arXiv:2512.24880 eq. 14-19.

    Args:
        X: streams in front of the site, `[..., n, C]`.
        phi, alpha, bias: `[nC, columns]`, `[3]`, `[columns]`, columns pre | post | res.
        variant: `Variant.text`.
        eps: added to mean(x⃗²).

    Returns:
        H_pre, H_post, H_res, y, inv_r.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or a variant that cannot have n streams.
    """
    check_mapping(X, phi, alpha, bias, variant)
    call = Call(X, phi, variant=variant)
    mapping = Mapping(*call.flat(Mapping._fields, X, phi, alpha, bias))
    found = call.kernels.coefficients(mapping, variant=call.variant, eps=eps)
    return tuple(call.shaped(*found))  # type: ignore[return-value]


# --- pre ------------------------------------------------------------------------------------------


@operator(like="H_pre X")
def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> Pair:
    """dH_pre and dX of `mhc::pre`."""
    call = Call(X, H_pre, dh.dtype)
    return call.kernels.pre_backward(*call.flat(("dh", "H_pre", "X"), dh, H_pre, X))


def _fake_pre(H_pre: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    check_coefficients("mhc::pre", X, H_pre)
    return X.new_empty(*X.shape[:-2], X.shape[-1], dtype=dtype)


@operator(
    fake=_fake_pre,
    keep=keep_inputs(2),
    formula=lambda ctx, dh: (*pre_backward(dh, *ctx.saved_tensors), None),
)
def pre(H_pre: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """h = H_pre X, the branch's input, `[..., C]` in `dtype`; the sum accumulates in H_pre's."""
    check_coefficients("mhc::pre", X, H_pre)
    call = Call(X, H_pre, dtype)
    (h,) = call.shaped(call.kernels.pre(*call.flat(("H_pre", "X"), H_pre, X)))
    return h.to(dtype)


# --- post_res -------------------------------------------------------------------------------------


@operator(like="H_res H_post X f")
def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> Gradients:
    """dH_res, dH_post, dX and df of `mhc::post_res`, from the gradient of X'."""
    call = Call(X, H_res, f.dtype)
    operands = call.flat(("X", *Closed._fields), dX2, H_res, H_post, X, f)
    return call.kernels.post_res_backward(*operands)


def _fake_post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    check_coefficients("mhc::post_res", X, H_post, H_res, f)
    return empty_like(X)


@operator(
    fake=_fake_post_res,
    keep=keep_inputs(4),
    formula=lambda ctx, dX2: post_res_backward(dX2, *ctx.saved_tensors),
)
def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X' = H_res X + H_postᵀ f, `[..., n, C]` in X's dtype; f is `[..., C]` of any float dtype."""
    check_coefficients("mhc::post_res", X, H_post, H_res, f)
    call = Call(X, H_res, f.dtype)
    (X2,) = call.shaped(call.kernels.post_res(*call.flat(Closed._fields, H_res, H_post, X, f)))
    return X2.to(X.dtype)


# --- what must fit --------------------------------------------------------------------------------


@functools.cache
def _columns(variant: str, n: int) -> int:
    """Columns of φ for n streams; ValueError if the variant cannot have them."""
    description = parse_variant(variant)
    description.check(n)
    return sum(description.columns(n))


def check_mapping(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str) -> None:
    """ValueError unless the parameters of a variant fit the streams."""
    parse_variant(variant)
    # A number of streams is never symbolic: it decides the shapes of everything else.
    n, width = (int(X.shape[-2]), X.shape[-1]) if X.dim() >= 2 else (0, 0)
    columns = _columns(variant, n) if n else 0
    fits = n and phi.shape == (n * width, columns) and alpha.shape == (3,)
    fits = fits and bias.shape == (columns,) and phi.dtype == alpha.dtype == bias.dtype
    if not fits or (X.dtype is torch.float64 and phi.dtype is not torch.float64):
        raise ValueError(
            f"mhc::coefficients with variant {variant!r} takes X [..., n, C], phi [nC, {columns}], "
            f"alpha [3] and bias [{columns}], the last three in float32 (float64 for float64 X); "
            f"got {described(X, phi, alpha, bias)}"
        )


def check_coefficients(
    name: str, X: Tensor, row: Tensor, H_res: Tensor | None = None, f: Tensor | None = None
) -> None:
    """ValueError unless H_pre or H_post, H_res and f belong to the streams X."""
    fits = X.dim() >= 2 and row.shape == X.shape[:-1]
    fits = fits and (H_res is None or H_res.shape == (*row.shape, row.shape[-1]))
    fits = fits and (f is None or f.shape == (*X.shape[:-2], X.shape[-1]))
    if not fits:
        given = [t for t in (H_res, row, X, f) if t is not None]
        raise ValueError(
            f"{name} takes streams X [..., n, C] with H_res [..., n, n], H_pre or H_post [..., n] "
            f"and f [..., C] of the same tokens; got {described(*given)}"
        )
