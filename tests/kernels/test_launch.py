"""Launchers without a device: what they run and allocate, seen under fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile.kernels import launch, post_res, pre, readout

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty"}


def fake(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def streams(*shape: int) -> torch.Tensor:
    return fake(*shape, dtype=torch.bfloat16)


def coefficients(T, n):
    return fake(T, n, n), fake(T, n)


CALLS = {
    "post_res": lambda T, n, C: post_res.post_res(
        *coefficients(T, n), streams(T, n, C), streams(T, C)
    ),
    "post_res_backward": lambda T, n, C: post_res.post_res_backward(
        streams(T, n, C), *coefficients(T, n), streams(T, n, C), streams(T, C)
    ),
    "pre": lambda T, n, C: pre.pre(fake(T, n), streams(T, n, C)),
    "pre_backward": lambda T, n, C: pre.pre_backward(streams(T, C), fake(T, n), streams(T, n, C)),
    "dots": lambda T, n, C: pre.dots(streams(T, C), streams(T, n, C)),
    "readout": lambda T, n, C: readout.readout(streams(T, n, C), "mean"),
    "readout_backward": lambda T, n, C: readout.readout_backward(streams(T, C), n, "mean"),
    "expand": lambda T, n, C: readout.expand(streams(T, C), n),
    "expand_backward": lambda T, n, C: readout.expand_backward(streams(T, n, C)),
}


class Operators(TorchDispatchMode):
    """Names of the torch operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def recorded(name: str, T: int, n: int = 4, C: int = 2560) -> list[launch.Launch]:
    with FakeTensorMode(), launch.recording() as launches:
        CALLS[name](T, n, C)
    return launches


@pytest.mark.parametrize("name", CALLS)
def test_only_allocates_and_launches(name):
    """Fake tensors raise on any wait for the device, `.item()` for example."""
    with FakeTensorMode(), launch.recording() as launches, Operators() as operators:
        CALLS[name](1000, 4, 2560)
    assert len(launches) == 1
    assert {operator.split(".")[0] for operator in operators.names} <= ALLOCATIONS


@pytest.mark.parametrize("name", CALLS)
def test_token_counts_change_nothing_but_the_grid(name):
    """No token count compiles anything: constants are the same, T is never specialised on."""
    few, many = (recorded(name, T)[0] for T in (1, 100_003))
    assert few.kernel is many.kernel
    assert few.constants == many.constants
    assert few.grid == (1,) and many.grid == (100_003,)
    names = few.kernel.arg_names[: len(few.args)]
    varying = {a for a, x in zip(names, few.args, strict=True) if isinstance(x, int)}
    assert varying == {"T"} == set(few.kernel.do_not_specialize)


@pytest.mark.parametrize("name", CALLS)
def test_no_tokens_launch_nothing(name):
    assert recorded(name, 0) == []


@pytest.mark.parametrize(
    "C, itemsize", [(2560, 2), (4096, 4), (8, 2), (13, 2), (40, 4), (16384, 8)]
)
def test_blocks_fill_one_warp(C, itemsize):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    cut = launch.blocks(C, dtype)
    assert cut.warps == 1
    assert cut.lane * itemsize <= 16 and cut.channels % cut.lane == 0
    assert cut.channels >= min(C, 32 * cut.lane)
    assert cut.tokens * cut.channels <= 32 * 16 // itemsize


def test_recording_ends_with_its_block():
    with FakeTensorMode(), launch.recording() as outer:
        with launch.recording() as inner:
            CALLS["pre"](1, 4, 8)
        CALLS["dots"](1, 4, 8)
    assert [len(outer), len(inner)] == [1, 1]
    assert outer[0].kernel is not inner[0].kernel
