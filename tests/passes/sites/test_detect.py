"""detect: what is a residual add and what is not, one small program each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhc_compile import Reason

from ..graphs import WIDTH, detected, stream


def chain(*steps):
    """Steps one after the other, each a function of the module and the stream."""

    def program(m, x):
        for step in steps:
            x = step(m, x)
        return x

    return program


def pre(m, x):
    return x + m.a(F.layer_norm(x, (WIDTH,)))


def post(m, x):
    return F.layer_norm(x + m.b(x), (WIDTH,))


def gelu_inside(m, x):
    h = m.a(x)
    return x + m.b(0.5 * h * (1 + torch.tanh(0.8 * (h + 0.044715 * h**3))))


def rotary_inside(m, x):
    q = m.a(x)
    half = torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1)
    return x + (q * torch.cos(q.detach()) + half * torch.sin(q.detach())) @ m.b.weight


def inner_chain(m, x):
    h = m.d(x)
    for f in (m.a, m.b):
        h = h + f(h)
    return x + m.c(h)


def shared_start(m, x):
    h = x + m.a(x)
    h = h + m.b(h)
    return x + m.c(h)


def delta_rule(m, x):
    """A fast-weight memory: a residual add by form, but no weight acts on the state."""
    state = torch.zeros(2, WIDTH, WIDTH)
    for t in range(3):
        k = m.a(x[:, t]).unsqueeze(-1)
        state = state + (m.b(x[:, t]).unsqueeze(-1) - state @ k) @ k.mT
    return x + m.c(x @ state)


def learned_from_zeros(m, x):
    """A decoder whose queries start at zero is a residual stream: weights act on it."""
    q = torch.zeros(2, 3, WIDTH)
    for f in (m.a, m.b):
        q = q + f(q + x)
    return q


WEIGHT = torch.nn.Parameter(torch.randn(2, 3, WIDTH))


def learned_queries(m, x):
    """A stream may begin at a weight."""
    q = WEIGHT
    for f in (m.a, m.b):
        q = q + f(q) @ x.mT @ x
    return q


def positions_in_a_repeated_block(m, x):
    """The second time, all that the position is added to was computed from it."""
    for _ in range(2):
        x = torch.sigmoid(m.c(x)) * x + WEIGHT  # the gate ends the stream
        x = post(m, pre(m, x))
        x = (torch.relu(x) + WEIGHT) + m.d(WEIGHT)
    return x


def first_state_in_every_sum(m, x):
    first = x
    for f in (m.a, m.b, m.c):
        x = x + f(x) + first
    return x


def stale_branch_and_state(m, x):
    """The stream is the latest state; what is added to it from an old one is no site."""
    z = pre(m, pre(m, x))
    return pre(m, z + m.c(x) + x)


def scalar_clamp(m, x):
    x = x + m.a(x)
    limit = torch.where(torch.isinf(x).any(), 1e4, 1e5)
    x = torch.clamp(x, min=-limit, max=limit)
    return x + m.b(x)


def gated_by_another(m, x):
    """Either factor could carry the stream; the branch tells which one does."""
    gate = torch.sigmoid(m.c(torch.ones(2, 3, WIDTH)))
    x = gate * x + m.a(x)
    x = gate * x + m.b(x)
    return x, gate + 1


COUNTS = {
    "pre-norm": (chain(pre, pre, pre), 3),
    "post-norm": (chain(post, post), 2),
    "relu between": (chain(pre, lambda m, x: torch.relu(x), pre), 2),
    "cast between": (chain(pre, lambda m, x: x.double().float(), pre), 2),
    "dropout between": (chain(pre, lambda m, x: F.dropout(x, 0.5), pre), 2),
    "2-D between": (
        chain(pre, lambda m, x: x.view(-1, WIDTH), pre, lambda m, x: x.view(2, 3, WIDTH), pre),
        3,
    ),
    "transposed between": (chain(pre, lambda m, x: x.transpose(0, 1), pre), 2),
    "position added between": (chain(pre, lambda m, x: x + torch.arange(3.0)[:, None], pre), 1 + 1),
    "same-shape constant between": (chain(pre, lambda m, x: x + torch.ones(2, 3, WIDTH), pre), 2),
    "scaled skip": (chain(*[lambda m, x: 0.5 * x + m.a(x)] * 2), 2),
    "learned scale of the skip": (chain(*[lambda m, x: m.scale * x + m.a(x)] * 2), 2),
    "scaled branch": (chain(*[lambda m, x: x + m.scale * m.a(x)] * 2), 2),
    "parallel (x + a) + b": (chain(*[lambda m, x: (x + m.a(x)) + m.b(x)] * 2), 2),
    "parallel x + (a + b)": (chain(*[lambda m, x: x + (m.a(x) + m.b(x))] * 2), 2),
    "parallel a + (x + b)": (chain(*[lambda m, x: m.a(x) + (x + m.b(x))] * 2), 2),
    "three branches": (chain(*[lambda m, x: m.c(x) + (x + m.b(x)) + m.a(x)] * 2), 2),
    "one branch added to itself": (
        chain(*[lambda m, x: x + (lambda f: f + f)(m.a(x) + m.b(x))] * 2),
        2,
    ),
    "skip times a gate of its shape": (gated_by_another, 2),
    "constant in the sum": (chain(*[lambda m, x: x + torch.ones_like(x) + m.a(x)] * 2), 2),
    "adapter inside": (
        chain(*[lambda m, x: x + (lambda h: h + m.b(torch.relu(h)))(m.a(x))] * 2),
        2,
    ),
    "tanh-GELU inside": (chain(gelu_inside, gelu_inside), 2),
    "rotary inside": (chain(rotary_inside, rotary_inside), 2),
    "chain inside a branch": (chain(inner_chain, inner_chain), 2 + 2 * 2),
    "chain inside a branch, one start": (chain(shared_start, shared_start), 2 + 2 * 2),
    "cumulative sum as mixing": (chain(*[lambda m, x: x + x.cumsum(1) * 0.1] * 2), 2),
    "Fourier mixing": (chain(*[lambda m, x: x + torch.fft.fft2(x).real] * 2), 2),
    "overflow clamp": (scalar_clamp, 2),
    "fast weights": (chain(delta_rule, pre), 2),
    "queries from zeros": (learned_from_zeros, 2),
    "queries from a weight": (learned_queries, 2),
    "first state in every sum": (first_state_in_every_sum, 3),
    "stale branch and state": (stale_branch_and_state, 3),
    "positions in a repeated block": (positions_in_a_repeated_block, 4),
    "lone add": (pre, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sites_are_those_a_person_counts(name: str) -> None:
    program, count = COUNTS[name]
    found = detected(program)
    assert len(found.sites) == count, [(r.node.name, r.reason) for r in found.rejected]


REJECTED = {
    Reason.GATED_SKIP: lambda m, x: torch.sigmoid(m.b(x)) * x + m.a(x),
    Reason.PROJECTED_SKIP: lambda m, x: m.b(x) + m.a(torch.relu(m.c(x))),
    Reason.POINTWISE_BRANCH: lambda m, x: x + torch.sin(x),
    Reason.INDEPENDENT: lambda m, x: x + torch.ones_like(x),
    Reason.WEIGHT: lambda m, x: x + WEIGHT,
    Reason.BROADCAST: lambda m, x: x + m.a(x).mean(1, keepdim=True),
    Reason.UNUSED: lambda m, x: (x + m.a(x), m.b(x))[1],
    Reason.CHAIN_OF_ONE: lambda m, x: m.d(x + m.a(x)),
}


def test_a_broadcast_operand_with_a_factor_is_no_site() -> None:
    """`alpha * v` was given the shape of x, and three such sums were taken for sites."""

    def function(m, x):
        for branch in (m.a, m.b, m.c):
            x = torch.add(x, branch(x).mean((0, 1)), alpha=2)
        return x

    found = detected(function)
    assert not found.sites
    assert [r.reason for r in found.rejected] == [Reason.BROADCAST] * 3


@pytest.mark.parametrize("reason", REJECTED, ids=lambda r: r.name)
def test_rejected_adds_say_why(reason: Reason) -> None:
    found = detected(REJECTED[reason])
    assert not found.sites
    assert [r.reason for r in found.rejected] == [reason]
    assert "test_detect.py:" in found.rejected[0].location


def test_a_sum_of_two_states_of_one_stream_is_no_site() -> None:
    def program(m, x):
        first = pre(m, x)
        second = pre(m, first)
        return first + second

    found = detected(program)
    assert len(found.sites) == 2
    assert [r.reason for r in found.rejected] == [Reason.SUM_OF_STATES]


def test_a_learned_position_is_not_the_stream() -> None:
    """Were it taken for one, the state before it would look like another stream's."""

    def program(m, x):
        start = x + m.scale.new_zeros(2, 3, WIDTH)
        for f in (m.a, m.b):
            x = x + WEIGHT
            x = x + f(x)
        return x + start

    found = detected(program)
    assert len(found.sites) == 2
    assert Reason.SUM_OF_STATES in [r.reason for r in found.rejected]


