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
from .operands import Closed, Mapping, Opened, Parameters, Saved
from .results import Coefficients, Gradients, Pair, Seven, Six, Triple
from .variants import Gate, Variant

LANGUAGE = "PyTorch"


def supports(dtype: torch.dtype, n: int, variant: Variant | None = None) -> bool:
    return True


def source(variant: Variant, n: int, dtype: torch.dtype) -> str | None:
    """Nothing is generated."""
    return None


def coefficients(mapping: Mapping, *, variant: Variant, eps: float) -> Coefficients:
    """The coefficients of a site from its streams, and what its backward needs of them."""
    X, phi, alpha, bias = mapping
    y, inv_r = _project(X, phi, eps)
    mapped = y * inv_r.unsqueeze(-1)
    H = reference.from_projection(mapped, alpha, bias, variant=variant, n=X.shape[1])
    return (*(h.contiguous() for h in H), y, inv_r)  # type: ignore[return-value]


def coefficients_backward(dH: Triple, saved: Saved, *, variant: Variant, eps: float) -> Gradients:
    """The exact gradient of `coefficients`, the finite Sinkhorn iteration included.

    Args:
        dH: gradients of H_pre, H_post, H_res.
    """
    dX, *rest = _coefficients_backward(dH, saved, variant)
    return (dX.to(saved.X.dtype), *rest)  # type: ignore[return-value]


def pre(H_pre: Tensor, X: Tensor) -> Tensor:
    """h = H_pre X."""
    return (H_pre.unsqueeze(1) @ X.to(H_pre.dtype)).squeeze(1).to(X.dtype)


def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> Pair:
    """dH_pre, dX."""
    dH_pre, dX = _pre_backward(dh, H_pre, X)
    return dH_pre, dX.to(X.dtype)


def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X' = H_res X + H_postᵀ f."""
    mixed = H_res @ X.to(H_res.dtype)
    return mixed.add_(H_post.unsqueeze(-1) * f.unsqueeze(1)).to(X.dtype)


def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> Gradients:
    """dH_res, dH_post, dX, df."""
    exact, f_exact = dX2.to(H_res.dtype), f.to(H_res.dtype)
    dH_res = exact @ X.to(H_res.dtype).mT
    dH_post = (exact @ f_exact.unsqueeze(-1)).squeeze(-1)
    dX = (H_res.mT @ exact).to(X.dtype)
    df = (H_post.unsqueeze(1) @ exact).squeeze(1).to(f.dtype)
    return dH_res, dH_post, dX, df


def coefficients_pre(mapping: Mapping, *, variant: Variant, eps: float) -> Six:
    """h, and the coefficients: both read the same streams."""
    found = coefficients(mapping, variant=variant, eps=eps)
    return (pre(found[0], mapping.X), *found)


def coefficients_pre_backward(
    opened: Opened, saved: Saved, partial: Tensor | None, *, variant: Variant, eps: float
) -> Gradients:
    """dX with all its parts, dφ, dα, db.

    Args:
        partial: the gradient of X from its other readers, in X's dtype; None if there are none.
    """
    dX, *rest = _coefficients_pre_backward(opened, saved, partial, variant)
    return (dX.to(saved.X.dtype), *rest)  # type: ignore[return-value]


def seam(closed: Closed, parameters: Parameters, *, variant: Variant, eps: float) -> Seven:
    """X' of a site, then h and the coefficients of the next site from X' as it was rounded."""
    X2 = post_res(*closed)
    return (X2, *coefficients_pre(Mapping(X2, *parameters), variant=variant, eps=eps))


def seam_backward(
    opened: Opened,
    saved: Saved,
    partial: Tensor | None,
    closed: Closed,
    *,
    variant: Variant,
    eps: float,
) -> Seven:
    """dφ, dα, db of the next site; dH_res, dH_post, dX, df of this one. dX' is never rounded.

    Args:
        opened, saved, partial: of the next site, whose X is X'.
    """
    dX2, *rest = _coefficients_pre_backward(opened, saved, partial, variant)
    return (*rest, *post_res_backward(dX2, *closed))  # type: ignore[return-value]


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
) -> Triple:
    """The weights `[T, n]` of the learned readout, y = x⃗ φ `[T, n]` and 1 / r `[T]`."""
    y, inv_r = _project(X, phi, eps)
    return (alpha * (y * inv_r.unsqueeze(-1)) + bias).sigmoid() + offset, y, inv_r


def head_backward(dx: Tensor, dweights: Tensor, saved: Saved, weights: Tensor) -> Gradients:
    """dX, dφ, dα, db of the learned readout; `dweights` comes from other readers."""
    dH, dX = _pre_backward(dx, weights, saved.X)
    normed = saved.y * saved.inv_r.unsqueeze(-1)
    d = _gate_backward(dH + dweights, saved.alpha * normed + saved.bias, Gate("sigmoid"))
    more, dphi = _project_backward(d * saved.alpha, saved)
    return dX.add_(more).to(saved.X.dtype), dphi, (d * normed).sum().reshape(1), d.sum(0)


def _project(X: Tensor, phi: Tensor, eps: float) -> Pair:
    """y = x⃗ φ and 1 / r."""
    flat = X.flatten(1).to(phi.dtype)
    return flat @ phi, (flat.square().mean(-1) + eps).rsqrt()


# --- gradients in the dtype of the coefficients ---------------------------------------------------


def _pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> Pair:
    exact = dh.to(H_pre.dtype)
    dH_pre = (X.to(H_pre.dtype) @ exact.unsqueeze(-1)).squeeze(-1)
    return dH_pre, H_pre.unsqueeze(-1) * exact.unsqueeze(1)


def _coefficients_pre_backward(
    opened: Opened, saved: Saved, partial: Tensor | None, variant: Variant
) -> Gradients:
    dh, dH_post, dH_res, H_pre = opened
    dH_pre, dX = _pre_backward(dh, H_pre, saved.X)
    more, *rest = _coefficients_backward((dH_pre, dH_post, dH_res), saved, variant)
    dX.add_(more)
    if partial is not None:
        dX.add_(partial)
    return (dX, *rest)  # type: ignore[return-value]


def _coefficients_backward(dH: Triple, saved: Saved, variant: Variant) -> Gradients:
    normed = saved.y * saved.inv_r.unsqueeze(-1)
    mapped = normed.tanh() if variant.inner == "tanh" else normed
    dmapped, dalpha, dbias = _chain_backward(dH, mapped, saved.alpha, saved.bias, variant)
    if variant.inner == "tanh":
        dmapped = dmapped * (1 - mapped.square())
    return (*_project_backward(dmapped, saved), dalpha, dbias)


def _project_backward(dmapped: Tensor, saved: Saved) -> Pair:
    """dX and dφ from the gradient of y / r."""
    flat = saved.X.flatten(1).to(saved.phi.dtype)
    dy = dmapped * saved.inv_r.unsqueeze(-1)
    dinv_r = (dmapped * saved.y).sum(-1)
    # inv_r = (mean(x⃗²) + eps)^(-1/2):  d inv_r / d x⃗ = -inv_r³ x⃗ / (nC)
    dX = dy @ saved.phi.mT
    dX.addcmul_(flat, (dinv_r * saved.inv_r**3 / -flat.shape[1]).unsqueeze(-1))
    return dX.view(saved.X.shape), flat.mT @ dy


def _chain_backward(
    grads: Triple, mapped: Tensor, alpha: Tensor, bias: Tensor, variant: Variant
) -> Triple:
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
