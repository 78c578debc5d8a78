"""The operators of a site as torch sees them: schemas, fakes, autograd, dtypes, errors."""

import pytest
import torch

from mhc_compile.kernels import reference
from mhc_compile.kernels.variants import get_variant

from ..operands import (
    EPS,
    label,
    possible,
    random_site,
)

mhc = torch.ops.mhc
PAPER = get_variant("mhc")


def site_of_operators(X, f, phi, alpha, bias, variant, h_dtype):
    H_pre, H_post, H_res, *_ = mhc.coefficients(X, phi, alpha, bias, variant.text, EPS)
    return mhc.pre(H_pre, X, h_dtype), mhc.post_res(H_res, H_post, X, f)


def open_site(X, f, phi, alpha, bias, variant, h_dtype):
    n, width = X.shape[-2:]
    exact = {"compute_dtype": phi.dtype}
    H_pre, H_post, H_res = reference.coefficients(
        X, phi, alpha, bias, variant=variant, n=n, width=width, eps=EPS, **exact
    )
    h = reference.pre(H_pre, X, dtype=h_dtype, **exact)
    return h, reference.post_res(H_res, H_post, X, f, dtype=X.dtype, **exact)


def results(function, site, variant, h_dtype=None, weights=None):
    """h, X' and the gradients of a weighted sum of them."""
    operands = (site.X, site.f, site.phi, site.alpha, site.bias)
    outputs = function(*operands, variant, h_dtype or site.X.dtype)
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, operands, materialize_grads=True)]


def weights_for(site):
    random = torch.Generator().manual_seed(7)
    draw = {"generator": random, "dtype": torch.float64}
    return torch.randn(site.f.shape, **draw), torch.randn(site.X.shape, **draw)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize(("variant", "n"), possible([2, 3, 4, 8]), ids=label)
def test_equals_the_open_form(variant, n, leading):
    """Forward and backward, with any leading dimensions."""
    site = random_site(variant, n, 5, leading).requires_grad()
    weights = weights_for(site)
    ours = results(site_of_operators, site, variant, weights=weights)
    true = results(open_site, site, variant, weights=weights)
    for a, b in zip(ours, true, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


MIXED = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16)]
MIXED += [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
MIXED += [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize(("streams", "branch"), MIXED, ids=str)
def test_every_dtype_is_as_exact_as_the_open_form(streams, branch):
    """No further from float64 than the open form in the same dtypes, times 2."""
    site = random_site(PAPER, 4, 40, (7,)).to(streams)
    site.f = site.f.to(branch)
    exact = random_site(PAPER, 4, 40, (7,))
    exact.X, exact.f = site.X.double(), site.f.double()
    exact.phi, exact.alpha, exact.bias = (t.double() for t in (site.phi, site.alpha, site.bias))
    weights = weights_for(site)
    weights = weights[0].to(branch), weights[1].to(streams)
    true = results(open_site, exact.requires_grad(), PAPER, weights=weights)
    ours = results(site_of_operators, site.requires_grad(), PAPER, branch, weights)
    plain = results(open_site, site.requires_grad(), PAPER, branch, weights)
    for a, b, t in zip(ours, plain, true, strict=True):
        assert a.dtype == b.dtype
        allowed = 2 * (b - t).abs().max() + 1e-6 * t.abs().max()
        assert (a - t).abs().max() <= allowed


def test_a_nan_stays_in_its_token():
    site = random_site(PAPER, 4, 6, (3,))
    site.X[1, 2, 3] = torch.nan
    site = site.requires_grad()
    h, X2, dX, df, *_ = results(site_of_operators, site, PAPER, weights=weights_for(site))
    for t in (h, X2, dX, df):
        assert t[1].isnan().any()
        assert t[[0, 2]].isfinite().all()


def test_two_runs_are_bit_equal():
    site = random_site(PAPER, 4, 40, (33,)).to(torch.float32).requires_grad()
    weights = weights_for(site)
    first, second = (results(site_of_operators, site, PAPER, weights=weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- what torch demands of an operator ------------------------------------------------------------


def test_compiles_without_a_break():
    site = random_site(PAPER, 4, 8, (5,)).to(torch.float32).requires_grad()
    weights = weights_for(site)
    compiled = torch.compile(site_of_operators, backend="aot_eager", fullgraph=True)
    ours = results(compiled, site, PAPER, weights=weights)
    plain = results(site_of_operators, site, PAPER, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_shapes_that_do_not_fit_raise():
    site = random_site(PAPER, 4, 8, (5,)).to(torch.float32)
    X, phi, alpha, bias = site.mapping
    with pytest.raises(ValueError, match=r"phi \[nC, 24\].*got .*\(31, 24\) float32"):
        mhc.coefficients(X, phi[:-1], alpha, bias, PAPER.text, EPS)
    with pytest.raises(ValueError, match="float64 for float64 X"):
        mhc.coefficients(X.double(), phi, alpha, bias, PAPER.text, EPS)
    with pytest.raises(ValueError, match="needs a power of two, got n=3"):
        mhc.coefficients(X[:, :3], phi, alpha, bias, get_variant("kromhc").text, EPS)
    with pytest.raises(ValueError, match=r"written like 'mhc\(iterations=20\)', got 'paper'"):
        mhc.coefficients(X, phi, alpha, bias, "paper", EPS)
    H_pre, H_post, H_res, *_ = mhc.coefficients(X, phi, alpha, bias, PAPER.text, EPS)
    with pytest.raises(ValueError, match=r"mhc::pre takes streams .*got \(4, 4\) float32"):
        mhc.pre(H_pre[1:], X, X.dtype)
    with pytest.raises(ValueError, match="mhc::post_res takes"):
        mhc.post_res(H_res, H_post, X, site.f[:, 1:])
