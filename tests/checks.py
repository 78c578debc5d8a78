"""Running a model, comparing two runs, and the one comparison with the plain model that counts.

Used by the tests and by benchmarks/zoo.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mhc_compile
from mhc_compile.model.connection import Connection, StreamParameters

Inputs = Mapping[str, Any] | tuple[Any, ...]
"""The keyword arguments, or the positional ones, of a call."""

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


def outputs_of(model: Callable[..., Any], inputs: Inputs, seed: int = 0) -> list[Tensor]:
    """The outputs of a call from the given random state, with their graph."""
    torch.manual_seed(seed)
    keywords = isinstance(inputs, Mapping)
    return tensors(model(**inputs) if keywords else model(*inputs))


def run(
    model: nn.Module,
    inputs: Inputs,
    seed: int = 0,
    called: Callable[..., Any] | None = None,
) -> Run:
    """Forward and backward of `loss_of` from the given random state.

    Args:
        called: what is called in the model's place, such as a compiled or wrapped model.
    """
    model.zero_grad(set_to_none=True)
    outputs = outputs_of(model if called is None else called, inputs, seed)
    loss = loss_of(outputs)
    if loss.requires_grad:  # a model without mHC parameters may be frozen
        loss.backward()
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


def split_groups(phi: Tensor, alpha: Tensor, bias: Tensor, sizes: list[int]) -> dict[str, Tensor]:
    """The nine groups of a site's parameters (or of their gradients), by name.

    Args:
        sizes: how many columns of phi belong to pre, post and res.
    """
    parts = (*phi.split(sizes, dim=-1), *alpha, *bias.split(sizes))
    return dict(zip(GROUPS, parts, strict=True))


def groups_of(module: StreamParameters) -> dict[str, Tensor]:
    """The gradients of the parameters of a site by group, of a readout by leaf."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    if not isinstance(module, Connection):
        return dict(zip(LEAVES, gradients, strict=True))
    columns = module.config.variant_object.columns(module.config.n)
    groups = split_groups(*gradients, list(columns))
    # A part without numbers, as H_res of the variant `identity`, has nothing to learn.
    without = {part for part, size in zip(PARTS, columns, strict=True) if size == 0}
    return {name: g for name, g in groups.items() if name.rpartition("_")[2] not in without}


def gradient_norms(model: nn.Module) -> dict[str, dict[str, float]]:
    """Norm of the gradient of every group of every site, relative to the largest of the model."""
    modules = {
        name.replace("mhc.", "", 1) if name.startswith("mhc.") else name.replace(".mhc.", "."): m
        for name, m in model.named_modules()
        if isinstance(m, StreamParameters)
    }
    norms = {
        name: {group: g.double().norm().item() for group, g in groups_of(module).items()}
        for name, module in modules.items()
    }
    largest = max(norm for groups in norms.values() for norm in groups.values())
    assert largest > 0, "no mHC parameter has a gradient"
    return {name: {k: v / largest for k, v in groups.items()} for name, groups in norms.items()}


@torch.no_grad()
def perturb(model: nn.Module, sigma: float = 0.5) -> None:
    """Add normal noise to every mHC parameter, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    for site in connections(model).values():
        for p in site:
            p += sigma * torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Gives the mHC parameters their values back."""
    before = [(p, p.detach().clone()) for p in mhc_compile.parameters(model)]
    yield
    with torch.no_grad():
        for parameter, value in before:
            parameter.copy_(value)


def spread(X: Tensor) -> float:
    """How far the streams `X [..., n, C]` are from their mean, relative to their size."""
    return ((X - X.mean(-2, keepdim=True)).norm() / X.norm()).item()


# ------------------------------------------------------------------- comparing with the plain model


def assert_same(actual: Run, expected: Run, outputs: float, gradients: float) -> None:
    """Outputs, gradients of all parameters in `expected` and buffers (BatchNorm's) agree."""
    assert output_error(actual.outputs, expected.outputs) <= outputs
    if any(g.any() for g in expected.gradients.values()):  # not all parameters are frozen
        assert gradient_error(actual.gradients, expected.gradients) <= gradients
    for name, buffer in expected.buffers.items():
        torch.testing.assert_close(
            actual.buffers[name], buffer, rtol=10 * outputs, atol=10 * outputs
        )


