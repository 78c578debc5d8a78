"""The `mhc::` operator library.

Importing this module registers the operators with torch, once per process because a module is
imported once. They are opaque to compilers: a graph shows them as one node each.

    mhc::matmul(a, b)                                     product in the dtype of its operands
    mhc::sinkhorn_knopp(logits, iters, eps=0.)            H_res of arXiv:2512.24880, eq. 19
    mhc::sinkhorn_knopp_backward(grad, logits, iters, eps=0.)

Every operator takes any number of leading dimensions (tokens), none and zero tokens included,
any strides, runs on any device with ordinary torch operations, returns contiguous tensors and is
deterministic.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

# Tokens are the last dimension inside the Sinkhorn operators, so that the reductions over n
# streams run over long contiguous rows of tokens: [out, in, tokens].
_COLUMNS, _ROWS = 0, 1

_HISTORY_ELEMENTS = 1 << 24
"""Bound on what Sinkhorn's backward keeps at a time, 64 MiB in float32."""


@custom_op("mhc::matmul", mutates_args=())
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a `[..., K]` and b `[K, N]`, or `[..., M, K]` and `[..., K, N]`.

    Unlike `torch.matmul` it keeps the dtype of its operands under autocast: residual streams and
    coefficients of mHC are float32 there too (arXiv:2512.24880, §4.3).

    Raises:
        ValueError: if the shapes do not fit; leading dimensions are not broadcast.
    """
    _check_matmul(a, b)
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    # Calls with out= do not take part in autocast; that is documented, and works on all devices.
    if b.dim() == 2:
        torch.mm(_rows(a), b, out=_rows(out))
    else:
        torch.bmm(_batch(a), _batch(b), out=_batch(out))
    return out


def _batch(matrices: Tensor) -> Tensor:
    return matrices.reshape(-1, *matrices.shape[-2:])


def _rows(vectors: Tensor) -> Tensor:
    return vectors.reshape(math.prod(vectors.shape[:-1]), vectors.shape[-1])


def _check_matmul(a: Tensor, b: Tensor) -> None:
    fits = a.dim() >= 1 and b.dim() >= 2 and a.shape[-1] == b.shape[-2]
    if not fits or (b.dim() > 2 and a.shape[:-2] != b.shape[:-2]):
        raise ValueError(
            f"mhc::matmul takes [..., K] and [K, N], or [..., M, K] and [..., K, N] with equal "
            f"leading dimensions, got {tuple(a.shape)} and {tuple(b.shape)}"
        )


@matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    _check_matmul(a, b)
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _matmul_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    grad_a = matmul(grad, b.mT) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return grad_a, None
    if b.dim() == 2:
        a, grad = _rows(a), _rows(grad)
    return grad_a, matmul(a.mT, grad)


matmul.register_autograd(_matmul_backward, setup_context=_matmul_setup)


@custom_op("mhc::sinkhorn_knopp", mutates_args=())
def sinkhorn_knopp(logits: Tensor, iters: int, eps: float = 0.0) -> Tensor:
    """`iters` times columns, then rows to sum 1, starting from exp(logits).

    Rows (over the last dimension, `in`) come last and are exact; columns are approximate after
    finitely many iterations.

    Args:
        logits: `[..., n, n]`, `[out, in]`, n >= 1, floating point. 16-bit logits are computed in
            float32 and the result cast back. Finite logits of any size give finite results.
        iters: 1 or more.
        eps: 0 for the paper. Above 0 as DeepSeek-V4 does: softmax over each column plus eps
            instead of exp and the first columns; eps added to every sum.

    Returns:
        Contiguous, shape and dtype of `logits`. A NaN affects its own matrix only.

    Raises:
        ValueError: for anything but square matrices of floats, iters >= 1 and eps >= 0.
    """
    _check(logits, iters, eps)
    _, matrix = _start(_tokens_last(logits), eps)
    for axis in _axes(iters, eps):
        matrix.div_(_sums(matrix, axis, eps))
    return _tokens_first(matrix, logits)


@sinkhorn_knopp.register_fake
def _(logits: Tensor, iters: int, eps: float = 0.0) -> Tensor:
    _check(logits, iters, eps)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("mhc::sinkhorn_knopp_backward", mutates_args=())
def sinkhorn_knopp_backward(grad: Tensor, logits: Tensor, iters: int, eps: float = 0.0) -> Tensor:
    """The gradient of the finite iteration with respect to `logits`, by replaying it.

    For one normalisation M' = M / s, s = sum(M) + eps:  dM = (dM' - sum(dM' · M')) / s.
    The replay keeps M' and s of all 2 · iters normalisations, for a bounded number of tokens at
    a time.

    Args:
        grad: gradient of the result, shape of `logits`.
        logits, iters, eps: as given to `mhc::sinkhorn_knopp`.

    Returns:
        Contiguous, shape and dtype of `logits`.

    Raises:
        ValueError: as `mhc::sinkhorn_knopp`, and if `grad` has another shape.
    """
    _check(logits, iters, eps, grad)
    size = max(1, _HISTORY_ELEMENTS // (2 * iters * logits.shape[-1] ** 2))
    parts = [
        _gradient(_tokens_last(some_grad), _tokens_last(some_logits), iters, eps)
        for some_grad, some_logits in zip(
            _batch(grad).split(size), _batch(logits).split(size), strict=True
        )
    ]
    return _tokens_first(torch.cat(parts, -1), logits)


@sinkhorn_knopp_backward.register_fake
def _(grad: Tensor, logits: Tensor, iters: int, eps: float = 0.0) -> Tensor:
    _check(logits, iters, eps, grad)
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _check(logits: Tensor, iters: int, eps: float, grad: Tensor | None = None) -> None:
    shape = tuple(logits.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1 or not logits.is_floating_point():
        raise ValueError(
            f"mhc::sinkhorn_knopp takes floating-point logits [..., n, n] with n >= 1, got shape "
            f"{shape} and dtype {logits.dtype}"
        )
    if iters < 1:
        raise ValueError(f"mhc::sinkhorn_knopp needs iters >= 1, got {iters}")
    if not eps >= 0:
        raise ValueError(f"mhc::sinkhorn_knopp needs eps >= 0, got {eps}")
    if grad is not None and grad.shape != logits.shape:
        raise ValueError(
            f"mhc::sinkhorn_knopp_backward takes grad and logits of one shape, got "
            f"{tuple(grad.shape)} and {shape}"
        )


def _tokens_last(matrices: Tensor) -> Tensor:
    """[..., n, n] of any float -> a contiguous copy [n, n, tokens] in float32 or float64."""
    exact = torch.float64 if matrices.dtype == torch.float64 else torch.float32
    last = _batch(matrices).permute(1, 2, 0)
    # A copy even where none is needed (n = 1): `_gradient` writes into it.
    return last.to(exact, copy=True, memory_format=torch.contiguous_format)


def _tokens_first(matrices: Tensor, like: Tensor) -> Tensor:
    """[n, n, tokens] -> contiguous, with the shape and dtype of `like`."""
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    _batch(out).copy_(matrices.permute(2, 0, 1))
    return out


def _start(logits: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Columns as probabilities, and the matrix that the iteration of `_axes` starts from.

    Without eps the first columns and rows are one step in the log domain: exp of a logit, or of
    all logits of a row less the maxima of their columns, can be 0, and 0 / 0 is not a number.
    After that every sum lies between 1 / n and n.
    """
    if eps:
        columns = torch.softmax(logits, _COLUMNS)
        return columns, columns + eps
    columns = torch.log_softmax(logits, _COLUMNS)
    return columns.exp(), torch.softmax(columns, _ROWS)


