"""h = H_pre X, the branch's input, and its backward, as Triton kernels.

Bytes per token, in units of C elements of the streams (coefficients apart):

    pre             reads nC        writes C
    pre_backward    reads (n+1)C    writes nC        dH_pre and dX at once
    dots            reads (n+1)C                     dH_pre alone
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from .launch import contiguous, launch
from .tiles import add_dots, combine, load_numbers, load_streams, store_sums, zeros
from .tuning import blocks, cdiv


def pre(H_pre: Tensor, X: Tensor) -> Tensor:
    """h `[T, C]` from H_pre `[T, n]` and X `[T, n, C]`."""
    H_pre, X = contiguous(H_pre, X)
    T, n, C = X.shape
    h = X.new_empty(T, C)
    cut = blocks(C, X.dtype)
    launch(
        _forward, (cdiv(T, cut.tokens),), h, H_pre, X, T,
        n=n, C=C, BT=cut.tokens, BC=cut.channels, num_warps=cut.warps,
    )  # fmt: skip
    return h


def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """dH_pre `[T, n]` and dX `[T, n, C]` from dh `[T, C]` and what forward had."""
    dX = torch.empty_like(X, memory_format=torch.contiguous_format)
    return _dots(dh, X, dX, H_pre.contiguous()), dX


def dots(dh: Tensor, X: Tensor) -> Tensor:
    """dH_pre `[T, n]`, the products of dh with each stream: `pre_backward` without dX."""
    return _dots(dh, X, None, None)


def _dots(dh: Tensor, X: Tensor, dX: Tensor | None, H_pre: Tensor | None) -> Tensor:
    dh, X = contiguous(dh, X)
    T, n, C = X.shape
    dH_pre = X.new_empty(T, n, dtype=compute_dtype(X.dtype))
    cut = blocks(C, X.dtype)
    launch(
        _backward, (cdiv(T, cut.tokens),), dH_pre, dX, dh, H_pre, X, T,
        n=n, C=C, BT=cut.tokens, BC=cut.channels, LANE=cut.lane, num_warps=cut.warps,
    )  # fmt: skip
    return dH_pre


@triton.jit(do_not_specialize=["T"])
def _forward(
    h, H_pre, X, T,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    rows = first * C + token * C
    weights = load_numbers(H_pre + first * n + token * n, live, n)
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = live & (channel < C)
        streams = load_streams(X + rows * n + channel, mask, C, n)
        mixed = combine(streams, weights, 0, 1, n)
        tl.store(h + rows + channel, mixed.to(h.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def _backward(
    dH_pre, dX, dh, H_pre, X, T,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    rows = first * C + token * C
    if dX is not None:
        weights = load_numbers(H_pre + first * n + token * n, live, n)
    sums = zeros(BT, BC // LANE, n, dH_pre.dtype.element_ty)
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = live & (channel < C)
        gradient = tl.load(dh + rows + channel, mask, other=0.0)
        streams = load_streams(X + rows * n + channel, mask, C, n)
        if dX is not None:
            for j in tl.static_range(n):
                d = weights[j] * gradient.to(weights[j].dtype)
                tl.store(dX + rows * n + j * C + channel, d.to(dX.dtype.element_ty), mask)
        sums = add_dots(sums, 0, gradient, streams, n, LANE)
    store_sums(dH_pre + first * n + token * n, sums, live, 0, 1, n)
