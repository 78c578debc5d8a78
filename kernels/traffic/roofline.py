"""The times that bytes and operations allow on named GPUs: PREDICTED."""

from dataclasses import dataclass

import torch

from .apart import apart, apart_bytes, bytes_once
from .streams import known, traffic


@dataclass(frozen=True)
class Gpu:
    """A device, as far as the roofline goes.

    Args:
        copy: bytes a second that a copy reads and writes.
        cache: bytes of the last cache, and `cache_rate`, bytes a second from it.
        matmul: operations a second of bfloat16 matrix products with float32 sums.
        launch: seconds from one kernel to the next in a stream.
    """

    copy: float
    cache: float
    cache_rate: float
    matmul: float
    launch: float = 3e-6


GPUS = {
    # H200: copy and matmul measured on one; the others are nine tenths of the data sheet's memory
    # rate and two thirds of its dense matmul rate, about what the H200 reached. Caches and their
    # rates are public microbenchmarks, rounded.
    "H100": Gpu(copy=3.0e12, cache=50e6, cache_rate=5.5e12, matmul=660e12),
    "H200": Gpu(copy=4.3e12, cache=60e6, cache_rate=5.5e12, matmul=790e12),
    "B200": Gpu(copy=7.2e12, cache=126e6, cache_rate=10e12, matmul=1500e12),
    "MI300X": Gpu(copy=4.8e12, cache=256e6, cache_rate=10e12, matmul=870e12),
}


def predicted_seconds(
    operator: str,
    gpu: Gpu,
    *,
    T: int,
    n: int,
    C: int,
    columns: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> float:
    """PREDICTED, not measured: launches, plus the slowest of memory, cache and arithmetic.

    A second read of streams hits the cache where they fit into it; else it costs as much as the
    first. What else one kernel asks for again hits a cache always: it is small, or asked for by
    neighbours at nearly the same time. Kernels are cut as `apart` says.
    """
    moved = traffic(operator, T=T, n=n, C=C, columns=columns, dtype=dtype)
    others = apart(operator, T=T, n=n, C=C, columns=columns, dtype=dtype)
    fits = T * n * C * dtype.itemsize <= gpu.cache
    limits = (
        ((moved.floor if fits else moved.requested) + bytes_once(others, dtype)) / gpu.copy,
        (moved.requested + apart_bytes(others, dtype)) / gpu.cache_rate,
        moved.flops / gpu.matmul,
    )
    return known(operator, n).launches * gpu.launch + max(limits)
