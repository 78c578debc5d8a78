"""Tensors of a site for tests of kernels, and what float64 makes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

STREAMS = [2, 3, 4, 8]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

SHAPES = [(0, 40), (1, 8), (3, 264), (7, 40), (35, 8), (5, 13)]
"""(T, C): no token, several blocks of channels, several tokens a program, an odd C."""


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class Site:
    """Inputs of the operators of a site and gradients of their outputs."""

    H_res: Tensor
    H_post: Tensor
    H_pre: Tensor
    X: Tensor
    f: Tensor
    dX2: Tensor
    dh: Tensor

    @classmethod
    def random(cls, T: int, n: int, C: int, dtype: torch.dtype) -> "Site":
        K = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            H_res=normal(T, n, n, dtype=K),
            H_post=normal(T, n, dtype=K),
            H_pre=normal(T, n, dtype=K),
            X=normal(T, n, C, dtype=dtype),
            f=normal(T, C, dtype=dtype),
            dX2=normal(T, n, C, dtype=dtype),
            dh=normal(T, C, dtype=dtype),
        )


def assert_sum(actual: Tensor, terms: str, *factors: Tensor) -> None:
    """`actual` is the einsum of the factors: rounded once, and not far from exact before that.

    The bound is rigorous: half a unit in the last place of the result, and a few roundings of
    the accumulating dtype relative to the sum of absolute values.
    """
    exact = torch.einsum(terms, *(factor.double() for factor in factors))
    sizes = torch.einsum(terms, *(factor.double().abs() for factor in factors))
    assert_near(actual, exact, sizes)


def assert_near(actual: Tensor, exact: Tensor, sizes: Tensor) -> None:
    """|actual − exact| is half a unit in its last place, and some float32 roundings of `sizes`."""
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    accumulating = torch.float64 if actual.dtype == torch.float64 else torch.float32
    info = torch.finfo(actual.dtype)
    rounding = 0.5 * info.eps * exact.abs() + info.smallest_normal * info.eps
    bound = 1.01 * rounding + 16 * torch.finfo(accumulating).eps * sizes
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"error {error.max():.2e}, {(error / bound).max():.2f} x bound"


def strided(x: Tensor) -> Tensor:
    """Equal to x, with gaps and another order in memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    view = wide.transpose(0, -1).contiguous().transpose(0, -1)[..., ::2]
    view.copy_(x)
    assert view.numel() < 2 or not view.is_contiguous()
    return view
