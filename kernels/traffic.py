"""Bytes and operations of every operator, and the times that they allow on named GPUs.

    traffic("seam", T=16384, n=4, C=4096, columns=24)    -> Traffic
    predicted_seconds("seam", GPUS["H200"], T=16384, n=4, C=4096, columns=24)

Streams dominate: a token has C elements of x, of h and of f, nC of X. The table counts them.

    floor        each tensor of streams once: what device memory has to move
    requested    what the loads and stores of the kernels ask for: where X does not fit on chip it
                 is read twice, the second time, with luck, from L2

Note: What is predicted and what is measured
    Requested bytes are counted under Triton's interpreter by the tests, within 2 %. Seconds are
    PREDICTED by a roofline until they are measured: they assume the kernel reaches the copy rate
    of the device, which nothing here has shown.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Streams:
    """Elements of streams that an operator moves, `n · per_stream + single` times C a token."""

    per_stream: int
    single: int

    def elements(self, n: int, C: int) -> int:
        return (self.per_stream * n + self.single) * C


@dataclass(frozen=True)
class Operator:
    """What is known of an operator.

    Args:
        floor, requested: as above.
        launches: kernels that run one after the other.
        exact: requested in float32, whatever the dtype of the streams.
        groups: whether dh is read once more for each further group of streams, see `groups`.
        products: products x⃗ φ, or of its two gradients, of 2 · nC · columns operations a token.
        mixes: sums over streams for n streams, of 2 · n² · C operations a token.
    """

    floor: Streams
    requested: Streams
    launches: int
    exact: Streams = Streams(0, 0)
    groups: bool = False
    products: int = 0
    mixes: int = 0


# The residual add that all this replaces: reads x and F(x), writes their sum.
OPERATORS = {
    "add": Operator(Streams(0, 3), Streams(0, 3), 1),
    "expand": Operator(Streams(1, 1), Streams(1, 1), 1),
    "readout": Operator(Streams(1, 1), Streams(1, 1), 1),
    "expand_backward": Operator(Streams(1, 1), Streams(1, 1), 1),
    "readout_backward": Operator(Streams(1, 1), Streams(1, 1), 1),
    "coefficients": Operator(Streams(1, 0), Streams(1, 0), 2, products=1),
    "pre": Operator(Streams(1, 1), Streams(1, 1), 1),
    "coefficients_pre": Operator(Streams(1, 1), Streams(2, 1), 3, products=1),
    "post_res": Operator(Streams(2, 1), Streams(2, 1), 1, mixes=1),
    "seam": Operator(Streams(2, 2), Streams(3, 2), 3, products=1, mixes=1),
    "pre_backward": Operator(Streams(2, 1), Streams(2, 1), 1),
    "post_res_backward": Operator(Streams(3, 2), Streams(3, 2), 1, mixes=2),
    "coefficients_backward": Operator(Streams(2, 0), Streams(2, 0), 3, products=2),
    # Both with a partial gradient to add. ⟨dh, X⟩ must be complete before any of dX is.
    "coefficients_pre_backward": Operator(Streams(3, 1), Streams(4, 2), 4, groups=True, products=2),
    "seam_backward": Operator(Streams(4, 3), Streams(5, 4), 5, products=2, mixes=2),
}
"""In the units of the paper's Table: see `Operator`."""

MOST_STREAMS = 4
"""More do not fit the registers of one kernel: their seams are made of those of both sites."""

OF_MANY_STREAMS = OPERATORS | {
    "seam": Operator(Streams(2, 2), Streams(4, 2), 4, products=1, mixes=1),
    "seam_backward": Operator(
        Streams(4, 3), Streams(5, 4), 5, exact=Streams(2, 0), groups=True, products=2, mixes=2
    ),
}
"""For more than `MOST_STREAMS`."""


def groups(n: int, columns: int) -> int:
    """Groups of streams whose dφ fits the registers of a program: those of `projection.slots`."""
    padded = max(16, 1 << (columns - 1).bit_length())
    return -(-n // min(n, max(1, 128 // padded)))


@dataclass(frozen=True)
class Traffic:
    """Of one call. `parameters` and `coefficients` are not part of the first two.

    Args:
        floor, requested: bytes of streams.
        parameters: bytes of φ, and of dφ in backward, moved once.
        coefficients: bytes of H_pre, H_post, H_res and of their gradients in backward.
        flops: of products with φ and of sums over streams.
    """

    floor: int
    requested: int
    parameters: int
    coefficients: int
    flops: int


def traffic(
    operator: str,
    *,
    T: int,
    n: int,
    C: int,
    columns: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Traffic:
    """Bytes and operations of a call with T tokens.

    Args:
        operator: a key of `OPERATORS`.
        columns: of φ; 0 for operators without.
        dtype: of the streams; φ and coefficients are float32, or float64 with float64 streams.

    Raises:
        KeyError: for an unknown operator.
    """
    known = _known(operator, n)
    wide = 8 if dtype == torch.float64 else 4
    elements = known.requested.elements(n, C)
    if known.groups and columns:
        elements += (groups(n, columns) - 1) * C
    return Traffic(
        floor=T * known.floor.elements(n, C) * dtype.itemsize,
        requested=T * (elements * dtype.itemsize + known.exact.elements(n, C) * wide),
        parameters=known.products * n * C * columns * wide,
        coefficients=(1 + operator.endswith("backward")) * T * (n * n + 2 * n) * wide,
        flops=2 * T * n * C * (known.products * columns + known.mixes * n),
    )


def _known(operator: str, n: int) -> Operator:
    return (OF_MANY_STREAMS if n > MOST_STREAMS else OPERATORS)[operator]


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

    A second read hits the cache where the streams fit into it; else it costs as much as the first.
    """
    moved = traffic(operator, T=T, n=n, C=C, columns=columns, dtype=dtype)
    fits = T * n * C * dtype.itemsize <= gpu.cache
    others = moved.parameters + moved.coefficients
    memory = (moved.floor if fits else moved.requested) + others
    limits = (
        memory / gpu.copy,
        (moved.requested + others) / gpu.cache_rate,
        moved.flops / gpu.matmul,
    )
    return _known(operator, n).launches * gpu.launch + max(limits)
