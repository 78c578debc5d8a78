"""The functions of a site as Triton kernels, in the interpreter, against float64 truth.

The truth is `eager` in float64, whose values and gradients test_eager.py compares with loops over
numbers and with gradcheck. The rule for errors: streams and their gradients are no further from
the truth than twice what eager is with float32 coefficients. Numbers made of x⃗ φ are allowed more:
for streams of 16 bits, where φ is two bfloat16 terms, a relative error of 1e-5, and for streams of
32 bits a few roundings. Only float32 numbers are given it: in 16 bits it is not to be seen.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from mhc_compile.kernels import eager
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import get_variant

from .. import truth
from ..operands import EPS, possible, variant_of
from ..sites import normal

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    ("mhc", 4, BF16, 7, 72),
    ("mhc", 4, F32, 7, 40),
    ("mhc", 4, F16, 1, 8),
    ("mhc", 2, F32, 7, 13),
    ("mhc", 3, BF16, 7, 13),
    ("mhc", 3, F16, 7, 24),
    ("mhc", 8, BF16, 7, 24),
    ("mhc", 8, F32, 1, 13),
    ("deepseek_v4", 4, BF16, 7, 8),
    ("hc", 4, F32, 7, 8),
    ("mhc_lite", 3, BF16, 7, 8),
    ("kromhc", 2, F32, 7, 8),
    ("kromhc", 8, BF16, 7, 8),
    ("identity", 4, F32, 7, 8),
    # Five, eight and three splits of channels, whose parts are added.
    ("mhc", 4, BF16, 3, 2560),
    ("mhc", 2, F32, 1, 16384),
    ("mhc", 2, F16, 1, 1031),
    ("deepseek_v4", 2, F16, 3, 13),
    ("hc", 3, BF16, 3, 13),
    ("hc_linear", 4, BF16, 7, 8),
    ("kromhc", 4, F16, 3, 8),
]
cases = pytest.mark.parametrize(("name", "n", "dtype", "T", "C"), CASES)


class Operands(NamedTuple):
    """Of a seam and of its backward, large and irregular."""

    H_res: Tensor
    H_post: Tensor
    X: Tensor
    f: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    dh: Tensor
    dH_pre: Tensor
    dH_post: Tensor
    dH_res: Tensor
    partial: Tensor

    @classmethod
    def random(cls, name, n, dtype, T, C):
        columns = sum(variant_of(name).columns(n))
        shapes = ((T, n, n), (T, n))
        return cls(
            *(normal(*shape, dtype=F32) for shape in shapes),
            normal(T, n, C, dtype=dtype),
            normal(T, C, dtype=dtype),
            normal(n * C, columns, dtype=F32) / (n * C) ** 0.5,
            normal(3, dtype=F32),
            normal(columns, dtype=F32),
            normal(T, C, dtype=dtype),
            *(normal(*shape, dtype=F32) for shape in ((T, n), (T, n), (T, n, n))),
            normal(T, n, C, dtype=dtype),
        )

    @property
    def closed(self):
        return Closed(self.H_res, self.H_post, self.X, self.f)

    def mapping(self, X):
        return Mapping(X, self.phi, self.alpha, self.bias)

    def double(self):
        return Operands(*(t.double() for t in self))

    def tokens(self, t):
        """The operands of the tokens of a slice."""
        own = ("phi", "alpha", "bias")
        return Operands(**{k: x if k in own else x[t] for k, x in self._asdict().items()})


def forward(o, name):
    """Every function of forward, X' as the seam made it."""
    parameters = Parameters(o.phi, o.alpha, o.bias)
    options = {"variant": variant_of(name), "eps": EPS}
    X2 = gpu.post_res(*o.closed)
    found = gpu.coefficients(Mapping(X2, *parameters), **options)
    return {
        "seam": gpu.seam(o.closed, parameters, **options),
        "separate": (X2, gpu.pre(found[0], X2), *found),
    }


