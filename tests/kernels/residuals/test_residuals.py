"""What every way to make H_res promises, whichever files lie in kernels/residuals."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch

from mhc_compile.kernels import eager, reference
from mhc_compile.kernels.cpu import codegen as codegen_cpp
from mhc_compile.kernels.gpu import codegen
from mhc_compile.kernels.operands import Saved
from mhc_compile.kernels.residuals import RESIDUALS
from mhc_compile.kernels.variants import Variant, get_variant

from ..operands import DESCRIPTIONS, label, possible

WITH_NUMBERS = [(v, n) for v, n in possible([1, 2, 3, 4, 8]) if v.res.columns(n)]


def test_every_residual_has_a_variant_that_carries_what_it_reads():
    assert {variant.residual for variant in DESCRIPTIONS} == set(RESIDUALS)
    for variant in DESCRIPTIONS:
        assert type(variant.res) is RESIDUALS[variant.residual]
        for field in fields(variant.res):
            assert getattr(variant.res, field.name) == getattr(variant, field.name)


@pytest.mark.parametrize(("variant", "n"), WITH_NUMBERS, ids=label)
def test_starts_near_the_identity_with_rows_and_columns_of_sum_one(variant, n):
    b = variant.res.near_identity(n)
    assert b.dtype == torch.float64 and b.shape == (variant.columns(n)[2],)
    H_res = variant.res.forward(b, n)
    assert H_res.shape == (n, n)
    torch.testing.assert_close(H_res.sum(0), torch.ones(n).double(), rtol=0, atol=1e-6 * n)
    torch.testing.assert_close(H_res.sum(1), torch.ones(n).double(), rtol=0, atol=1e-6 * n)
    assert (H_res - torch.eye(n)).abs().max() < 0.06


@pytest.mark.parametrize(("variant", "n"), WITH_NUMBERS, ids=label)
def test_backward_is_the_gradient_of_forward(variant, n):
    random = torch.Generator().manual_seed(n)
    x = torch.randn(
        5, variant.columns(n)[2], dtype=torch.float64, generator=random
    ).requires_grad_()
    H_res = variant.res.forward(x, n)
    grad = torch.randn(H_res.shape, dtype=torch.float64, generator=random)
    (expected,) = torch.autograd.grad(H_res, x, grad)
    found = variant.res.backward(grad, x.detach(), n)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_an_unknown_residual_raises_wherever_it_is_asked():
    unknown, n = replace(get_variant("mhc"), residual="sinkhron"), 2
    y, inv_r, alpha, bias = torch.randn(3, 8), torch.ones(3), torch.ones(3), torch.zeros(8)
    H = torch.randn(3, n), torch.randn(3, n), torch.randn(3, n, n)
    X, phi = torch.randn(3, n, 4), torch.randn(8, 8)
    for ask in (
        lambda: unknown.columns(n),
        lambda: unknown.check(n),
        lambda: reference.from_projection(y, alpha, bias, variant=unknown, n=n),
        lambda: eager.coefficients_backward(
            H, Saved(X, phi, alpha, bias, y, inv_r), variant=unknown, eps=1e-6
        ),
        lambda: codegen.source(unknown, n),
        lambda: codegen_cpp.chain_source(unknown, n, torch.float32),
        lambda: torch.ops.mhc.coefficients(X, phi, alpha, bias, "mhc(residual=sinkhron)", 1e-6),
    ):
        with pytest.raises(ValueError, match="unknown residual 'sinkhron'; known are identity"):
            ask()


def test_residuals_need_no_triton():
    """Their text in Triton is text: Windows and macOS have no Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mhc_compile.kernels.variants import get_variant\n"
        "from mhc_compile.kernels.residuals.residual import Chain\n"
        "print(len(get_variant('mhc').res.triton(Chain(4, 24)).forward) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_number_that_a_residual_does_not_read_changes_nothing():
    plain = get_variant("hc")
    other = replace(plain, iterations=3, eps=0.1)
    assert plain.res == other.res
    assert Variant("hc", residual="free").res == plain.res
