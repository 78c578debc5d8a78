"""Parts of gradients, added in a fixed order, as Triton kernels.

    parameters    parts of dφ, and of the sums of `chain_backward`    ->  dφ, dα, db
    tokens        parts of dH_res and dH_post of every token          ->  dH_res, dH_post

Which part an addend is in follows from shapes alone, so two runs, on whatever device, add the same
numbers in the same order. All is float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .tuning import cdiv

_BLOCK = 1024
"""Elements of dφ of a program: 16 bytes of each thread, of every part."""

_ROWS = 64
"""Rows of `chain_sums` that are read at once."""

_NUMBERS = 1024
"""Numbers of a program of `tokens`."""


def parameters(
    dphi_parts: Tensor, chain_sums: Tensor, widths: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """dφ `[nC, columns]`, dα `[3]` and db `[columns]`.

    Args:
        dphi_parts: `[slots, nC, columns]`.
        chain_sums: `[programs, 2, columns]`: sums of dH̃, and of dH̃ · inner(y / r).
        widths: columns of pre, post and res.
    """
    slots, rows, columns = dphi_parts.shape
    dphi = dphi_parts.new_empty(rows, columns)
    dalpha, dbias = dphi_parts.new_empty(3), dphi_parts.new_empty(columns)
    blocks = triton.cdiv(rows * columns, _BLOCK)
    launch(
        _parameters, (1 + blocks,), dphi, dalpha, dbias, dphi_parts, chain_sums,
        slots, chain_sums.shape[0],
        SIZE=rows * columns, COLUMNS=columns, POST=widths[0], RES=widths[0] + widths[1],
        COLS=triton.next_power_of_2(columns), ROWS=_ROWS, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
    return dphi, dalpha, dbias


@triton.jit(do_not_specialize=["slots", "programs"])
def _parameters(
    dphi, dalpha, dbias, dphi_parts, chain_sums, slots, programs,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, POST: tl.constexpr, RES: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # The first program has the longest loop: it begins at once.
    if tl.program_id(0) == 0:
        column = tl.arange(0, COLS)
        real = column < COLUMNS
        d = tl.zeros([ROWS, COLS], tl.float32)
        products = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.range(0, programs, ROWS):
            row = first + tl.arange(0, ROWS)[:, None]
            at = row * (2 * COLUMNS) + column[None, :]
            here = (row < programs) & real[None, :]
            d += tl.load(chain_sums + at, here, other=0.0)
            products += tl.load(chain_sums + COLUMNS + at, here, other=0.0)
        tl.store(dbias + column, tl.sum(d, 0), real)
        product = tl.sum(products, 0)
        tl.store(dalpha, tl.sum(tl.where(column < POST, product, 0.0)))
        tl.store(dalpha + 1, tl.sum(tl.where((column >= POST) & (column < RES), product, 0.0)))
        tl.store(dalpha + 2, tl.sum(tl.where(column >= RES, product, 0.0)))
    else:
        at = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < SIZE
        total = tl.zeros([BLOCK], tl.float32)
        for slot in tl.range(0, slots):
            total += tl.load(dphi_parts + slot * SIZE + at, inside, other=0.0)
        tl.store(dphi + at, total, inside)


def tokens(parts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """dH_res `[T, n, n]` and dH_post `[T, n]` from parts `[count, n² + n, T]`."""
    count, numbers, T = parts.shape
    dH_res, dH_post = parts.new_empty(T, n, n), parts.new_empty(T, n)
    K = triton.next_power_of_2(numbers)
    BT = max(1, _NUMBERS // K)
    launch(
        _tokens, (cdiv(T, BT),), dH_res, dH_post, parts, T,
        n=n, COUNT=count, BT=BT, K=K, num_warps=4,
    )  # fmt: skip
    return dH_res, dH_post


@triton.jit(do_not_specialize=["T"])
def _tokens(
    dH_res, dH_post, parts, T,
    n: tl.constexpr, COUNT: tl.constexpr, BT: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[None, :]
    k = tl.arange(0, K)[:, None]
    res: tl.constexpr = n * n
    inside = (token < T) & (k < res + n)
    parts += k * T.to(tl.int64) + token
    total = tl.zeros([K, BT], tl.float32)
    for part in tl.range(COUNT):
        total += tl.load(parts + part * ((res + n) * T.to(tl.int64)), inside, other=0.0)
    tl.store(dH_res + token * res + k, total, inside & (k < res))
    tl.store(dH_post + token * n + (k - res), total, inside & (k >= res))
