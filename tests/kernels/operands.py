"""Random sites for the tests of the operators: large, irregular coefficients, perturbed streams."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mhc_compile.kernels.variants import VARIANTS, Variant, get_variant

EPS = 1e-6
LINEAR_HC = replace(get_variant("hc"), inner="linear")
DESCRIPTIONS = [*(get_variant(name) for name in VARIANTS), LINEAR_HC]


def variant_of(name: str) -> Variant:
    """The variant of a name, of which `hc_linear` is one more."""
    return LINEAR_HC if name == "hc_linear" else get_variant(name)


def possible(streams: list[int]) -> list[tuple[Variant, int]]:
    """Every variant with every number of streams that it can have."""
    return [
        (variant, n)
        for variant, n in itertools.product(DESCRIPTIONS, streams)
        if not (variant.residual == "permutations" and n > 4)
        and not (variant.residual == "kronecker" and n & (n - 1))
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
    def mapping(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.X, self.phi, self.alpha, self.bias

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
