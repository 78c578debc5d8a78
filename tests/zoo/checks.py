"""Running a model and comparing two runs; used by the tests and by benchmarks/zoo.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LEAVES, PARTS = ("phi", "alpha", "bias"), ("pre", "post", "res")
GROUPS = tuple(f"{leaf}_{part}" for leaf in LEAVES for part in PARTS)
NEGLIGIBLE = 1e-12
"""A float64 gradient below this, relative to the model's largest, is rounding."""


@dataclass(frozen=True)
class Run:
    """One forward and backward: outputs in order, gradients and buffers by name, detached."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def tensors(outputs: Any) -> list[Tensor]:
    """The floating-point tensors in any structure a model returns, in order."""
    leaves = pytree.tree_leaves(outputs)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A loss that weighs every entry of every output differently."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o.shape, dtype=torch.float64, generator=generator) for o in outputs]
    return sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))


def gradients_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of the gradients, zero where a parameter was not reached."""
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in parameters}


def run(model: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> Run:
    """Forward and backward of `loss_of` from the given random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = tensors(model(**inputs))
    loss_of(outputs).backward()
    return Run(
        [o.detach().clone() for o in outputs],
        gradients_of(model.named_parameters()),
        {k: b.clone() for k, b in model.named_buffers()},
    )


def error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def output_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The worst relative error of an output."""
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


def gradient_errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[float]:
    """The relative error of every gradient in `expected`.

    A gradient that vanishes (the bias of attention keys) has no relative error: norms below a
    hundredth of the largest count as that.
    """
    floor = max(e.double().norm() for e in expected.values()) / 100
    return [
        ((actual[k].double() - e.double()).norm() / e.double().norm().clamp_min(floor)).item()
        for k, e in expected.items()
    ]


def gradient_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The worst relative error of a gradient in `expected`, and of all of them as one vector."""
    flat = [torch.cat([g[k].flatten() for k in expected]) for g in (actual, expected)]
    return max(*gradient_errors(actual, expected), error(*flat))


# ------------------------------------------------------------------------------- mHC parameters

_KEY = re.compile(r"(?:(?P<owner>.+)\.)?mhc\.(?P<branch>[^.]+)\.(?P<leaf>phi|alpha|bias)")


def connections(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter, nn.Parameter]]:
    """(phi, alpha, bias) of every site by the site's name, owner path + branch."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for key, parameter in model.named_parameters():
        if match := _KEY.fullmatch(key):
            name = ".".join(part for part in (match["owner"], match["branch"]) if part)
            found.setdefault(name, {})[match["leaf"]] = parameter
    return {name: (p["phi"], p["alpha"], p["bias"]) for name, p in found.items()}


def split_groups(phi: Tensor, alpha: Tensor, bias: Tensor, n: int) -> dict[str, Tensor]:
    """The nine groups of a site's parameters (or of their gradients), by name."""
    sizes = [n, n, n * n]
    parts = (*phi.split(sizes, dim=-1), *alpha, *bias.split(sizes))
    return dict(zip(GROUPS, parts, strict=True))


def gradient_norms(model: nn.Module, n: int) -> dict[str, dict[str, float]]:
    """Norm of the gradient of every group of every site, relative to the largest of the model."""
    norms = {
        name: {
            group: 0.0 if g is None else g.norm().item()
            for group, g in split_groups(*(p.grad for p in site), n).items()
        }
        for name, site in connections(model).items()
    }
    largest = max(norm for groups in norms.values() for norm in groups.values())
    return {name: {k: v / largest for k, v in groups.items()} for name, groups in norms.items()}


@torch.no_grad()
def perturb(model: nn.Module, sigma: float = 0.5) -> None:
    """Add normal noise to every mHC parameter, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    for site in connections(model).values():
        for p in site:
            p += sigma * torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def spread(X: Tensor) -> float:
    """How far the streams `X [..., n, C]` are from their mean, relative to their size."""
    return ((X - X.mean(-2, keepdim=True)).norm() / X.norm()).item()
