"""Which implementation computes an operator of a site.

    cpu      C++, built on first use
    eager    ordinary PyTorch, on any device

Every implementation has the tensor contract of `eager`.
"""

from types import ModuleType

import torch

from . import codegen_cpp, cpu, eager
from .dtypes import compute_dtype
from .variants import Variant

__all__ = ["NAMES", "implementation", "sources"]

NAMES = {cpu: "C++", eager: "PyTorch"}
"""What an implementation is written in."""


def implementation(
    device: torch.device, dtype: torch.dtype, n: int, variant: Variant | None = None
) -> ModuleType:
    """The module that computes sites with n streams of a dtype on a device.

    Args:
        variant: of the coefficients, for operators that compute these.
    """
    if device.type == "cpu" and cpu.supports(dtype, n, variant):
        return cpu
    return eager


def sources(kernels: ModuleType, dtype: torch.dtype, n: int, variant: Variant) -> dict[str, str]:
    """The text that an implementation generates for the coefficients of a variant, by language."""
    if kernels is cpu:
        return {"C++": codegen_cpp.chain_source(variant, n, compute_dtype(dtype))}
    return {}
