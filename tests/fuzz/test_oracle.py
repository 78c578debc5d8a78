"""The oracle counts, on programs short enough to count by hand, what a person counts."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import captured
from .oracle import CHAIN_OF_ONE, RECURRENT, SITE, accepted, residual_adds

C = 8


class Net(nn.Module):
    """A function of (net, x, y), x and y [2, 3, C], with a few weights to use."""

    def __init__(self, function: Callable[["Net", Tensor, Tensor], object]) -> None:
        super().__init__()
        self.f, self.g, self.h = (nn.Linear(C, C) for _ in range(3))
        self.norm, self.scale = nn.LayerNorm(C), nn.Parameter(torch.ones(C))
        self.embed = nn.Embedding(5, C)
        self.position = nn.Parameter(torch.ones(2, 3, C))
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> object:
        return self.function(self, x, y)


def graph_of(function: Callable[[Net, Tensor, Tensor], object]) -> torch.fx.Graph:
    model = Net(function).double()
    return captured(model, *torch.randn(2, 2, 3, C, dtype=torch.float64)).graph


def blocks(net: Net, x: Tensor, count: int) -> Tensor:
    """`count` residual sites."""
    for _ in range(count):
        x = x + net.f(x)
    return x


def pre_norm(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(3):
        h = net.norm(x)
        x = x + F.scaled_dot_product_attention(h, h, h)
        x = x + net.f(F.gelu(net.g(net.norm(x))))
    return x


def post_norm(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(3):
        x = net.norm(x + net.f(x))
    return x


def spelled_post_norm(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(3):
        x = x + net.f(x)
        x = net.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    return x


def parallel(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = x + net.f(x) + net.g(x)
    x = net.f(x) + (x + net.g(x))
    return (net.f(x) + net.g(x)) + x


def parallel_with_bias(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + net.f(x) + net.h(y) + net.g(x)
    return x


def scaled(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = 0.5 * x + net.f(x)
    x = x * net.scale + net.f(x) * net.scale
    return F.dropout(x, 0.1) + net.f(x)


def in_place(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = 1.0 * x
    x += net.f(2.0 * x)
    x.add_(net.f(2.0 * x))
    f = net.f(x)
    f += x
    return torch.add(f, net.g(f), alpha=0.5)


def relayout(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = x + net.f(x)
    x = x.reshape(-1, C)
    x = x + net.f(x)
    x = x.view(2, 3, C).transpose(1, 2)
    return x + net.f(x.transpose(1, 2)).transpose(1, 2)


def lost_channels(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = blocks(net, x, 2)
    return blocks(net, net.f(x.reshape(2, 3, 2, C // 2).flatten(-2)), 2)


def gated(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.sigmoid(net.g(x)) * x + net.f(x)
    return x


def gated_by_another(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.sigmoid(net.g(y)) * x + net.f(x)
    return x


def projected(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = net.g(x) + net.f(x)
    return x


def pointwise(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + torch.sin(x)
    return x


def broadcast(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + net.f(x).mean(1, keepdim=True)
    return x


def integers(net: Net, x: Tensor, y: Tensor) -> Tensor:
    i = x.argmax(-1)
    i = i + i.cumsum(-1)
    return net.embed(i % 5)


def independent(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return blocks(net, blocks(net, x, 1) + net.h(y), 1)


def one_site(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return net.g(blocks(net, net.f(x), 1))


def two_chains_of_one(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return blocks(net, net.g(blocks(net, x, 1)), 1)


def ended_by_pointwise(net: Net, x: Tensor, y: Tensor) -> Tensor:
    x = blocks(net, x, 2)
    x = x + torch.sin(x)
    return blocks(net, x, 1)


def sum_of_states(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return blocks(net, x, 3) + x


def doubled(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = blocks(net, x, 1)
        x = x + x
    return x


def long_skip(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + net.h(blocks(net, x, 2))
    return x


def long_skip_over_one(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(3):
        x = x + net.h(blocks(net, x, 1))
    return x


def inner_chain(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + blocks(net, net.g(x), 2)
    return x


def inner_chain_of_one(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + blocks(net, net.g(x), 1)
    return x


def stale_branch(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = blocks(net, x, 2)
    return blocks(net, z + net.g(x), 1)


def encoder_decoder(net: Net, x: Tensor, y: Tensor) -> Tensor:
    memory = net.norm(blocks(net, y, 2))
    for _ in range(2):
        h = net.norm(x)
        x = x + F.scaled_dot_product_attention(h, h, h)
        x = x + F.scaled_dot_product_attention(net.norm(x), memory, memory)
        x = x + net.g(x)
    return x


def inside_the_branch(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        u = net.f(x)
        u = 0.5 * u * (1.0 + torch.tanh(0.8 * (u + 0.044715 * u**3)))
        q = u * y.cos() + torch.cat((-u[..., 4:], u[..., :4]), -1) * y.sin()
        x = x + net.g(q)
    return x


def squeeze_and_excite(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = x + x * torch.sigmoid(net.f(x))
    return x


def recurrence(net: Net, x: Tensor, y: Tensor) -> Tensor:
    k = net.f(x)
    state = x.new_zeros(2, C, C)
    for t in range(3):
        key = k[:, t, :, None]
        state = state + (y[:, t, :, None] - state @ key) @ key.mT
    return x @ state


def hidden_states(net: Net, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    states = [x]
    for _ in range(3):
        x = x + net.f(x)
        states.append(net.norm(x))
    return tuple(states)


def first_state_in_every_sum(net: Net, x: Tensor, y: Tensor) -> Tensor:
    first = x
    for _ in range(3):
        x = x + net.f(x) + first
    return x


def stale_branch_and_state(net: Net, x: Tensor, y: Tensor) -> Tensor:
    z = blocks(net, x, 2)
    return blocks(net, z + net.g(x) + x, 1)


def learned_queries(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return blocks(net, net.position, 2) @ y.mT @ x


def repeated_position(net: Net, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.sigmoid(net.g(x)) * x + net.position
        x = blocks(net, x, 2)
        x = F.relu(x) + net.position + net.h(net.position)
    return x


@pytest.mark.parametrize(
    ("function", "sites"),
    [
        (pre_norm, 6),
        (post_norm, 3),
        (spelled_post_norm, 3),
        (parallel, 3),
        (parallel_with_bias, 2),
        (scaled, 3),
        (in_place, 4),
        (relayout, 3),
        (lost_channels, 4),
        (gated, 0),
        (gated_by_another, 2),
        (projected, 0),
        (pointwise, 0),
        (broadcast, 0),
        (integers, 0),
        (independent, 2),
        (one_site, 0),
        (two_chains_of_one, 0),
        (ended_by_pointwise, 2),
        (sum_of_states, 3),
        (doubled, 2),
        (long_skip, 6),
        (long_skip_over_one, 3),
        (inner_chain, 6),
        (inner_chain_of_one, 2),
        (stale_branch, 3),
        (encoder_decoder, 8),
        (inside_the_branch, 2),
        (squeeze_and_excite, 2),
        (recurrence, 0),
        (hidden_states, 3),
        (first_state_in_every_sum, 3),
        (stale_branch_and_state, 3),
        (learned_queries, 2),
        (repeated_position, 4),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_counts_what_a_person_counts(
    function: Callable[[Net, Tensor, Tensor], object], sites: int
) -> None:
    assert len(accepted(graph_of(function))) == sites


@pytest.mark.parametrize(
    ("function", "verdicts"),
    [
        (one_site, [CHAIN_OF_ONE]),
        (two_chains_of_one, [CHAIN_OF_ONE] * 2),
        (ended_by_pointwise, [SITE, SITE, CHAIN_OF_ONE]),
        (inner_chain_of_one, [CHAIN_OF_ONE, SITE] * 2),
        (long_skip_over_one, [CHAIN_OF_ONE, SITE] * 3),
        (recurrence, [RECURRENT] * 3),
        (gated, []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_verdicts(function: Callable[[Net, Tensor, Tensor], object], verdicts: list[str]) -> None:
    assert [found.verdict for found in residual_adds(graph_of(function))] == verdicts


@pytest.mark.parametrize(
    ("function", "chains"),
    [
        (pre_norm, 1),
        (relayout, 1),
        (lost_channels, 2),
        (encoder_decoder, 2),
        (long_skip, 3),
        (inner_chain, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_chains(function: Callable[[Net, Tensor, Tensor], object], chains: int) -> None:
    assert len({found.chain for found in residual_adds(graph_of(function))}) == chains
