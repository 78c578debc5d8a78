"""hoist_views: other shapes of the tokens move in front of post_res; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mhc_compile.kernels.variants import get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.hoist_views import hoist_views
from mhc_compile.passes.graph.operators import op_name, shape_of

from ..open_sites import run, traced

N, WIDTH = 3, 5
LEAD = (2, 3, 4)


def operands() -> list[Tensor]:
    """H_res, H_post, X and f of 2 x 3 x 4 tokens."""
    shapes = ((*LEAD, N, N), (*LEAD, N), (*LEAD, N, WIDTH), (*LEAD, WIDTH))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def behind_post_res(view: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda H_res, H_post, X, f: view(torch.ops.mhc.post_res.default(H_res, H_post, X, f))


def hoisted(view: Callable[[Tensor], Any]) -> tuple[fx.GraphModule, list[str]]:
    gm = traced(behind_post_res(view), operands())
    result = hoist_views(gm, Context(Options(2, get_variant("mhc"))))
    gm.graph.lint()
    gm.recompile()
    assert result.changed == bool(result.notes)
    return gm, result.notes


def post_res(gm: fx.GraphModule) -> fx.Node:
    (node,) = (n for n in gm.graph.nodes if op_name(n) == "post_res")
    return node


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda X: X.reshape(24, N, WIDTH),
    "a size left open": lambda X: X.reshape((-1, N, WIDTH)),
    "function": lambda X: torch.reshape(X, (6, 4, N, WIDTH)),
    "view": lambda X: X.view(4, 2, 3, N, WIDTH),
    "flatten": lambda X: X.flatten(0, 1),
    "unflatten": lambda X: X.unflatten(2, (2, 2)),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_view_of_tokens_moves_in_front(name: str) -> None:
    view = MOVED[name]
    gm, notes = hoisted(view)
    assert notes == ["1 views of tokens moved in front of mhc.post_res"]
    node = post_res(gm)
    assert [op_name(n) for n in node.users] == ["output"]
    assert shape_of(node) == tuple(view(operands()[2]).shape)
    inputs = operands()
    expected = run(behind_post_res(view), inputs)
    assert all(torch.equal(a, b) for a, b in zip(run(gm, inputs), expected, strict=True))


STAYS: dict[str, Callable[[Tensor], Any]] = {
    "streams take part": lambda X: X.reshape(*LEAD, N * WIDTH),
    "streams and channels change places": lambda X: X.reshape(24, WIDTH, N),
    "streams are flattened with tokens": lambda X: X.flatten(2, 3),
    "streams are unflattened": lambda X: X.unflatten(3, (1, N)),
    "bits": lambda X: X.view(torch.int64).double(),
    "tokens change places": lambda X: X.transpose(0, 1),
    "other readers": lambda X: X.reshape(24, N, WIDTH).sum() + X,
    "a write": lambda X: X.reshape(24, N, WIDTH).add_(1.0),
}


@pytest.mark.parametrize("name", STAYS)
def test_anything_else_stays(name: str) -> None:
    gm, notes = hoisted(STAYS[name])
    assert not notes
    assert shape_of(post_res(gm)) == (*LEAD, N, WIDTH)


def test_a_view_that_is_given_a_whole_size_stays() -> None:
    def program(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
        return torch.ops.mhc.post_res.default(H_res, H_post, X, f).view(X.size())

    gm = traced(program, operands())
    assert not hoist_views(gm, Context(Options(2, get_variant("mhc")))).changed


def test_what_is_overwritten_before_the_view_is_not_read_behind_it() -> None:
    def program(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
        f = f * 1.0
        made = torch.ops.mhc.post_res.default(H_res, H_post, X, f)
        f.zero_()
        return made.reshape(24, N, WIDTH)

    gm = traced(program, operands())
    assert not hoist_views(gm, Context(Options(2, get_variant("mhc")))).changed
