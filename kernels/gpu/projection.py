"""x⃗ φ and Σ x⃗² of every token, and their backward, as Triton kernels.

Bytes per token, in units of C elements of the streams (φ, dφ and the few numbers of a token apart):

    project              reads nC
    gradients            reads nC, and C for dh, nC for partial where given;  writes nC

Note: The order of sums
    A split of C belongs to one program with all its streams; it adds tile after tile, blocks of
    channels outside, streams inside, and the splits are added in their order. So a token's sums
    do not depend on the number of tokens, and `seam`, which calls `add_tile` with the same tiles,
    has the same bits. Squares are added along a tree that is written out (`row_sums`), because the
    order of `tl.sum` follows from a layout that is the compiler's choice.

Note: Precision
    φ is float32. Against 16-bit streams it is split into two bfloat16 terms: products are exact,
    and the result has a relative error of 2e-6 where tf32 has 2e-4. float32 streams take three
    tf32 products on NVIDIA, float32 matrix instructions elsewhere.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tuning import cdiv, config, slots


def project(X: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of x⃗ φ `[splits, T, columns]` and of Σ x⃗² `[splits, T]`, float32, to be added in order.

    Args:
        X: `[T, n, C]`, contiguous.
        phi: `[nC, columns]`, contiguous, float32.
    """
    T, n, C = X.shape
    columns = phi.shape[1]
    cut = config(n, C, columns, X.dtype)
    y_parts = phi.new_empty(cut.splits, T, columns)
    square_parts = phi.new_empty(cut.splits, T)
    launch(
        _project, (cdiv(T, cut.BT), cut.splits), y_parts, square_parts, X, phi, T,
        n=n, C=C, COLUMNS=columns, SLICE=cut.SLICE, BT=cut.BT, BK=cut.BK, COLS=cut.COLS,
        PRECISION=cut.PRECISION, num_warps=cut.num_warps, num_stages=4 if cut.COLS <= 64 else 3,
    )  # fmt: skip
    return y_parts, square_parts


