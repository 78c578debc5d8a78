"""The `mhc::` operators that compute what lies between two branches in one go.

    mhc::coefficients_pre(X, phi, alpha, bias, variant, eps, dtype)
        -> h, H_pre, H_post, H_res, y, inv_r
    mhc::seam(H_res, H_post, X, f, phi, alpha, bias, variant, eps, dtype)
        -> X', h, H_pre', H_post', H_res', y, inv_r
    mhc::coefficients_pre_backward, mhc::seam_backward

`coefficients_pre` opens the first site of a chain; `seam` closes one site (`post_res`) and opens
the next, with the φ, α, b of the next. Forward results are bit-equal to those of the separate
operators of `site`, so that recomputation may replay those. The backwards also add up the
several gradients of the streams, which autograd would sum as separate tensors.
"""

from typing import Any

import torch
from torch import Tensor

from ..operands import Closed, Mapping, Opened, Parameters, Saved
from ..results import Gradients, Seven, Six
from . import site as site_ops
from .register import Call, empty_like, operator

# --- backwards ------------------------------------------------------------------------------------


@operator(like="X phi alpha bias")
def coefficients_pre_backward(
    dh: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    H_pre: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    partial: Tensor | None,
    variant: str,
    eps: float,
) -> Gradients:
    """dX, dφ, dα, db where H_pre is read by `pre` alone.

    Args:
        partial: the gradient of X from its other readers, `[..., n, C]`, added to dX before its
            one rounding; None if there are none.
    """
    call = Call(X, phi, dh.dtype, variant=variant)
    opened = Opened(*call.flat(Opened._fields, dh, dH_post, dH_res, H_pre))
    saved = Saved(*call.flat(Saved._fields, X, phi, alpha, bias, y, inv_r))
    if partial is not None:
        (partial,) = call.flat(("partial",), partial)
    return call.kernels.coefficients_pre_backward(
        opened, saved, partial, variant=call.variant, eps=eps
    )


@operator(like="phi alpha bias H_res H_post X f")
def seam_backward(
    dh: Tensor,
    dH_post_next: Tensor,
    dH_res_next: Tensor,
    H_pre_next: Tensor,
    X2: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    partial: Tensor | None,
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    variant: str,
    eps: float,
) -> Seven:
    """dφ, dα, db of the site that was opened; dH_res, dH_post, dX, df of the one that was closed.

    `coefficients_pre_backward` on X', whose result goes to `post_res_backward` and nowhere else.
    """
    call = Call(X2, phi, dh.dtype, f.dtype, X.dtype, variant=variant)
    opened = Opened(*call.flat(Opened._fields, dh, dH_post_next, dH_res_next, H_pre_next))
    saved = Saved(*call.flat(Saved._fields, X2, phi, alpha, bias, y, inv_r))
    closed = Closed(*call.flat(Closed._fields, H_res, H_post, X, f))
    if partial is not None:
        (partial,) = call.flat(("partial",), partial)
    return call.kernels.seam_backward(opened, saved, partial, closed, variant=call.variant, eps=eps)


