"""in_place: what is written in place is seen by whom it was seen before, and by nobody else.

Each program may write into its argument. Its truth is the recurrence by hand and returns, behind
the results, what the argument has to hold afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_compile import Reason
from mhc_compile.passes.sites.canonicalize import canonicalize
from mhc_compile.passes.sites.in_place import after_write

from ..graphs import WIDTH, captured, detected, operations, stream
from ..recurrence import (
    HOW,
    assert_is_truth,
    call,
    expand,
    leaves,
    perturbed,
    site,
    without_gradient,
)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def two_sites(m: Any, x: Tensor, *branches: Callable[[Tensor], Tensor]) -> Tensor:
    first, second = branches or (m.a, m.b)
    return site(site(expand(x), m.mhc.a, first), m.mhc.b, second).mean(-2)


def f(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A branch that keeps nothing of x for backward, so that x may be overwritten."""
    return layer(2 * x)


def argument(m, x):
    x += f(m.a, x)
    x.add_(f(m.b, x))
    return x


def argument_truth(m, x):
    x = two_sites(m, x, lambda h: f(m.a, h), lambda h: f(m.b, h))
    return x, x


def read_between(m, x):
    x += f(m.a, x)
    kept = x * 2
    x += f(m.b, x)
    x *= 3
    return kept


def read_between_truth(m, x):
    X = site(expand(x), m.mhc.a, lambda h: f(m.a, h))
    kept = X.mean(-2) * 2
    return kept, 3 * site(X, m.mhc.b, lambda h: f(m.b, h)).mean(-2)


def overwritten(m, x):
    """The argument first holds something else."""
    x.mul_(0.5)
    y = x + f(m.a, x)
    y = y + m.b(y)
    x.zero_()
    return y


def overwritten_truth(m, x):
    return two_sites(m, 0.5 * x, lambda h: f(m.a, h), m.b), x * 0


def in_part(m, x):
    """Some tokens are written: the streams begin behind that."""
    x[:, 0] = 0.0
    y = x + f(m.a, x)
    return y + m.b(y)


def in_part_truth(m, x):
    x = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
    return two_sites(m, x, lambda h: f(m.a, h), m.b), x


def in_part_behind(m, x):
    """And in front of it a state that is read later."""
    before = x.clone()
    y = x + f(m.a, x)
    x[:, 0] = 0.0
    y = y + m.b(y)
    return y, x + before


def in_part_behind_truth(m, x):
    after = torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)
    return two_sites(m, x, lambda h: f(m.a, h), m.b), after + x, after


def view_before(m, x):
    """A view made before a write sees it."""
    first = x[:, 0]
    x += f(m.a, x)
    y = x + f(m.b, x)
    y = y + m.c(y)
    return y + first[:, None]


def view_before_truth(m, x):
    # its first sum is written through a view's memory: no site, and said to be none
    x = x + f(m.a, x)
    y = site(site(expand(x), m.mhc.b, lambda h: f(m.b, h)), m.mhc.c, m.c).mean(-2)
    return y + x[:, :1], x


def view_returned(m, x):
    x += f(m.a, x)
    y = x + f(m.b, x)
    y = y + m.c(y)
    return y, x.view(-1, WIDTH)


def view_returned_truth(m, x):
    x = x + f(m.a, x)
    y = site(site(expand(x), m.mhc.b, lambda h: f(m.b, h)), m.mhc.c, m.c).mean(-2)
    return y, x.view(-1, WIDTH), x


def local(m, x):
    x = m.d(x)
    x += f(m.a, x)
    x.add_(f(m.b, x))
    F.relu(x, inplace=True)
    return x


def local_truth(m, x):
    return torch.relu(two_sites(m, m.d(x), lambda h: f(m.a, h), lambda h: f(m.b, h))), x * 1


def branch_in_place(m, x):
    """A branch that writes into what it made of its input."""
    h = m.a(x)
    F.relu(h, inplace=True)
    h *= 2
    h.add_(1)
    x = x + h
    return x + m.b(x)


def branch_in_place_truth(m, x):
    return two_sites(m, x, lambda h: 2 * torch.relu(m.a(h)) + 1, m.b), x * 1


