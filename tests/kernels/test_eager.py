"""The PyTorch implementation of a site: values against loops in float64, gradients by gradcheck."""

import numpy as np
import pytest
import torch

from mhc_compile.kernels import eager, reference
from mhc_compile.kernels.operands import Mapping, Opened, Saved
from mhc_compile.kernels.variants import VARIANTS, get_variant

from . import truth
from .operands import EPS, label, possible, random_site


def error(actual, expected):
    return float(np.abs(actual.double().numpy() - expected).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_values_equal_float64_truth(name):
    variant = get_variant(name)
    site = random_site(variant, 4, 3, (5,))
    numbers = [t.numpy() for t in (site.phi, site.alpha, site.bias)]
    H = truth.over_tokens(lambda x: truth.coefficients(x, *numbers, name, EPS), site.X.numpy())
    found = eager.coefficients(site.mapping, variant=variant, eps=EPS)
    assert all(error(ours, true) < 1e-14 for ours, true in zip(found[:3], H, strict=True))
    h = truth.over_tokens(truth.pre, H[0], site.X.numpy())
    assert error(eager.pre(found[0], site.X), h) < 1e-14
    X2 = truth.over_tokens(truth.post_res, H[2], H[1], site.X.numpy(), site.f.numpy())
    assert error(eager.post_res(found[2], found[1], site.X, site.f), X2) < 1e-13


class Coefficients(torch.autograd.Function):
    """`eager.coefficients` with `eager.coefficients_backward`, for gradcheck."""

    @staticmethod
    def forward(ctx, X, phi, alpha, bias, variant):
        *H, y, inv_r = eager.coefficients(Mapping(X, phi, alpha, bias), variant=variant, eps=EPS)
        ctx.save_for_backward(X, phi, alpha, bias, y, inv_r)
        ctx.variant = variant
        return tuple(H)

    @staticmethod
    def backward(ctx, *grads):
        saved = Saved(*ctx.saved_tensors)
        found = eager.coefficients_backward(grads, saved, variant=ctx.variant, eps=EPS)
        return (*found, None)


@pytest.mark.parametrize(("variant", "n"), possible([2, 3, 4]), ids=label)
def test_gradients_of_coefficients(variant, n):
    site = random_site(variant, n, 2, (2,)).requires_grad()
    assert torch.autograd.gradcheck(
        lambda *operands: Coefficients.apply(*operands, variant),
        tuple(site.mapping),
        fast_mode=True,
    )


@pytest.mark.parametrize(("variant", "n"), possible([4, 8]), ids=label)
def test_gradients_equal_those_of_the_reference(variant, n):
    """The backward of both sums and of the mapping, by autograd of the open form."""
    site = random_site(variant, n, 5, (3,)).requires_grad()
    exact = {"compute_dtype": torch.float64}
    H_pre, H_post, H_res = reference.coefficients(
        *site.mapping, variant=variant, n=n, width=5, eps=EPS, **exact
    )
    h = reference.pre(H_pre, site.X, dtype=torch.float64, **exact)
    X2 = reference.post_res(H_res, H_post, site.X, site.f, dtype=torch.float64, **exact)
    dh, dX2 = torch.randn_like(h), torch.randn_like(X2)
    expected = torch.autograd.grad(
        (h * dh).sum() + (X2 * dX2).sum(),
        (site.X, site.f, site.phi, site.alpha, site.bias),
        materialize_grads=True,
    )
    with torch.no_grad():
        found = eager.coefficients(site.mapping, variant=variant, eps=EPS)
        dH_res, dH_post, partial, df = eager.post_res_backward(
            dX2, found[2], found[1], site.X, site.f
        )
        opened, saved = Opened(dh, dH_post, dH_res, found[0]), Saved(*site.mapping, *found[3:])
        dX, *rest = eager.coefficients_pre_backward(
            opened, saved, partial, variant=variant, eps=EPS
        )
    for ours, true in zip((dX, df, *rest), expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-11)


def test_a_sum_of_gradients_is_rounded_once():
    """In bfloat16 the parts of dX are added before any of them is rounded."""
    variant = get_variant("mhc")
    site = random_site(variant, 4, 64, (32,)).to(torch.bfloat16)
    found = eager.coefficients(site.mapping, variant=variant, eps=EPS)
    dh, partial = torch.randn_like(site.f), torch.randn_like(site.X)
    dH_post, dH_res = torch.randn_like(found[1]), torch.randn_like(found[2])
    opened, saved = Opened(dh, dH_post, dH_res, found[0]), Saved(*site.mapping, *found[3:])
    dX, *_ = eager.coefficients_pre_backward(opened, saved, partial, variant=variant, eps=EPS)
    opened, saved = (type(ts)(*(t.double() for t in ts)) for ts in (opened, saved))
    true, *_ = eager.coefficients_pre_backward(
        opened, saved, partial.double(), variant=variant, eps=EPS
    )
    ulp = true.abs().clamp_min(1e-3).log2().floor().exp2() * 2**-7
    assert ((dX.double() - true).abs() / ulp).max() < 0.51
