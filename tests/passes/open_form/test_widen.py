"""widen: the n-stream graph computes what the paper's formulas say, written out in `recurrence`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import mhc_compile
from tests.checks import assert_moves

from ..graphs import WIDTH, Program, stream
from ..recurrence import (
    HOW,
    N,
    assert_is_truth,
    call,
    connect,
    expand,
    leaves,
    norm,
    perturb,
    perturbed,
    site,
)


def plain_pre(m, x):
    x = x + m.a(norm(x))
    x = x + m.b(x)
    return norm(x)


def truth_pre(m, x):
    X = site(expand(x), m.mhc.a, lambda h: m.a(norm(h)))
    X = site(X, m.mhc.b, m.b)
    return norm(X.mean(-2))


def plain_post(m, x):
    x = norm(x + m.a(x))
    return norm(x + m.b(x))


def truth_post(m, x):
    X = norm(site(expand(x), m.mhc.a, m.a))
    return norm(site(X, m.mhc.b, m.b).mean(-2))


def plain_scaled(m, x):
    x = 0.5 * x + m.a(x)
    x = m.scale * torch.relu(x) + m.b(x)
    return x, x + m.c(x)


def truth_scaled(m, x):
    X = site(expand(x), m.mhc.a, m.a, lambda S: 0.5 * S)
    X = site(X, m.mhc.b, m.b, lambda S: m.scale * torch.relu(S))
    return X.mean(-2), site(X, m.mhc.c, m.c).mean(-2)


def plain_parallel(m, x):
    x = (x + m.a(x)) + m.b(x)
    return m.c(x) + (torch.ones_like(x) + x)


def truth_parallel(m, x):
    X = site(expand(x), m.mhc.a, lambda h: m.a(h) + m.b(h))
    return site(X, m.mhc.c, lambda h: m.c(h) + 1).mean(-2)


def plain_nested(m, x):
    h = x + m.a(x)
    h = h + m.b(h)
    x = x + m.c(h)
    return x + m.d(x)


def truth_nested(m, x):
    def branch(h):
        H = site(expand(h), m.mhc.a, m.a)
        return m.c(site(H, m.mhc.b, m.b).mean(-2))

    X = site(expand(x), m.mhc.a_1, branch) if "a_1" in m.mhc._modules else None
    if X is None:
        X = site(expand(x), m.mhc.c, branch)
    return site(X, m.mhc.d, m.d).mean(-2)


def plain_masked(m, x):
    mask = torch.tensor([1.0, 0.25]).view(2, 1, 1)
    x = x + m.a(x)
    x = x * mask
    return x + m.b(x)


def truth_masked(m, x):
    mask = torch.tensor([1.0, 0.25]).view(2, 1, 1, 1)
    return site(site(expand(x), m.mhc.a, m.a) * mask, m.mhc.b, m.b).mean(-2)


CASES = {
    "pre-norm": (plain_pre, truth_pre),
    "post-norm": (plain_post, truth_post),
    "scaled skips, a state read in the middle": (plain_scaled, truth_scaled),
    "parallel branches": (plain_parallel, truth_parallel),
    "a chain inside a branch": (plain_nested, truth_nested),
    "a mask over samples": (plain_masked, truth_masked),
}


RESHAPED = {
    "view": (lambda x: x.view(-1, WIDTH), lambda x: x.view(2, 3, WIDTH)),
    "sizes left open": (lambda x: x.reshape((6, -1)), lambda x: torch.reshape(x, (2, -1, WIDTH))),
    "flatten": (lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (2, 3))),
    "flatten, from the right": (lambda x: x.flatten(-3, -2), lambda x: x.unflatten(-2, (-1, 3))),
    "by name": (
        lambda x: torch.flatten(x, start_dim=0, end_dim=1),
        lambda x: x.unflatten(dim=0, sizes=(2, 3)),
    ),
    "flatten to a dimension": (
        lambda x: x.flatten(end_dim=1),
        lambda x: x.unflatten(0, (2, 3)).flatten(start_dim=2),
    ),
    "channels as well": (
        lambda x: x.reshape(2, 3, 1, WIDTH).flatten(2),
        lambda x: x.unflatten(-1, (1, WIDTH)).flatten(1, 2),
    ),
}


def reshaped(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Tokens in another shape around the middle one of three sites."""
    there, back = RESHAPED[name]

    def plain(m, x):
        x = there(x + m.a(x))
        x = back(x + m.b(x.cumsum(0)))
        return x + m.c(x)

    def truth(m, x):
        X = site(expand(x), m.mhc.a, m.a)
        X = torch.stack([there(X[..., i, :]) for i in range(N)], -2)
        X = site(X, m.mhc.b, lambda h: m.b(h.cumsum(0)))
        X = torch.stack([back(X[..., i, :]) for i in range(N)], -2)
        return site(X, m.mhc.c, m.c).mean(-2)

    return plain, truth


