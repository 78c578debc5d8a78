"""The mhc:: operators: values and gradients against float64 truth, and their manners."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.library import opcheck

from mhc_compile.kernels import reference
from mhc_compile.kernels.ops import basic as ops

from .. import truth
from ..operands import assert_strides_are_those_of_the_fake, repeated, reversed_in_memory
from ..sites import strided

sinkhorn_knopp = torch.ops.mhc.sinkhorn_knopp
sinkhorn_knopp_backward = torch.ops.mhc.sinkhorn_knopp_backward
matmul = torch.ops.mhc.matmul

BOTH_FORMS = pytest.mark.parametrize("eps", [0.0, 1e-6], ids=["paper", "v4"])


def true_sinkhorn(logits: torch.Tensor, iters: int, eps: float) -> np.ndarray:
    matrices = logits.detach().double().numpy().reshape(-1, *logits.shape[-2:])
    if eps:
        by_token = [truth.sinkhorn_v4(m.T, iters).T for m in matrices]
    else:
        by_token = [truth.sinkhorn(m, iters) for m in matrices]
    return np.stack(by_token).reshape(logits.shape)


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.abs(actual.detach().double().numpy() - expected).max())


# --- Sinkhorn-Knopp: values -------------------------------------------------------------------


def test_one_iteration_by_hand():
    """Columns first, then rows: exp(logits) = [[1, 2], [3, 1]] has column sums 4 and 3."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64).log()
    columns = np.array([[1 / 4, 2 / 3], [3 / 4, 1 / 3]])
    expected = np.array([[3 / 11, 8 / 11], [9 / 13, 4 / 13]])
    assert np.allclose(columns / columns.sum(1, keepdims=True), expected, atol=1e-15)
    assert error(sinkhorn_knopp(logits, 1), expected) < 1e-15
    rows_first = sinkhorn_knopp(logits.T, 1).T
    assert error(rows_first, expected) > 0.03


@BOTH_FORMS
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_equals_float64_truth(n, iters, eps):
    logits = 2 * torch.randn(3, n, n, dtype=torch.float64)
    expected = true_sinkhorn(logits, iters, eps)
    assert error(sinkhorn_knopp(logits, iters, eps), expected) < 1e-14
    assert error(sinkhorn_knopp(logits.float(), iters, eps), expected) < 1e-6
    if n > 1:
        transposed = sinkhorn_knopp(logits.mT, iters, eps)
        assert error(transposed, expected) > 1e-2
        # Rows before columns has the same limit: the order shows while that is far.
        assert iters > 2 or error(transposed.mT, expected) > 1e-3


@BOTH_FORMS
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e3, 1e4])
def test_logits_of_any_size_survive_in_float32(scale, eps):
    logits = (scale * torch.randn(40, 4, 4)).requires_grad_()
    result = sinkhorn_knopp(logits, 20, eps)
    grad = torch.randn_like(result)
    result.backward(grad)

    # A logit of this size is known to half a unit in its last place, 2^-24 of it: no float32
    # algorithm can be expected to be closer than what that changes.
    tolerance = 1e-6 + scale * 2**-24
    assert error(result, true_sinkhorn(logits, 20, eps)) < tolerance
    exact = logits.detach().double().requires_grad_()
    reference.sinkhorn_knopp(exact, 20, eps).backward(grad.double())
    assert error(logits.grad, exact.grad.numpy()) < 4 * tolerance


def test_subtracting_the_maximum_would_not_survive():
    """The reason for the log domain: a whole row vanishes next to its columns' maxima."""
    logits = torch.tensor([[0.0, 0.0], [200.0, 300.0]])
    naive = (logits - logits.amax()).exp()
    naive = naive / naive.sum(-2, keepdim=True)
    assert (naive / naive.sum(-1, keepdim=True)).isnan().any()
    expected = truth.sinkhorn(logits.numpy(), 20)
    assert error(sinkhorn_knopp(logits, 20), expected) < 1e-6


