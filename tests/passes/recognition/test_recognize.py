"""recognize: hand-written connections in the spellings of modules that follow the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_compile.kernels.variants import get_variant, parse_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.fuse_coefficients import fuse_coefficients
from mhc_compile.passes.pipeline import OWN
from mhc_compile.passes.recognition.recognize import recognize
from mhc_compile.passes.runner import run_pipeline
from mhc_compile.passes.sites.records import FusedSite, Reason, Rejected

from ..open_sites import EPS, WIDTH, assert_as_exact, operators, traced

N = 3
ONE_SITE = {"coefficients": 1, "pre": 1, "post_res": 1}


def recognized(function: Any, inputs: list[Tensor]) -> tuple[Any, Context, list[str]]:
    """The graph behind `recognize` and `fuse_coefficients`, its connections, all notes."""
    gm, context = traced(function, inputs), Context(Options(2, get_variant("mhc")))
    notes = []
    for step in (recognize, fuse_coefficients):
        notes += step(gm, context).notes
        gm.graph.lint()
    gm.recompile()
    return gm, context, notes


def variant_in(gm: Any) -> Any:
    (node,) = (n for n in gm.graph.nodes if "mhc.coefficients" in str(n.target))
    return parse_variant(node.args[4])


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """X `[2, 3, n, C]`, a matrix for the branch, and parameters of the given shapes."""
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, N, WIDTH), *shapes)]
    return [t.to(dtype).requires_grad_() for t in drawn]


# --- modules that follow the paper ----------------------------------------------------------------


def sinkhorn(logits: Tensor, iterations: int = 4) -> Tensor:
    """As it is often written: the largest subtracted, rows first, columns last."""
    M = torch.exp(logits - logits.amax(dim=(-2, -1), keepdim=True).detach())
    for _ in range(iterations):
        M = M / M.sum(dim=-1, keepdim=True)
        M = M / M.sum(dim=-2, keepdim=True)
    return M


def branch(h: Tensor, W: Tensor) -> Tensor:
    return torch.tanh(h @ W)


def three_projections(X, W, res, post, pre, a_pre, a_post, a_res, b_pre, b_post, b_res):
    """A matrix, a factor and a bias for each of the three, the residual first and transposed."""
    x = F.rms_norm(X.flatten(-2), (N * WIDTH,), eps=EPS)
    H_res = sinkhorn(a_res * (x @ res).unflatten(-1, (N, N)).mT + b_res)
    H_post = 2 * torch.sigmoid(a_post * (x @ post) + b_post)
    H_pre = torch.sigmoid(a_pre * (x @ pre) + b_pre)
    f = branch(torch.einsum("btn,btnc->btc", H_pre, X), W)
    return torch.einsum("btij,btjc->btic", H_res, X) + torch.einsum("btn,btc->btnc", H_post, f)


def linears_with_a_bias(X, W, pre, post, res, b_pre, b_post, b_res, weight):
    """`nn.Linear` as it is: no α, the bias inside; an RMSNorm with a weight; bmm."""
    B, T, n, C = 2, 5, N, WIDTH
    x = F.rms_norm(X.reshape(B * T, n * C), (n * C,), weight, EPS)
    H_pre = F.linear(x, pre, b_pre).sigmoid()
    H_post = F.linear(x, post, b_post).sigmoid() * 2.0
    H_res = torch.ops.mhc.sinkhorn_knopp.default(F.linear(x, res, b_res).view(B * T, n, n), 5)
    S = X.view(B * T, n, C)
    h = torch.bmm(H_pre.unsqueeze(1), S).squeeze(1)
    out = torch.bmm(H_res, S) + torch.bmm(H_post.unsqueeze(2), branch(h, W).unsqueeze(1))
    return out.view(B, T, n, C)


def one_linear_with_constants(X, W, phi, bias):
    """One projection with a bias, constant factors, each stream mixed by itself."""
    x = F.rms_norm(X.flatten(2), (N * WIDTH,), eps=EPS)
    pre, post, res = F.linear(x, phi).split([N, N, N * N], dim=-1)
    b = bias.split([N, N, N * N])
    H_pre, H_post = torch.sigmoid(0.5 * pre + b[0]), 2 * torch.sigmoid(post + b[1])
    H_res = torch.softmax((0.25 * res + b[2]).view(2, 5, N, N), dim=-2)
    H_res = H_res / H_res.sum(-1, keepdim=True)
    for _ in range(3):
        H_res = H_res / H_res.sum(-2, keepdim=True)
        H_res = H_res / H_res.sum(-1, keepdim=True)
    h = sum(H_pre[..., i : i + 1] * X[:, :, i] for i in range(N))
    f = branch(h, W)
    mixed = [sum(H_res[..., i, j, None] * X[..., j, :] for j in range(N)) for i in range(N)]
    return torch.stack(mixed, dim=2) + H_post.unsqueeze(-1) * f.unsqueeze(2)


def streams_only_added_to(X, W, fn, base, scale):
    """No H_res: the streams stay, the branch is added to each (`hy_v4`)."""
    flat = X.flatten(2)
    mixes = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    pre_b, post_b = base.split(N, dim=-1)
    pre_scale, post_scale = scale.unbind(0)
    pre, post = mixes.split(N, dim=-1)
    H_pre = torch.sigmoid(pre * pre_scale + pre_b) + 1e-6
    H_post = 1.5 * torch.sigmoid(post * post_scale + post_b) + 1e-6
    f = branch(torch.sum(H_pre.unsqueeze(-1) * X, dim=2), W)
    return H_post.unsqueeze(-1) * f.unsqueeze(-2) + X


D, SQUARE = N * WIDTH, (WIDTH, WIDTH)
PAPER = {
    three_projections: (
        *((D, N * N), (D, N), (D, N), (), (), (1,), (N,), (N,), (N, N)),
        "mhc(iterations=4)",
    ),
    linears_with_a_bias: (
        *((N, D), (N, D), (N * N, D), (N,), (N,), (N * N,), (D,)),
        "mhc(iterations=5)",
    ),
    one_linear_with_constants: ((N * N + 2 * N, D), (N * N + 2 * N,), "mhc(iterations=4)"),
    streams_only_added_to: (
        *((2 * N, D), (2 * N,), (2,)),
        "identity(pre.offset=1e-06, post.scale=1.5, post.offset=1e-06)",
    ),
}


@pytest.mark.parametrize("function", PAPER, ids=lambda f: f.__name__)
def test_modules_that_follow_the_paper_are_sites(function: Any) -> None:
    *shapes, text = PAPER[function]
    inputs = leaves(SQUARE, *shapes)
    gm, context, notes = recognized(function, inputs)
    made = {k: v for k, v in operators(gm).items() if k in ONE_SITE}
    assert made == ONE_SITE, notes
    assert variant_in(gm).text == text
    (site,) = context.own
    assert isinstance(site, FusedSite) and site.reason == f"recognised: {text}"
    assert site.width == WIDTH
    assert_as_exact(function, gm, function, inputs)


def test_projections_are_joined_in_the_order_of_their_use() -> None:
    """pre and post have the same size: what is multiplied with the streams is pre."""
    *shapes, _ = PAPER[three_projections]
    gm = traced(three_projections, leaves(SQUARE, *shapes))
    assert recognize(gm, Context(Options(2, get_variant("mhc")))).notes == [
        "1 connections",
        "3 projections joined",
    ]
    (joined,) = (n for n in gm.graph.nodes if n.target is torch.cat)
    assert [str(phi) for phi in joined.args[0]] == ["pre", "post", "res"]


# --- what is none ---------------------------------------------------------------------------------


def folded_into_the_batch(X, W, gamma, alpha, static_alpha, beta, static_beta):
    """lucidrains' form: each stream normalised and projected by itself; one map for all of them."""
    R = X.permute(0, 2, 1, 3).flatten(0, 1)  # streams beside the batch between connections
    S = R.unflatten(0, (2, N)).permute(0, 2, 1, 3)
    x = F.normalize(S, dim=-1) * WIDTH**0.5 * (gamma + 1)
    dynamic = torch.einsum("btsd,de->btse", x, alpha) * 0.1 + static_alpha
    weights = torch.cat((dynamic[..., :1].sigmoid(), sinkhorn(dynamic[..., 1:])), dim=-1)
    mixed = torch.einsum("btse,btsd->bted", weights, S)
    H_post = 2 * torch.sigmoid((x @ beta) * 0.1 + static_beta)
    f = branch(mixed[..., 0, :], W)
    added = torch.einsum("btd,bts->btsd", f, H_post).permute(0, 2, 1, 3).flatten(0, 1)
    R = added + mixed[..., 1:, :].permute(0, 2, 1, 3).flatten(0, 1)
    return R.unflatten(0, (2, N)).permute(0, 2, 1, 3)


