"""modes: every operation stays in the mode in which the model runs it, and so do its gradients.

Each truth runs the recurrence with the switches of the plain program where they stand there.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhc_compile
from mhc_compile import Reason

from ..graphs import WIDTH, detected
from ..recurrence import (
    HOW,
    N,
    assert_is_truth,
    call,
    connect,
    expand,
    gradients,
    leaves,
    norm,
    perturbed,
    site,
    without_gradient,
)

no_grad = torch.no_grad


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@dataclass(frozen=True)
class Case:
    """A program, what it has to compute, and which coefficients get no gradient.

    H_res of a first site never does: its streams are equal.
    """

    plain: Callable[..., Any]
    truth: Callable[..., Any]
    silent: str = "a.res"
    options: dict[str, Any] = field(default_factory=dict)


def branch_plain(m, x):
    with no_grad():
        f = m.a(norm(x))
    x = x + f
    return x + m.b(norm(x))


def branch_truth(m, x):
    def branch(h):
        with no_grad():
            return m.a(norm(h))

    X = site(expand(x), m.mhc.a, branch)
    return site(X, m.mhc.b, lambda h: m.b(norm(h))).mean(-2)


def later_branch_plain(m, x):
    x = x + m.a(norm(x))
    with no_grad():
        f = m.b(norm(x))
    x = x + f
    return x + m.c(norm(x))


def later_branch_truth(m, x):
    def branch(h):
        with no_grad():
            return m.b(norm(h))

    X = site(expand(x), m.mhc.a, lambda h: m.a(norm(h)))
    X = site(X, m.mhc.b, branch)
    return site(X, m.mhc.c, lambda h: m.c(norm(h))).mean(-2)


def half_branch_plain(m, x):
    with no_grad():
        f = m.a(x)
    x = x + m.c(f * x)
    return x + m.b(x)


def half_branch_truth(m, x):
    def branch(h):
        with no_grad():
            f = m.a(h)
        return m.c(f * h)

    # the branch is named after the first module that computes in it
    return site(site(expand(x), m.mhc.a, branch), m.mhc.b, m.b).mean(-2)


def trunk_plain(m, x):
    with no_grad():
        x = x + m.a(x)
    x = x + m.b(x)
    return x + m.c(x)


def trunk_truth(m, x):
    with no_grad():
        X = site(expand(x), m.mhc.a, m.a)
    return site(site(X, m.mhc.b, m.b), m.mhc.c, m.c).mean(-2)


def middle_plain(m, x):
    x = x + m.a(x)
    with no_grad():
        x = x + m.b(x)
    x = x + m.c(x)
    return x + m.d(x)


def middle_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    with no_grad():
        X = site(X, m.mhc.b, m.b)
    return site(site(X, m.mhc.c, m.c), m.mhc.d, m.d).mean(-2)


def sum_plain(m, x):
    x = x + m.a(x)
    f = m.b(x)
    with no_grad():
        x = x + f
    return x + m.c(x), f


def sum_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    f = m.b(torch.einsum("...n,...nc->...c", connect(X, m.mhc.b)[0], X))
    with no_grad():
        X = site(X, m.mhc.b, lambda h: f)
    return site(X, m.mhc.c, m.c).mean(-2), f


def first_state_plain(m, x):
    with no_grad():
        x = m.d(x)
    x = x + m.a(x)
    return x + m.b(x)


def first_state_truth(m, x):
    with no_grad():
        x = m.d(x)
    return site(site(expand(x), m.mhc.a, m.a), m.mhc.b, m.b).mean(-2)


def first_state_and_gate_plain(m, x):
    with no_grad():
        x = m.d(x)
        gate = m.c(x)
    x = x + m.a(x) * gate
    return x + m.b(x)


def first_state_and_gate_truth(m, x):
    def branch(h):
        with no_grad():
            gate = m.c(h)
        return m.a(h) * gate

    with no_grad():
        x = m.d(x)
    return site(site(expand(x), m.mhc.c, branch), m.mhc.b, m.b).mean(-2)


def streamwise_plain(m, x):
    x = x + m.a(x)
    with no_grad():
        x = torch.relu(x)
    x = x + m.b(x)
    return x + m.c(x)


def streamwise_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    with no_grad():
        X = torch.relu(X)
    return site(site(X, m.mhc.b, m.b), m.mhc.c, m.c).mean(-2)


def readout_plain(m, x):
    x = x + m.a(x)
    x = x + m.b(x)
    with no_grad():
        seen = m.c(x)
    return m.d(x), seen


def readout_truth(m, x):
    x = site(site(expand(x), m.mhc.a, m.a), m.mhc.b, m.b).mean(-2)
    with no_grad():
        seen = m.c(x)
    return m.d(x), seen


def by_hand_plain(m, x):
    torch.set_grad_enabled(False)
    f = m.a(x)
    torch.set_grad_enabled(True)
    x = x + f
    return x + m.b(x)


def by_hand_truth(m, x):
    def branch(h):
        with no_grad():
            return m.a(h)

    return site(site(expand(x), m.mhc.a, branch), m.mhc.b, m.b).mean(-2)


def rms_without_gradient(x: Tensor) -> Tensor:
    """The r of each token counts as a constant."""
    with no_grad():
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x * r


def variance_plain(m, x):
    x = x + m.a(rms_without_gradient(x))
    return x + m.b(rms_without_gradient(x))


def variance_truth(m, x):
    X = site(expand(x), m.mhc.a, lambda h: m.a(rms_without_gradient(h)))
    return site(X, m.mhc.b, lambda h: m.b(rms_without_gradient(h))).mean(-2)


def deferred_plain(m, x):
    x = x + m.a(x)
    with no_grad():
        h = F.rms_norm(x, (WIDTH,))
    x = x + m.b(h)
    return x + m.c(x)


def deferred_truth(m, x):
    def branch(h):
        with no_grad():
            h = F.rms_norm(h, (WIDTH,))
        return m.b(h)

    X = site(site(expand(x), m.mhc.a, m.a), m.mhc.b, branch)
    return site(X, m.mhc.c, m.c).mean(-2)


def viewed_plain(m, x):
    x = x + m.a(x)
    with no_grad():
        x = x.view(-1, WIDTH)
    x = x + m.b(x)
    return x + m.c(x)


def viewed_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    with no_grad():
        X = X.view(-1, N, WIDTH)
    return site(site(X, m.mhc.b, m.b), m.mhc.c, m.c).mean(-2)


def viewed_later_plain(m, x):
    x = x + m.a(x)
    with no_grad():
        x = x + m.b(x)
    x = x.view(-1, WIDTH)
    x = x + m.c(x)
    return x + m.d(x)


def viewed_later_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    with no_grad():
        X = site(X, m.mhc.b, m.b)
    X = X.view(-1, N, WIDTH)
    return site(site(X, m.mhc.c, m.c), m.mhc.d, m.d).mean(-2)


def enabled_inside_plain(m, x):
    """Called under no_grad: only the second branch and sum are recorded."""
    x = x + m.a(x)
    with torch.enable_grad():
        x = x + m.b(x)
        return x + m.c(x)


def enabled_inside_truth(m, x):
    X = site(expand(x), m.mhc.a, m.a)
    with torch.enable_grad():
        return site(site(X, m.mhc.b, m.b), m.mhc.c, m.c).mean(-2)


CASES = {
    "a branch": Case(branch_plain, branch_truth, "a.pre a.res"),
    "a later branch": Case(later_branch_plain, later_branch_truth, "a.res b.pre"),
    "half a branch": Case(half_branch_plain, half_branch_truth),
    "switched by hand": Case(by_hand_plain, by_hand_truth, "a.pre a.res"),
    "the first site": Case(trunk_plain, trunk_truth, "a.pre a.post a.res"),
    "a site in the middle": Case(
        middle_plain, middle_truth, "a.pre a.post a.res b.pre b.post b.res"
    ),
    "a sum": Case(sum_plain, sum_truth, "a.res b.post b.res"),
    "the first state": Case(first_state_plain, first_state_truth),
    "the first state and a gate": Case(
        first_state_and_gate_plain, first_state_and_gate_truth, "c.res"
    ),
    "a step on the stream": Case(streamwise_plain, streamwise_truth, "a.pre a.post a.res"),
    "a reader": Case(readout_plain, readout_truth),
    "a norm that may be deferred": Case(
        deferred_plain, deferred_truth, "a.res b.pre", {"defer_norms": True}
    ),
    "a view of tokens": Case(viewed_plain, viewed_truth, "a.pre a.post a.res"),
    "a view of tokens behind a site": Case(
        viewed_later_plain, viewed_later_truth, "a.pre a.post a.res b.pre b.post b.res"
    ),
    "the variance of a norm": Case(variance_plain, variance_truth),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CASES)
def test_under_no_grad(name: str, how: str) -> None:
    case = CASES[name]
    model, x = perturbed(case.plain, **case.options)
    actual, expected = leaves(call(model, how)(x)), leaves(case.truth(model, x))
    inputs = [x, *model.parameters()]
    assert_is_truth(actual, expected, leaves(case.plain(model, x)), inputs)
    assert without_gradient(model, actual) == set(case.silent.split())


@pytest.mark.parametrize("how", HOW)
def test_recorded_inside_of_a_call_that_is_not(how: str) -> None:
    model, x = perturbed(enabled_inside_plain)
    function = call(model, how)
    with no_grad():
        actual = leaves(function(x))
        expected = leaves(enabled_inside_truth(model, x))
        plain = leaves(enabled_inside_plain(model, x))
    assert_is_truth(actual, expected, plain, list(model.parameters()))
    assert without_gradient(model, actual) == {"a.pre", "a.post", "a.res"}


# --- autocast -------------------------------------------------------------------------------------


def halved(m, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m(x)


def autocast_branch_plain(m, x):
    f = halved(m.a, norm(x))
    x = x + f
    g = m.b(norm(x))
    return x + g, f


def autocast_branch_truth(m, x):
    seen = []

    def branch(h):
        seen.append(halved(m.a, norm(h)))
        return seen[-1]

    X = site(expand(x), m.mhc.a, branch)
    return site(X, m.mhc.b, lambda h: m.b(norm(h))).mean(-2), seen[0]


def autocast_sites_plain(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = x + m.a(x)
        f = m.b(x)
        x = x + f
    return x + m.c(x), f


def autocast_sites_truth(m, x):
    seen = []

    def branch(h):
        seen.append(halved(m.b, h))
        return seen[-1]

    X = site(expand(x), m.mhc.a, lambda h: halved(m.a, h))
    X = site(X, m.mhc.b, branch)
    return site(X, m.mhc.c, m.c).mean(-2), seen[0]


def exact_branch_plain(m, x):
    """Called under autocast: one branch in float32."""
    x = x + m.a(x)
    with torch.autocast("cpu", enabled=False):
        f = m.b(x)
    x = x + f
    return x + m.c(x), f


def exact_branch_truth(m, x):
    """Not called under autocast."""
    X = site(expand(x), m.mhc.a, lambda h: halved(m.a, h))
    seen = []

    def branch(h):
        seen.append(m.b(h))
        return seen[-1]

    X = site(X, m.mhc.b, branch)
    return site(X, m.mhc.c, lambda h: halved(m.c, h)).mean(-2), seen[0]


AUTOCAST = {
    "a branch": (autocast_branch_plain, autocast_branch_truth, False),
    "sites": (autocast_sites_plain, autocast_sites_truth, False),
    "all but a branch": (exact_branch_plain, exact_branch_truth, True),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast(name: str, how: str) -> None:
    """The last output is what a branch returned: rounded to bfloat16 only where it is autocast."""
    plain, truth, around = AUTOCAST[name]
    model, x = perturbed(plain, torch.float32)
    function = call(model, how)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        actual = leaves(function(x))
        plain_result = leaves(plain(model, x))
    expected = leaves(truth(model, x))
    assert [a.dtype for a in actual] == [e.dtype for e in expected]
    inputs = [x, *model.parameters()]
    assert_is_truth(actual, expected, plain_result, inputs, error=1e-5, gradient_error=2e-2)
    assert without_gradient(model, actual) == {"a.res"}


# --- connections of the model's own ---------------------------------------------------------------


class Own(nn.Module):
    """Two connections as DeepSeek-V4 has them, one part of each in a mode of its own."""

    def __init__(self, part: str, mode: str) -> None:
        super().__init__()
        columns = 2 * N + N * N
        self.part, self.mode = part, mode
        self.phi = nn.ParameterList(torch.randn(N * WIDTH, columns) / 2 for _ in range(2))
        self.alpha = nn.ParameterList(torch.randn(3) for _ in range(2))
        self.bias = nn.ParameterList(torch.randn(columns) for _ in range(2))
        self.branch = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def of(self, part: str) -> Any:
        if part not in self.part.split():
            return contextlib.nullcontext()
        return no_grad() if self.mode == "no_grad" else torch.autocast("cpu", torch.bfloat16)

    def forward(self, X: Tensor) -> Tensor:
        parts = (self.phi, self.alpha, self.bias, self.branch)
        for phi, alpha, bias, branch in zip(*parts, strict=True):
            with self.of("flattened"):
                x = X.flatten(-2)
            with self.of("norm"):
                x = F.rms_norm(x, (N * WIDTH,), None, 1e-6)
            with self.of("projection"):
                y = x @ phi
            with self.of("H_pre"):
                H_pre = torch.sigmoid(alpha[0] * y[..., :N] + bias[:N])
            with self.of("H_post"):
                H_post = 2 * torch.sigmoid(alpha[1] * y[..., N : 2 * N] + bias[N : 2 * N])
            with self.of("H_res"):
                logits = (alpha[2] * y[..., 2 * N :] + bias[2 * N :]).unflatten(-1, (N, N))
                H_res = torch.softmax(logits, -1) + 1e-6
                H_res = H_res / (H_res.sum(-2, keepdim=True) + 1e-6)
            with self.of("read"):
                h = (H_pre.unsqueeze(-1) * X).sum(-2)
            with self.of("branch"):
                f = branch(torch.tanh(h))
            with self.of("mix"):
                Z = H_res @ X
            with self.of("write"):
                X = Z + H_post.unsqueeze(-1) * f.unsqueeze(-2)
        return X


PARTS = (
    *("flattened", "norm", "projection", "flattened norm projection"),
    *("H_pre", "H_post", "H_res", "read", "mix", "write"),
)
FUSED = ["coefficients", "pre", "post_res"] * 2


def compared(plain: nn.Module) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A compiled copy of a model; its output and gradients, and those of the model."""
    model, dtype = copy.deepcopy(plain), next(plain.parameters()).dtype
    X = torch.randn(2, 5, N, WIDTH, dtype=dtype, requires_grad=True)
    results = []
    for m, function in ((model, call(model, "partitioned")), (plain, plain)):
        outputs = [function(X)]
        given = gradients(outputs, [X, *m.parameters()])
        results.append([*outputs, *(torch.zeros(()) if g is None else g for g in given)])
    return model, *results


