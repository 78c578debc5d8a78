"""A second truth for any transformed model: the streams take turns in being the plain model.

Let H_pre read one stream, H_post write to one, and H_res be a permutation of them. A route says for
every site which: it begins at stream a, and at each site the streams are turned by some d,

    H_pre = e_a,    H_res[j + d, j] = 1,    H_post = e_(a + d),    then a <- a + d  (all modulo n).

The branch reads the stream that the last write went to, and its own write goes to where H_res has
taken that stream. So one stream, the active one, goes through the plain model's states x_0, x_1,
..., x_L, all others keep x_0, and the mean (x_L + (n - 1) x_0) / n is read out. Hence

- outputs and gradients of the model's own parameters depend neither on where a route begins nor on
  how it turns. Site l of route r turns by l + r, so that each site sees every d: H_res transposed
  or missing agrees with the others at d = 0 only (transposed, at d = n / 2 as well);
- they are not the plain model's, unless x_0 = x_L;
- a site that reads another stream than the active one gets x_0, whichever it reads. So all n - 1
  mistaken routes from there on agree with each other, and not with the right one. Where the streams
  are averaged in front of a site, where a site is left plain, or where the write before it went
  elsewhere, they do not. (At a chain's first site all streams are equal: nothing to mistake.)

What a mean cannot show is how the last site of a chain distributes what it has among the streams.

It needs the parametrisation of `mhc` (saturated biases, alpha = 0) and float64, in which a weight
of 1e-43 is nothing beside 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import checks

LARGE = 100.0
"""A logit behind which sigmoid and Sinkhorn-Knopp leave 0 or 1."""

SAME = 1e-10
"""Errors up to this, of outputs and of gradients, are rounding."""
DIFFERENT = 1e-7
"""What another function differs by at least."""


@dataclass(frozen=True)
class Turns:
    """What the routes showed, as relative errors of outputs and gradients.

    Attributes:
        turned: how far two routes are apart, at most.
        plain: how far the routes are from the plain model.
        lost: how far a route is from one that loses its stream, at least; None without such sites.
    """

    turned: float
    plain: float
    lost: float | None


def assert_streams_take_turns(
    plain: nn.Module, model: nn.Module, inputs: Mapping[str, Any], n: int = 4
) -> Turns:
    """Compare all routes through a transformed float64 model, and routes that lose their stream.

    Args:
        plain: the model before it was transformed.
        model: its transformed copy, variant `mhc` with `n` streams and the mean as readout. Its
            mHC parameters are overwritten.
        inputs: keyword arguments of a call.

    Raises:
        AssertionError: the outputs show that a site is not what arXiv:2512.24880 says it is.
    """
    unrouted = checks.run(plain, inputs)
    checks.run(model, inputs)
    sites = sites_of(model)
    runs = []
    for begin in range(n):
        set_route(model, sites, n, begin)
        runs.append(checks.run(model, inputs))
    own = own_gradients(plain, runs[0])
    apart = [checks.output_error(run.outputs, runs[0].outputs) for run in runs[1:]]
    apart += [checks.gradient_error(run.gradients, own) for run in runs[1:]]
    assert max(apart) <= SAME
    from_plain = checks.output_error(runs[0].outputs, unrouted.outputs)
    assert from_plain > DIFFERENT

    from_right = []
    for site in (site for site in sites if site.previous is not None):
        lost = []
        for offset in range(1, n):
            set_route(model, sites, n, begin=0, lost=(site, offset))
            lost.append(checks.outputs_of(model, inputs))
        from_right.append(checks.output_error(lost[0], runs[0].outputs))
        assert from_right[-1] > DIFFERENT, (
            f"{site.name} does not mind which stream it reads: the streams in front of it are "
            "equal, or it is no site"
        )
        for other in lost[1:]:
            assert checks.output_error(other, lost[0]) <= SAME, (
                f"in front of {site.name} there is more than one stream that differs from the start"
            )
    return Turns(max(apart), from_plain, min(from_right, default=None))


def own_gradients(plain: nn.Module, run: checks.Run) -> dict[str, Tensor]:
    """The gradients of the parameters that the plain model has."""
    return {name: run.gradients[name] for name, _ in plain.named_parameters()}


def sites_of(model: nn.Module) -> Sequence[Any]:
    """The sites in the order of the forward: those that have parameters, and no other."""
    sites = checks.sites_of(model)
    apart = checks.connections(model).keys() ^ {site.name for site in sites}
    assert not apart, f"only with parameters, or only in the graph: {sorted(apart)}"
    return sites


@torch.no_grad()
def set_route(
    model: nn.Module,
    sites: Sequence[Any],
    n: int,
    begin: int,
    lost: tuple[Any, int] = (None, 0),
) -> None:
    """Set all mHC parameters to the route that begins at stream `begin`.

    Args:
        lost: a site, and how far from the active stream the one lies that it reads; all sites
            behind it follow that one.
    """
    connections = checks.connections(model)
    active: dict[str, int] = {}  # the stream that is active behind a site
    for site in sites:
        read = active[site.previous] if site.previous else begin
        if site is lost[0]:
            read += lost[1]
        turn = site.position + begin
        write = active[site.name] = read + turn
        _, alpha, bias = connections[site.name]
        alpha.zero_()
        bias.copy_(torch.cat([gate(read, n, LARGE), gate(write, n, 0.0), turned(turn, n)]))


def gate(stream: int, n: int, logit: float) -> Tensor:
    """Logits [n] of a gate that is open for one stream: with `logit` there, 0 elsewhere."""
    chosen = F.one_hot(torch.tensor(stream % n), n).bool()
    return torch.where(chosen, logit, -LARGE).double()


def turned(by: int, n: int) -> Tensor:
    """Logits [n * n] of the H_res that takes stream j to j + by."""
    permutation = torch.eye(n).roll(by, dims=0)  # [out, in]
    return (2 * LARGE * permutation - LARGE).double().flatten()
