"""Launchers without a device: what they run and allocate, seen under fake CUDA tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile.kernels import traffic
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.gpu import launch, post_res, pre, projection, readout, seam, sums, tuning
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import get_variant

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


SETTINGS = {"variant": get_variant("mhc"), "eps": 1e-6}


def mapping(n, C):
    """φ, α, b of the paper's variant."""
    columns = n * n + 2 * n
    return Parameters(fake(n * C, columns), fake(3), fake(columns))


def saved(T, n, C):
    return Saved(streams(T, n, C), *mapping(n, C), fake(T, n * n + 2 * n), fake(T))


def opened(T, n, C):
    H_res, H_post = coefficients(T, n)
    return Opened(streams(T, C), H_post, H_res, H_post)


def closed(T, n, C):
    return Closed(*coefficients(T, n), streams(T, n, C), streams(T, C))


PARTS = {
    "project": lambda T, n, C: projection.project(streams(T, n, C), mapping(n, C)[0]),
    "gradients": lambda T, n, C: projection.gradients(
        streams(T, n, C), mapping(n, C)[0], fake(T, n * n + 2 * n), fake(T)
    ),
    "post_res_project": lambda T, n, C: seam.post_res_project(*closed(T, n, C), mapping(n, C)[0]),
    "sums.tokens": lambda T, n, C: sums.tokens(fake(40, n * n + n, T), n),
}
"""Launchers that functions of a site are made of; one launch each."""

SITE = {
    "coefficients": lambda T, n, C: gpu.coefficients(
        Mapping(streams(T, n, C), *mapping(n, C)), **SETTINGS
    ),
    "coefficients_pre": lambda T, n, C: gpu.coefficients_pre(
        Mapping(streams(T, n, C), *mapping(n, C)), **SETTINGS
    ),
    "seam": lambda T, n, C: gpu.seam(closed(T, n, C), mapping(n, C), **SETTINGS),
    "coefficients_backward": lambda T, n, C: gpu.coefficients_backward(
        (*coefficients(T, n)[1:] * 2, coefficients(T, n)[0]), saved(T, n, C), **SETTINGS
    ),
    "coefficients_pre_backward": lambda T, n, C: gpu.coefficients_pre_backward(
        opened(T, n, C), saved(T, n, C), streams(T, n, C), **SETTINGS
    ),
    "seam_backward": lambda T, n, C: gpu.seam_backward(
        opened(T, n, C), saved(T, n, C), streams(T, n, C), closed(T, n, C), **SETTINGS
    ),
}
"""Functions of several launches."""

ALL = {**CALLS, **PARTS, **SITE}


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
        ALL[name](T, n, C)
    return launches


@pytest.mark.parametrize("name", ALL)
def test_only_allocates_and_launches(name):
    """Fake tensors raise on any wait for the device, `.item()` for example."""
    with FakeTensorMode(), launch.recording() as launches, Operators() as operators:
        ALL[name](1000, 4, 2560)
    assert len(launches) == (traffic.OPERATORS[name].launches if name in SITE else 1)
    assert {operator.split(".")[0] for operator in operators.names} <= ALLOCATIONS


@pytest.mark.parametrize("name", ALL)
def test_token_counts_change_nothing_but_the_grid(name):
    """No token count compiles anything: constants are the same, T is never specialised on."""
    for few, many in zip(*(recorded(name, T) for T in (1, 100_003)), strict=True):
        assert few.kernel is many.kernel
        assert few.constants == many.constants
        assert all(a <= b for a, b in zip(few.grid, many.grid, strict=True))
        names = few.kernel.arg_names[: len(few.args)]
        varying = {a for a, x in zip(names, few.args, strict=True) if isinstance(x, int)}
        assert varying == set(few.kernel.do_not_specialize)
        types = [[type(x) for x in each.args] for each in (few, many)]
        assert types[0] == types[1]


@pytest.mark.parametrize("name", CALLS)
def test_a_warp_has_a_token(name):
    assert [recorded(name, T)[0].grid for T in (1, 100_003)] == [(1,), (100_003,)]


@pytest.mark.parametrize("name", ALL)
def test_no_tokens_launch_nothing(name):
    """But gradients of parameters, which are zeros."""
    left = recorded(name, 0)
    assert [each.kernel for each in left] == [sums._parameters] * (
        name in SITE and name.endswith("backward")
    )


@pytest.mark.parametrize("name", ["seam", "seam_backward"])
def test_seams_of_many_streams_are_made_of_both_sites(name):
    """Eight streams do not fit the registers of one kernel."""
    inside = {seam._forward, seam._backward}
    assert any(each.kernel in inside for each in recorded(name, 7))
    many = recorded(name, 7, n=8)
    assert len(many) == traffic.OF_MANY_STREAMS[name].launches
    assert not any(each.kernel in inside for each in many)


@pytest.mark.parametrize(
    "C, itemsize", [(2560, 2), (4096, 4), (8, 2), (13, 2), (40, 4), (16384, 8)]
)
def test_blocks_fill_one_warp(C, itemsize):
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize]
    cut = tuning.blocks(C, dtype)
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