def backward(kernels, o, partial, X2, H_pre, y, inv_r, name):
    """Every function of backward that reads φ, from the given results of forward."""
    saved = Saved(X2, o.phi, o.alpha, o.bias, y, inv_r)
    opened = Opened(o.dh, o.dH_post, o.dH_res, H_pre), saved, partial
    options = {"variant": variant_of(name), "eps": EPS}
    return {
        "coefficients": kernels.coefficients_backward(
            (o.dH_pre, o.dH_post, o.dH_res), saved, **options
        ),
        "coefficients_pre": kernels.coefficients_pre_backward(*opened, **options),
        "seam": kernels.seam_backward(*opened, o.closed, **options),
    }


def everything(o, partial, name):
    results = forward(o, name)
    X2, _, H_pre, *_, y, inv_r = results["seam"]
    return results, backward(gpu, o, partial, X2, H_pre, y, inv_r, name)


def floor_for(streams):
    """The relative error of numbers made of x⃗ φ; `streams` is the dtype of x⃗."""
    return 4 * torch.finfo(F32).eps if streams == F32 else 1e-5


def assert_close(actual, plain, expected, what, floor=0.0):
    """The rule above; `expected` is float64, `plain` is eager's in the dtypes of `actual`."""
    for k, (a, e, true) in enumerate(zip(actual, plain, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape and a.is_contiguous(), (what, k)
        if a.numel() == 0:
            continue
        error, allowed = ((t.double() - true).abs().max() for t in (a, e))
        more = floor * true.abs().max() if a.dtype == F32 else 0.0
        assert error <= 2 * allowed + more, (what, k, error, allowed)


@cases
def test_equals_float64_truth(interpreted, name, n, dtype, T, C):
    """And the seam's results are those of the separate functions, bit by bit."""
    o = Operands.random(name, n, dtype, T, C)
    assert_truth(o, o.partial, name, *interpreted(everything, o, o.partial, name))


def test_without_a_partial_gradient(interpreted):
    o = Operands.random("mhc", 4, BF16, 3, 8)
    assert_truth(o, None, "mhc", *interpreted(everything, o, None, "mhc"))


def assert_truth(o, partial, name, results, gradients):
    X2, *opened = results["seam"]
    for a, b in zip(results["seam"], results["separate"], strict=True):
        assert torch.equal(a, b)
    h, H_pre, *_, y, inv_r = opened
    exact = o.double()
    assert_close(
        (X2,),
        (eager.post_res(*o.closed),),
        (eager.post_res(*exact.closed),),
        "post_res",
    )
    # As h below, but from the same H_pre: without what that is allowed.
    assert_close((h,), (eager.pre(H_pre, X2),), (eager.pre(H_pre.double(), X2.double()),), "pre")
    options = {"variant": variant_of(name), "eps": EPS}
    assert_close(
        opened,
        eager.coefficients_pre(o.mapping(X2), **options),
        eager.coefficients_pre(exact.mapping(X2.double()), **options),
        "coefficients_pre",
        floor_for(X2.dtype),
    )
    kept = X2, H_pre, y, inv_r
    plain = backward(eager, o, partial, *kept, name)
    partial = None if partial is None else partial.double()
    true = backward(eager, exact, partial, *(t.double() for t in kept), name)
    for what, actual in gradients.items():
        assert_close(actual, plain[what], true[what], what, floor_for(X2.dtype))


def test_coefficients_pre_is_its_parts_bit_by_bit(interpreted):
    o = Operands.random("mhc", 4, BF16, 7, 13)
    options = {"variant": get_variant("mhc"), "eps": EPS}
    h, *found = interpreted(gpu.coefficients_pre, o.mapping(o.X), **options)
    separate = interpreted(gpu.coefficients, o.mapping(o.X), **options)
    assert all(torch.equal(a, b) for a, b in zip(found, separate, strict=True))
    assert torch.equal(h, interpreted(gpu.pre, found[0], o.X))


@pytest.mark.parametrize("n", [4, 8])
def test_no_tokens(interpreted, n):
    """Outputs are empty, gradients of parameters are zeros."""
    o = Operands.random("mhc", n, BF16, 0, 40)
    results, gradients = interpreted(everything, o, o.partial, "mhc")
    assert all(t.numel() == 0 for tensors in results.values() for t in tensors)
    for parameters in (gradients["coefficients"][1:], gradients["seam"][:3]):
        shapes = [tuple(p.shape) for p in parameters]
        assert shapes == [tuple(p.shape) for p in (o.phi, o.alpha, o.bias)]
        assert all((p == 0).all() for p in parameters)


def test_a_token_does_not_depend_on_its_neighbours(interpreted):
    """Whatever block of tokens it is in: all results per token, and two runs of everything."""
    T, last = 67, slice(63, 66)
    o = Operands.random("mhc", 4, BF16, T, 8)
    whole, again = (interpreted(everything, o, o.partial, "mhc") for _ in range(2))
    part = o.tokens(last)
    part = interpreted(everything, part, part.partial, "mhc")
    for results, same, alone in zip(whole, again, part, strict=True):
        for what, tensors in results.items():
            for k, t in enumerate(tensors):
                assert torch.equal(t, same[what][k]), (what, k)
                if t.shape[:1] == (T,):
                    assert torch.equal(t[last], alone[what][k]), (what, k)


@pytest.mark.parametrize(("n", "dtype"), [(2, F16), (4, BF16), (8, F32)])
def test_a_nan_stays_in_its_token(interpreted, n, dtype):
    T, bad = 9, 4
    o = Operands.random("mhc", n, dtype, T, 8)
    o.X[bad, 1, 7] = float("nan")
    found = interpreted(everything, o, o.partial, "mhc")
    assert found[0]["seam"][0][bad].isnan().any()
    for results in found:
        for what, tensors in results.items():
            for k, t in enumerate(tensors):
                if t.shape[:1] == (T,):
                    assert t[torch.arange(T) != bad].isfinite().all(), (what, k)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinite_coefficients_give_the_same_bits_in_a_seam(interpreted, value):
    """13 channels leave lanes of a tile unused: nothing from there gets into x⃗ φ."""
    o = Operands.random("mhc", 4, F32, 3, 13)
    o.H_post[1, 2] = value
    results = interpreted(forward, o, "mhc")
    torch.testing.assert_close(results["seam"], results["separate"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", ["mhc", "deepseek_v4"])
def test_sinkhorn_of_logits_of_any_size(interpreted, name, n):
    """α = 0, so that b alone decides and no rounding stands in front of Sinkhorn."""
    options = {"variant": get_variant(name), "eps": EPS}
    for scale in (1.0, 30.0, 1e3, 1e4):
        o = Operands.random(name, n, BF16, 1, 8)
        o.alpha.zero_()
        o.bias[2 * n :] *= scale
        *H, y, inv_r = interpreted(gpu.coefficients, o.mapping(o.X), **options)
        logits = o.bias[2 * n :].reshape(n, n).double().numpy()
        iterations = options["variant"].iterations
        if name == "mhc":
            expected = truth.sinkhorn(logits, iterations)
        else:
            expected = truth.sinkhorn_v4(logits, iterations).T
        assert np.abs(H[2][0].double().numpy() - expected).max() < 2e-6

        dH, saved = (o.dH_pre, o.dH_post, o.dH_res), Saved(*o.mapping(o.X), y, inv_r)
        dbias = interpreted(gpu.coefficients_backward, dH, saved, **options)[3]
        wide = [t.double() for t in dH], Saved(*(t.double() for t in saved))
        exact = eager.coefficients_backward(*wide, **options)[3]
        assert (dbias - exact).abs().max() < 1e-5


def test_supported_streams():
    assert all(gpu.supports(dtype, n) for dtype in (BF16, F16, F32) for n in (2, 3, 4, 8, 10))
    assert not gpu.supports(torch.float64, 4)
    assert not gpu.supports(BF16, 16)
    assert all(gpu.supports(BF16, n, variant) for variant, n in possible([2, 3, 4, 8, 10]))
