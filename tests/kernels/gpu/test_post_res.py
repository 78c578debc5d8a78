"""post_res and its backward as Triton kernels, in the interpreter, against float64."""

import pytest
import torch

from mhc_compile.kernels.gpu import post_res

from .. import sites
from ..sites import Site, assert_sum, strided


def forward_inputs(site: Site) -> tuple[torch.Tensor, ...]:
    return site.H_res, site.H_post, site.X, site.f


def assert_forward(X2, H_res, H_post, X, f):
    """X'[i] = Σ_j H_res[i, j] · X[j] + H_post[i] · f, as one sum over n + 1 streams."""
    weights = torch.cat((H_res, H_post.unsqueeze(2)), 2)
    assert_sum(X2, "tij,tjc->tic", weights, torch.cat((X, f.unsqueeze(1)), 1))


def assert_backward(gradients, dX2, H_res, H_post, X, f):
    dH_res, dH_post, dX, df = gradients
    assert_sum(dH_res, "tic,tjc->tij", dX2, X)
    assert_sum(dH_post, "tic,tc->ti", dX2, f)
    assert_sum(dX, "tij,tic->tjc", H_res, dX2)
    assert_sum(df, "ti,tic->tc", H_post, dX2)


@pytest.mark.parametrize("T, C", sites.SHAPES)
@pytest.mark.parametrize("n", sites.STREAMS)
@pytest.mark.parametrize("dtype", sites.DTYPES)
def test_equals_float64_truth(interpreted, dtype, n, T, C):
    site = Site.random(T, n, C, dtype)
    X2 = interpreted(post_res.post_res, *forward_inputs(site))
    assert X2.dtype == dtype
    assert_forward(X2, *forward_inputs(site))
    gradients = interpreted(post_res.post_res_backward, site.dX2, *forward_inputs(site))
    assert [g.dtype for g in gradients] == [torch.float32] * 2 + [dtype] * 2
    assert_backward(gradients, site.dX2, *forward_inputs(site))


@pytest.mark.parametrize("n", [1, 5])
def test_any_number_of_streams_in_float64(interpreted, n):
    site = Site.random(3, n, 24, torch.float64)
    assert_forward(interpreted(post_res.post_res, *forward_inputs(site)), *forward_inputs(site))
    gradients = interpreted(post_res.post_res_backward, site.dX2, *forward_inputs(site))
    assert_backward(gradients, site.dX2, *forward_inputs(site))


def test_any_strides_give_the_same_bits(interpreted):
    site = Site.random(7, 4, 40, torch.bfloat16)
    inputs = site.dX2, *forward_inputs(site)
    for call, args in ((post_res.post_res, inputs[1:]), (post_res.post_res_backward, inputs)):
        expected = interpreted(call, *args)
        actual = interpreted(call, *map(strided, args))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_nan_stays_in_its_token(interpreted):
    site = Site.random(9, 4, 40, torch.float32)
    site.X[4, 1, 7] = float("nan")
    X2 = interpreted(post_res.post_res, *forward_inputs(site))
    gradients = interpreted(post_res.post_res_backward, site.dX2, *forward_inputs(site))
    assert X2[4].isnan().any() and gradients[0][4].isnan().any()
    for result in (X2, *gradients):
        assert result[torch.arange(9) != 4].isfinite().all()
