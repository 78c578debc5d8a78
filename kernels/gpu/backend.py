"""The operators of a site on GPUs, NVIDIA's and AMD's, by Triton kernels.

The tensor contract is that of `eager`, for contiguous streams of 16 or 32 bits. Every function is
a few launches, one behind the other, of which none waits for the device:

    coefficients                 project, chain_forward
    coefficients_pre             project, chain_forward, pre
    seam                         post_res_project, chain_forward, pre
    coefficients_backward        chain_backward, gradients, parameters
    coefficients_pre_backward    dots, chain_backward, gradients, parameters
    seam_backward                dots, chain_backward, seam_gradients, parameters, tokens

`pre`, `post_res` and their backwards are one kernel each. Results of forward are bit-equal between
`seam`, `coefficients_pre` and the separate functions: they share the pieces that compute them, and
a token's sums do not depend on how many tokens there are.
"""

import torch
from torch import Tensor

from ..operands import Closed, Mapping, Opened, Parameters, Saved
from ..results import Coefficients, Gradients, Seven, Six, Triple
from ..variants import Variant
from . import codegen, projection, sums
from .launch import launch
from .post_res import post_res, post_res_backward  # noqa: F401  (a function of `Kernels`)
from .pre import dots, pre, pre_backward  # noqa: F401
from .readout import expand, expand_backward, readout, readout_backward  # noqa: F401
from .seam import post_res_project, seam_gradients
from .tuning import DTYPES, MOST_COLUMNS, MOST_STREAMS, cdiv, tokens_per_program

LANGUAGE = "Triton"


def supports(dtype: torch.dtype, n: int, variant: Variant | None = None) -> bool:
    """Whether the functions here take such streams, and coefficients of such a variant."""
    if dtype not in DTYPES or n > MOST_STREAMS:
        return False
    return variant is None or sum(variant.columns(n)) <= MOST_COLUMNS


def source(variant: Variant, n: int, dtype: torch.dtype) -> str | None:
    """The text of the chain, which is float32 for streams of any dtype."""
    return codegen.source(variant, n)


def coefficients(mapping: Mapping, *, variant: Variant, eps: float) -> Coefficients:
    """H_pre [T, n], H_post [T, n], H_res [T, n, n], y = x⃗ φ [T, columns] and 1 / r [T]."""
    X, phi, alpha, bias = mapping
    return _chain_forward(X, *projection.project(X, phi), alpha, bias, variant, eps)


def coefficients_backward(dH: Triple, saved: Saved, *, variant: Variant, eps: float) -> Gradients:
    """dX, dφ, dα, db of `coefficients`."""
    dy, norm_grad, chain_sums = _chain_backward(dH, saved, variant)
    dX, dphi_parts = projection.gradients(saved.X, saved.phi, dy, norm_grad)
    return dX, *_parameters(dphi_parts, chain_sums, saved.X, variant)


def coefficients_pre(mapping: Mapping, *, variant: Variant, eps: float) -> Six:
    """h = H_pre X, H_pre, H_post, H_res, y, 1 / r."""
    found = coefficients(mapping, variant=variant, eps=eps)
    return (pre(found[0], mapping.X), *found)


def coefficients_pre_backward(
    opened: Opened, saved: Saved, partial: Tensor | None, *, variant: Variant, eps: float
) -> Gradients:
    """dX, dφ, dα, db of `coefficients_pre`; `partial`, if given, is added to dX."""
    dh, dH_post, dH_res, H_pre = opened
    dH = dots(dh, saved.X), dH_post, dH_res
    dy, norm_grad, chain_sums = _chain_backward(dH, saved, variant)
    dX, dphi_parts = projection.gradients(
        saved.X, saved.phi, dy, norm_grad, dh=dh, H_pre=H_pre, partial=partial
    )
    return dX, *_parameters(dphi_parts, chain_sums, saved.X, variant)


def seam(closed: Closed, parameters: Parameters, *, variant: Variant, eps: float) -> Seven:
    """X' = H_res X + H_postᵀ f, and from X' of the next site h, H_pre, H_post, H_res, y, 1 / r."""
    phi, alpha, bias = parameters
    X2, y_parts, square_parts = post_res_project(*closed, phi)
    found = _chain_forward(X2, y_parts, square_parts, alpha, bias, variant, eps)
    return (X2, pre(found[0], X2), *found)


def seam_backward(
    opened: Opened,
    saved: Saved,
    partial: Tensor | None,
    closed: Closed,
    *,
    variant: Variant,
    eps: float,
) -> Seven:
    """dφ, dα, db, dH_res, dH_post, dX, df of `seam`; `partial` is a further gradient of X'."""
    dh, dH_post, dH_res, H_pre = opened
    dH = dots(dh, saved.X), dH_post, dH_res
    dy, norm_grad, chain_sums = _chain_backward(dH, saved, variant)
    *of_closed, dphi_parts = seam_gradients(
        dh, H_pre, saved.X, saved.phi, dy, norm_grad, partial, closed
    )
    return *_parameters(dphi_parts, chain_sums, saved.X, variant), *of_closed  # type: ignore


# --- the generated chain --------------------------------------------------------------------------


def _chain_forward(
    X: Tensor,
    y_parts: Tensor,
    square_parts: Tensor,
    alpha: Tensor,
    bias: Tensor,
    variant: Variant,
    eps: float,
) -> Coefficients:
    T, n, C = X.shape
    splits, _, columns = y_parts.shape
    shapes = ((T, n), (T, n), (T, n, n), (T, columns), (T,))
    H_pre, H_post, H_res, y, inv_r = (y_parts.new_empty(shape) for shape in shapes)
    BT = tokens_per_program(n)
    launch(
        codegen.load(variant, n).chain_forward, (cdiv(T, BT),),
        H_pre, H_post, H_res, y, inv_r, y_parts, square_parts, alpha, bias, T, n * C, eps,
        SPLITS=splits, BT=BT, num_warps=1,
    )  # fmt: skip
    return H_pre, H_post, H_res, y, inv_r


def _chain_backward(dH: Triple, saved: Saved, variant: Variant) -> Triple:
    """dy [T, columns], norm_grad [T], and sums for dα and db, [programs, 2, columns]."""
    X, _, alpha, bias, y, inv_r = saved
    T, n, C = X.shape
    BT = tokens_per_program(n)
    programs = cdiv(T, BT)
    dy, norm_grad = torch.empty_like(y), torch.empty_like(inv_r)
    chain_sums = y.new_empty(programs, 2, y.shape[1])
    launch(
        codegen.load(variant, n).chain_backward, (programs,),
        dy, norm_grad, chain_sums, *dH, alpha, bias, y, inv_r, T, n * C,
        BT=BT, num_warps=1,
    )  # fmt: skip
    return dy, norm_grad, chain_sums


def _parameters(dphi_parts: Tensor, chain_sums: Tensor, X: Tensor, variant: Variant) -> Triple:
    """dφ, dα, db from their parts."""
    return sums.parameters(dphi_parts, chain_sums, variant.columns(X.shape[1]))
