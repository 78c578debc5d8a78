"""Open forms of a site, by hand and by the reference, traced into graphs for tests of passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.kernels import reference
from mhc_compile.kernels.variants import Variant, get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.fuse_coefficients import fuse_coefficients
from mhc_compile.passes.graph.operators import op_name

EPS = 1e-6
WIDTH = 6


def parameters(variant: Variant, n: int, dtype: torch.dtype, *, tokens: tuple[int, ...] = (2, 3)):
    """X, φ, α, b and a matrix for the branch: far from where variants look alike."""
    columns = sum(variant.columns(n))
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    shapes = [(*tokens, n, WIDTH), (n * WIDTH, columns), (3,), (columns,), (WIDTH, WIDTH)]
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    drawn[1] *= 0.5
    dtypes = (dtype, exact, exact, exact, dtype)
    return [t.to(d).requires_grad_() for t, d in zip(drawn, dtypes, strict=True)]


def open_site(variant: Variant, n: int, dtype: torch.dtype) -> Callable[..., Any]:
    """A site with a linear branch, as `widen` writes it."""
    exact = torch.float64 if dtype is torch.float64 else torch.float32

    def site(X, phi, alpha, bias, W):
        options = {"variant": variant, "n": n, "width": WIDTH, "eps": EPS, "compute_dtype": exact}
        H_pre, H_post, H_res = reference.coefficients(X, phi, alpha, bias, **options)
        h = reference.pre(H_pre, X, dtype=dtype, compute_dtype=exact)
        f = torch.tanh(h) @ W
        return reference.post_res(H_res, H_post, X, f, dtype=dtype, compute_dtype=exact)

    return site


def traced(function: Callable[..., Any], inputs: list[Tensor]) -> fx.GraphModule:
    """The graph of a function, with example values as a capture leaves them."""
    gm = fx.symbolic_trace(function)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in inputs]

    class Annotate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op != "output":
                n.meta["example_value"] = value
            return value

    with mode, torch.no_grad():
        Annotate(gm).run(*fakes)
    return gm


def fuse(
    function: Callable[..., Any], inputs: list[Tensor], *before: Callable[..., Any]
) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a function behind `fuse_coefficients` (and other passes before), its notes."""
    gm, context = traced(function, inputs), Context(Options(2, get_variant("mhc")))
    for step in before:
        step(gm, context)
    result = fuse_coefficients(gm, context)
    gm.graph.lint()
    gm.recompile()
    return gm, result.notes


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How often each `mhc::` operator stands in a graph."""
    nodes = (n for n in gm.graph.nodes if str(n.target).startswith("mhc."))
    return Counter(op_name(n) for n in nodes)


def run(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """The result and all gradients, in float64, for one loss that weighs every entry."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    grads = torch.autograd.grad((out.double() * weight).sum(), leaves)
    return [out.detach().double(), *(g.double() for g in grads)]


def assert_as_exact(
    function: Callable[..., Any],
    candidate: Callable[..., Any],
    truth: Callable[..., Any],
    inputs: list[Tensor],
) -> None:
    """The candidate is no farther from the float64 truth than the function is, up to rounding."""
    exact = run(truth, [t.double() for t in inputs])
    for want, plain, got in zip(exact, run(function, inputs), run(candidate, inputs), strict=True):
        assert got.shape == want.shape and not got.isnan().any()
        scale = want.norm()
        dtype = inputs[0].dtype
        slack = (4 if dtype is torch.bfloat16 else 40) * torch.finfo(dtype).eps * scale
        if dtype is torch.bfloat16:  # rounded only at the end: half a unit a value
            slack = scale * 2**-8
        assert (got - want).norm() <= 2 * (plain - want).norm() + slack
