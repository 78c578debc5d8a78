"""Pieces of kernels: tiles [BT, BC] of tokens and channels, and the numbers of a token.

A tile lives in one warp, a lane holds LANE neighbouring channels of it (see `launch.blocks`). The
streams of a block, and the coefficients of a token, are tuples of tensors.
"""

import triton
import triton.language as tl


@triton.jit
def load_streams(pointer, mask, C: tl.constexpr, n: tl.constexpr):
    """n tiles, C elements apart."""
    streams = ()
    for j in tl.static_range(n):
        streams += (tl.load(pointer + j * C, mask, other=0.0),)
    return streams


@triton.jit
def load_numbers(pointer, live, count: tl.constexpr, step: tl.constexpr = 1):
    """`count` numbers, `step` apart from each pointer [BT, 1], as that many tensors [BT, 1]."""
    numbers = ()
    for k in tl.static_range(count):
        numbers += (tl.load(pointer + k * step, live, other=0.0),)
    return numbers


@triton.jit
def combine(streams, weights, start: tl.constexpr, step: tl.constexpr, n: tl.constexpr):
    """Σ_j weights[start + j · step] · streams[j], in the dtype of the weights.

    The fma are explicit: whatever kernel computes this sum gets the same bits.
    """
    K: tl.constexpr = weights[0].dtype
    total = weights[start] * streams[0].to(K)
    for j in tl.static_range(1, n):
        total = tl.fma(weights[start + j * step], streams[j].to(K), total)
    return total


@triton.jit
def add_dots(dots, start: tl.constexpr, tile, streams, n: tl.constexpr, LANE: tl.constexpr):
    """dots[start + j] + tile · streams[j] over a lane's channels: n tensors [BT, BC / LANE]."""
    K: tl.constexpr = dots[0].dtype
    split: tl.constexpr = (tile.shape[0], tile.shape[1] // LANE, LANE)
    added = ()
    for j in tl.static_range(n):
        products = (tile.to(K) * streams[j].to(K)).reshape(split)
        added += (dots[start + j] + tl.sum(products, 2),)
    return added


@triton.jit
def zeros(BT: tl.constexpr, lanes: tl.constexpr, count: tl.constexpr, K: tl.constexpr):
    """`count` tensors [BT, lanes], where `add_dots` begins."""
    dots = ()
    for _ in tl.static_range(count):
        dots += (tl.zeros([BT, lanes], K),)
    return dots


@triton.jit
def store_sums(pointer, dots, live, start: tl.constexpr, step: tl.constexpr, count: tl.constexpr):
    """Sums over all lanes of `count` of the dots, stored side by side from each pointer [BT, 1]."""
    for k in tl.static_range(count):
        total = tl.sum(dots[start + k * step], 1, keep_dims=True)
        tl.store(pointer + k, total, live)