def test_rows_are_exact_and_columns_approach_with_the_iterations():
    logits = 3 * torch.randn(200, 4, 4, dtype=torch.float64)
    errors = []
    for iters in (1, 2, 5, 20, 400):
        matrix = sinkhorn_knopp(logits, iters)
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(-1), torch.ones(200, 4).double(), rtol=0, atol=1e-14)
        errors.append((matrix.sum(-2) - 1).abs().sum(-1))
    # The summed column error never grows (true token by token), and is far from 0 at 20.
    assert all((late <= early + 1e-13).all() for early, late in pairwise(errors))
    assert errors[0].max() > 0.1
    assert errors[3].max() > 1e-3
    assert errors[4].median() < 1e-9


def test_a_fixed_point_stays():
    """6I - 3, the initial bias, is doubly stochastic after one iteration already."""
    for n in (2, 3, 4, 8):
        logits = 6 * torch.eye(n, dtype=torch.float64) - 3
        one, twenty = sinkhorn_knopp(logits, 1), sinkhorn_knopp(logits, 20)
        torch.testing.assert_close(one, twenty, rtol=0, atol=1e-15)
        torch.testing.assert_close(twenty.sum(-2), torch.ones(n).double(), rtol=0, atol=1e-15)


def test_constants_added_to_columns_do_not_matter_and_to_rows_do():
    """True for any number of iterations because columns are normalised first."""
    logits, shift = torch.randn(5, 4, 4).double(), torch.randn(5, 4).double()
    result = sinkhorn_knopp(logits, 3)
    of_columns = sinkhorn_knopp(logits + shift.unsqueeze(-2), 3)
    of_rows = sinkhorn_knopp(logits + shift.unsqueeze(-1), 3)
    torch.testing.assert_close(of_columns, result, rtol=0, atol=1e-14)
    assert (of_rows - result).abs().max() > 1e-4


# --- Sinkhorn-Knopp: gradients ----------------------------------------------------------------


@BOTH_FORMS
@pytest.mark.parametrize(
    ("n", "iters"), [(1, 20), (2, 1), (2, 20), (3, 2), (3, 20), (4, 5), (8, 3)]
)
def test_gradcheck(n, iters, eps):
    logits = torch.randn(2, n, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: sinkhorn_knopp(x, iters, eps), logits, fast_mode=n > 4
    )


@BOTH_FORMS
def test_gradient_is_that_of_the_finite_iteration(eps):
    """Central differences of the truth; the formula for the limit would be far off."""
    logits = 3 * torch.randn(1, 3, 3, dtype=torch.float64)
    weights = torch.randn(1, 3, 3, dtype=torch.float64)
    step, expected = 1e-5, np.zeros((1, 3, 3))
    for i in range(3):
        for j in range(3):
            moved = [logits.clone(), logits.clone()]
            moved[0][0, i, j] += step
            moved[1][0, i, j] -= step
            up, down = (float((true_sinkhorn(m, 4, eps) * weights.numpy()).sum()) for m in moved)
            expected[0, i, j] = (up - down) / (2 * step)
    actual = sinkhorn_knopp_backward(weights, logits, 4, eps)
    assert error(actual, expected) < 1e-9
    assert error(sinkhorn_knopp_backward(weights, logits, 400, eps), expected) > 1e-3


@BOTH_FORMS
def test_gradient_in_float32_is_as_close_as_autograd_of_the_iteration(eps):
    logits, grad = 3 * torch.randn(500, 4, 4), torch.randn(500, 4, 4)

    def by_autograd(x):
        x = x.clone().requires_grad_()
        reference.sinkhorn_knopp(x, 20, eps).backward(grad.to(x.dtype))
        return x.grad

    expected = by_autograd(logits.double()).numpy()
    ours = error(sinkhorn_knopp_backward(grad, logits, 20, eps), expected)
    assert ours < 2 * error(by_autograd(logits), expected) < 1e-5


