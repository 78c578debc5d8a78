"""Streams that each operator moves, and its operations."""

from dataclasses import dataclass

import torch

from ..gpu.tuning import MOST_FUSED_STREAMS, cdiv, group


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
    found = known(operator, n)
    elements = found.requested.elements(n, C)
    if found.groups and columns:
        elements += (cdiv(n, group(n, columns)) - 1) * C
    return Traffic(
        floor=T * found.floor.elements(n, C) * dtype.itemsize,
        requested=T * (elements * dtype.itemsize + found.exact.elements(n, C) * wide(dtype)),
        flops=2 * T * n * C * (found.products * columns + found.mixes * n),
    )


def known(operator: str, n: int) -> Operator:
    """What is known of an operator for n streams; KeyError for an unknown one."""
    return (OF_MANY_STREAMS if n > MOST_FUSED_STREAMS else OPERATORS)[operator]


def wide(dtype: torch.dtype) -> int:
    """Bytes of a coefficient, for streams of a dtype."""
    return 8 if dtype == torch.float64 else 4