@triton.jit(do_not_specialize=["T"])
def _project(
    y_parts, square_parts, X, phi, T,
    n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    begin = tl.program_id(1) * SLICE
    token = tl.arange(0, BT)[:, None]
    live = first + token < T
    X += first * (n * C) + token * (n * C)
    total = tl.zeros([BT, COLS], tl.float32)
    squares = tl.zeros([BT, BK], tl.float32)
    # One loop over blocks of channels and their streams, so that loads run ahead by few tiles.
    for tile in tl.range(0, tl.cdiv(tl.minimum(SLICE, C - begin), BK) * n):
        block, stream = begin + tile // n * BK, tile % n
        channel = block + tl.arange(0, BK)[None, :]
        mask = live if C % BK == 0 else live & (channel < C)
        x = tl.load(X + stream * C + channel, mask, other=0.0)
        weights = load_phi(phi, stream, block, C, COLUMNS, BK, COLS)
        total, squares = add_tile(total, squares, x, weights, PRECISION)
    split = tl.program_id(1).to(tl.int64) * T + first
    store_parts(y_parts, square_parts, total, squares, split, live, COLUMNS)


@triton.jit
def store_parts(y_parts, square_parts, total, squares, row, live, COLUMNS: tl.constexpr):
    """The sums of a program, at `row` + token of both outputs; live is [BT, 1]."""
    token = tl.arange(0, total.shape[0])[:, None]
    column = tl.arange(0, total.shape[1])[None, :]
    tl.store(y_parts + row * COLUMNS + token * COLUMNS + column, total, live & (column < COLUMNS))
    tl.store(square_parts + row + token, row_sums(squares), live)


@triton.jit
def load_phi(
    phi, stream, block, C: tl.constexpr, COLUMNS: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr
):
    """The tile [BK, COLS] of φ for the channels of a stream from `block` on."""
    channel = block + tl.arange(0, BK)[:, None]
    column = tl.arange(0, COLS)[None, :]
    mask = (column < COLUMNS) if C % BK == 0 else (column < COLUMNS) & (channel < C)
    return tl.load(phi + (stream * C + channel) * COLUMNS + column, mask, other=0.0)


@triton.jit
def add_tile(total, squares, x, phi, PRECISION: tl.constexpr):
    """total [BT, COLS] + x φ and squares [BT, BK] + x², for tiles x [BT, BK] and φ [BK, COLS]."""
    total = multiply(x, phi, total, PRECISION)
    x = x.to(tl.float32)
    return total, tl.fma(x, x, squares)


@triton.jit
def multiply(x, w, total, PRECISION: tl.constexpr):
    """total + x w, w float32, x of the streams' dtype.

    PRECISION is that dtype, where x w is computed in bfloat16 terms, or else the `input_precision`
    of a product of float32. bfloat16 x is one term; float16 x is exactly two.
    """
    if PRECISION == "bfloat16":
        high, low = two_terms(w)
        total = tl.dot(x, high, total)
        return tl.dot(x, low, total)
    elif PRECISION == "float16":  # noqa: RET505 (Triton compiles what follows a static return)
        return multiply_float32(x.to(tl.float32), w, total)
    else:
        return tl.dot(x, w, total, input_precision=PRECISION)


@triton.jit
def multiply_float32(a, b, total):
    """total + a b in two bfloat16 terms each; the product of the low terms is left out."""
    a_high, a_low = two_terms(a)
    b_high, b_low = two_terms(b)
    total = tl.dot(a_high, b_high, total)
    total = tl.dot(a_high, b_low, total)
    return tl.dot(a_low, b_high, total)


@triton.jit
def two_terms(x):
    """x = high + low up to 2^-17 |x|, both bfloat16."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def row_sums(x):
    """Σ over the columns of x [rows, columns], [rows, 1], neighbours first."""
    for _ in tl.static_range(MOST_LEVELS):
        if x.shape[1] > 1:
            left, right = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
            x = left + right
    return x


MOST_LEVELS = tl.constexpr(8)
"""Of the tree in `row_sums`, for up to 256 columns."""


def gradients(
    X: Tensor,
    phi: Tensor,
    dy: Tensor,
    norm_grad: Tensor,
    *,
    dh: Tensor | None = None,
    H_pre: Tensor | None = None,
    partial: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dX `[T, n, C]`, rounded once, and parts of dφ `[slots, nC, columns]`, to be added in order.

        dX[i] = dy φ[i]ᵀ + norm_grad · X[i] + H_pre[i] · dh + partial[i]          dφ = Σ x⃗ᵀ dy

    Args:
        X, phi: as for `project`.
        dy, norm_grad: `[T, columns]` and `[T]`, float32.
        dh, H_pre: `[T, C]` in the dtype of X, and `[T, n]`; both or none.
        partial: another gradient of X, in its dtype.
        dtype: of dX, if not that of X.
    """
    T, n, C = X.shape
    columns = phi.shape[1]
    cut = slots(T, n, C, columns, X.dtype)
    dX = torch.empty_like(X, dtype=dtype)
    dphi_parts = phi.new_empty(cut.slots, *phi.shape)
    launch(
        _gradients, (cut.blocks, cut.slots, triton.cdiv(n, cut.GROUP)), dX, dphi_parts,
        X, phi, dy, norm_grad, dh, H_pre, partial, T, cut.size,
        n=n, C=C, COLUMNS=columns, GROUP=cut.GROUP, BT=cut.BT, BK=cut.BK, COLS=cut.COLS,
        PRECISION=cut.PRECISION, num_warps=cut.num_warps, num_stages=1,
    )  # fmt: skip
    return dX, dphi_parts


@triton.jit(do_not_specialize=["T", "size"])
def _gradients(
    dX, dphi_parts, X, phi, dy, norm_grad, dh, H_pre, partial, T, size,
    n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BK
    begin = tl.program_id(1).to(tl.int64) * size
    group = tl.program_id(2) * GROUP if n > GROUP else 0
    channel = block + tl.arange(0, BK)[None, :]
    token = tl.arange(0, BT)[:, None]
    weights = load_weights(phi, group, block, n, C, COLUMNS, GROUP, BK, COLS)
    sums = zero_sums(GROUP, BK, COLS)
    for row in tl.range(begin, tl.minimum(begin + size, T), BT):
        live = row + token < T
        inside = live if C % BK == 0 else live & (channel < C)
        d = load_dy(dy + row * COLUMNS, live, COLUMNS, COLS, PRECISION)
        scale = tl.load(norm_grad + row + token, live, other=0.0)
        if dh is not None:
            gradient = tl.load(dh + row * C + token * C + channel, inside, other=0.0)
        added = ()
        for j in tl.static_range(GROUP):
            stream = group + j
            mask = inside if n % GROUP == 0 else inside & (stream < n)
            at = row * (n * C) + token * (n * C) + stream * C + channel
            x = tl.load(X + at, mask, other=0.0)
            g = gradient_tile(x, d, scale, weights[j], PRECISION)
            if dh is not None:
                live_j = live if n % GROUP == 0 else live & (stream < n)
                weight = tl.load(H_pre + row * n + token * n + stream, live_j, other=0.0)
                g = tl.fma(weight, gradient.to(tl.float32), g)
            if partial is not None:
                g += tl.load(partial + at, mask, other=0.0).to(tl.float32)
            tl.store(dX + at, g.to(dX.dtype.element_ty), mask)
            added += (add_dphi(sums[j], x, d, PRECISION),)
        sums = added
    dphi_parts += tl.program_id(1).to(tl.int64) * (n * C * COLUMNS)
    store_dphi(dphi_parts, sums, group, block, n, C, COLUMNS, GROUP, BK, COLS)


@triton.jit
def load_dy(
    dy, live, COLUMNS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The rows of dy of a block of tokens, [BT, COLS], in the terms of its products.

    live is [BT, 1].
    """
    token = tl.arange(0, live.shape[0])[:, None]
    column = tl.arange(0, COLS)[None, :]
    d = tl.load(dy + token * COLUMNS + column, live & (column < COLUMNS), other=0.0)
    if PRECISION == "bfloat16" or PRECISION == "float16":
        high, low = two_terms(d)
        terms = (settled(high), settled(low))
    else:
        terms = (d,)
    return terms


@triton.jit
def load_weights(
    phi, group, block, n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The tiles of φ of GROUP streams. Loaded in front of a loop, they stay in shared memory."""
    weights = ()
    for j in tl.static_range(GROUP):
        stream = tl.minimum(group + j, n - 1)
        weights += (load_phi(phi, stream, block, C, COLUMNS, BK, COLS),)
    return weights


@triton.jit
def zero_sums(GROUP: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr):
    """Where the sums of dφ begin: [COLS, BK], or [BK, COLS] if there are more columns.

    The longer side is the last, as in the tiles of dX, [BT, BK]: the compiler cuts all products of
    a loop among warps in the same way, along the longer side of the first, and where it cuts the
    shorter side of another, several warps hold the same sums.
    """
    sums = ()
    for _ in tl.static_range(GROUP):
        if COLS <= BK:
            sums += (tl.zeros([COLS, BK], tl.float32),)
        else:
            sums += (tl.zeros([BK, COLS], tl.float32),)
    return sums


@triton.jit
def add_dphi(total, x, dy, PRECISION: tl.constexpr):
    """total + xᵀ dy, or its transpose, see `zero_sums`; x is [BT, BK], dy from `load_dy`."""
    if PRECISION == "bfloat16":
        total = add_product(total, x, dy[0], "ieee")
        total = add_product(total, x, dy[1], "ieee")
    elif PRECISION == "float16":
        high, low = two_terms(x.to(tl.float32))
        total = add_product(total, high, dy[0], "ieee")
        total = add_product(total, high, dy[1], "ieee")
        total = add_product(total, low, dy[0], "ieee")
    else:
        total = add_product(total, x, dy[0], PRECISION)
    return total


@triton.jit
def add_product(total, x, dy, PRECISION: tl.constexpr):
    """`add_dphi` for a single term."""
    if dy.shape[1] > x.shape[1]:
        total = tl.dot(tl.trans(x), dy, total, input_precision=PRECISION)
    else:
        total = tl.dot(tl.trans(dy), x, total, input_precision=PRECISION)
    return total


@triton.jit
def store_dphi(
    dphi_parts, sums, group, block, n: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, BK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The sums of a program, as a slot of dφ has them."""
    if COLS <= BK:
        column = tl.arange(0, COLS)[:, None]
        channel = block + tl.arange(0, BK)[None, :]
    else:
        column = tl.arange(0, COLS)[None, :]
        channel = block + tl.arange(0, BK)[:, None]
    for j in tl.static_range(GROUP):
        real = (channel < C) & (column < COLUMNS)
        if n % GROUP != 0:
            real = real & (group + j < n)
        tl.store(dphi_parts + ((group + j) * C + channel) * COLUMNS + column, sums[j], real)


@triton.jit
def gradient_tile(x, dy, norm_grad, phi, PRECISION: tl.constexpr):
    """dy φᵀ + norm_grad x: what coefficients add to the gradient of tile x [BT, BK], in float32.

    dy is from `load_dy`, norm_grad [BT, 1], φ [BK, COLS].
    """
    d = tl.zeros([x.shape[0], x.shape[1]], tl.float32)
    if PRECISION == "bfloat16" or PRECISION == "float16":
        high, low = two_terms(tl.trans(phi))
        d = tl.dot(dy[0], high, d)
        d = tl.dot(dy[0], low, d)
        d = tl.dot(dy[1], high, d)
    else:
        d = tl.dot(dy[0], tl.trans(phi), d, input_precision=PRECISION)
    return tl.fma(norm_grad, x.to(tl.float32), settled(d))


@triton.jit
def settled(x):
    """x, where the compiler shall not mix the layout of a product with that of memory.

    It would compute what x is made of, or what is made of x, once in each layout, and keep both:
    255 registers and a stack. It does not look through a sum, here over one element.
    """
    return tl.sum(tl.expand_dims(x, 2), 2)
