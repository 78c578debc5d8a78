"""x⃗ φ, its gradients and sums of their parts as Triton kernels, against float64 truth."""

import pytest
import torch

from mhc_compile.kernels.gpu import projection, sums, tuning

from ..sites import normal

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = [BF16, F16, F32]

ERROR = {BF16: 1e-5, F16: 1e-5, F32: 5e-7}
"""Relative to Σ |x φ|: for streams of 16 bits φ is two bfloat16 terms."""


def assert_product(actual, terms, *factors):
    dtype = factors[0].dtype
    exact = torch.einsum(terms, *(factor.double() for factor in factors))
    sizes = torch.einsum(terms, *(factor.double().abs() for factor in factors))
    assert actual.shape == exact.shape and actual.dtype == F32
    assert ((actual.double() - exact).abs() <= ERROR[dtype] * sizes).all()


def operands(T, n, C, columns, dtype):
    return normal(T, n, C, dtype=dtype), normal(n * C, columns, dtype=F32)


@pytest.mark.parametrize(
    "dtype, T, n, C, columns",
    [(dtype, 5, 3, 40, 15) for dtype in DTYPES]
    + [(BF16, 65, 2, 13, 8), (F32, 1, 2, 600, 8), (BF16, 3, 10, 8, 120), (F16, 0, 4, 40, 24)],
)
def test_projection_equals_float64_truth(interpreted, dtype, T, n, C, columns):
    """600 channels are two splits: their parts are to be added."""
    X, phi = operands(T, n, C, columns, dtype)
    y_parts, square_parts = interpreted(projection.project, X, phi)
    cut = tuning.config(n, C, columns, dtype)
    assert y_parts.shape == (cut.splits, T, columns) and square_parts.shape == (cut.splits, T)
    assert cut.splits == (2 if C == 600 else 1)
    assert_product(y_parts.sum(0), "tk,kc->tc", X.flatten(1), phi)
    exact = X.double().square().sum((1, 2))
    torch.testing.assert_close(square_parts.sum(0).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_two_terms_of_phi_are_better_than_one(interpreted, dtype):
    """Streams of 16 bits are exact in the product: the error is that of φ."""
    X, phi = operands(4, 2, 256, 8, dtype)
    y = interpreted(projection.project, X, phi)[0].sum(0)
    exact = X.double().flatten(1) @ phi.double()
    one_term = X.double().flatten(1) @ phi.to(BF16).double()
    assert (y - exact).abs().max() < 0.02 * (one_term - exact).abs().max()


@pytest.mark.parametrize(
    "dtype, T, n, C",
    [(BF16, 37, 4, 40), (F16, 7, 3, 13), (F32, 19, 2, 72), (BF16, 5, 8, 40), (F32, 3, 8, 8)],
)
def test_gradients_equal_float64_truth(interpreted, dtype, T, n, C):
    columns = n * n + 2 * n
    X, phi = operands(T, n, C, columns, dtype)
    dy, norm_grad = normal(T, columns, dtype=F32), normal(T, dtype=F32)
    dh, H_pre = normal(T, C, dtype=dtype), normal(T, n, dtype=F32)
    partial = normal(T, n, C, dtype=dtype)
    more = {"dh": dh, "H_pre": H_pre, "partial": partial}
    dX, parts = interpreted(projection.gradients, X, phi, dy, norm_grad, **more, dtype=F32)
    assert_product(parts.sum(0), "tk,tc->kc", X.flatten(1), dy)
    exact = (dy.double() @ phi.double().mT).view(X.shape)
    exact += norm_grad.double()[:, None, None] * X.double() + partial.double()
    exact += H_pre.double().unsqueeze(2) * dh.double().unsqueeze(1)
    sizes = (dy.abs() @ phi.abs().mT).view(X.shape)
    assert ((dX - exact).abs() <= ERROR[dtype] * (sizes + exact.abs() + 8)).all()
    rounded, same = interpreted(projection.gradients, X, phi, dy, norm_grad, **more)
    assert torch.equal(rounded, dX.to(dtype)) and torch.equal(same, parts)


def test_every_slot_has_its_tokens(interpreted):
    """Parts of dφ are sums over ranges of tokens that only their number decides."""
    T, n, C = 330, 2, 8
    X, phi = operands(T, n, C, 8, BF16)
    dy = normal(T, 8, dtype=F32)
    _, parts = interpreted(projection.gradients, X, phi, dy, torch.zeros(T))
    cut = tuning.slots(T, n, C, 8, BF16)
    assert cut.slots == len(parts) > 1
    for slot, part in enumerate(parts):
        own = slice(slot * cut.size, (slot + 1) * cut.size)
        assert_product(part, "tk,tc->kc", X[own].flatten(1), dy[own])


def test_slots_are_at_most_eight():
    for T in (0, 1, 31, 1000, 100_003):
        cut = tuning.slots(T, 4, 2560, 24, BF16)
        assert cut.slots <= 8 and cut.slots * cut.size >= T > (cut.slots - 1) * cut.size - 1


@pytest.mark.parametrize("slots, programs, columns", [(1, 1, 8), (8, 67, 24), (0, 0, 15)])
def test_sums_of_parameters(interpreted, slots, programs, columns):
    widths = {8: (2, 2, 4), 24: (4, 4, 16), 15: (3, 3, 9)}[columns]
    parts = torch.randn(slots, 50, columns)
    chain_sums = torch.randn(programs, 2, columns)
    dphi, dalpha, dbias = interpreted(sums.parameters, parts, chain_sums, widths)
    exact = chain_sums.double().sum(0)
    groups = torch.stack([group.sum() for group in exact[1].split(widths)])
    for actual, expected in ((dphi, parts.double().sum(0)), (dbias, exact[0]), (dalpha, groups)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("n, T", [(4, 70), (3, 5), (2, 0)])
def test_sums_of_tokens(interpreted, n, T):
    parts = torch.randn(3, n * n + n, T)
    dH_res, dH_post = interpreted(sums.tokens, parts, n)
    total = (parts[0] + parts[1] + parts[2]).mT  # in this order
    assert torch.equal(dH_res, total[:, : n * n].unflatten(1, (n, n)))
    assert torch.equal(dH_post, total[:, n * n :])


def test_what_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"float32 streams, got torch\.float64"):
        tuning.config(4, 64, 24, torch.float64)
    with pytest.raises(ValueError, match=r"up to 128 columns of φ, got 143 \(n=11\)"):
        tuning.slots(5, 11, 64, 143, BF16)
