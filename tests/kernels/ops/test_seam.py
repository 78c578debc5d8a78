"""The operators across two branches: bit-equal to their parts, and their manners."""

import pytest
import torch
from torch.library import opcheck

from mhc_compile.kernels.ops import seam as seam_ops
from mhc_compile.kernels.variants import get_variant

from ..operands import (
    EPS,
    IN_CPP_AND_EAGER,
    assert_not_autocast,
    assert_same,
    assert_strides_do_not_matter,
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


def operators(dtype=torch.float32):
    """Every operator with operands; backwards with such as need no gradient."""
    operands = closed_and_opened(PAPER, 4, 8, (2, 3), dtype)
    H_res, H_post, X, f, *mapping = operands
    X2, h, H_pre, *H, y, inv_r = separately(*operands, PAPER, dtype)
    grads = (torch.randn_like(h), *(torch.randn_like(t) for t in H))
    back = (*grads, H_pre, X2, *mapping, y, inv_r, torch.randn_like(X2))
    needs = [t.clone().requires_grad_() for t in operands]
    return {
        "coefficients_pre": (*needs[2:3], *needs[4:], PAPER.text, EPS, torch.bfloat16),
        "coefficients_pre_backward": (*back, PAPER.text, EPS),
        "seam": (*needs, PAPER.text, EPS, torch.float32),
        "seam_backward": (*back, H_res, H_post, X, f, PAPER.text, EPS),
    }


@pytest.mark.parametrize("name", list(operators()))
def test_opcheck(name):
    opcheck(getattr(mhc, name).default, operators()[name])


@pytest.mark.parametrize("dtype", IN_CPP_AND_EAGER, ids=str)
@pytest.mark.parametrize("name", list(operators()))
def test_strides_do_not_matter(name, dtype):
    assert_strides_do_not_matter(getattr(mhc, name), operators(dtype)[name])


@pytest.mark.parametrize("dtype", IN_CPP_AND_EAGER, ids=str)
@pytest.mark.parametrize("name", list(operators()))
def test_autocast_does_not_reach_into_operators(name, dtype):
    assert_not_autocast(getattr(mhc, name), operators(dtype)[name])


@pytest.mark.parametrize("dtype", IN_CPP_AND_EAGER, ids=str)
def test_gradients_under_autocast_are_those_without(dtype):
    operands = closed_and_opened(PAPER, 4, 8, (3,), dtype)
    grads = [torch.randn_like(t) for t in mhc.seam(*operands, PAPER.text, EPS, dtype)[:5]]

    def results():
        leaves = [t.detach().clone().requires_grad_() for t in operands]
        opened = mhc.coefficients_pre(leaves[2], *leaves[4:], PAPER.text, EPS, dtype)[:4]
        closed = mhc.seam(*leaves, PAPER.text, EPS, dtype)[:5]
        outputs = (*opened, *closed)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [*grads[1:], *grads])]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        inside = results()
    assert_same(inside, plain)


@pytest.mark.parametrize("name", ["coefficients_pre_backward", "seam_backward"])
def test_double_backward_raises(name):
    operands = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in operators()[name]]
    output = getattr(mhc, name)(*operands)
    with pytest.raises(RuntimeError, match="double backward"):
        output[0].sum().backward()


def test_module_lists_its_operators():
    named = {name for name in operators() if f"mhc::{name}" in seam_ops.__doc__}
    assert named == set(operators())
