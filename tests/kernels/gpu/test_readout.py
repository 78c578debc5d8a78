"""Readout, expand and their backwards as Triton kernels, in the interpreter, against float64."""

import pytest
import torch

from mhc_compile.kernels.gpu import readout

from .. import sites
from ..sites import assert_near, normal, strided

KINDS = ("mean", "sum")


def assert_sum_of_streams(x, X, scale=1.0):
    exact = X.double()
    assert_near(x, scale * exact.sum(1), scale * exact.abs().sum(1))


def assert_copies(X, x, scale=1.0):
    exact = scale * x.double().unsqueeze(1).expand(X.shape)
    assert_near(X, exact, exact.abs())


@pytest.mark.parametrize("T, C", sites.SHAPES)
@pytest.mark.parametrize("n", [1, *sites.STREAMS])
@pytest.mark.parametrize("dtype", [*sites.DTYPES, torch.float64])
def test_equals_float64_truth(interpreted, dtype, n, T, C):
    X, x = normal(T, n, C, dtype=dtype), normal(T, C, dtype=dtype)
    mean, total, *copies = interpreted(all_four, X, x, n)
    assert_sum_of_streams(mean, X, 1 / n)
    assert_sum_of_streams(total, X)
    assert torch.equal(copies[0], x.unsqueeze(1).expand(T, n, C))
    assert_copies(copies[1], x, 1 / n)
    assert all(result.dtype == dtype for result in (mean, total, *copies))


def all_four(X, x, n):
    """Every function once; backward of `sum` is expand, that of expand is `sum`."""
    return (
        readout.readout(X, "mean"),
        readout.readout(X, "sum"),
        readout.expand(x, n),
        readout.readout_backward(x, n, "mean"),
    )


def test_backwards_are_each_others_forwards(interpreted):
    X, x = normal(7, 4, 40, dtype=torch.bfloat16), normal(7, 40, dtype=torch.bfloat16)
    assert torch.equal(
        interpreted(readout.readout_backward, x, 4, "sum"), interpreted(readout.expand, x, 4)
    )
    assert torch.equal(
        interpreted(readout.expand_backward, X), interpreted(readout.readout, X, "sum")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides_give_the_same_bits(interpreted, kind):
    X = normal(7, 4, 40, dtype=torch.bfloat16)
    expected = interpreted(readout.readout, X, kind)
    assert torch.equal(interpreted(readout.readout, strided(X), kind), expected)


def test_nan_stays_in_its_token(interpreted):
    X = normal(9, 4, 40, dtype=torch.float32)
    X[4, 1, 7] = float("nan")
    x = interpreted(readout.readout, X, "mean")
    assert x.isnan().nonzero().tolist() == [[4, 7]]


def test_unknown_kind_raises():
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'head'"):
        readout.readout(torch.zeros(1, 2, 8), "head")
