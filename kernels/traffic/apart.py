"""What the kernels of an operator move besides streams, cut as their launchers cut it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from ..gpu import tuning
from .streams import known, wide


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

    That is, as they do for the GPUs of this build of PyTorch. The chain is that of `mhc`; its
    backward in other variants may read y once less.

    Raises:
        KeyError: for an unknown operator.
        ValueError: if the operator has φ, and no Triton kernel takes such streams.
    """
    call = _Call(T, n, C, columns, dtype)
    return [found for kernel in known(operator, n).kernels for found in KERNELS[kernel](call)]


def apart_bytes(found: list[Apart], dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that are requested."""
    return wide(dtype) * sum(each.numbers * each.times for each in found)


def bytes_once(found: list[Apart], dtype: torch.dtype) -> int:
    """Bytes if what a kernel asks for several times comes from a cache."""
    return wide(dtype) * sum(each.numbers for each in found)


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
    def forward(self) -> tuning.Config:
        return tuning.config(self.n, self.C, self.columns, self.dtype)

    @cached_property
    def backward(self) -> tuning.Slots:
        return tuning.slots(self.T, self.n, self.C, self.columns, self.dtype)

    @property
    def token_blocks(self) -> int:
        return -(-self.T // self.forward.BT)

    @property
    def chains(self) -> int:
        """Programs of the chain."""
        return tuning.cdiv(self.T, tuning.tokens_per_program(self.n))

    @property
    def rereads(self) -> int:
        """How often post_res and its backward read the coefficients of a token."""
        channels = tuning.blocks(self.C, self.dtype).channels
        return 1 if self.n <= tuning.MOST_FUSED_STREAMS else tuning.cdiv(self.C, channels)


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