def test_few_tokens_at_a_time_give_the_same_gradient(monkeypatch):
    logits, grad = torch.randn(2, 7, 4, 4), torch.randn(2, 7, 4, 4)
    whole = sinkhorn_knopp_backward(grad, logits, 20)
    for elements in (1, 3 * 2 * 20 * 16):  # one and three tokens
        monkeypatch.setattr(ops, "_HISTORY_ELEMENTS", elements)
        torch.testing.assert_close(
            sinkhorn_knopp_backward(grad, logits, 20), whole, rtol=1e-5, atol=1e-7
        )


def test_double_backward_raises_and_says_of_what():
    logits = torch.randn(4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sinkhorn_knopp(logits, 20).square().sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward through mhc::sinkhorn_knopp"):
        grad.sum().backward()


# --- manners of every operator ------------------------------------------------------------------

SHAPES = [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)]


@BOTH_FORMS
@pytest.mark.parametrize("lead", SHAPES)
def test_any_leading_dimensions(lead, eps):
    logits = torch.randn(*lead, 4, 4, requires_grad=True)
    result = sinkhorn_knopp(logits, 20, eps)
    assert result.shape == logits.shape
    result.backward(torch.ones_like(result))
    assert logits.grad.shape == logits.shape
    torch.testing.assert_close(result, reference.sinkhorn_knopp(logits, 20, eps))


@pytest.mark.parametrize("n", [1, 4])
def test_any_strides_and_arguments_are_left_alone(n):
    base = torch.randn(n, 6, n, 2).movedim(1, 0)[::2].transpose(0, 3)[1].permute(2, 0, 1)
    grad = torch.randn(n, n, 3).permute(2, 0, 1)
    assert base.shape == (3, n, n)
    copies = base.clone(), grad.clone()
    result = sinkhorn_knopp(base, 20)
    backward = sinkhorn_knopp_backward(grad, base, 20)
    assert result.is_contiguous()
    assert backward.is_contiguous()
    assert torch.equal(result, sinkhorn_knopp(base.contiguous(), 20))
    assert torch.equal(backward, sinkhorn_knopp_backward(grad.contiguous(), base.contiguous(), 20))
    assert torch.equal(base, copies[0])
    assert torch.equal(grad, copies[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [strided, reversed_in_memory, repeated])
def test_strides_of_matmul_are_those_of_the_fake(layout, dtype):
    a, b, c, d = (
        layout(torch.randn(shape, dtype=dtype))
        for shape in [(2, 5, 3), (3, 4), (2, 3, 5), (2, 5, 4)]
    )
    assert_strides_are_those_of_the_fake(matmul, (a, b))
    assert_strides_are_those_of_the_fake(matmul, (c, d))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_float32(dtype):
    logits = (3 * torch.randn(50, 4, 4)).to(dtype)
    grad = torch.randn(50, 4, 4).to(dtype)
    assert torch.equal(sinkhorn_knopp(logits, 20), sinkhorn_knopp(logits.float(), 20).to(dtype))
    assert torch.equal(
        sinkhorn_knopp_backward(grad, logits, 20),
        sinkhorn_knopp_backward(grad.float(), logits.float(), 20).to(dtype),
    )


@BOTH_FORMS
def test_not_a_number_stays_in_its_token(eps):
    logits, grad = torch.randn(9, 4, 4), torch.randn(9, 4, 4)
    clean = sinkhorn_knopp(logits, 20, eps), sinkhorn_knopp_backward(grad, logits, 20, eps)
    logits[4, 1, 2] = float("nan")
    dirty = sinkhorn_knopp(logits, 20, eps), sinkhorn_knopp_backward(grad, logits, 20, eps)
    others = torch.arange(9) != 4
    for before, after in zip(clean, dirty, strict=True):
        assert after[4].isnan().any()
        torch.testing.assert_close(after[others], before[others], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sinkhorn_knopp(torch.randn(2, 3, 4), 20), r"\[..., n, n\].*\(2, 3, 4\)"),
        (lambda: sinkhorn_knopp(torch.randn(4), 20), "n, n"),
        (lambda: sinkhorn_knopp(torch.randn(2, 0, 0), 20), "n >= 1"),
        (lambda: sinkhorn_knopp(torch.ones(4, 4, dtype=torch.long), 20), "int64"),
        (lambda: sinkhorn_knopp(torch.randn(4, 4), 0), "iters >= 1, got 0"),
        (lambda: sinkhorn_knopp(torch.randn(4, 4), 20, -1.0), "eps >= 0"),
        (lambda: sinkhorn_knopp_backward(torch.randn(3, 3), torch.randn(4, 4), 20), "one shape"),
        (lambda: matmul(torch.randn(2, 3), torch.randn(2, 3)), "mhc::matmul takes"),
        (lambda: matmul(torch.randn(2, 3, 3), torch.randn(4, 3, 3)), "equal leading"),
        (lambda: matmul(torch.randn(3), torch.randn(3)), "mhc::matmul takes"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_arguments_are_refused_before_anything_is_computed(call, message, device):
    with torch.device(device), pytest.raises(ValueError, match=message):
        call()


@BOTH_FORMS
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 2, 2), (0, 4, 4), (5, 1, 1)])
def test_opcheck_sinkhorn(shape, eps):
    logits = torch.randn(shape, requires_grad=True)
    opcheck(sinkhorn_knopp.default, (logits, 5, eps))
    # Without gradients: asked to differentiate it, opcheck would find that it raises.
    plain = logits.detach(), torch.randn(shape).transpose(-1, -2)
    opcheck(sinkhorn_knopp_backward.default, (*plain, 5, eps))