CASES = {
    "the argument": (argument, argument_truth, "a.res"),
    "the argument, read between": (read_between, read_between_truth, "a.res"),
    "the argument, overwritten": (overwritten, overwritten_truth, "a.res"),
    "in part": (in_part, in_part_truth, "a.res"),
    "in part, behind a site": (in_part_behind, in_part_behind_truth, "a.res"),
    "a view made before": (view_before, view_before_truth, "b.res"),
    "a view returned": (view_returned, view_returned_truth, "b.res"),
    "a value of the program's": (local, local_truth, "a.res"),
    "inside a branch": (branch_in_place, branch_in_place_truth, "a.res"),
}


def called(function: Callable[..., Any], m: Any, x: Tensor) -> tuple[list[Tensor], bool]:
    """Results, then what the argument holds; and whether the first result is the argument."""
    given = x * 1
    results = leaves(function(m, given))
    return [*results, given], results[0] is given


def assert_seen(case: tuple[Any, ...], how: str, *, recorded: bool) -> None:
    plain, truth, silent = case
    model, x = perturbed(plain)
    function = call(model, how)
    with torch.set_grad_enabled(recorded):
        actual, same = called(lambda m, x: function(x), model, x)
        expected = leaves(truth(model, x))
        plain_result, plain_same = called(plain, model, x)
    assert same == plain_same
    inputs = [x, *model.parameters()] if recorded else []
    assert_is_truth(actual, expected, plain_result, inputs)
    if recorded:
        assert without_gradient(model, actual) == set(silent.split())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_caller_sees_what_was_written(name: str, recorded: bool, how: str) -> None:
    assert_seen(CASES[name], how, recorded=recorded)


def out(m, x):
    torch.add(x, (2 * x).cumsum(-1), out=x)
    return x + m.b(x)


def out_truth(m, x):
    X = site(expand(x), m.mhc.cumsum, lambda h: (2 * h).cumsum(-1))
    return site(X, m.mhc.b, m.b).mean(-2), X.mean(-2)


@pytest.mark.parametrize("how", HOW)
def test_the_caller_sees_a_sum_written_by_out(how: str) -> None:
    """torch has it only where no gradients are recorded."""
    assert_seen((out, out_truth, ""), how, recorded=False)


def test_what_is_written_in_part_has_another_node_behind_it() -> None:
    gm, context = captured(in_part)
    canonicalize(gm, context)
    (version,) = gm.graph.find_nodes(op="call_function", target=after_write)
    assert version.prev.target is operator.setitem
    assert {u.target for u in version.users} == {operator.add, operator.mul}


def test_a_write_that_is_left_is_no_site() -> None:
    found = detected(view_before)
    assert [s.name for s in found.sites] == ["b", "c"]
    assert [r.reason for r in found.rejected if r.reason is Reason.IN_PLACE] == [Reason.IN_PLACE]


def shared(m, x, y):
    """Two arguments that may show the same memory."""
    x += 1
    return m.a(y) + x


def test_arguments_that_share_memory_are_written_as_they_stand() -> None:
    x = stream()
    gm, context = captured(shared, x, stream())
    canonicalize(gm, context)
    assert "iadd" not in operations(gm)
    gm, context = captured(shared, x, x.view(x.shape))
    canonicalize(gm, context)
    assert "iadd" in operations(gm)


def added_wider(m, x, wide):
    y = m.a(x)
    y += wide
    return y * 1


def copied_wider(m, x, wide):
    y = m.a(x)
    y.copy_(wide)
    return y * 1


@pytest.mark.parametrize("function", [added_wider, copied_wider])
def test_a_write_keeps_the_dtype_of_what_it_writes_into(function: Callable[..., Tensor]) -> None:
    gm, context = captured(function, stream(), stream().double())
    canonicalize(gm, context)
    gm.recompile()
    (result,) = gm(*(node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")))
    assert result.dtype is torch.float32


def unrecorded(m, x):
    """The gradient of y stays what it was, as if nothing had been written."""
    y = m.a(x)
    with torch.no_grad():
        y.mul_(2)
    return y * m.scale


def recorded(m, x):
    y = m.a(x)
    y.mul_(2)
    return y * m.scale


def test_what_is_written_where_no_gradients_are_recorded_stays_a_write() -> None:
    for function, stays in ((unrecorded, True), (recorded, False)):
        gm, context = captured(function)
        canonicalize(gm, context)
        assert ("mul_" in operations(gm)) == stays