CASES |= {f"reshaped: {name}": reshaped(name) for name in RESHAPED}


@pytest.mark.parametrize("name", CASES)
def test_perturbed_graph_agrees_with_truth(name: str) -> None:
    plain, truth = CASES[name]
    model, x = perturbed(plain)
    actual, expected = leaves(model(x)), leaves(truth(model, x))
    plain_result = leaves(plain(model, x))
    parameters = [x, *model.parameters()]
    for a, e, p in zip(actual, expected, plain_result, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
        assert (a - p).norm() > 1e-2 * p.norm()
    weights = [torch.randn_like(e) for e in expected]
    gradients = [
        torch.autograd.grad(
            sum((w * o).sum() for w, o in zip(weights, outputs, strict=True)),
            parameters,
            allow_unused=True,
        )
        for outputs in (actual, expected)
    ]
    for got, want in zip(*gradients, strict=True):
        if want is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_dropout_on_the_stream_draws_one_mask_for_all_streams() -> None:
    def plain(m, x):
        x = F.dropout(x + m.a(x), 0.5)
        return x + m.b(x)

    def truth(m, x):
        X = site(expand(x), m.mhc.a, m.a)
        return site(X * F.dropout(torch.ones_like(x), 0.5)[..., None, :], m.mhc.b, m.b).mean(-2)

    model, x = perturbed(plain)
    torch.manual_seed(3)
    actual = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(actual, truth(model, x), rtol=1e-11, atol=1e-11)


def permuted_stream(m, x):
    x = x.permute(1, 0, 2)
    x = F.dropout(x + m.a(x), 0.5)
    return x + m.b(x)


def permuted_branch(m, x):
    x = x.permute(1, 0, 2)
    x = x + F.dropout(x * x.cumsum(-1), 0.5)
    return x + F.dropout(x * x.cumsum(-1), 0.5)


def permuted_norm(m, x):
    x = x.permute(1, 0, 2)
    for _ in range(2):
        h = x * x.cumsum(-1)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x + F.dropout(h, 0.5)
    return x


@pytest.mark.parametrize("plain", [permuted_stream, permuted_branch, permuted_norm])
def test_dropout_draws_the_mask_of_the_plain_model(plain) -> None:
    """Random numbers fill memory in its order, and a permuted tensor keeps another one."""
    torch.manual_seed(2)
    model, x = Program(plain).double(), stream(4, 5, WIDTH).double()
    torch.manual_seed(3)
    expected = model(x)
    mhc_compile.transform(model, n=N, example_inputs=(x,))
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert_moves(model, (x,))


def test_a_branch_may_view_what_it_could_view_before() -> None:
    """Channels in the middle are moved there from the last axis, and lie there as before."""
    weight = torch.randn(4, 4, 3, 3).double() / 8

    def plain(m, x):
        for _ in range(2):
            x = x + F.conv2d(x, weight, padding=1) * x.view(2, 4, 25).mean(-1)[..., None, None]
        return x.view(2, 100)

    model, x = Program(plain).double(), stream(2, 4, 5, 5).double()
    expected = model(x)
    mhc_compile.transform(model, n=N, example_inputs=(x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert_moves(model, (x,))


def test_whether_any_overflows_is_asked_of_all_streams() -> None:
    """One stream may overflow while the mean of the streams does not."""

    def plain(m, x):
        x = x + m.a(x)
        limit = torch.where((x.abs() > 1).any(), 0.5, 9.0)
        x = torch.clamp(x, min=-limit, max=limit)
        return x + m.b(x)

    def truth(m, x):
        X = site(expand(x), m.mhc.a, m.a)
        limit = torch.where((X.abs() > 1).any(), 0.5, 9.0)
        return site(torch.clamp(X, min=-limit, max=limit), m.mhc.b, m.b).mean(-2)

    model, x = perturbed(plain)
    torch.testing.assert_close(model(x), truth(model, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x / x.norm(),
        lambda x: x / x.std(),
        lambda x: x / x.abs().max(),
        lambda x: x * x.pow(2).mean().rsqrt(),
        lambda x: x / (x * x).sum(),
    ],
    ids=["norm", "std", "max", "rms", "sum"],
)
def test_a_number_of_the_whole_stream_ends_the_chain(step: Callable[[Any], Any]) -> None:
    """Over all streams it is another one."""

    def plain(m, x):
        x = x + m.a(x)
        x = step(x + m.b(x))
        x = x + m.c(x)
        return x + m.d(x)

    def truth(m, x):
        x = step(site(site(expand(x), m.mhc.a, m.a), m.mhc.b, m.b).mean(-2))
        return site(site(expand(x), m.mhc.c, m.c), m.mhc.d, m.d).mean(-2)

    model, x = perturbed(plain)
    torch.testing.assert_close(model(x), truth(model, x), rtol=1e-11, atol=1e-11)


def swap(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


SKIPS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    # a layer; where its skip takes the tokens, what the branch makes of h, and the way back
    "there twice": (lambda f, x: swap(x) + f(swap(x)), swap, lambda f, h: f(swap(h)), swap),
    "there and back": (lambda f, x: swap(x) + swap(f(x)), swap, lambda f, h: swap(f(h)), swap),
    "moved": (
        lambda f, x: x.movedim(0, 1).permute(0, 1, 2) + f(x.movedim(0, 1)),
        *(swap, lambda f, h: f(swap(h)), swap),
    ),
    "flattened": (
        lambda f, x: x.reshape(-1, WIDTH) + f(x).view(-1, WIDTH),
        *(lambda t: t.flatten(0, 1), lambda f, h: f(h).flatten(0, 1)),
        lambda t: t.unflatten(0, (3, -1)),
    ),
    "a new axis": (
        lambda f, x: x.unsqueeze(1) + f(x).unsqueeze(1),
        *(lambda t: t.unsqueeze(1), lambda f, h: f(h).unsqueeze(1), lambda t: t.squeeze(1)),
    ),
}


@torch._functorch.config.patch(donated_buffer=False)  # backward runs twice
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("samples", [3, 2])
@pytest.mark.parametrize("name", SKIPS)
def test_a_skip_that_moves_tokens_takes_their_coefficients_along(
    name: str, samples: int, how: str
) -> None:
    """With as many samples as positions those of other tokens would fit as well."""
    layer, there, branch, back = SKIPS[name]

    def plain(m, x):
        for f in (m.a, m.b, m.c):
            x = back(layer(f, x))
        return x

    def truth(m, x):
        X = expand(x)
        for f, p in ((m.a, m.mhc.a), (m.b, m.mhc.b), (m.c, m.mhc.c)):
            pre, post, res = connect(X, p)
            y = branch(f, torch.einsum("...n,...nc->...c", pre, X))
            X = torch.einsum("...ij,...jc->...ic", there(res), there(X))
            X = back(X + there(post)[..., None] * y[..., None, :])
        return X.mean(-2)

    model, x = perturbed(plain, x=stream(3, samples, WIDTH))
    actual, expected = leaves(call(model, how)(x)), leaves(truth(model, x))
    assert_is_truth(actual, expected, leaves(plain(model, x)), [x, *model.parameters()])


def prelu(m, x):
    """One weight for each channel, which stand second: where the batch is as large, too."""
    return F.prelu(x, m.scale)


@pytest.mark.parametrize("batch", [2, WIDTH])
def test_prelu_has_its_weights_in_the_second_axis(batch: int) -> None:
    def plain(m, x):
        x = prelu(m, x + m.a(x))
        x = prelu(m, x + m.b(x))
        return x + m.c(x)

    def truth(m, x):
        def each(X):
            return torch.stack([prelu(m, X[:, i]) for i in range(N)], 1)

        X = each(site(expand(x), m.mhc.a, m.a))
        return site(each(site(X, m.mhc.b, m.b)), m.mhc.c, m.c).mean(-2)

    model, x = perturbed(plain, x=stream(batch, WIDTH))
    assert len(mhc_compile.explain(model, x).sites) == 3
    torch.testing.assert_close(model(x), truth(model, x), rtol=1e-11, atol=1e-11)


def test_channels_first_streams_mix_over_positions() -> None:
    weight = torch.randn(WIDTH, WIDTH, 3, 3).double() / 8

    def conv(x):
        return F.conv2d(x, weight, padding=1)

    def plain(m, x):
        x = torch.relu(x + m.scale[0] * conv(x))
        return torch.relu(x + m.scale[1] * conv(torch.relu(x)))

    def last(h):
        return h.movedim(1, -1)

    def truth(m, x):
        names = list(m.mhc._modules)
        first, second = m.mhc[names[0]], m.mhc[names[1]]
        X = site(expand(last(x)), first, lambda h: last(m.scale[0] * conv(h.movedim(-1, 1))))
        X = torch.relu(X)
        X = site(X, second, lambda h: last(m.scale[1] * conv(torch.relu(h.movedim(-1, 1)))))
        return torch.relu(X.mean(-2).movedim(-1, 1))

    model = Program(plain).double()
    x = stream(2, WIDTH, 5, 4).double()
    mhc_compile.transform(model, n=N, example_inputs=(x,))
    perturb(model)
    torch.testing.assert_close(model(x), truth(model, x), rtol=1e-11, atol=1e-11)


def test_the_rewritten_graph_runs_the_last_norm_once() -> None:
    model, x = perturbed(plain_pre)
    model(x)
    (graph,) = mhc_compile.graphs(model)
    norms = [n for n in graph.after.graph.nodes if "layer_norm" in str(n.target)]
    assert len(norms) == 2 and all(n.meta["example_value"].dim() == 3 for n in norms)
