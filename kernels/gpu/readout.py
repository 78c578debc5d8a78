"""n streams to one by their mean or sum, one stream to n, and backwards, as Triton kernels.

Bytes per token, in units of C elements of the streams:

    readout, expand_backward    read nC    write C        (a sum over streams)
    expand, readout_backward    read C     write nC       (a copy to every stream)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from .launch import launch
from .tiles import load_streams
from .tuning import blocks, cdiv


def readout(X: Tensor, kind: str) -> Tensor:
    """x `[T, C]`, the `mean` or `sum` of the streams of X `[T, n, C]`."""
    return _sum(X, _scale(kind, X.shape[1]))


def readout_backward(dx: Tensor, n: int, kind: str) -> Tensor:
    """dX `[T, n, C]` from dx `[T, C]`."""
    return _copy(dx, n, _scale(kind, n))


def expand(x: Tensor, n: int) -> Tensor:
    """X `[T, n, C]`, n streams equal to x `[T, C]`."""
    return _copy(x, n, 1.0)


def expand_backward(dX: Tensor) -> Tensor:
    """dx `[T, C]`, the sum of dX `[T, n, C]` over streams."""
    return _sum(dX, 1.0)


def _scale(kind: str, n: int) -> float:
    if kind not in ("mean", "sum"):
        raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")
    return 1.0 / n if kind == "mean" else 1.0


def _sum(X: Tensor, scale: float) -> Tensor:
    T, n, C = X.shape
    x = X.new_empty(T, C)
    _launch(_sum_kernel, x, X.contiguous(), T, n, C, scale)
    return x


def _copy(x: Tensor, n: int, scale: float) -> Tensor:
    T, C = x.shape
    X = x.new_empty(T, n, C)
    _launch(_copy_kernel, X, x.contiguous(), T, n, C, scale)
    return X


def _launch(kernel: object, out: Tensor, x: Tensor, T: int, n: int, C: int, scale: float) -> None:
    cut = blocks(C, x.dtype)
    wide = compute_dtype(x.dtype) == torch.float64
    launch(
        kernel, (cdiv(T, cut.tokens),), out, x, T,
        n=n, C=C, SCALE=scale, K=tl.float64 if wide else tl.float32,
        BT=cut.tokens, BC=cut.channels, num_warps=cut.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _sum_kernel(
    x, X, T,
    n: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    rows = first * C + token * C
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = (first + token < T) & (channel < C)
        streams = load_streams(X + rows * n + channel, mask, C, n)
        total = streams[0].to(K)
        for j in tl.static_range(1, n):
            total += streams[j].to(K)
        tl.store(x + rows + channel, (total * SCALE).to(x.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["T"])
def _copy_kernel(
    X, x, T,
    n: tl.constexpr, C: tl.constexpr, SCALE: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BT
    token = tl.arange(0, BT)[:, None]
    rows = first * C + token * C
    for block in range(0, C, BC):
        channel = block + tl.arange(0, BC)[None, :]
        mask = (first + token < T) & (channel < C)
        stream = tl.load(x + rows + channel, mask, other=0.0).to(K) * SCALE
        for j in tl.static_range(n):
            tl.store(X + rows * n + j * C + channel, stream.to(X.dtype.element_ty), mask)
