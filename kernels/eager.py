"""The operators of a site in ordinary PyTorch, forward and backward, on any device.

This is what runs where no kernel does: another device, no compiler, a dtype or a number of streams
that the kernels leave out. It has the tensor contract of every implementation:

    X, f, h       streams, the branch's output and input: [T, n, C], [T, C], [T, C], one dtype
    H_*, φ, α, b  and y, inv_r and all their gradients: float32 (float64 for float64 streams)
    y, inv_r      x⃗ φ [T, columns], and 1 / sqrt(mean(x⃗²) + eps) [T]

T counts tokens. Sums over streams and channels accumulate in the dtype of the coefficients; a
gradient with several parts is rounded once, after their sum.
"""

import torch
from torch import Tensor

from . import reference
from .dtypes import compute_dtype
from .variants import Gate, Variant

Coefficients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""H_pre [T, n], H_post [T, n], H_res [T, n, n], y, inv_r."""

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""dX, dφ, dα, db."""


def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, variant: Variant, eps: float
) -> Coefficients:
    """The coefficients of a site from its streams, and what its backward needs of them."""
    y, inv_r = _project(X, phi, eps)
    mapped = y * inv_r.unsqueeze(-1)
    H = reference.from_projection(mapped, alpha, bias, variant=variant, n=X.shape[1])
    return (*(h.contiguous() for h in H), y, inv_r)  # type: ignore[return-value]


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
    *,
    variant: Variant,
    eps: float,
) -> Gradients:
    """The exact gradient of `coefficients`, the finite Sinkhorn iteration included."""
    dX, *rest = _coefficients_backward(
        dH_pre, dH_post, dH_res, X, phi, alpha, bias, y, inv_r, variant
    )
    return (dX.to(X.dtype), *rest)  # type: ignore[return-value]


def pre(H_pre: Tensor, X: Tensor) -> Tensor:
    """h = H_pre X."""
    return (H_pre.unsqueeze(1) @ X.to(H_pre.dtype)).squeeze(1).to(X.dtype)


def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """dH_pre, dX."""
    dH_pre, dX = _pre_backward(dh, H_pre, X)
    return dH_pre, dX.to(X.dtype)


def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X' = H_res X + H_postᵀ f."""
    mixed = H_res @ X.to(H_res.dtype)
    return mixed.add_(H_post.unsqueeze(-1) * f.unsqueeze(1)).to(X.dtype)


def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dH_res, dH_post, dX, df."""
    exact, f_exact = dX2.to(H_res.dtype), f.to(H_res.dtype)
    dH_res = exact @ X.to(H_res.dtype).mT
    dH_post = (exact @ f_exact.unsqueeze(-1)).squeeze(-1)
    dX = (H_res.mT @ exact).to(X.dtype)
    df = (H_post.unsqueeze(1) @ exact).squeeze(1).to(f.dtype)
    return dH_res, dH_post, dX, df


def coefficients_pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, variant: Variant, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, and the coefficients: both read the same streams."""
    found = coefficients(X, phi, alpha, bias, variant=variant, eps=eps)
    return (pre(found[0], X), *found)


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
    *,
    variant: Variant,
    eps: float,
) -> Gradients:
    """dX with all its parts, dφ, dα, db.

    Args:
        partial: the gradient of X from its other readers, in X's dtype; None if there are none.
    """
    dX, *rest = _coefficients_pre_backward(
        dh, dH_post, dH_res, H_pre, X, phi, alpha, bias, y, inv_r, partial, variant
    )
    return (dX.to(X.dtype), *rest)  # type: ignore[return-value]