def test_a_memory_without_weights_is_a_recurrent_state() -> None:
    found = detected(chain(delta_rule, pre))
    assert {r.reason for r in found.rejected} == {Reason.RECURRENT_STATE}


def test_a_sum_is_one_site_whatever_stands_between_its_branches() -> None:
    found = detected(chain(*[lambda m, x: ((x + m.a(x)) + torch.ones_like(x)) + m.b(x)] * 2))
    assert [len(s.branch) for s in found.sites] == [3, 3]


def test_the_parts_of_a_sum_are_reported_as_such() -> None:
    found = detected(COUNTS["parallel (x + a) + b"][0])
    assert [r.reason for r in found.rejected] == [Reason.PART_OF_SITE] * 2


def test_chains_are_separate_where_the_width_changes() -> None:
    def program(m, x):
        x = chain(pre, pre)(m, x)
        x = torch.cat([x, x], -1)
        w = torch.ones(2 * WIDTH, 2 * WIDTH)
        x = x + x @ w * m.scale[0]
        return x + x @ w * m.scale[0]

    found = detected(program)
    assert [len(c) for c in found.chains] == [2, 2]
    assert [c[0].width for c in found.chains] == [WIDTH, 2 * WIDTH]


def test_convolutional_streams_have_their_channels_second() -> None:
    weight = torch.randn(4, 4, 3, 3)

    def block(m, x):
        return torch.relu(x + F.conv2d(x, weight, padding=1) * m.scale[0])

    found = detected(chain(block, block), stream(2, 4, 5, 5))
    assert [(s.channel, s.width, s.linear) for s in found.sites] == [(-3, 4, False)] * 2


def test_the_channel_axis_is_found_behind_a_change_of_layout() -> None:
    """The first branch mixes tokens alone; where the channels are, only the second one tells."""

    def program(m, x):
        x = x.permute(0, 2, 1)
        x = x + torch.tanh(x).cumsum(-1) @ torch.ones(3, 3)
        return pre(m, x.transpose(1, 2).reshape(-1, WIDTH))

    found = detected(program)
    assert [(s.channel_in, s.width) for s in found.sites] == [(-2, WIDTH), (-1, WIDTH)]


def test_names_come_from_the_branch() -> None:
    found = detected(chain(pre, post, lambda m, x: x + m.a(x), lambda m, x: x + x.cumsum(1)))
    assert [s.branch_name for s in found.sites] == ["a", "b", "a_1", "cumsum"]


def test_a_weight_names_the_branch_where_no_module_does() -> None:
    found = detected(chain(*[lambda m, x: x + x @ torch.diag(m.scale)] * 2))
    assert [s.branch_name for s in found.sites] == ["scale", "scale_1"]
