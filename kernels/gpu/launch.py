"""The one place that calls a Triton kernel.

    launch(kernel, grid, *args, **constants)      runs it, or notes it inside `recording()`

Note: How kernels here are called
    The number of streams n and of channels C are compile-time constants: a model has few of them,
    loop bounds and the alignment of every row are then known, and accesses are 16 bytes wide for
    every C that is a multiple of 8. The number of tokens T is a run-time integer that is never
    specialised on (`do_not_specialize`): no batch size compiles anything. Offsets of token blocks
    are 64 bits wide, offsets inside a block 32. Launchers allocate outputs and workspace, and
    never wait for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, as `recording` notes it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its tensors; an empty grid runs nothing.

    Args:
        kernel: a function under `triton.jit`.
        args: its positional arguments, a tensor first.
        constants: its compile-time constants, and Triton's options (`num_warps`, `num_stages`).
    """
    if 0 in grid:
        return
    # Whether a * b + c may become one instruction is said here: Triton's default changes in 3.10.
    constants = {"enable_fp_fusion": True, **constants}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, constants))
        return
    with _current(args[0].device):
        kernel[grid](*args, **constants)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside are noted, in order, and not run: for tests and tables, without a device.

    Together with fake tensors it shows exactly which kernels with which constants a call runs.
    """
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def _current(device: torch.device) -> Any:
    """Triton launches on the current device: make it that of the tensors."""
    if device.type == "cpu":  # Triton's interpreter
        return nullcontext()
    return torch.accelerator.device_index(device.index)


def contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as kernels read them."""
    return tuple(tensor.contiguous() for tensor in tensors)
