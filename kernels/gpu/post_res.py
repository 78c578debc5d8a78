"""X' = H_res X + H_postᵀ f, the state behind a site, and its backward, as Triton kernels.

Bytes per token, in units of C elements of the streams (coefficients apart):

    post_res            reads (n+1)C     writes nC
    post_res_backward   reads (2n+1)C    writes (n+1)C        dX, df, dH_post and dH_res at once
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import contiguous, launch
from .tiles import add_dots, combine, load_numbers, load_streams, store_sums, zeros
from .tuning import blocks, cdiv

MOST_KEPT = tl.constexpr(4)
"""Up to so many streams the coefficients of a token stay in registers over all channels. With 8
streams they are 72, which would spill: they are read again, from L1, where they are needed.
"""


def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X' `[T, n, C]` from H_res `[T, n, n]`, H_post `[T, n]`, X `[T, n, C]`, f `[T, C]`."""
    H_res, H_post, X, f = contiguous(H_res, H_post, X, f)
    T, n, C = X.shape
    X2 = torch.empty_like(X)
    cut = blocks(C, X.dtype)
    launch(
        _forward, (cdiv(T, cut.tokens),), X2, H_res, H_post, X, f, T,
        n=n, C=C, BT=cut.tokens, BC=cut.channels, num_warps=cut.warps,
    )  # fmt: skip
    return X2


def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dH_res, dH_post, dX, df from dX2 `[T, n, C]` and what forward had."""
    dX2, H_res, H_post, X, f = contiguous(dX2, H_res, H_post, X, f)
    T, n, C = X.shape
    dH_res, dH_post = torch.empty_like(H_res), torch.empty_like(H_post)
    dX, df = torch.empty_like(X), torch.empty_like(f)
    cut = blocks(C, X.dtype)
    launch(
        _backward, (cdiv(T, cut.tokens),),
        dH_res, dH_post, dX, df, dX2, H_res, H_post, X, f, T,
        n=n, C=C, BT=cut.tokens, BC=cut.channels, LANE=cut.lane, num_warps=cut.warps,
    )  # fmt: skip
    return dH_res, dH_post, dX, df


@triton.jit(do_not_specialize=["T"])
def _forward(
    X2, H_res, H_post, X, f, T,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    rows = first * C + token * C
    res_rows = H_res + first * (n * n) + token * (n * n)
    post_rows = H_post + first * n + token * n
    if n <= MOST_KEPT:
        weights = load_numbers(res_rows, live, n * n)
        posts = load_numbers(post_rows, live, n)
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = live & (channel < C)
        streams = load_streams(X + rows * n + channel, mask, C, n)
        branch = tl.load(f + rows + channel, mask, other=0.0)
        for i in tl.static_range(n):
            if n <= MOST_KEPT:
                mixed = mix(streams, branch, weights, i * n, posts[i], n)
            else:
                row = load_numbers(res_rows + i * n, live, n)
                post = tl.load(post_rows + i, live, other=0.0)
                mixed = mix(streams, branch, row, 0, post, n)
            tl.store(X2 + rows * n + i * C + channel, mixed.to(X2.dtype.element_ty), mask)


@triton.jit
def mix(streams, branch, weights, start: tl.constexpr, post, n: tl.constexpr):
    """A stream of X', not yet rounded: a row of H_res, from `start` on, times X, plus post · f."""
    mixed = combine(streams, weights, start, 1, n)
    return tl.fma(post, branch.to(mixed.dtype), mixed)


@triton.jit(do_not_specialize=["T"])
def _backward(
    dH_res, dH_post, dX, df, dX2, H_res, H_post, X, f, T,
    n: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    rows = first * C + token * C
    res_rows = first * (n * n) + token * (n * n)
    post_rows = first * n + token * n
    if n <= MOST_KEPT:
        weights = load_numbers(H_res + res_rows, live, n * n)
        posts = load_numbers(H_post + post_rows, live, n)
    dots = zeros(BT, BC // LANE, n * (n + 1), H_post.dtype.element_ty)
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = live & (channel < C)
        gradients = load_streams(dX2 + rows * n + channel, mask, C, n)
        for j in tl.static_range(n):
            if n <= MOST_KEPT:
                mixed = combine(gradients, weights, j, n, n)
            else:
                column = load_numbers(H_res + res_rows + j, live, n, n)
                mixed = combine(gradients, column, 0, 1, n)
            tl.store(dX + rows * n + j * C + channel, mixed.to(dX.dtype.element_ty), mask)
        if n > MOST_KEPT:
            posts = load_numbers(H_post + post_rows, live, n)
        mixed = combine(gradients, posts, 0, 1, n)
        tl.store(df + rows + channel, mixed.to(df.dtype.element_ty), mask)
        added = ()
        for j in tl.static_range(n):
            x = tl.load(X + rows * n + j * C + channel, mask, other=0.0)
            added += add_dots(dots, j * n, x, gradients, n, LANE)
        x = tl.load(f + rows + channel, mask, other=0.0)
        dots = added + add_dots(dots, n * n, x, gradients, n, LANE)
    for i in tl.static_range(n):
        store_sums(dH_res + res_rows + i * n, dots, live, i, n, n)
    store_sums(dH_post + post_rows, dots, live, n * n, 1, n)
