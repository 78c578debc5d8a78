"""Which implementation computes an operator of a site.

    cpu      C++, built on first use
    gpu      Triton, on CUDA devices, NVIDIA's and AMD's
    eager    ordinary PyTorch, on any device

Every implementation has the tensor contract of `eager`.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

from . import eager
from .cpu import backend as cpu
from .cpu import codegen as codegen_cpp
from .dtypes import compute_dtype
from .variants import Variant

__all__ = ["implementation", "language", "source"]


def implementation(
    device: torch.device, dtype: torch.dtype, n: int, variant: Variant | None = None
) -> ModuleType:
    """The module that computes sites with n streams of a dtype on a device.

    Args:
        variant: of the coefficients, for operators that compute these.
    """
    if device.type == "cpu" and cpu.supports(dtype, n, variant):
        return cpu
    if device.type == "cuda" and _has_matrix_units(device.index):
        gpu = _gpu()
        if gpu is not None and gpu.supports(dtype, n):
            return gpu
    return eager


@functools.cache
def _has_matrix_units(index: int | None) -> bool:
    """Whether a device multiplies bfloat16 matrices; NVIDIA's do since compute capability 8.0."""
    return bool(torch.version.hip) or torch.cuda.get_device_capability(index) >= (8, 0)


@functools.cache
def _gpu() -> ModuleType | None:
    """The Triton implementation; None where Triton is not installed, as on Windows and macOS."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(".gpu.backend", __package__)


def language(kernels: ModuleType) -> str:
    """What an implementation is written in."""
    return {cpu: "C++", eager: "PyTorch"}.get(kernels, "Triton")


def source(kernels: ModuleType, dtype: torch.dtype, n: int, variant: Variant) -> str | None:
    """The text that an implementation generates for the coefficients; None if it needs none."""
    if kernels is eager:
        return None
    if kernels is cpu:
        return codegen_cpp.chain_source(variant, n, compute_dtype(dtype))
    return kernels.codegen.source(variant, n)
