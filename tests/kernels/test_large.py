"""Streams of more than 2³¹ elements: the last token comes out as it does alone.

Memory that nobody has written is a page of zeros, so a tensor of 4 GiB costs what is touched. The
C++ operators here read all of it. In Triton's interpreter only the last program of the first axis
runs; its offsets are those of the whole, and 32-bit arithmetic overflows there as on a device.
"""

from contextlib import contextmanager

import torch

from mhc_compile.kernels import cpu, gpu
from mhc_compile.kernels.post_res import post_res_backward
from mhc_compile.kernels.pre import pre_backward
from mhc_compile.kernels.variants import get_variant

from .operands import EPS, random_site

PAPER = get_variant("mhc")
N, C = 4, 1024
TOKENS = 2**31 // (N * C) + 77
BF16, F32 = torch.bfloat16, torch.float32


def last_alone():
    """The operands of a site with one token."""
    return random_site(PAPER, N, C, (1,)).to(BF16)


def at_the_end(t):
    """A tensor of TOKENS tokens of which only the last, `t`, has been written."""
    large = torch.zeros(TOKENS, *t.shape[1:], dtype=t.dtype)
    large[-1:] = t
    return large


def test_cpu():
    site = last_alone()
    large = at_the_end(site.X)
    assert large.numel() > 2**31
    found, expected = (
        cpu.coefficients_pre(X, *site.mapping[1:], variant=PAPER, eps=EPS) for X in (large, site.X)
    )
    for ours, alone in zip(found, expected, strict=True):
        assert torch.equal(ours[-1:], alone)
    assert torch.equal(cpu.readout(large, "mean")[-1:], cpu.readout(site.X, "mean"))


def test_gpu(interpreted):
    found, expected = interpreted(both)
    for ours, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, alone)


def both():
    """The last token of every token-wise kernel, in the midst of many and alone."""
    site = last_alone()
    H = torch.rand(1, N, N), torch.rand(1, N)
    alone = (site.X, site.f, *H)
    with last_program():
        found = kernels(site, *map(at_the_end, alone))
    return [t[-1:].clone() for t in found], kernels(site, *alone)


def kernels(site, X, f, H_res, H_post):
    parameters = {"variant": PAPER, "eps": EPS}
    return (
        *gpu.coefficients_pre(X, *site.mapping[1:], **parameters),
        *gpu.seam(H_res, H_post, X, f, *site.mapping[1:], **parameters),
        *pre_backward(f, H_post, X),
        *post_res_backward(X, H_res, H_post, X, f),
    )


@contextmanager
def last_program():
    """Inside, of the programs along a grid's first axis only the last one runs."""
    from triton.runtime import interpreter

    builder, plain = interpreter.interpreter_builder, interpreter.GridExecutor

    class Last(plain):
        def __init__(self, fn, arg_names, grid, *rest):
            super().__init__(fn, arg_names, (1, *grid[1:]), *rest)
            self.before = grid[0] - 1

        def __call__(self, *args, **kwargs):
            def place(x, y, z):
                builder.grid_idx = (x + self.before, y, z)

            builder.set_grid_idx = place
            try:
                return super().__call__(*args, **kwargs)
            finally:
                del builder.set_grid_idx

    interpreter.GridExecutor = Last
    try:
        yield
    finally:
        interpreter.GridExecutor = plain
