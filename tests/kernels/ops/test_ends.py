"""The operators at the ends of a chain, as torch sees them, against float64."""

import pytest
import torch

from mhc_compile.kernels import eager, reference
from mhc_compile.kernels.backends import implementation
from mhc_compile.kernels.ops import ends as readout_ops

from ..operands import (
    IN_CPP_AND_EAGER,
    assert_same,
)

mhc = torch.ops.mhc
EPS = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LEADING = [(), (0,), (7,), (2, 3)]


def head_operands(n=4, C=6, leading=(2, 3), dtype=torch.float64):
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    X = torch.randn(*leading, n, C, dtype=torch.float64).to(dtype)
    shapes = [(n * C, n), (1,), (n,)]
    return [X, *(torch.randn(shape, dtype=torch.float64).to(exact) for shape in shapes)]


def open_head(X, phi, alpha, bias, offset=1e-6):
    """The readout by einsum and powers; imports nothing of ours."""
    x = X.flatten(-2)
    r = (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    weights = 1 / (1 + torch.exp(-(alpha * (x @ phi) / r + bias))) + offset
    return torch.einsum("...n,...nc->...c", weights, X), weights


def fused_head(X, phi, alpha, bias, dtype=None):
    return mhc.head(X, phi, alpha, bias, EPS, 1e-6, dtype or X.dtype)[:2]


def results(function, operands, grads):
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    outputs = function(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expand_and_readout_are_exact_up_to_one_rounding(dtype, n, leading):
    x = torch.randn(*leading, 13, dtype=torch.float64).to(dtype).requires_grad_()
    X = torch.randn(*leading, n, 13, dtype=torch.float64).to(dtype).requires_grad_()
    copies, mean, total = (
        mhc.expand(x, n),
        mhc.readout(X, "mean", dtype),
        mhc.readout(X, "sum", dtype),
    )
    assert torch.equal(copies, x.unsqueeze(-2).expand(X.shape))
    exact = X.detach().double()
    for ours, true in ((mean, exact.mean(-2)), (total, exact.sum(-2))):
        bound = torch.finfo(dtype).eps * true.abs() + 4e-7 * exact.abs().sum(-2)
        assert ours.dtype is dtype and ((ours.double() - true).abs() <= bound).all()
    (dx,) = torch.autograd.grad(copies, x, X.detach())
    assert torch.equal(dx, total.detach())
    for kind, out in (("mean", mean), ("sum", total)):
        (dX,) = torch.autograd.grad(out, X, x.detach())
        assert torch.equal(dX, mhc.readout_backward(x.detach(), n, kind, dtype))
        true = x.detach().double().unsqueeze(-2).expand(X.shape) / (n if kind == "mean" else 1)
        assert torch.allclose(dX.double(), true, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize(
    "given, wanted", [(torch.float32, torch.bfloat16)] * 1 + [(torch.bfloat16, torch.float32)]
)
def test_readout_into_another_dtype_rounds_once(given, wanted):
    X = torch.randn(5, 4, 8).to(given)
    assert torch.equal(mhc.readout(X, "mean", wanted), X.float().mean(-2).to(wanted))


def test_expand_and_readout_can_be_differentiated_twice():
    X = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for kind in readout_ops.KINDS:
        torch.autograd.gradgradcheck(lambda X, k=kind: mhc.readout(X, k, X.dtype).sin(), X)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: mhc.expand(x, 3).cos(), x)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_head_equals_its_formula_in_float64(n, leading):
    operands = head_operands(n=n, leading=leading)
    grads = torch.randn(*leading, 6, dtype=torch.float64), torch.randn(*leading, n).double()
    ours, true = (results(f, operands, grads) for f in (fused_head, open_head))
    for a, b in zip(ours, true, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_head_is_as_exact_as_the_open_form(dtype):
    operands = head_operands(C=40, leading=(9,), dtype=dtype)
    grads = torch.randn(9, 40).to(dtype), torch.randn(9, 4)
    wide = [t.double() for t in operands]
    options = {"n": 4, "width": 40, "eps": EPS, "compute_dtype": torch.float32, "offset": 1e-6}

    def plain(*operands):
        x = reference.head_readout(*operands, dtype=dtype, **options)
        weights = open_head(*(t.float() for t in operands))[1]
        return x, weights

    exact_grads = [g.double() for g in grads]
    true = results(open_head, wide, exact_grads)
    # Gradients of α and b are sums over tokens that cancel: their scale is that of the terms.
    each = [*wide[:2], wide[2].expand(9, 1), wide[3].expand(9, 4)]
    scales = [t.norm() for t in true[:4]]
    scales += [t.abs().sum(0).norm() for t in results(open_head, each, exact_grads)[4:]]
    ours, eager_form = (results(f, operands, grads) for f in (fused_head, plain))
    for a, b, t, scale in zip(ours, eager_form, true, scales, strict=True):
        assert a.dtype == b.dtype
        assert (a - t).norm() <= 2 * (b - t).norm() + 1e-6 * scale


@pytest.mark.parametrize("dtype", IN_CPP_AND_EAGER, ids=str)
def test_gradients_under_autocast_are_those_without(dtype):
    """Of a chain from one stream to n and back, by the head and by the mean."""
    operands = [torch.randn(3, 6).to(dtype), *head_operands(dtype=dtype)[1:]]
    grads = torch.randn(3, 6).to(dtype), torch.randn(3, 4), torch.randn(3, 6).to(dtype)

    def chain(x, *parameters):
        X = mhc.expand(x, 4)
        return *fused_head(X, *parameters), mhc.readout(X, "mean", dtype)

    plain = results(chain, operands, grads)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(chain, operands, grads)
    assert_same(inside, plain)


def test_implementations_agree_on_copies_and_sums():
    X = torch.randn(5, 4, 40)
    cpu = implementation(torch.device("cpu"), torch.float32, 4)
    for kind in readout_ops.KINDS:
        assert torch.allclose(cpu.readout(X, kind), eager.readout(X, kind), rtol=1e-6, atol=1e-6)
        x = X[:, 0].contiguous()
        assert torch.equal(cpu.readout_backward(x, 4, kind), eager.readout_backward(x, 4, kind))
    assert torch.equal(cpu.expand(x, 4), eager.expand(x, 4))


def test_wrong_arguments_raise():
    X, phi, alpha, bias = head_operands(dtype=torch.float32)
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'head'"):
        mhc.readout(X, "head", X.dtype)
    with pytest.raises(ValueError, match=r"mhc::head takes .*got .*\(23, 4\) float32"):
        mhc.head(X, phi[:-1], alpha, bias, EPS, 0.0, X.dtype)
    with pytest.raises(ValueError, match="float64 for float64 X"):
        mhc.head(X.double(), phi, alpha, bias, EPS, 0.0, X.dtype)
