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
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.library import custom_op

from ..backends import implementation
from ..variants import Variant, parse_variant

F = TypeVar("F", bound=Callable[..., Any])


def without_autocast(function: F) -> F:
    """Compute an operator in the dtypes of its operands, wherever it is called."""

    @functools.wraps(function)
    def exact(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args, **kwargs)

    return exact  # type: ignore[return-value]


class Call:
    """One call of an operator: its tokens flattened, its streams in one dtype.

    Kernels take one dtype for X, f, h and their gradients. Where these differ (16-bit branches on
    float32 streams, or the reverse) the call computes in the wider one, which changes no value
    before the last rounding.
    """

    def __init__(
        self,
        X: Tensor,
        coefficient: Tensor,
        *dtypes: torch.dtype,
        variant: Variant | None = None,
    ) -> None:
        self.leading, self.n, self.width = X.shape[:-2], X.shape[-2], X.shape[-1]
        self.tokens = math.prod(self.leading)
        self.dtype = X.dtype
        for dtype in dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        if self.dtype is torch.float64 or coefficient.dtype is torch.float64:
            self.dtype = coefficient.dtype
        self.keeps_streams = self.dtype is X.dtype
        self.kernels: ModuleType = implementation(X.device, self.dtype, self.n, variant)

    def streams(self, X: Tensor) -> Tensor:
        """`[..., n, C]` -> `[T, n, C]`."""
        return X.reshape(self.tokens, self.n, self.width).to(self.dtype).contiguous()

    def branch(self, f: Tensor) -> Tensor:
        """`[..., C]` -> `[T, C]`."""
        return f.reshape(self.tokens, self.width).to(self.dtype).contiguous()

    def flat(self, *tensors: Tensor) -> list[Tensor]:
        """Coefficients with their leading dimensions as one."""
        count = len(self.leading)
        return [t.reshape((self.tokens, *t.shape[count:])).contiguous() for t in tensors]

    def shaped(self, flat: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """`[T, ...]` -> `[..., ...]`."""
        return flat.reshape((*self.leading, *flat.shape[1:])).to(dtype or flat.dtype)


def weights(*parameters: Tensor) -> list[Tensor]:
    """φ, α, b as kernels take them."""
    return [p.contiguous() for p in parameters]


# --- coefficients ---------------------------------------------------------------------------------


@custom_op("mhc::coefficients", mutates_args=())
@without_autocast
def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
    description = check_mapping(X, phi, alpha, bias, variant)
    call = Call(X, phi, variant=description)
    found = call.kernels.coefficients(
        call.streams(X), *weights(phi, alpha, bias), variant=description, eps=eps
    )
    return tuple(call.shaped(t) for t in found)  # type: ignore[return-value]


@coefficients.register_fake
def fake_coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_mapping(X, phi, alpha, bias, variant)
    leading, n = X.shape[:-2], int(X.shape[-2])
    H_pre, H_post = phi.new_empty(*leading, n), phi.new_empty(*leading, n)
    H_res = phi.new_empty(*leading, n, n)
    return H_pre, H_post, H_res, phi.new_empty(*leading, phi.shape[1]), phi.new_empty(leading)


@custom_op("mhc::coefficients_backward", mutates_args=())
@without_autocast
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dφ, dα, db of `mhc::coefficients`, by replaying the finite Sinkhorn iteration."""
    description = parse_variant(variant)
    call = Call(X, phi, variant=description)
    dX, dphi, dalpha, dbias = call.kernels.coefficients_backward(
        *call.flat(dH_pre, dH_post, dH_res),
        call.streams(X),
        *weights(phi, alpha, bias),
        *call.flat(y, inv_r),
        variant=description,
        eps=eps,
    )
    return call.shaped(dX, X.dtype), dphi, dalpha, dbias


@coefficients_backward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_like(X), empty_like(phi), empty_like(alpha), empty_like(bias)


def _keep_mapping(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    X, phi, alpha, bias, ctx.variant, ctx.eps = inputs
    y, inv_r = output[3:]
    ctx.mark_non_differentiable(y, inv_r)
    ctx.save_for_backward(X, phi, alpha, bias, y, inv_r)


def _coefficients_formula(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    found = coefficients_backward(*grads[:3], *ctx.saved_tensors, ctx.variant, ctx.eps)
    return (*found, None, None)


coefficients.register_autograd(_coefficients_formula, setup_context=_keep_mapping)


# --- pre ------------------------------------------------------------------------------------------


@custom_op("mhc::pre", mutates_args=())
@without_autocast
def pre(H_pre: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    """h = H_pre X, the branch's input, `[..., C]` in `dtype`; the sum accumulates in H_pre's."""
    check_coefficients("mhc::pre", X, H_pre)
    call = Call(X, H_pre, dtype)
    return call.shaped(call.kernels.pre(*call.flat(H_pre), call.streams(X)), dtype)


@pre.register_fake
def _(H_pre: Tensor, X: Tensor, dtype: torch.dtype) -> Tensor:
    check_coefficients("mhc::pre", X, H_pre)
    return X.new_empty(*X.shape[:-2], X.shape[-1], dtype=dtype)


@custom_op("mhc::pre_backward", mutates_args=())
@without_autocast
def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """dH_pre and dX of `mhc::pre`."""
    call = Call(X, H_pre, dh.dtype)
    dH_pre, dX = call.kernels.pre_backward(call.branch(dh), *call.flat(H_pre), call.streams(X))
    return call.shaped(dH_pre), call.shaped(dX, X.dtype)


@pre_backward.register_fake
def _(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    return empty_like(H_pre), empty_like(X)


def _keep_pre(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _pre_formula(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*pre_backward(dh, *ctx.saved_tensors), None)


pre.register_autograd(_pre_formula, setup_context=_keep_pre)


# --- post_res -------------------------------------------------------------------------------------


@custom_op("mhc::post_res", mutates_args=())
@without_autocast
def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X' = H_res X + H_postᵀ f, `[..., n, C]` in X's dtype; f is `[..., C]` of any float dtype."""
    check_coefficients("mhc::post_res", X, H_post, H_res, f)
    call = Call(X, H_res, f.dtype)
    found = call.kernels.post_res(*call.flat(H_res, H_post), call.streams(X), call.branch(f))
    return call.shaped(found, X.dtype)


@post_res.register_fake
def _(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    check_coefficients("mhc::post_res", X, H_post, H_res, f)
    return empty_like(X)


@custom_op("mhc::post_res_backward", mutates_args=())
@without_autocast
def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dH_res, dH_post, dX and df of `mhc::post_res`, from the gradient of X'."""
    call = Call(X, H_res, f.dtype)
    dH_res, dH_post, dX, df = call.kernels.post_res_backward(
        call.streams(dX2), *call.flat(H_res, H_post), call.streams(X), call.branch(f)
    )
    return (
        call.shaped(dH_res),
        call.shaped(dH_post),
        call.shaped(dX, X.dtype),
        call.shaped(df, f.dtype),
    )


@post_res_backward.register_fake
def _(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_like(H_res), empty_like(H_post), empty_like(X), empty_like(f)


def _keep_post_res(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _post_res_formula(ctx: Any, dX2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return post_res_backward(dX2, *ctx.saved_tensors)


post_res.register_autograd(_post_res_formula, setup_context=_keep_post_res)


# --- what the operators have in common ------------------------------------------------------------


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous, whatever the strides of `tensor`."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def check_mapping(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, variant: str) -> Variant:
    """The description of a variant whose parameters fit the streams; ValueError if not."""
    description = parse_variant(variant)
    # A number of streams is never symbolic: it decides the shapes of everything else.
    n, width = (int(X.shape[-2]), X.shape[-1]) if X.dim() >= 2 else (0, 0)
    if n:
        description.check(n)
    columns = sum(description.columns(n)) if n else 0
    exact = torch.float64 if X.dtype is torch.float64 else phi.dtype
    fits = n and phi.shape == (n * width, columns) and alpha.shape == (3,)
    if not fits or bias.shape != (columns,) or {phi.dtype, alpha.dtype, bias.dtype} != {exact}:
        raise ValueError(
            f"mhc::coefficients with variant {variant!r} takes X [..., n, C], phi [nC, {columns}], "
            f"alpha [3] and bias [{columns}], the last three in float32 (float64 for float64 X); "
            f"got {_described(X, phi, alpha, bias)}"
        )
    return description


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
            f"and f [..., C] of the same tokens; got {_described(*given)}"
        )


def _described(*tensors: Tensor) -> str:
    return ", ".join(f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors)


def refuse_double_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "the backward of an mhc:: operator cannot be differentiated: double backward (create_graph="
        "True, torch.func.hessian) is not supported by the fused operators. Take such gradients of "
        "the open form: Config(disabled=('fuse_coefficients',))"
    )


for operator in (coefficients_backward, pre_backward, post_res_backward):
    operator.register_autograd(refuse_double_backward)