def sites_of(model: nn.Module) -> list[Any]:
    """Each site as it stands in the graph that was captured last of those that have it."""
    found: dict[str, Any] = {}
    for graph in mhc_compile.graphs(model):  # of one call there may be several: in front, behind
        for site in graph.sites:
            found.pop(site.name, None)
            found[site.name] = site
    return list(found.values())


def firsts(model: nn.Module) -> set[str]:
    """Names of the sites at which a chain begins, as the model names them.

    A graph names them from the module that was called, which a wrapper may hold.
    """
    first = {site.name for site in sites_of(model) if site.previous is None}
    return {n for n in connections(model) if any(n == f or n.endswith(f".{f}") for f in first)}


def leaves_equal_streams_equal(config: mhc_compile.Config) -> bool:
    """Whether the rows of any H_res sum to 1: not if it is free, or off by an eps."""
    n, res = config.n, config.variant_object.res
    if not res.columns(n):
        return True
    x = torch.linspace(-1, 1, res.columns(n), dtype=torch.float64)
    return bool((res.forward(x, n).sum(-1) - 1).abs().max() < 1e-12)


def assert_learning(model: nn.Module, idle: Callable[[str, str], bool]) -> None:
    """Every group of every site has a gradient, except those that `idle(site, group)` names.

    Those have none, which only float64 can tell from rounding, and only where H_res leaves equal
    streams equal.
    """
    exact = all(p.dtype is torch.float64 for p in model.parameters())
    configs = {m.config for m in model.modules() if isinstance(m, StreamParameters)}
    exact = exact and all(map(leaves_equal_streams_equal, configs))
    for name, norms in gradient_norms(model).items():
        for group, norm in norms.items():
            if idle(name, group):
                assert norm <= NEGLIGIBLE or not exact, (name, group, norm)
            else:
                assert norm > NEGLIGIBLE, (name, group, norm)


@dataclass(frozen=True)
class Compared:
    """The runs of one comparison: the plain model, the transformed one at first, and perturbed."""

    plain: Run
    start: Run
    perturbed: Run


@torch.enable_grad()
def assert_moves(
    model: nn.Module,
    inputs: Inputs,
    start: Run | None = None,
    *,
    moves: float = 1e-3,
    idle: Callable[[str, str], bool] = lambda site, group: False,
    called: Callable[..., Any] | None = None,
) -> Run:
    """Perturb all mHC parameters, and require what would not be so if sites were in no graph.

    The output must then differ, and a gradient reach every group of every site, but H_res of a
    chain's first site, where all streams are equal. The parameters stay perturbed: see
    `parameters_kept`. Gradients are cleared.

    Args:
        model: a transformed model.
        inputs: arguments of a call.
        start: what the model, or the plain one, computes before; by default the model is run.
        moves: how far the output must move, relative to its norm.
        idle: further groups without a gradient, `idle(site, group)`; say why.
        called: what is called in the place of `model`, such as a compiled or wrapped model.
    """
    before = start or run(model, inputs, called=called)
    perturb(model)
    perturbed = run(model, inputs, called=called)
    assert output_error(perturbed.outputs, before.outputs) > moves
    first = firsts(model)
    assert_learning(
        model, lambda site, group: (site in first and group.endswith("res")) or idle(site, group)
    )
    model.zero_grad(set_to_none=True)
    return perturbed


def assert_transformed(
    plain: nn.Module,
    model: nn.Module,
    inputs: Inputs,
    *,
    outputs: float = 1e-12,
    gradients: float = 1e-10,
    moves: float = 1e-3,
    idle: Callable[[str, str], bool] = lambda site, group: False,
    called: Callable[..., Any] | None = None,
) -> Compared:
    """The model computes what the plain one does, and would not if its sites were not there.

    Equality at the start proves little: it also holds for a model whose sites are in no graph. So
    `assert_moves` follows, and leaves the parameters perturbed.

    Args:
        plain: the model before it was transformed.
        model: a transformed copy with its parameters as they were made.
        inputs: arguments of a call.
        outputs, gradients: how far outputs and gradients of the plain model's parameters may be
            apart, relative to their norm.
        moves, idle, called: as in `assert_moves`.
    """
    expected = run(plain, inputs)
    start = run(model, inputs, called=called)
    assert_same(start, expected, outputs, gradients)
    moved = assert_moves(model, inputs, expected, moves=moves, idle=idle, called=called)
    return Compared(expected, start, moved)