def seam(
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """X' of a site, then h and the coefficients of the next site from X' as it was rounded."""
    X2 = post_res(H_res, H_post, X, f)
    return (X2, *coefficients_pre(X2, phi, alpha, bias, variant=variant, eps=eps))


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
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dφ, dα, db of the next site; dH_res, dH_post, dX, df of this one. dX' is never rounded."""
    dX2, dphi, dalpha, dbias = _coefficients_pre_backward(
        dh, dH_post_next, dH_res_next, H_pre_next, X2, phi, alpha, bias, y, inv_r, partial, variant
    )
    return (dphi, dalpha, dbias, *post_res_backward(dX2, H_res, H_post, X, f))


def expand(x: Tensor, n: int) -> Tensor:
    """n equal streams `[T, n, C]`."""
    return readout_backward(x, n, "sum")


def readout(X: Tensor, kind: str) -> Tensor:
    """The `mean` or `sum` of the streams, `[T, C]`."""
    return reference.readout(X, kind, dtype=X.dtype, compute_dtype=compute_dtype(X.dtype))


def readout_backward(dx: Tensor, n: int, kind: str) -> Tensor:
    """dX `[T, n, C]`."""
    scaled = (dx.to(compute_dtype(dx.dtype)) / n).to(dx.dtype) if kind == "mean" else dx
    return reference.expand(scaled, n)


def head_weights(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights `[T, n]` of the learned readout, y = x⃗ φ `[T, n]` and 1 / r `[T]`."""
    y, inv_r = _project(X, phi, eps)
    return (alpha * (y * inv_r.unsqueeze(-1)) + bias).sigmoid() + offset, y, inv_r


def head_backward(
    dx: Tensor,
    dweights: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    weights: Tensor,
    y: Tensor,
    inv_r: Tensor,
) -> Gradients:
    """dX, dφ, dα, db of the learned readout; `dweights` comes from other readers."""
    dH, dX = _pre_backward(dx, weights, X)
    normed = y * inv_r.unsqueeze(-1)
    d = _gate_backward(dH + dweights, alpha * normed + bias, Gate("sigmoid"))
    more, dphi = _project_backward(d * alpha, X, phi, y, inv_r)
    return dX.add_(more).to(X.dtype), dphi, (d * normed).sum().reshape(1), d.sum(0)


def _project(X: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x⃗ φ and 1 / r."""
    flat = X.flatten(1).to(phi.dtype)
    return flat @ phi, (flat.square().mean(-1) + eps).rsqrt()


# --- gradients in the dtype of the coefficients ---------------------------------------------------


def _pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    exact = dh.to(H_pre.dtype)
    dH_pre = (X.to(H_pre.dtype) @ exact.unsqueeze(-1)).squeeze(-1)
    return dH_pre, H_pre.unsqueeze(-1) * exact.unsqueeze(1)


def _coefficients_pre_backward(
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
    variant: Variant,
) -> Gradients:
    dH_pre, dX = _pre_backward(dh, H_pre, X)
    more, *rest = _coefficients_backward(
        dH_pre, dH_post, dH_res, X, phi, alpha, bias, y, inv_r, variant
    )
    dX.add_(more)
    if partial is not None:
        dX.add_(partial)
    return (dX, *rest)  # type: ignore[return-value]


def _coefficients_backward(
    dH_pre: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    variant: Variant,
) -> Gradients:
    normed = y * inv_r.unsqueeze(-1)
    mapped = normed.tanh() if variant.inner == "tanh" else normed
    dmapped, dalpha, dbias = _chain_backward(
        (dH_pre, dH_post, dH_res), mapped, alpha, bias, variant
    )
    if variant.inner == "tanh":
        dmapped = dmapped * (1 - mapped.square())
    return (*_project_backward(dmapped, X, phi, y, inv_r), dalpha, dbias)


def _project_backward(
    dmapped: Tensor, X: Tensor, phi: Tensor, y: Tensor, inv_r: Tensor
) -> tuple[Tensor, Tensor]:
    """dX and dφ from the gradient of y / r."""
    flat = X.flatten(1).to(phi.dtype)
    dy = dmapped * inv_r.unsqueeze(-1)
    dinv_r = (dmapped * y).sum(-1)
    # inv_r = (mean(x⃗²) + eps)^(-1/2):  d inv_r / d x⃗ = -inv_r³ x⃗ / (nC)
    dX = dy @ phi.mT
    dX.addcmul_(flat, (dinv_r * inv_r**3 / -flat.shape[1]).unsqueeze(-1))
    return dX.view(X.shape), flat.mT @ dy


def _chain_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    mapped: Tensor,
    alpha: Tensor,
    bias: Tensor,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """d mapped, dα, db, from the gradients of H_pre, H_post and H_res."""
    n = grads[0].shape[-1]
    widths = variant.columns(n)
    groups, biases = mapped.split(widths, -1), bias.split(widths)
    inputs = [group * a + b for group, a, b in zip(groups, alpha, biases, strict=True)]
    d = [
        _gate_backward(grads[0], inputs[0], variant.pre),
        _gate_backward(grads[1], inputs[1], variant.post),
        variant.res.backward(grads[2], inputs[2], n) if widths[2] else inputs[2],
    ]
    dalpha = torch.stack([(g * group).sum() for g, group in zip(d, groups, strict=True)])
    dmapped = torch.cat([g * a for g, a in zip(d, alpha, strict=True)], -1)
    return dmapped, dalpha, torch.cat(d, -1).sum(0)


def _gate_backward(grad: Tensor, x: Tensor, gate: Gate) -> Tensor:
    grad = grad * gate.scale
    if gate.function == "linear":
        return grad
    s = x.sigmoid()
    return grad * (s * (1 - s))
