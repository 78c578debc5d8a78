"""Which implementation computes an operator of a site.

    cpu      C++, built on first use
    gpu      Triton, on CUDA devices, NVIDIA's and AMD's
    eager    ordinary PyTorch, on any device

Every implementation is a module with the functions of `Kernels`, and has the tensor contract that
`eager` writes down.
"""

import functools
import importlib.util
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import eager
from .cpu import backend as cpu
from .operands import Closed, Mapping, Opened, Parameters, Saved
from .results import Coefficients, Gradients, Pair, Seven, Six, Triple
from .variants import Variant, parse_variant

__all__ = ["Kernels", "Plan", "implementation", "plan", "planned"]


class Kernels(Protocol):
    """What an implementation has; `eager` says what the functions mean."""

    LANGUAGE: str
    """What it is written in."""

    def supports(self, dtype: torch.dtype, n: int, variant: Variant | None = None) -> bool:
        """Whether it takes n streams of a dtype, and coefficients of a variant."""

    def source(self, variant: Variant, n: int, dtype: torch.dtype) -> str | None:
        """The text that it generates for the coefficients; None if it needs none."""

    def coefficients(self, mapping: Mapping, *, variant: Variant, eps: float) -> Coefficients: ...

    def coefficients_backward(
        self, dH: Triple, saved: Saved, *, variant: Variant, eps: float
    ) -> Gradients: ...

    def coefficients_pre(self, mapping: Mapping, *, variant: Variant, eps: float) -> Six: ...

    def coefficients_pre_backward(
        self, opened: Opened, saved: Saved, partial: Tensor | None, *, variant: Variant, eps: float
    ) -> Gradients: ...

    def seam(
        self, closed: Closed, parameters: Parameters, *, variant: Variant, eps: float
    ) -> Seven: ...

    def seam_backward(
        self,
        opened: Opened,
        saved: Saved,
        partial: Tensor | None,
        closed: Closed,
        *,
        variant: Variant,
        eps: float,
    ) -> Seven: ...

    def pre(self, H_pre: Tensor, X: Tensor) -> Tensor: ...

    def pre_backward(self, dh: Tensor, H_pre: Tensor, X: Tensor) -> Pair: ...

    def post_res(self, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor: ...

    def post_res_backward(
        self, dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
    ) -> Gradients: ...

    def expand(self, x: Tensor, n: int) -> Tensor: ...

    def readout(self, X: Tensor, kind: str) -> Tensor: ...

    def readout_backward(self, dx: Tensor, n: int, kind: str) -> Tensor: ...


class Plan(NamedTuple):
    """What is the same in every call of an operator with such tensors.

    Attributes:
        dtype: of the streams inside.
        variant: of the coefficients, for operators that compute these.
    """

    kernels: Kernels
    dtype: torch.dtype
    variant: Variant | None


def plan(
    device: torch.device,
    n: int,
    exact: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    variant: str | None = None,
) -> Plan:
    """Who computes an operator, and in which dtype.

    Kernels take one dtype for X, f, h and their gradients. Where these differ (16-bit branches on
    float32 streams, or the reverse) the wider one is taken, which changes no value before the last
    rounding.

    Args:
        exact: of the coefficients.
        dtypes: of everything that has channels.
        variant: `Variant.text`.
    """
    dtype = functools.reduce(torch.promote_types, dtypes)
    if torch.float64 in (dtype, exact):
        dtype = exact
    description = None if variant is None else parse_variant(variant)
    return Plan(implementation(device, dtype, n, description), dtype, description)


planned = functools.cache(plan)
"""`plan` once for each set of arguments: what a step of a model asks for at every call."""


def implementation(
    device: torch.device, dtype: torch.dtype, n: int, variant: Variant | None = None
) -> Kernels:
    """What computes sites with n streams of a dtype on a device.

    Args:
        variant: of the coefficients, for operators that compute these.
    """
    if device.type == "cpu" and cpu.supports(dtype, n, variant):
        return cpu
    if device.type == "cuda" and _has_matrix_units(device.index):
        gpu = _gpu()
        if gpu is not None and gpu.supports(dtype, n, variant):
            return gpu
    return eager


@functools.cache
def _has_matrix_units(index: int | None) -> bool:
    """Whether a device multiplies bfloat16 matrices; NVIDIA's do since compute capability 8.0."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _gpu() -> Kernels | None:
    """The Triton implementation; None where Triton is not installed, as on Windows and macOS."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .gpu import backend  # not at the top, because it imports Triton

    return backend
