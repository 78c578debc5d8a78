"""Which implementation computes an operator of a site.

Every implementation has the tensor contract of `eager`, and `supports(dtype, n)`, which says
whether it takes streams of that dtype and number.
"""

from types import ModuleType

import torch

from . import eager

__all__ = ["implementation"]


def implementation(device: torch.device, dtype: torch.dtype, n: int) -> ModuleType:
    """The module that computes sites with n streams of a dtype on a device.

    Its last name says what it is: `eager` is PyTorch.
    """
    return eager
