"""H_res = I + U Vᵀ: what the tests that iterate over all variants do not say of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mhc_compile
from mhc_compile.kernels import backends, eager
from mhc_compile.kernels.gpu import codegen
from mhc_compile.kernels.variants import get_variant, parse_variant

from ...checks import assert_transformed, connections, run
from ...models import GPT, ids, pair
from ..operands import EPS, random_site

RANK_1 = get_variant("low_rank")
RANKS = [replace(RANK_1, rank=rank) for rank in (1, 2, 3)]
of_rank = pytest.mark.parametrize("variant", RANKS, ids=lambda variant: variant.text)


@of_rank
def test_text_carries_the_rank(variant):
    assert parse_variant(variant.text) == variant
    assert variant.columns(4) == (4, 4, 8 * variant.rank)


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="variant 'low_rank' needs a rank of 1 or more, got 0"):
        replace(RANK_1, rank=0).check(4)


@of_rank
def test_values_are_those_of_loops(variant):
    n, r = 3, variant.rank
    x = torch.randn(2 * n * r, dtype=torch.float64)
    U, V = x[: n * r].reshape(n, r), x[n * r :].reshape(n, r)
    H_res = variant.res.forward(x, n)
    for i in range(n):
        for j in range(n):
            true = float(i == j) + sum(float(U[i, k] * V[j, k]) for k in range(r))
            assert abs(float(H_res[i, j]) - true) < 1e-14


@of_rank
@pytest.mark.parametrize("n", [2, 4])
def test_gradcheck_of_the_operator(variant, n):
    """In float64, where C++ computes it, and through the open form of a site."""
    site = random_site(variant, n, 2, (2,)).requires_grad()

    def coefficients(*operands: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.mhc.coefficients(*operands, variant.text, EPS)[:3]

    assert torch.autograd.gradcheck(coefficients, tuple(site.mapping))


@of_rank
def test_every_rank_is_generated(variant):
    text = codegen.source(variant, 4)
    compile(text, "chain", "exec")
    assert f"I + U Vᵀ of rank {variant.rank}" in text


def test_more_columns_than_triton_takes_fall_back(monkeypatch):
    monkeypatch.setattr(backends, "_has_matrix_units", lambda index: True)
    cuda, wide = torch.device("cuda", 0), replace(RANK_1, rank=8)
    chosen = [backends.implementation(cuda, torch.bfloat16, 8, v) for v in (RANK_1, wide)]
    assert chosen[0].LANGUAGE == "Triton" and chosen[1] is eager


def true_gpt(model: GPT, tokens: Tensor, n: int, r: int = 1) -> Tensor:
    """The transformed model by formulas alone; calls nothing of ours."""
    sites = iter(connections(model).values())

    def connect(X: Tensor, branch) -> Tensor:
        phi, alpha, bias = next(sites)
        x = X.flatten(-2)
        y = x @ phi / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
        sizes = [n, n, n * r, n * r]
        pre, post, U, V = (
            alpha[min(k, 2)] * part + b
            for k, (part, b) in enumerate(zip(y.split(sizes, -1), bias.split(sizes), strict=True))
        )
        H_res = torch.eye(n) + torch.einsum(
            "...ik,...jk->...ij", U.unflatten(-1, (n, r)), V.unflatten(-1, (n, r))
        )
        f = branch(torch.einsum("...n,...nc->...c", torch.sigmoid(pre), X))
        mixed = torch.einsum("...ij,...jc->...ic", H_res, X)
        return mixed + torch.einsum("...n,...c->...nc", 2 * torch.sigmoid(post), f)

    X = torch.stack([model.embed(tokens)] * n, -2)
    for block in model.h:
        X = connect(X, lambda h, b=block: b.attn(b.ln_1(h)))
        X = connect(X, lambda h, b=block: b.mlp(b.ln_2(h)))
    return model.head(model.ln_f(X.mean(-2)))


@pytest.mark.parametrize("n", [2, 4])
def test_a_perturbed_gpt_equals_its_formulas(n):
    """It starts as the plain model; then outputs and all gradients are those of `true_gpt`."""
    plain, model = pair(variant="low_rank", n=n)
    found = assert_transformed(plain, model, (ids(),)).perturbed
    expected = run(model, (ids(),), called=lambda tokens: true_gpt(model, tokens, n))
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-11, atol=1e-11)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        scale = float(gradient.norm())
        torch.testing.assert_close(found.gradients[name], gradient, rtol=0, atol=1e-11 * scale)
    sources = [text for graph in mhc_compile.graphs(model) for text in graph.sources]
    assert sources[0].startswith("low_rank()")  # it was recognised and fused