def own(part: str, mode: str) -> Own:
    return Own(part, mode).to(torch.float64 if mode == "no_grad" else torch.float32)


@pytest.mark.parametrize("mode", ["no_grad", "autocast"])
@pytest.mark.parametrize("part", PARTS)
def test_a_connection_in_two_modes_stays_as_it_is(part: str, mode: str) -> None:
    model, actual, expected = compared(own(part, mode))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    (graph,) = mhc_compile.graphs(model)
    assert not graph.sites and not graph.history[-1].operators
    notes = [note for entry in graph.history for note in entry.notes]
    assert any("mode" in note for note in notes), notes


@pytest.mark.parametrize("mode", ["no_grad", "autocast"])
@pytest.mark.parametrize("part", ["branch", "none"])
def test_a_connection_around_a_branch_in_another_mode_is_recognised(part: str, mode: str) -> None:
    model, actual, expected = compared(own(part, mode))
    error = 1e-11 if mode == "no_grad" else 2e-5
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=error, atol=error)
    (graph,) = mhc_compile.graphs(model)
    (last,) = (e for e in graph.history if e.name == "report_kernels")
    assert last.operators == FUSED


class Apart(nn.Module):
    """Connections of which one in three projections runs in a mode of its own."""

    def __init__(self, switched: int | None) -> None:
        super().__init__()
        self.switched = switched
        self.phi = nn.ModuleList(
            nn.Linear(N * WIDTH, size, bias=False) for size in 2 * (N, N, N * N)
        )
        self.gates = nn.Parameter(torch.randn(2, 3))
        self.bias = nn.ParameterList(torch.randn(p.out_features) for p in self.phi)
        self.branch = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def logits(self, x: Tensor, layer: int, part: int) -> Tensor:
        number = 3 * layer + part
        with torch.set_grad_enabled(part != self.switched):
            y = self.phi[number](x)
        return self.gates[layer, part] * y + self.bias[number]

    def forward(self, X: Tensor) -> Tensor:
        for layer in range(2):
            x = F.rms_norm(X.flatten(-2), (N * WIDTH,), None, 1e-6)
            pre, post, res = (self.logits(x, layer, part) for part in range(3))
            h = (torch.sigmoid(pre).unsqueeze(-1) * X).sum(-2)
            f = self.branch[layer](torch.tanh(h))
            H_res = torch.softmax(res.unflatten(-1, (N, N)), -1) + 1e-6
            H_res = H_res / (H_res.sum(-2, keepdim=True) + 1e-6)
            X = H_res @ X + (2 * torch.sigmoid(post)).unsqueeze(-1) * f.unsqueeze(-2)
        return X