def gated_by_channel(X, W, down, up, inject):
    """`qwen4_exp`: a gate for every channel, and no H_res; groups normalised one by one."""
    R = X.flatten(-2)
    x = F.rms_norm(R.unflatten(-1, (N, WIDTH)), (WIDTH,), None, EPS).flatten(-2)
    gate = torch.sigmoid(F.linear(F.silu(F.linear(x, down)), up)).unflatten(-1, (N, WIDTH))
    h = (gate * x.unflatten(-1, (N, WIDTH))).mean(-2)
    H_post = 2 * torch.sigmoid(F.linear(x, inject))
    added = branch(h, W).unsqueeze(-2) * H_post.unsqueeze(-1)
    return (R + added.flatten(-2)).unflatten(-1, (N, WIDTH))


def changed(**change: Any) -> Any:
    """`one_linear_with_constants` with something else in one place."""

    def site(X, W, phi, bias):
        get = change.get
        x = X.flatten(2) if get("norm") == "none" else F.rms_norm(X.flatten(2), (D,), eps=EPS)
        if get("norm") == "rounded":
            x = x.bfloat16().to(phi.dtype)
        pre, post, res = (F.linear(x, phi) + bias).split([N, N, N * N], dim=-1)
        H_pre = F.hardsigmoid(pre) if get("gate") else torch.sigmoid(pre)
        H_res = torch.ops.mhc.sinkhorn_knopp.default(res.unflatten(-1, (N, N)), 3)
        h = (H_pre.unsqueeze(-1) * X).sum(2)
        H_post = (2 * torch.sigmoid(post)).unsqueeze(-1)
        return H_res @ X + H_post * branch(h, W).unsqueeze(2)

    return site


