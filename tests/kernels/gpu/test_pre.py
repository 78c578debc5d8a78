"""pre and its backward as Triton kernels, in the interpreter, against float64."""

import pytest
import torch

from mhc_compile.kernels.gpu import pre

from .. import sites
from ..sites import Site, assert_sum, strided


def assert_backward(gradients, dh, H_pre, X):
    dH_pre, dX = gradients
    assert_sum(dH_pre, "tc,tjc->tj", dh, X)
    assert_sum(dX, "tj,tc->tjc", H_pre, dh)


@pytest.mark.parametrize("T, C", sites.SHAPES)
@pytest.mark.parametrize("n", sites.STREAMS)
@pytest.mark.parametrize("dtype", sites.DTYPES)
def test_equals_float64_truth(interpreted, dtype, n, T, C):
    site = Site.random(T, n, C, dtype)
    h = interpreted(pre.pre, site.H_pre, site.X)
    assert h.dtype == dtype
    assert_sum(h, "tj,tjc->tc", site.H_pre, site.X)
    gradients = interpreted(pre.pre_backward, site.dh, site.H_pre, site.X)
    assert [g.dtype for g in gradients] == [torch.float32, dtype]
    assert_backward(gradients, site.dh, site.H_pre, site.X)


@pytest.mark.parametrize("n", [1, 5])
def test_any_number_of_streams_in_float64(interpreted, n):
    site = Site.random(3, n, 24, torch.float64)
    assert_sum(interpreted(pre.pre, site.H_pre, site.X), "tj,tjc->tc", site.H_pre, site.X)
    gradients = interpreted(pre.pre_backward, site.dh, site.H_pre, site.X)
    assert_backward(gradients, site.dh, site.H_pre, site.X)


def test_dots_are_the_gradient_of_H_pre(interpreted):
    site = Site.random(7, 4, 264, torch.bfloat16)
    dH_pre, _ = interpreted(pre.pre_backward, site.dh, site.H_pre, site.X)
    assert torch.equal(interpreted(pre.dots, site.dh, site.X), dH_pre)


def test_any_strides_give_the_same_bits(interpreted):
    site = Site.random(7, 4, 40, torch.bfloat16)
    inputs = site.dh, site.H_pre, site.X
    for call, args in ((pre.pre, inputs[1:]), (pre.pre_backward, inputs)):
        expected = interpreted(call, *args)
        actual = interpreted(call, *map(strided, args))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_nan_stays_in_its_token(interpreted):
    site = Site.random(9, 4, 40, torch.float32)
    site.X[4, 1, 7] = site.dh[4, 3] = float("nan")
    h = interpreted(pre.pre, site.H_pre, site.X)
    for result in (h, *interpreted(pre.pre_backward, site.dh, site.H_pre, site.X)):
        assert result[4].isnan().any()
        assert result[torch.arange(9) != 4].isfinite().all()
