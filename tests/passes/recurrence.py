"""The n-stream recurrence of arXiv:2512.24880, eqs. 14 to 19, by hand, and a comparison with it.

What says what is right uses nothing of mhc_compile; H_res is indexed `[out, in]`. A truth is a
function of a `Program`, whose connections stand under `m.mhc`, and of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhc_compile
from mhc_compile import _torch
from tests import checks
from tests.zoo.rewritten import partition

from .graphs import WIDTH, Program, stream

N = 3


def sinkhorn(logits: Tensor) -> Tensor:
    m = torch.exp(logits - logits.amax((-2, -1), keepdim=True))
    for _ in range(20):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def connect(X: Tensor, p: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of a site, from streams `[..., n, C]`."""
    x = X.flatten(-2)
    y = x @ p.phi / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    a, b = p.alpha, p.bias
    pre = torch.sigmoid(a[0] * y[..., :N] + b[:N])
    post = 2 * torch.sigmoid(a[1] * y[..., N : 2 * N] + b[N : 2 * N])
    res = (a[2] * y[..., 2 * N :] + b[2 * N :]).unflatten(-1, (N, N))
    return pre, post, sinkhorn(res)


def site(
    X: Tensor, p: Any, branch: Callable[[Tensor], Tensor], skip: Callable[..., Tensor] = lambda S: S
) -> Tensor:
    """X' = H_res skip(X) + H_post^T F(H_pre X); `skip` acts on every stream."""
    pre, post, res = connect(X, p)
    f = branch(torch.einsum("...n,...nc->...c", pre, X))
    return torch.einsum("...ij,...jc->...ic", res, skip(X)) + post[..., None] * f[..., None, :]


def expand(x: Tensor) -> Tensor:
    return torch.stack([x] * N, -2)


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


def leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def perturb(model: nn.Module) -> None:
    checks.perturb(model, sigma=0.7)


def perturbed(
    plain: Callable[..., Any],
    dtype: torch.dtype = torch.float64,
    x: Tensor | None = None,
    **options: Any,
) -> tuple[Program, Tensor]:
    """A transformed program whose mHC parameters are far from the start, and an input."""
    model = Program(plain).to(dtype)
    x = (stream() if x is None else x).to(dtype).requires_grad_()
    config = mhc_compile.Config(n=N, **options)
    mhc_compile.transform(model, config=config, example_inputs=(x.detach(),))
    perturb(model)
    return model, x


def call(model: nn.Module, how: str) -> Callable[..., Any]:
    """A model to be called `plain`, under AOTAutograd with all our passes, or under Inductor."""
    if how == "plain":
        return model
    compiled = torch.compile(model, backend="mhc")
    if how == "inductor":
        return compiled

    def partitioned(*inputs: Any) -> Any:
        with patch.object(_torch, "compile_inductor", partial(partition, saved=[])):
            return compiled(*inputs)

    return partitioned


HOW = ("plain", "partitioned")


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss that weighs every entry of the outputs that are recorded."""
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    pairs = [(w.to(o.dtype), o) for w, o in zip(drawn, outputs, strict=True) if o.requires_grad]
    loss: Any = sum((w * o).sum() for w, o in pairs)
    return (
        list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True))
        if pairs
        else []
    )


def assert_is_truth(
    actual: list[Tensor],
    expected: list[Tensor],
    plain: list[Tensor],
    inputs: list[Tensor],
    error: float = 1e-11,
    gradient_error: float = 1e-9,
) -> None:
    """Equal values, equally recorded, equal gradients; and not the values of the plain program."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=error, atol=error)
        assert a.requires_grad == e.requires_grad
    moved = [(a - p).norm() / p.norm() for a, p in zip(actual, plain, strict=True)]
    assert max(moved) > 1e-2
    for got, want in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=gradient_error, atol=gradient_error)


def without_gradient(model: nn.Module, outputs: list[Tensor]) -> set[str]:
    """`a.post` for each site and part (pre, post, res) of which a group has no gradient."""
    found = set()
    for name, connection in model.mhc.named_children():  # type: ignore[union-attr]
        leaves = [connection.phi, connection.alpha, connection.bias]
        given = gradients(outputs, leaves)
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(leaves, given, strict=True)
        ]
        for group, gradient in checks.split_groups(*filled, [N, N, N * N]).items():
            if gradient.norm() < 1e-2 * torch.finfo(gradient.dtype).eps ** 0.5:
                found.add(f"{name}.{group.split('_')[1]}")
    return found
