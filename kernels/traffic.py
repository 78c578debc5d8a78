"""Bytes and operations of every operator, and the times that they allow on named GPUs.

    traffic("seam", T=16384, n=4, C=4096, columns=24)    -> Traffic
    apart("seam", T=16384, n=4, C=4096, columns=24)      -> what its kernels move besides streams
    predicted_seconds("seam", GPUS["H200"], T=16384, n=4, C=4096, columns=24)

Streams dominate: a token has C elements of x, of h and of f, nC of X. The table counts them.

    floor        each tensor of streams once: what device memory has to move
    requested    what the loads and stores of the kernels ask for: where X does not fit on chip it
                 is read twice, the second time, with luck, from L2

Note: What is predicted and what is measured
    Requested bytes, of streams and apart, are what Triton's interpreter counts: tests compare them
    exactly, for the paper's variant. Seconds are PREDICTED by a roofline: they assume the kernel
    reaches the copy rate of the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch

from .gpu.limits import MOST_FUSED_STREAMS

if TYPE_CHECKING:
    from .gpu import projection


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
        kernels: those that run one after the other, keys of `KERNELS`.
        exact: requested in float32, whatever the dtype of the streams.
        groups: whether dh is read once more for each further group of streams, see `groups`.
        products: products x⃗ φ, or of its two gradients, of 2 · nC · columns operations a token.
        mixes: sums over streams for n streams, of 2 · n² · C operations a token.
    """

    floor: Streams
    requested: Streams
    kernels: tuple[str, ...]
    exact: Streams = Streams(0, 0)
    groups: bool = False
    products: int = 0
    mixes: int = 0

    @property
    def launches(self) -> int:
        return len(self.kernels)


_FORWARD = "project", "chain_forward"
_BACKWARD = "chain_backward", "gradients", "parameters"

OPERATORS = {
    # The residual add that all this replaces: reads x and F(x), writes their sum.
    "add": Operator(Streams(0, 3), Streams(0, 3), ("add",)),
    "expand": Operator(Streams(1, 1), Streams(1, 1), ("copy",)),
    "readout": Operator(Streams(1, 1), Streams(1, 1), ("sum",)),
    "expand_backward": Operator(Streams(1, 1), Streams(1, 1), ("sum",)),
    "readout_backward": Operator(Streams(1, 1), Streams(1, 1), ("copy",)),
    "coefficients": Operator(Streams(1, 0), Streams(1, 0), _FORWARD, products=1),
    "pre": Operator(Streams(1, 1), Streams(1, 1), ("pre",)),
    "coefficients_pre": Operator(Streams(1, 1), Streams(2, 1), (*_FORWARD, "pre"), products=1),
    "post_res": Operator(Streams(2, 1), Streams(2, 1), ("post_res",), mixes=1),
    "seam": Operator(
        Streams(2, 2),
        Streams(3, 2),
        ("post_res_project", "chain_forward", "pre"),
        products=1,
        mixes=1,
    ),
    "pre_backward": Operator(Streams(2, 1), Streams(2, 1), ("pre_backward",)),
    "post_res_backward": Operator(Streams(3, 2), Streams(3, 2), ("post_res_backward",), mixes=2),
    "coefficients_backward": Operator(Streams(2, 0), Streams(2, 0), _BACKWARD, products=2),
    # Both with a partial gradient to add. ⟨dh, X⟩ must be complete before any of dX is.
    "coefficients_pre_backward": Operator(
        Streams(3, 1),
        Streams(4, 2),
        ("dots", "chain_backward", "gradients_of_both", "parameters"),
        groups=True,
        products=2,
    ),
    "seam_backward": Operator(
        Streams(4, 3),
        Streams(5, 4),
        ("dots", "chain_backward", "seam_gradients", "parameters", "tokens"),
        products=2,
        mixes=2,
    ),
}
"""Streams in units of C elements a token: see `Streams`."""

OF_MANY_STREAMS = OPERATORS | {
    "seam": Operator(
        Streams(2, 2),
        Streams(4, 2),
        ("post_res", *_FORWARD, "pre"),
        products=1,
        mixes=1,
    ),
    "seam_backward": Operator(
        Streams(4, 3),
        Streams(5, 4),
        ("dots", "chain_backward", "gradients_of_both", "post_res_backward", "parameters"),
        exact=Streams(2, 0),
        groups=True,
        products=2,
        mixes=2,
    ),
}
"""For more than `MOST_FUSED_STREAMS`."""