@pytest.mark.parametrize(
    ("a", "b"), [((3,), (3, 2)), ((2, 5, 3), (3, 2)), ((2, 0, 3), (3, 2)), ((2, 5, 3), (2, 3, 4))]
)
def test_opcheck_matmul(a, b):
    arguments = (torch.randn(a, requires_grad=True), torch.randn(b, requires_grad=True))
    opcheck(matmul.default, arguments)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3,), (3, 2)),
        ((5, 3), (3, 2)),
        ((2, 5, 3), (3, 2)),
        ((0, 5, 3), (3, 2)),
        ((2, 4, 5, 3), (2, 4, 3, 7)),
        ((0, 4, 4), (0, 4, 6)),
    ],
)
def test_matmul_equals_torch_in_value_and_gradients(a, b):
    ours = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in (a, b)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    result, expected = matmul(*ours), torch.matmul(*theirs)
    grad = torch.randn_like(expected)
    result.backward(grad)
    expected.backward(grad)
    for x, y in [
        (result, expected),
        *((o.grad, t.grad) for o, t in zip(ours, theirs, strict=True)),
    ]:
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


def test_autocast_lowers_none_of_them():
    a, b = torch.randn(2, 5, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4)
    expected = matmul(sinkhorn_knopp(a, 20), b)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), a)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16  # what they are there to avoid
        result = matmul(sinkhorn_knopp(a, 20), b)
        (grad,) = torch.autograd.grad(result.square().sum(), a)
    assert torch.equal(result, expected)
    assert torch.equal(grad, expected_grad)


def test_one_graph_for_every_number_of_tokens_under_aot_autograd():
    torch._dynamo.reset()
    seen = []

    def backend(gm, example_inputs):
        seen.append([n.target for n in gm.graph.nodes if n.op == "call_function"])
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(logits, x):
        return torch.ops.mhc.matmul(torch.ops.mhc.sinkhorn_knopp(logits, 20), x)

    for tokens in (3, 5, 8):
        plain = [torch.randn(tokens, 4, 4, requires_grad=True), torch.randn(tokens, 4, 6)]
        traced = [plain[0].detach().clone().requires_grad_(), plain[1]]
        expected = matmul(sinkhorn_knopp(plain[0], 20), plain[1])
        result = compiled(*traced)
        assert torch.equal(result, expected)
        result.square().sum().backward()
        expected.square().sum().backward()
        assert torch.equal(traced[0].grad, plain[0].grad)
    assert len(seen) == 1