@pytest.mark.parametrize("switched", [None, 0, 1, 2])
def test_projections_in_different_modes_are_not_joined(switched: int | None) -> None:
    model, actual, expected = compared(Apart(switched).double())
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    (graph,) = mhc_compile.graphs(model)
    (last,) = (e for e in graph.history if e.name == "report_kernels")
    assert switched is not None or last.operators == FUSED


# --- what is no site ------------------------------------------------------------------------------


def inference_plain(m, x):
    with torch.inference_mode():
        f = m.a(x)
    x = x + f
    return x + m.b(x)


def inference_truth(m, x):
    return site(site(expand(x), m.mhc.a, m.a), m.mhc.b, m.b).mean(-2)


@pytest.mark.parametrize("how", HOW)
def test_a_branch_in_inference_mode(how: str) -> None:
    if how == "partitioned" and torch.__version__ < "2.12":
        pytest.skip("AOTAutograd of torch 2.11 fails on inference mode, and stays in it")
    model, x = perturbed(inference_plain)
    function = call(model, how)
    with no_grad():
        actual, expected, plain = function(x), inference_truth(model, x), inference_plain(model, x)
    assert_is_truth([actual], [expected], [plain], [])


def inference_site(m, x):
    with torch.inference_mode():
        x = x + m.a(x)
    x = x + m.b(x)
    return x + m.c(x)


def half_a_sum(m, x):
    with no_grad():
        s = x + m.a(x)
    x = s + m.b(x)
    x = x + m.c(x)
    return x + m.d(x)


def half_a_branch(m, x):
    """The terms of a branch added elsewhere are a sum of its own."""
    with no_grad():
        f = m.a(x) + m.b(x)
    x = x + f
    return x + m.c(x)


@pytest.mark.parametrize(
    ("program", "sites", "rejected"),
    [(half_a_sum, ["c", "d"], 2), (inference_site, [], 2), (half_a_branch, [], 2)],
)
def test_a_sum_in_two_modes_is_no_site(program: Any, sites: list[str], rejected: int) -> None:
    found = detected(program)
    assert [s.name for s in found.sites] == sites
    assert [r.reason for r in found.rejected].count(Reason.MODE) == rejected
