"""The mathematics of mHC, as the paper writes it: the oracle, and the open form of the graph.

X is the state of a token, n streams of C channels; F is any branch. With x⃗ = flatten(X) and
r = sqrt(mean(x⃗²) + eps), one site is (arXiv:2512.24880, eq. 14-19)

    H̃  = α ⊙ (x⃗ φ) / r + b            H_pre, H_post, H_res = gates and Sinkhorn-Knopp of H̃
    h   = H_pre X                      X' = H_res X + H_postᵀ F(h)

that is, stream i of X' is Σ_j H_res[i, j] · X[j] + H_post[i] · F(h): H_res is [out, in].

Note: These functions write graphs
    They take tensors and `torch.fx.Proxy` objects alike; called on proxies they write themselves
    into a graph that holds for every shape. So they never read a shape, dtype, device or value:
    what they need to know comes as an argument, dimensions are counted from the end, tokens are
    any leading dimensions. Products stand as `mhc::matmul`, because `@` would be computed in 16
    bits under autocast, and Sinkhorn-Knopp as `mhc::sinkhorn_knopp`, because compilers take very
    long over its iterations.
"""

import torch
from torch import Tensor

from .ops import basic  # noqa: F401  (registers the mhc:: operators)
from .variants import Gate, Variant


def expand(x: Tensor, n: int) -> Tensor:
    """One stream to n equal ones: `[..., C]` -> `[..., n, C]`, same dtype."""
    return x.unsqueeze(-2).tile((n, 1))


def readout(X: Tensor, kind: str, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """n streams to one: `[..., n, C]` -> `[..., C]`, their mean or sum.

    Args:
        kind: `mean` or `sum`.
        dtype: of the result.
        compute_dtype: float32, or float64 for float64 streams; the sum accumulates in it.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("mean", "sum"):
        raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")
    exact = X.to(compute_dtype)
    return (exact.mean(-2) if kind == "mean" else exact.sum(-2)).to(dtype)


def head_readout(
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    n: int,
    width: int,
    eps: float,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    offset: float = 0.0,
) -> Tensor:
    """n streams to one with weights that the streams decide: σ(α · (x⃗ φ) / r + b) + offset.

    Args:
        X: `[..., n, C]`.
        phi, alpha, bias: `[nC, n]`, `[1]`, `[n]`, in `compute_dtype`.
        width: C.
        eps: added to mean(x⃗²).
        dtype: of the result `[..., C]`.
        compute_dtype: float32 or float64.
        offset: 1e-6 in DeepSeek-V4, whose readout this is.
    """
    mapped = _project(X, phi, width=n * width, eps=eps, compute_dtype=compute_dtype)
    weights = _gate(Gate("sigmoid", offset=offset), mapped * alpha + bias)
    return pre(weights, X, dtype=dtype, compute_dtype=compute_dtype)


def coefficients(
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: Variant,
    n: int,
    width: int,
    eps: float,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre `[..., n]`, H_post `[..., n]`, H_res `[..., n, n]` of a site, in `compute_dtype`.

    Args:
        X: state, `[..., n, C]`, any float dtype.
        phi: `[nC, sum(variant.columns(n))]` in `compute_dtype`, columns pre | post | res.
        alpha: `[3]` in `compute_dtype`, for pre, post, res.
        bias: as many elements as phi has columns, in `compute_dtype`.
        variant: which functions turn H̃ into coefficients.
        width: C.
        eps: added to mean(x⃗²).
        compute_dtype: float32, or float64 for float64 models.

    Raises:
        ValueError: if the variant cannot have n streams.
    """
    variant.check(n)
    mapped = _project(X, phi, width=n * width, eps=eps, compute_dtype=compute_dtype)
    return from_projection(mapped, alpha, bias, variant=variant, n=n)


def from_projection(
    mapped: Tensor, alpha: Tensor, bias: Tensor, *, variant: Variant, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre, H_post, H_res from (x⃗ φ) / r `[..., columns]`; arguments as in `coefficients`."""
    widths = variant.columns(n)
    if variant.inner == "tanh":
        mapped = mapped.tanh()
    groups, biases = mapped.split(widths, -1), bias.split(widths)
    H_pre = _gate(variant.pre, groups[0] * alpha[0] + biases[0])
    H_post = _gate(variant.post, groups[1] * alpha[1] + biases[1])
    if widths[2] == 0:
        return H_pre, H_post, torch.diag_embed(torch.ones_like(H_pre))
    return H_pre, H_post, variant.res.forward(groups[2] * alpha[2] + biases[2], n)


def pre(H_pre: Tensor, X: Tensor, *, dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """h = H_pre X, the branch's input: `[..., n]`, `[..., n, C]` -> `[..., C]`.

    Args:
        H_pre: in `compute_dtype`.
        X: any float dtype; the sum over streams accumulates in `compute_dtype`.
        dtype: of the result.
    """
    h = torch.ops.mhc.matmul.default(H_pre.unsqueeze(-2), X.to(compute_dtype))
    return h.squeeze(-2).to(dtype)


def post_res(
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    *,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Tensor:
    """X' = H_res X + H_postᵀ f, the state behind a site: `[..., n, C]`.

    Args:
        H_res: `[..., n, n]`, `[out, in]`, in `compute_dtype`.
        H_post: `[..., n]` in `compute_dtype`.
        X: state in front of the site, `[..., n, C]`, any float dtype.
        f: the branch's output F(h), `[..., C]`, any float dtype.
        dtype: of the result; both sums accumulate in `compute_dtype`.
    """
    mixed = torch.ops.mhc.matmul.default(H_res, X.to(compute_dtype))
    spread = torch.ops.mhc.matmul.default(H_post.unsqueeze(-1), f.unsqueeze(-2).to(compute_dtype))
    return (mixed + spread).to(dtype)


def sinkhorn_knopp(logits: Tensor, iters: int, eps: float = 0.0) -> Tensor:
    """The iteration behind `mhc::sinkhorn_knopp`, written out: M₀ = exp(logits), columns, rows, …

    The first columns and rows are normalised in the log domain, so that logits of ±1e4 survive:
    subtracting a maximum is not enough, as a whole row can still underflow.

    Args:
        logits: `[..., n, n]`, `[out, in]`, float32 or float64.
        iters: pairs of column and row normalisations, 1 or more.
        eps: above 0 the form of DeepSeek-V4: softmax over each column plus eps takes the place of
            exp and the first columns, and eps is added to every sum.
    """
    if eps:
        M = logits.softmax(-2) + eps
        M = M / (M.sum(-1, keepdim=True) + eps)
    else:
        M = logits.log_softmax(-2).softmax(-1)
    for _ in range(iters - 1):
        M = M / (M.sum(-2, keepdim=True) + eps)
        M = M / (M.sum(-1, keepdim=True) + eps)
    return M


def _project(
    X: Tensor, phi: Tensor, *, width: int, eps: float, compute_dtype: torch.dtype
) -> Tensor:
    """(x⃗ φ) / r, all in `compute_dtype`; width is that of x⃗."""
    flat = X.flatten(-2).to(compute_dtype)
    return torch.ops.mhc.matmul.default(torch.nn.functional.rms_norm(flat, (width,), eps=eps), phi)


def _gate(gate: Gate, x: Tensor) -> Tensor:
    y = x.sigmoid() if gate.function == "sigmoid" else x
    y = y if gate.scale == 1 else gate.scale * y
    return y if gate.offset == 0 else y + gate.offset