ONE = ((N * N + 2 * N, D), (N * N + 2 * N,))
NEAR = {
    "folded": (
        folded_into_the_batch,
        ((WIDTH,), (WIDTH, N + 1), (N, N + 1), (WIDTH,), (N,)),
        Reason.OWN_NORM,
        "each of its 3 streams is normalised and projected by itself",
    ),
    "by channel": (
        gated_by_channel,
        ((2, D), (D, 2), (N, D)),
        Reason.OWN_NORM,
        "each of its 3 streams is normalised by itself",
    ),
    "no norm": (
        changed(norm="none"),
        ONE,
        Reason.OWN_NORM,
        "it is not divided by the rms of the flattened streams",
    ),
    "gate": (
        changed(gate="hard"),
        ONE,
        Reason.OWN_COEFFICIENTS,
        "nothing in it is H_pre of a known variant",
    ),
    "rounded": (
        changed(norm="rounded"),
        ONE,
        Reason.OWN_PRECISION,
        "its streams are rounded to torch.bfloat16 in front of the projection",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_left_as_it_is_and_says_what_differs(name: str) -> None:
    function, shapes, reason, detail = NEAR[name]
    inputs = leaves(SQUARE, *shapes)
    gm, context, notes = recognized(function, inputs)
    assert not set(operators(gm)) & set(ONE_SITE)
    (rejected,) = context.own
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.detail) == (reason, detail)
    assert detail in " ".join(notes)
    if name != "rounded":
        assert_as_exact(function, gm, function, inputs)


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_listed_where_norms_are_deferred_too(name: str) -> None:
    """Deferring replaces the product by which a connection was known; its tag goes along."""
    function, shapes, reason, _ = NEAR[name]
    gm = traced(function, leaves(SQUARE, *shapes))
    context = Context(Options(2, get_variant("mhc"), defer_norms=True))
    run_pipeline(gm, context, OWN)
    # The rounding moves behind the product, and what is left is the connection of the paper.
    expected = "recognised: mhc(iterations=3)" if name == "rounded" else reason
    assert [site.reason for site in context.own] == [expected]


def test_the_connection_that_the_near_misses_change_is_a_site() -> None:
    _, context, notes = recognized(changed(), leaves(SQUARE, *ONE))
    assert [type(site) for site in context.own] == [FusedSite], notes


def test_what_resembles_a_connection() -> None:
    """A delta rule adds outer products to a state, but its keys do not come from that state."""

    def delta_rule(state, W, h, key, value):
        k, v = (h @ key).sigmoid(), h @ value
        read = (k.unsqueeze(-2) @ state).squeeze(-2)
        return state * 0.5 + k.unsqueeze(-1) * (v - read).unsqueeze(-2)

    inputs = leaves(SQUARE, (2, 5, D), (D, N), (D, WIDTH))
    gm, context, notes = recognized(delta_rule, inputs)
    assert notes == [] and context.own == []
    assert gm.code == traced(delta_rule, inputs).code
