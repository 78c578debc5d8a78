"""What is computed between two branches without writing it down in between, as Triton kernels.

Bytes per token, in units of C elements of the streams (φ, dφ and the numbers of a token apart):

    post_res_project    reads (n+1)C     writes nC        X' of a site, and x⃗' φ of the next
    seam_gradients      reads (2n+2)C, and nC for partial where given     writes (n+1)C

`seam_gradients` also writes, and reads once more, parts of dH_res and dH_post: 4 (n² + n) bytes a
token for every 64 channels, at n = 4 as much as 0.6C of 16 bits.

`post_res_project` has the bits of `post_res` and `project`: it rounds X' before it goes on, and
calls `mix` and `add_tile` with the same tiles in the same order. `seam_gradients` never writes the
gradient of X' to memory and never rounds it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operands import Closed
from . import sums
from .launch import launch
from .post_res import mix, post_res, post_res_backward
from .projection import (
    add_dphi,
    add_tile,
    gradient_tile,
    gradients,
    load_dy,
    load_phi,
    load_weights,
    project,
    settled,
    store_dphi,
    store_parts,
    zero_sums,
)
from .tiles import combine, load_numbers, load_streams
from .tuning import MOST_FUSED_STREAMS, cdiv, config, lanes, slots


def post_res_project(
    H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """X' `[T, n, C]`, and of X' what `project` returns: parts of x⃗' φ and of Σ x⃗'².

    Args:
        H_res, H_post, X, f: as `post_res` takes them, contiguous.
        phi: of the next site, `[nC, columns]`, contiguous, float32.
    """
    T, n, C = X.shape
    if n > MOST_FUSED_STREAMS:
        X2 = post_res(H_res, H_post, X, f)
        return X2, *project(X2, phi)
    columns = phi.shape[1]
    cut = config(n, C, columns, X.dtype)
    X2 = torch.empty_like(X)
    y_parts = phi.new_empty(cut.splits, T, columns)
    square_parts = phi.new_empty(cut.splits, T)
    # Loads run a block ahead where there are registers for it.
    ahead = X.dtype.itemsize == 2 and lanes() == 32
    launch(
        _forward, (cdiv(T, cut.BT), cut.splits), X2, y_parts, square_parts,
        H_res, H_post, X, f, phi, T,
        n=n, C=C, COLUMNS=columns, SLICE=cut.SLICE, BT=cut.BT, BK=cut.BK, COLS=cut.COLS,
        PRECISION=cut.PRECISION, num_warps=cut.num_warps, num_stages=1 + ahead,
    )  # fmt: skip
    return X2, y_parts, square_parts


@triton.jit(do_not_specialize=["T"])
def _forward(
    X2, y_parts, square_parts, H_res, H_post, X, f, phi, T,
    n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    begin = tl.program_id(1) * SLICE
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    rows = first * C + token * C
    H_res += first * (n * n) + token * (n * n)
    H_post += first * n + token * n
    total = tl.zeros([BT, COLS], tl.float32)
    squares = tl.zeros([BT, BK], tl.float32)
    for block in tl.range(begin, tl.minimum(begin + SLICE, C), BK):
        channel = block + tl.arange(0, BK)[None, :]
        mask = live if C % BK == 0 else live & (channel < C)
        streams = load_streams(X + rows * n + channel, mask, C, n)
        branch = tl.load(f + rows + channel, mask, other=0.0)
        for i in tl.static_range(n):
            # Read again for every block, from L1: in registers they would be too many.
            weights = load_numbers(H_res + i * n, live, n)
            post = tl.load(H_post + i, live, other=0.0)
            mixed = settled(mix(streams, branch, weights, 0, post, n))
            x = mixed.to(X2.dtype.element_ty)
            tl.store(X2 + rows * n + i * C + channel, x, mask)
            if C % BK != 0:  # beyond C an infinite coefficient makes NaN of 0
                x = tl.where(mask, x, 0.0)
            weight = load_phi(phi, i, block, C, COLUMNS, BK, COLS)
            total, squares = add_tile(total, squares, x, weight, PRECISION)
    split = tl.program_id(1).to(tl.int64) * T + first
    store_parts(y_parts, square_parts, total, squares, split, live, COLUMNS)


def seam_gradients(
    dh: Tensor,
    H_pre: Tensor,
    X2: Tensor,
    phi: Tensor,
    dy: Tensor,
    norm_grad: Tensor,
    partial: Tensor | None,
    closed: Closed,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dH_res, dH_post, dX, df, and parts of dφ `[slots, nC, columns]`, to be added in order.

    Args:
        dh, H_pre, X2, phi, dy, norm_grad, partial: of the site that was opened, as `gradients`
            takes them.
        closed: of the site that was closed, as `post_res` took it.
    """
    H_res, H_post, X, f = closed
    T, n, C = X.shape
    if n > MOST_FUSED_STREAMS:
        dX2, dphi_parts = gradients(
            X2, phi, dy, norm_grad, dh=dh, H_pre=H_pre, partial=partial, dtype=torch.float32
        )
        return *post_res_backward(dX2, H_res, H_post, X, f), dphi_parts
    columns = phi.shape[1]
    cut = slots(T, n, C, columns, X.dtype)
    dX, df = torch.empty_like(X), torch.empty_like(f)
    dphi_parts = phi.new_empty(cut.slots, *phi.shape)
    H_parts = phi.new_empty(cut.blocks, n * n + n, T)
    launch(
        _backward, (cut.blocks, cut.slots), dX, df, dphi_parts, H_parts,
        dh, H_pre, X2, phi, dy, norm_grad, partial, H_res, H_post, X, f, T, cut.size,
        n=n, C=C, COLUMNS=columns, BT=cut.BT, BK=cut.BK, COLS=cut.COLS,
        PRECISION=cut.PRECISION, num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip
    return *sums.tokens(H_parts, n), dX, df, dphi_parts


@triton.jit(do_not_specialize=["T", "size"])
def _backward(
    dX, df, dphi_parts, H_parts,
    dh, H_pre, X2, phi, dy, norm_grad, partial, H_res, H_post, X, f, T, size,
    n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BK
    begin = tl.program_id(1).to(tl.int64) * size
    channel = block + tl.arange(0, BK)[None, :]
    token = tl.arange(0, BT)[:, None]
    H_parts += tl.program_id(0) * ((n * n + n) * T.to(tl.int64))
    weights_next = load_weights(phi, 0, block, n, C, COLUMNS, n, BK, COLS)
    dphi = zero_sums(n, BK, COLS)
    for row in tl.range(begin, tl.minimum(begin + size, T), BT):
        live = row + token < T
        rows = row * C + token * C
        mask = live if C % BK == 0 else live & (channel < C)
        d = load_dy(dy + row * COLUMNS, live, COLUMNS, COLS, PRECISION)
        scale = tl.load(norm_grad + row + token, live, other=0.0)
        branch = tl.load(dh + rows + channel, mask, other=0.0).to(tl.float32)
        streams = ()
        dX2 = ()
        for i in tl.static_range(n):
            x = tl.load(X2 + rows * n + i * C + channel, mask, other=0.0)
            g = gradient_tile(x, d, scale, weights_next[i], PRECISION)
            weight = tl.load(H_pre + row * n + token * n + i, live, other=0.0)
            g = tl.fma(weight, branch, g)
            if partial is not None:
                g += tl.load(partial + rows * n + i * C + channel, mask, other=0.0).to(tl.float32)
            streams += (x,)
            dX2 += (g,)
        # In a loop of its own: in the one above dy would be in registers twice, as both operands.
        added = ()
        for i in tl.static_range(n):
            added += (add_dphi(dphi[i], streams[i], d, PRECISION),)
        dphi = added
        weights = H_res + row * (n * n) + token * (n * n)
        for j in tl.static_range(n):
            column = load_numbers(weights + j, live, n, n)
            mixed = combine(dX2, column, 0, 1, n)
            tl.store(dX + rows * n + j * C + channel, mixed.to(dX.dtype.element_ty), mask)
        posts = load_numbers(H_post + row * n + token * n, live, n)
        mixed = combine(dX2, posts, 0, 1, n)
        tl.store(df + rows + channel, mixed.to(df.dtype.element_ty), mask)
        parts = H_parts + row + token
        for j in tl.static_range(n):
            x = tl.load(X + rows * n + j * C + channel, mask, other=0.0)
            store_dots(parts + j * T.to(tl.int64), dX2, x, live, n * T.to(tl.int64), n)
        x = tl.load(f + rows + channel, mask, other=0.0)
        store_dots(parts + n * n * T.to(tl.int64), dX2, x, live, T.to(tl.int64), n)
    dphi_parts += tl.program_id(1).to(tl.int64) * (n * C * COLUMNS)
    store_dphi(dphi_parts, dphi, 0, block, n, C, COLUMNS, n, BK, COLS)


@triton.jit
def store_dots(pointer, gradients, x, live, stride, n: tl.constexpr):
    """⟨gradients[i], x⟩ over the channels of a tile, `stride` apart from each pointer [BT, 1]."""
    for i in tl.static_range(n):
        dots = tl.sum(gradients[i] * x.to(tl.float32), 1, keep_dims=True)
        tl.store(pointer + i * stride, dots, live)