def _opened_backward(
    ctx: Any,
    partial: Tensor | None,
    dh: Tensor | None,
    dH_pre: Tensor | None,
    dH_post: Tensor | None,
    dH_res: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dφ, dα, db of the site that was opened; None stands for a gradient of zeros."""
    H_pre, y, inv_r, X, phi, alpha, bias = ctx.saved_tensors[:7]
    if dh is None:
        dh = X.new_zeros(*X.shape[:-2], X.shape[-1], dtype=ctx.dtype)
    dH_post = torch.zeros_like(H_pre) if dH_post is None else dH_post
    if dH_res is None:
        dH_res = H_pre.new_zeros(*H_pre.shape, H_pre.shape[-1])
    mapping = (X, phi, alpha, bias, y, inv_r)
    if dH_pre is None:
        return coefficients_pre_backward(
            dh, dH_post, dH_res, H_pre, *mapping, partial, ctx.variant, ctx.eps
        )
    dH_pre_of_h, dX = site_ops.pre_backward(dh, H_pre, X)
    dX_of_mapping, *rest = site_ops.coefficients_backward(
        dH_pre + dH_pre_of_h, dH_post, dH_res, *mapping, ctx.variant, ctx.eps
    )
    dX = dX + dX_of_mapping
    return (dX if partial is None else dX + partial, *rest)


def _keep(ctx: Any, found: tuple[Tensor, ...], *used: Tensor) -> None:
    H_pre, _, _, y, inv_r = found
    ctx.mark_non_differentiable(y, inv_r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(H_pre, y, inv_r, *used)


# --- coefficients and pre -------------------------------------------------------------------------


def _fake_opened(X: Tensor, *mapping: Any) -> Six:
    *parameters, dtype = mapping
    found = site_ops.fake_coefficients(X, *parameters)
    return (X.new_empty(*X.shape[:-2], X.shape[-1], dtype=dtype), *found)


def _keep_opened(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    X, phi, alpha, bias, ctx.variant, ctx.eps, ctx.dtype = inputs
    _keep(ctx, output[1:], X, phi, alpha, bias)


def _opened_formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*_opened_backward(ctx, None, *grads[:4]), None, None, None)


@operator(fake=_fake_opened, keep=_keep_opened, formula=_opened_formula)
def coefficients_pre(
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    variant: str,
    eps: float,
    dtype: torch.dtype,
) -> Six:
    """h in `dtype`, and what `mhc::coefficients` returns; arguments and errors as there."""
    site_ops.check_mapping(X, phi, alpha, bias, variant)
    call = Call(X, phi, dtype, variant=variant)
    mapping = Mapping(*call.flat(Mapping._fields, X, phi, alpha, bias))
    h, *found = call.shaped(*call.kernels.coefficients_pre(mapping, variant=call.variant, eps=eps))
    return h.to(dtype), *found  # type: ignore[return-value]


# --- seam -----------------------------------------------------------------------------------------


def _fake_seam(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor, *mapping: Any) -> Seven:
    site_ops.check_coefficients("mhc::seam", X, H_post, H_res, f)
    return (empty_like(X), *_fake_opened(X, *mapping))


def _keep_seam(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *closed, phi, alpha, bias, ctx.variant, ctx.eps, ctx.dtype = inputs
    _keep(ctx, output[2:], output[0], phi, alpha, bias, *closed)


def _seam_formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dX2, dphi, dalpha, dbias = _opened_backward(ctx, *grads[:5])
    closed = site_ops.post_res_backward(dX2, *ctx.saved_tensors[7:])
    return (*closed, dphi, dalpha, dbias, None, None, None)


@operator(fake=_fake_seam, keep=_keep_seam, formula=_seam_formula)
def seam(
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    variant: str,
    eps: float,
    dtype: torch.dtype,
) -> Seven:
    """X' of a site in X's dtype, then h in `dtype` and the coefficients of the next from X'.

    Args:
        H_res, H_post, X, f: of the site that is closed, as `mhc::post_res` takes them.
        phi, alpha, bias, variant, eps, dtype: of the site that is opened.
    """
    site_ops.check_mapping(X, phi, alpha, bias, variant)
    call = Call(X, H_res, f.dtype, dtype, variant=variant)
    if call.dtype is not X.dtype:  # X' must be rounded to its dtype before it is read again
        X2 = site_ops.post_res(H_res, H_post, X, f)
        return X2, *coefficients_pre(X2, phi, alpha, bias, variant, eps, dtype)
    site_ops.check_coefficients("mhc::seam", X, H_post, H_res, f)
    closed = Closed(*call.flat(Closed._fields, H_res, H_post, X, f))
    parameters = Parameters(*call.flat(Parameters._fields, phi, alpha, bias))
    X2, h, *found = call.shaped(
        *call.kernels.seam(closed, parameters, variant=call.variant, eps=eps)
    )
    return X2, h.to(dtype), *found  # type: ignore[return-value]
