"""The operators across two branches: bit-equal to their parts, and their manners."""

import pytest
import torch

from mhc_compile.kernels.variants import get_variant

from ..operands import (
    EPS,
    label,
    possible,
    random_site,
)

mhc = torch.ops.mhc
PAPER = get_variant("mhc")


def closed_and_opened(variant, n, C, leading, dtype=torch.float64):
    """Operands of a seam: H_res, H_post, X, f of one site, φ, α, b of the next."""
    site = random_site(variant, n, C, leading, seed=1).to(dtype)
    following = random_site(variant, n, C, leading, seed=2).to(dtype)
    _, H_post, H_res, *_ = mhc.coefficients(*site.mapping, variant.text, EPS)
    return [H_res, H_post, site.X, site.f, following.phi, following.alpha, following.bias]


def separately(H_res, H_post, X, f, phi, alpha, bias, variant, h_dtype):
    X2 = mhc.post_res(H_res, H_post, X, f)
    found = mhc.coefficients(X2, phi, alpha, bias, variant.text, EPS)
    return X2, mhc.pre(found[0], X2, h_dtype), *found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "n"), possible([2, 3, 4, 8]), ids=label)
def test_forward_is_bit_equal_to_its_parts(variant, n, dtype):
    operands = closed_and_opened(variant, n, 13, (2, 3), dtype)
    X2, h, *found = separately(*operands, variant, dtype)
    fused = mhc.seam(*operands, variant.text, EPS, dtype)
    opened = mhc.coefficients_pre(X2, *operands[4:], variant.text, EPS, dtype)
    for a, b in zip((*fused, *opened), (X2, h, *found, h, *found), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("streams", "branch"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("both", [True, False])
def test_branches_of_another_dtype(streams, branch, both):
    operands = closed_and_opened(PAPER, 4, 13, (5,), streams)
    operands[3] = operands[3].to(branch if both else streams)
    fused = mhc.seam(*operands, PAPER.text, EPS, branch)
    for a, b in zip(fused, separately(*operands, PAPER, branch), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("used", [(0, 1, 2, 3, 4), (0, 1, 3, 4), (1, 4), (0,)], ids=str)
def test_gradients_equal_those_of_the_parts(used):
    """Whichever of X', h, H_pre, H_post, H_res something reads."""
    operands = closed_and_opened(PAPER, 4, 5, (3,))
    operands = [t.detach().requires_grad_() for t in operands]
    fused = mhc.seam(*operands, PAPER.text, EPS, torch.float64)
    parts = separately(*operands, PAPER, torch.float64)
    weights = [torch.randn_like(t) for t in parts]

    def gradients(outputs):
        loss = sum((outputs[i] * weights[i]).sum() for i in used)
        return torch.autograd.grad(loss, operands, materialize_grads=True)

    for a, b in zip(gradients(fused), gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_partial", [True, False])
@pytest.mark.parametrize(("variant", "n"), possible([2, 3, 4, 8]), ids=label)
def test_backwards_equal_their_parts(variant, n, has_partial):
    H_res, H_post, X, f, *mapping = closed_and_opened(variant, n, 5, (2, 3))
    X2, h, H_pre, *H, y, inv_r = separately(H_res, H_post, X, f, *mapping, variant, X.dtype)
    dh, dH_post, dH_res = torch.randn_like(h), *(torch.randn_like(t) for t in H)
    partial = torch.randn_like(X2) if has_partial else None
    kept = (X2, *mapping, y, inv_r)

    dH_pre, dX2 = mhc.pre_backward(dh, H_pre, X2)
    more, *rest = mhc.coefficients_backward(dH_pre, dH_post, dH_res, *kept, variant.text, EPS)
    dX2 = dX2 + more + (0 if partial is None else partial)
    closed = mhc.post_res_backward(dX2, H_res, H_post, X, f)

    operands = (dh, dH_post, dH_res, H_pre, *kept, partial)
    opened = mhc.coefficients_pre_backward(*operands, variant.text, EPS)
    both = mhc.seam_backward(*operands, H_res, H_post, X, f, variant.text, EPS)
    for a, b in zip((*opened, *both), (dX2, *rest, *rest, *closed), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