def _axes(iters: int, eps: float) -> tuple[int, ...]:
    """What is normalised after `_start`, in order."""
    return ((_ROWS,) if eps else ()) + (_COLUMNS, _ROWS) * (iters - 1)


def _sums(matrix: Tensor, axis: int, eps: float) -> Tensor:
    sums = matrix.sum(axis, keepdim=True)
    return sums.add_(eps) if eps else sums


def _gradient(grad: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """d logits, all tensors [n, n, tokens]; `grad` is used as workspace."""
    columns, first = _start(logits, eps)
    matrix, history = first, []
    for axis in _axes(iters, eps):
        sums = _sums(matrix, axis, eps)
        matrix = matrix / sums
        history.append((axis, sums, matrix))
    for axis, sums, matrix in reversed(history):
        grad.sub_((grad * matrix).sum(axis, keepdim=True)).div_(sums)
    if eps:
        grad.mul_(columns)
    else:
        grad.mul_(first)
        grad.sub_(first * grad.sum(_ROWS, keepdim=True))
    return grad.sub_(columns * grad.sum(_COLUMNS, keepdim=True))


def _setup(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
    logits, ctx.iters, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return sinkhorn_knopp_backward(grad, logits, ctx.iters, ctx.eps), None, None


def _double_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(
        "mhc::sinkhorn_knopp_backward cannot be differentiated: double backward through "
        "mhc::sinkhorn_knopp is not supported. Take gradients of gradients (create_graph=True, "
        "torch.func.hessian) with variant 'identity', 'kromhc' or 'mhc_lite' instead"
    )


sinkhorn_knopp.register_autograd(_backward, setup_context=_setup)
sinkhorn_knopp_backward.register_autograd(_double_backward)
