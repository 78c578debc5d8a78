"""RMSNorm in a graph: as a call, written out, or as the root of the mean square alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mhc_compile.passes.graph.norms import rms_norm_of, root_mean_square, spelled_out_rms_norm

from ..open_sites import traced

C, EPS = 6, 1e-3
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def result(function: Callable[[Tensor], Any], x: Tensor) -> fx.Node:
    """The node that a function returns."""
    (node,) = traced(function, [x]).graph.output_node().all_input_nodes
    return node


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
def test_the_default_eps_is_the_one_that_torch_takes(dtype: torch.dtype) -> None:
    """Seen on values so small that eps is most of the mean square."""
    x = (torch.randn(3, C, dtype=FP64) * 1e-5).to(dtype)
    norm = rms_norm_of(result(lambda x: F.rms_norm(x, (C,)), x))
    assert norm is not None and norm.weight is None
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, True) + norm.eps)
    torch.testing.assert_close(F.rms_norm(x, (C,)).double(), exact, rtol=2**-7, atol=0)


CALLS: list[tuple[Callable[[Tensor], Tensor], float | None]] = [
    (lambda x: F.rms_norm(x, [C], None, EPS), EPS),
    (lambda x: F.rms_norm(x, (C,), eps=EPS, weight=None), EPS),
    (lambda x: torch.rms_norm(x, (C,), None, EPS), EPS),
    (lambda x: F.rms_norm(x, (3, C), None, EPS), None),
    (lambda x: F.layer_norm(x, (C,)), None),
]


@pytest.mark.parametrize(("function", "eps"), CALLS)
def test_a_call_over_the_last_axis(function: Callable[[Tensor], Tensor], eps: float | None) -> None:
    norm = rms_norm_of(result(function, torch.randn(2, 3, C)))
    assert (None if norm is None else norm.eps) == eps


ROOTS: list[tuple[Callable[[Tensor], Tensor], bool | None]] = [
    (lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS), True),
    (lambda x: (EPS + x.square().mean([-1], True)) ** -0.5, True),
    (lambda x: torch.sqrt((x * x).mean(dim=2, keepdim=True) + EPS).reciprocal(), True),
    (lambda x: 1.0 / torch.sqrt((x**2.0).mean(-1, True) + EPS), True),
    (lambda x: (x.pow(2).mean(-1, True) + EPS).sqrt(), False),
    (lambda x: (x.pow(2).mean(-1, True) + EPS) ** 0.5, False),
    (lambda x: torch.rsqrt(x.pow(2).mean(-1, True)), None),
    (lambda x: torch.rsqrt(x.pow(3).mean(-1, True) + EPS), None),
    (lambda x: torch.rsqrt((x * x.sin()).mean(-1, True) + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).sum(-1, True) + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).mean(-1) + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).mean(1, True) + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).mean((1, 2), True) + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).mean(-1, True) + x[:1, :1, :1]), None),
    (lambda x: 2 / torch.sqrt(x.pow(2).mean(-1, True) + EPS), None),
    (lambda x: (x.pow(2).mean(-1, True) + EPS).sqrt() ** -0.5, None),
    (lambda x: torch.rsqrt(x.pow(2).mean(-1, True).bfloat16() + EPS), None),
    (lambda x: torch.rsqrt(x.pow(2).mean(-1, True) + EPS).bfloat16(), None),
]


@pytest.mark.parametrize(("function", "inverse"), ROOTS)
def test_the_root_of_the_mean_square(
    function: Callable[[Tensor], Tensor], inverse: bool | None
) -> None:
    found = root_mean_square(result(function, torch.randn(2, 3, C)))
    assert (None if found is None else found[1:]) == (None if inverse is None else (EPS, inverse))


def norm_of(x: Tensor, of: Tensor) -> Tensor:
    return x * torch.rsqrt(of.pow(2).mean(-1, True) + EPS)


WRITTEN_OUT: list[tuple[Callable[[Tensor], Tensor], bool]] = [
    (lambda x: norm_of(x, x), True),
    (lambda x: norm_of(x.double(), x.double()), True),
    (lambda x: norm_of(x.double(), x), False),  # r is rounded to float32
    (lambda x: norm_of(x, x.double()).float(), False),  # the node returned is a cast
    (lambda x: x / torch.sqrt(x.pow(2).mean(-1, True) + EPS), True),
    (lambda x: x * torch.sqrt(x.pow(2).mean(-1, True) + EPS), False),
    (lambda x: x / torch.rsqrt(x.pow(2).mean(-1, True) + EPS), False),
    (lambda x: torch.sqrt(x.pow(2).mean(-1, True) + EPS) / x, False),
    (lambda x: norm_of(x, x + 1), False),
    (lambda x: norm_of(x[:1], x), False),
]


@pytest.mark.parametrize(("function", "is_norm"), WRITTEN_OUT)
def test_a_norm_written_out(function: Callable[[Tensor], Tensor], is_norm: bool) -> None:
    found = spelled_out_rms_norm(result(function, torch.randn(2, 3, C)))
    assert (found is not None) == is_norm
    assert found is None or found[1] == EPS