def groups(n: int, columns: int) -> int:
    """Groups of streams whose dφ fits the registers of a program: those of `projection.slots`."""
    padded = max(16, 1 << (columns - 1).bit_length())
    return -(-n // min(n, max(1, 128 // padded)))


@dataclass(frozen=True)
class Traffic:
    """Of one call.

    Args:
        floor, requested: bytes of streams; all else is in `apart`.
        flops: of products with φ and of sums over streams. Left out are those of 2 · nC a token
            and less: H_pre X, H_postᵀ f, Σ x⃗² and the chain of a token.
    """

    floor: int
    requested: int
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
        dtype: of the streams.

    Raises:
        KeyError: for an unknown operator.
    """
    known = _known(operator, n)
    wide = _wide(dtype)
    elements = known.requested.elements(n, C)
    if known.groups and columns:
        elements += (groups(n, columns) - 1) * C
    return Traffic(
        floor=T * known.floor.elements(n, C) * dtype.itemsize,
        requested=T * (elements * dtype.itemsize + known.exact.elements(n, C) * wide),
        flops=2 * T * n * C * (known.products * columns + known.mixes * n),
    )


def _known(operator: str, n: int) -> Operator:
    return (OF_MANY_STREAMS if n > MOST_FUSED_STREAMS else OPERATORS)[operator]


# --- what is no stream ---------------------------------------------------------------------------


class Apart(NamedTuple):
    """A tensor, or several, that a kernel moves besides streams.

    Args:
        kind: a key of `KINDS`.
        numbers: elements, of 4 bytes (8 with float64 streams).
        times: how often the loads and stores of the kernel ask for each.
    """

    kind: str
    numbers: int
    times: int = 1


KINDS = {
    "phi": "φ, dφ and parts of dφ",
    "y": "x⃗ φ, Σ x⃗², their gradients and parts, and what makes dα and db",
    "H": "H_pre, H_post, H_res, their gradients and parts",
}


def apart(
    operator: str,
    *,
    T: int,
    n: int,
    C: int,
    columns: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Apart]:
    """What a call moves besides streams, kernel after kernel, cut as the launchers cut it.

    That is, as they do for the GPUs of this build of PyTorch, hence Triton must be there. The
    chain is that of `mhc`; its backward in other variants may read y once less.

    Raises:
        KeyError: for an unknown operator.
        ValueError: if the operator has φ, and no Triton kernel takes such streams.
    """
    call = _Call(T, n, C, columns, dtype)
    return [found for kernel in _known(operator, n).kernels for found in KERNELS[kernel](call)]


def apart_bytes(found: list[Apart], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that are requested."""
    return _wide(dtype) * sum(each.numbers * each.times for each in found)


def _once(found: list[Apart], dtype: torch.dtype) -> int:
    """Bytes if what a kernel asks for several times comes from a cache."""
    return _wide(dtype) * sum(each.numbers for each in found)


def _wide(dtype: torch.dtype) -> int:
    return 8 if dtype == torch.float64 else 4


@dataclass(frozen=True)
class _Call:
    """The arguments of `apart`, and how launchers cut them."""

    T: int
    n: int
    C: int
    columns: int
    dtype: torch.dtype

    @property
    def phi(self) -> int:
        return self.n * self.C * self.columns

    @property
    def mixing(self) -> int:
        """Numbers of H_res and H_post, of all tokens."""
        return self.T * (self.n * self.n + self.n)

    @property
    def coefficients(self) -> int:
        return self.mixing + self.T * self.n

    @cached_property
    def forward(self) -> "projection.Config":
        from .gpu import projection

        return projection.config(self.n, self.C, self.columns, self.dtype)

    @cached_property
    def backward(self) -> "projection.Slots":
        from .gpu import projection

        return projection.slots(self.T, self.n, self.C, self.columns, self.dtype)

    @property
    def token_blocks(self) -> int:
        return -(-self.T // self.forward.BT)

    @property
    def chains(self) -> int:
        """Programs of the chain."""
        from .gpu import codegen

        return -(-self.T // codegen.tokens_per_program(self.n))

    @property
    def rereads(self) -> int:
        """How often post_res and its backward read the coefficients of a token."""
        from .gpu import launch

        channels = launch.blocks(self.C, self.dtype).channels
        return 1 if self.n <= MOST_FUSED_STREAMS else -(-self.C // channels)


def _nothing(c: _Call) -> Iterator[Apart]:
    return iter(())


def _pre(c: _Call) -> Iterator[Apart]:
    yield Apart("H", c.T * c.n)


def _pre_backward(c: _Call) -> Iterator[Apart]:
    yield Apart("H", 2 * c.T * c.n)


def _post_res(c: _Call) -> Iterator[Apart]:
    yield Apart("H", c.mixing, c.rereads)


def _post_res_backward(c: _Call) -> Iterator[Apart]:
    yield Apart("H", c.mixing, c.rereads)
    yield Apart("H", c.mixing)


def _project(c: _Call) -> Iterator[Apart]:
    yield Apart("phi", c.phi, c.token_blocks)
    yield Apart("y", c.forward.splits * c.T * (c.columns + 1))


def _post_res_project(c: _Call) -> Iterator[Apart]:
    yield Apart("H", c.mixing, -(-c.C // c.forward.BK))
    yield from _project(c)


def _chain_forward(c: _Call) -> Iterator[Apart]:
    yield Apart("y", c.forward.splits * c.T * (c.columns + 1))
    yield Apart("y", c.T * (c.columns + 1))
    yield Apart("y", 3 + c.columns, c.chains)  # α, b
    yield Apart("H", c.coefficients)


def _chain_backward(c: _Call) -> Iterator[Apart]:
    """y of H_res is read twice, and α once for H̃, once for its gradient."""
    yield Apart("H", c.coefficients)
    yield Apart("y", c.T * (2 * c.n + 1))
    yield Apart("y", c.T * (c.columns - 2 * c.n), 2)
    yield Apart("y", c.T * (c.columns + 1))
    yield Apart("y", 3, 2 * c.chains)
    yield Apart("y", c.columns, c.chains)
    yield Apart("y", 2 * c.columns * c.chains)


def _gradients(c: _Call) -> Iterator[Apart]:
    groups = -(-c.n // c.backward.GROUP)
    streams = groups * c.backward.GROUP  # the last group reads φ of a stream it does not have
    yield Apart("phi", streams * c.C * c.columns, c.backward.slots)
    yield Apart("phi", c.phi * c.backward.slots)
    yield Apart("y", c.T * (c.columns + 1), c.backward.blocks * groups)


def _gradients_of_both(c: _Call) -> Iterator[Apart]:
    yield from _gradients(c)
    yield Apart("H", c.T * c.n, c.backward.blocks)


def _seam_gradients(c: _Call) -> Iterator[Apart]:
    yield Apart("phi", c.phi, c.backward.slots)
    yield Apart("phi", c.phi * c.backward.slots)
    yield Apart("y", c.T * (c.columns + 1), c.backward.blocks)
    yield Apart("H", c.coefficients, c.backward.blocks)
    yield Apart("H", c.mixing * c.backward.blocks)


def _parameters(c: _Call) -> Iterator[Apart]:
    yield Apart("phi", c.phi * (c.backward.slots + 1))
    yield Apart("y", 2 * c.columns * c.chains)
    yield Apart("y", c.columns + 3)


def _tokens(c: _Call) -> Iterator[Apart]:
    yield Apart("H", c.mixing * (c.backward.blocks + 1))


KERNELS: dict[str, Callable[[_Call], Iterator[Apart]]] = {
    "add": _nothing,
    "copy": _nothing,
    "sum": _nothing,
    "pre": _pre,
    "pre_backward": _pre_backward,
    "dots": _pre,
    "post_res": _post_res,
    "post_res_backward": _post_res_backward,
    "project": _project,
    "post_res_project": _post_res_project,
    "chain_forward": _chain_forward,
    "chain_backward": _chain_backward,
    "gradients": _gradients,
    "gradients_of_both": _gradients_of_both,
    "seam_gradients": _seam_gradients,
    "parameters": _parameters,
    "tokens": _tokens,
}


# --- the roofline --------------------------------------------------------------------------------


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
        ((moved.floor if fits else moved.requested) + _once(others, dtype)) / gpu.copy,
        (moved.requested + apart_bytes(others, dtype)) / gpu.cache_rate,
        moved.flops / gpu.matmul,
    )
    return _known(operator, n).launches * gpu.launch + max(limits)
