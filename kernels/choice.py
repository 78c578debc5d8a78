"""Which implementation computes an operator of a site.

    cpu      C++, built on first use
    eager    ordinary PyTorch, on any device

Every implementation has the tensor contract of `eager`.
"""

from types import ModuleType

import torch

from . import cpu, eager
from .variants import Variant

__all__ = ["implementation"]


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
