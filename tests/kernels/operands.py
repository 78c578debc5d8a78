"""Random sites for the tests of the operators: large, irregular coefficients, perturbed streams."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.kernels.operands import Mapping
from mhc_compile.kernels.variants import VARIANTS, Variant, get_variant

from .sites import strided

EPS = 1e-6
LINEAR_HC = replace(get_variant("hc"), inner="linear")
DESCRIPTIONS = [*(get_variant(name) for name in VARIANTS), LINEAR_HC]


# Of streams on a CPU: float16 is left to eager, which autocast could reach into.
IN_CPP_AND_EAGER = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def variant_of(name: str) -> Variant:
    """The variant of a name, of which `hc_linear` is one more."""
    return LINEAR_HC if name == "hc_linear" else get_variant(name)


def possible(streams: list[int]) -> list[tuple[Variant, int]]:
    """Every variant with every number of streams that it can have."""
    return [
        (variant, n)
        for variant, n in itertools.product(DESCRIPTIONS, streams)
        if variant.res.obstacle(n) is None
    ]


def label(value: object) -> str | None:
    return value.text if isinstance(value, Variant) else None


@dataclass
class Site:
    """The operands of a site's operators."""

    X: Tensor
    f: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.X, self.phi, self.alpha, self.bias)

    def to(self, dtype: torch.dtype) -> "Site":
        """Streams in a dtype, parameters in the dtype that goes with it."""
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        X, f = self.X.to(dtype), self.f.to(dtype)
        return Site(X, f, self.phi.to(exact), self.alpha.to(exact), self.bias.to(exact))

    def requires_grad(self) -> "Site":
        tensors = (self.X, self.f, self.phi, self.alpha, self.bias)
        return Site(*(t.detach().clone().requires_grad_() for t in tensors))


def random_site(variant: Variant, n: int, C: int, leading: tuple[int, ...], seed: int = 0) -> Site:
    """Float64; φ of the size that makes H̃ of order 1."""
    random = torch.Generator().manual_seed(seed)
    columns = sum(variant.columns(n))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    phi = normal(n * C, columns) / (n * C) ** 0.5
    return Site(normal(*leading, n, C), normal(*leading, C), phi, normal(3), normal(columns))


def reversed_in_memory(x: Tensor) -> Tensor:
    """Equal to x, dense, the first axis the fastest."""
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def repeated(x: Tensor) -> Tensor:
    """The first along the first axis, again and again without memory of their own."""
    return x[:1].expand_as(x)


def assert_strides_do_not_matter(operator: Callable[..., Any], operands: Sequence[Any]) -> None:
    """Whatever the memory of the operands is like: the same bits, and contiguous."""
    for layout in (strided, reversed_in_memory, repeated):
        others = [layout(t) if isinstance(t, Tensor) else t for t in operands]
        found = operator(*others)
        assert all(t.is_contiguous() for t in _tensors(found))
        plain = [t.contiguous() if isinstance(t, Tensor) else t for t in others]
        assert_same(found, operator(*plain))
        assert_strides_are_those_of_the_fake(operator, others)


def assert_strides_are_those_of_the_fake(
    operator: Callable[..., Any], operands: Sequence[Any]
) -> None:
    """A graph is traced with fake tensors, and its later views fit only their strides."""
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in operands]
        promised = [t.stride() for t in _tensors(operator(*fakes))]
    assert [t.stride() for t in _tensors(operator(*operands))] == promised


def assert_not_autocast(operator: Callable[..., Any], operands: Sequence[Any]) -> None:
    """The same bits in the same dtypes, whatever autocast does outside."""
    plain = operator(*operands)
    with torch.autocast("cpu", torch.bfloat16):
        inside = operator(*operands)
    assert_same(inside, plain)


def assert_same(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> None:
    for a, b in zip(_tensors(found), _tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _tensors(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results
