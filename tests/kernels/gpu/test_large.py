"""Streams of more than 2³¹ elements: the last token comes out as it does alone.

Memory that nobody has written is a page of zeros, so a tensor of 4 GiB costs what is written. The
C++ operators read and write all of it, and give gradients of parameters too: zeros add nothing to
them. In Triton's interpreter only the last program along the tokens runs; its offsets are those of
the whole, and 32-bit arithmetic overflows there as on a device.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_compile.kernels.cpu import backend as cpu
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.gpu import projection, seam
from mhc_compile.kernels.gpu.pre import dots
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import get_variant

from ..operands import EPS, random_site

PAPER = get_variant("mhc")
SETTINGS = {"variant": PAPER, "eps": EPS}
N, C = 4, 1024
TOKENS = 2**31 // (N * C) + 77
BF16 = torch.bfloat16


class Tokens(NamedTuple):
    """What operators take of tokens; some of it stands for gradients too, which are as large."""

    X: Tensor
    f: Tensor
    H_res: Tensor
    H_post: Tensor
    y: Tensor
    inv_r: Tensor

    @property
    def closed(self) -> Closed:
        return Closed(self.H_res, self.H_post, self.X, self.f)

    def opened(self, *parameters: Tensor) -> tuple[Opened, Saved, Tensor]:
        """What the backward of coefficients and pre takes."""
        opened = Opened(self.f, self.H_post, self.H_res, self.H_post)
        return opened, Saved(self.X, *parameters, self.y, self.inv_r), self.X

    @property
    def projected(self) -> dict[str, Tensor]:
        return {"dy": self.y, "norm_grad": self.inv_r}


# Of kernels (`cpu` or `gpu`), tokens and φ, α, b.
CALLS: dict[str, Callable[..., Any]] = {
    "expand": lambda k, t, *_: k.expand(t.f, N),
    "expand_backward": lambda k, t, *_: k.expand_backward(t.X),
    "readout": lambda k, t, *_: k.readout(t.X, "mean"),
    "readout_backward": lambda k, t, *_: k.readout_backward(t.f, N, "mean"),
    "pre": lambda k, t, *_: k.pre(t.H_post, t.X),
    "pre_backward": lambda k, t, *_: k.pre_backward(t.f, t.H_post, t.X),
    "post_res": lambda k, t, *_: k.post_res(*t.closed),
    "post_res_backward": lambda k, t, *_: k.post_res_backward(t.X, *t.closed),
    "coefficients_pre": lambda k, t, *p: k.coefficients_pre(Mapping(t.X, *p), **SETTINGS),
    "seam": lambda k, t, *p: k.seam(t.closed, Parameters(*p), **SETTINGS),
}

# The other half of expand and readout is the same C++; coefficients and pre by themselves are
# parts of the calls with both.
CPU_CALLS = {
    **{k: v for k, v in CALLS.items() if k not in ("expand_backward", "readout_backward")},
    "coefficients_pre_backward": lambda k, t, *p: k.coefficients_pre_backward(
        *t.opened(*p), **SETTINGS
    ),
    "seam_backward": lambda k, t, *p: k.seam_backward(*t.opened(*p), t.closed, **SETTINGS),
}

# Of the backwards of coefficients only the kernels with streams: between them is a chain of a few
# numbers a token, and sums over programs that did not run here.
GPU_CALLS = {
    **CALLS,
    "dots": lambda _, t, *p: dots(t.f, t.X),
    "gradients": lambda _, t, *p: projection.gradients(
        t.X, p[0], **t.projected, dh=t.f, H_pre=t.H_post, partial=t.X
    ),
    "seam_gradients": lambda _, t, *p: seam.seam_gradients(
        t.f, t.H_post, t.X, p[0], *t.projected.values(), t.X, t.closed
    ),
}


def last_alone():
    """The last token, and φ, α, b."""
    site = random_site(PAPER, N, C, (1,)).to(BF16)
    parameters = site.mapping[1:]
    _, H_post, H_res, y, inv_r = cpu.coefficients(site.mapping, **SETTINGS)
    return Tokens(site.X, site.f, H_res, H_post, y, inv_r), parameters


def at_the_end(t):
    """A tensor of TOKENS tokens of which only the last, `t`, has been written."""
    shape = TOKENS, *t.shape[1:]
    # Not torch.zeros, which writes them.
    zeros = np.zeros(math.prod(shape) * t.dtype.itemsize, np.uint8)
    large = torch.from_numpy(zeros).view(t.dtype).view(shape)
    large[-1:] = t
    return large


def results(call, kernels, tokens, parameters):
    """Those of the last token, and of parameters."""
    found = call(kernels, tokens, *parameters)
    found = (found,) if isinstance(found, Tensor) else found
    return [t[-1:].clone() if len(t) == len(tokens.X) else t for t in found]


@pytest.mark.parametrize("name", CPU_CALLS)
def test_cpu(name):
    alone, parameters = last_alone()
    large = Tokens(*map(at_the_end, alone))
    assert large.X.numel() > 2**31
    found, expected = (results(CPU_CALLS[name], cpu, t, parameters) for t in (large, alone))
    for ours, ours_alone in zip(found, expected, strict=True):
        assert torch.equal(ours, ours_alone)


@pytest.mark.parametrize("name", GPU_CALLS)
def test_gpu(interpreted, name):
    alone, parameters = last_alone()
    found, expected = interpreted(both, name, alone, parameters)
    for ours, ours_alone in zip(found, expected, strict=True):
        assert torch.equal(ours, ours_alone)


def both(name, alone, parameters):
    """The last token of a kernel, in the midst of many and alone."""
    call = GPU_CALLS[name]
    with last_program(), last_slot_of_one(), typed_ranges():
        found = results(call, gpu, Tokens(*map(at_the_end, alone)), parameters)
    expected = results(call, gpu, alone, parameters)
    if name in ("gradients", "seam_gradients"):  # parts of dφ, of which the last has been written
        found[-1], expected[-1] = found[-1][-1], expected[-1][-1]
    return found, expected


@contextmanager
def last_slot_of_one():
    """Inside, kernels that go through many tokens in a loop have a last program with one token."""

    def of_two(T, *shape):
        return replace(plain(T, *shape), slots=2, size=T - 1)

    plain = projection.slots
    with mock.patch.object(projection, "slots", of_two), mock.patch.object(seam, "slots", of_two):
        yield


@contextmanager
def typed_ranges():
    """Inside, `tl.range` counts in the type of its start, as on a device, and not in Python's."""
    import triton.language as tl
    from triton.runtime import interpreter

    def patched(lang, *scope):
        plain(lang, *scope)
        in_python = lang.range

        def counted(*args, **options):
            if not isinstance(args[0], tl.tensor):
                return in_python(*args, **options)
            start, end, step = args
            return (start + done for done in range(0, int(end) - int(start), step))

        lang.range = counted

    plain = interpreter._patch_lang_core
    with mock.patch.object(interpreter, "_patch_lang_core", patched):
        yield


@contextmanager
def last_program():
    """Inside, of the programs along a grid's axis of tokens only the last one runs."""
    from triton.runtime import interpreter

    builder, plain = interpreter.interpreter_builder, interpreter.GridExecutor

    class Last(plain):
        def __init__(self, fn, arg_names, grid, *rest):
            # Tokens are the first axis, or the second where a program goes through `size` of them.
            self.axis = int("size" in arg_names)
            self.before = grid[self.axis] - 1
            grid = [1 if axis == self.axis else count for axis, count in enumerate(grid)]
            super().__init__(fn, arg_names, tuple(grid), *rest)

        def __call__(self, *args, **kwargs):
            def place(*index):
                index = list(index)
                index[self.axis] += self.before
                builder.grid_idx = tuple(index)

            builder.set_grid_idx = place
            try:
                return super().__call__(*args, **kwargs)
            finally:
                del builder.set_grid_idx

    with mock.patch.object(interpreter, "GridExecutor", Last):
        yield
