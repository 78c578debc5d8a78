"""Operators are known by what they are, not by what they are called."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile.errors import NoSitesError
from mhc_compile.passes.graph.operators import UNKNOWN, Kind, op_name, op_of
from tests.passes.graphs import WIDTH

from .met import LIST, found


@torch.library.custom_op("mhc_test::add", mutates_args=())
def custom_add(x: Tensor, y: Tensor) -> Tensor:
    return x + 3 * y


@custom_add.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch._dynamo.allow_in_graph
def add(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@torch._dynamo.allow_in_graph
def linear(x: Tensor, weight: Tensor) -> Tensor:
    return (x.cumsum(-1) @ weight.T).sin()


@torch._dynamo.allow_in_graph
def dropout(x: Tensor, p: float) -> Tensor:
    return x.flip(-1)


def call(target: Any, *args: Any) -> fx.Node:
    return fx.Graph().create_node("call_function", target, args)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (operator.add, "add"),
        (operator.iadd, "iadd"),
        (torch.add, "add"),
        (F.linear, "linear"),
        (F.layer_norm, "layer_norm"),
        (torch.nn.functional.scaled_dot_product_attention, "scaled_dot_product_attention"),
        (Tensor.__radd__, "add"),
        (torch.ops.aten.add.Tensor, "add"),
        (torch.ops.mhc_test.add.default, "mhc_test::add"),
        (add, "tests.passes.graph.test_operators::add"),
        (dropout, "tests.passes.graph.test_operators::dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_only_known_functions_have_a_bare_name(target: Any, name: str) -> None:
    node = call(target)
    assert op_name(node) == name
    if "::" in name:
        assert op_of(node).kind is Kind.MIXING


class Block(nn.Module):
    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.linear, self.combine = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), combine

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(x, self.linear(self.norm(x)))


class Strange(Tensor):
    """A tensor whose sums and norms are its own."""

    def add(self, other: Tensor) -> Tensor:
        return torch.maximum(self, other)

    def sin(self) -> Tensor:
        return torch.cos(self)


def test_a_method_of_a_subclass_is_the_subclass_s() -> None:
    graph = fx.Graph()
    strange, plain = graph.placeholder("strange"), graph.placeholder("plain")
    strange.meta["example_value"] = torch.ones(2).as_subclass(Strange)
    plain.meta["example_value"] = torch.ones(2)
    named = lambda value, name: op_of(graph.call_method(name, (value, plain))).name  # noqa: E731
    assert [named(plain, n) for n in ("add", "mul", "sin")] == ["add", "mul", "sin"]
    assert [named(strange, n) for n in ("add", "mul", "sin")] == ["", "mul", ""]


@pytest.mark.parametrize(
    "name", ["add", "mul", "linear", "rms_norm", "layer_norm", "dropout", "to"]
)
def test_a_function_of_the_users_own_is_none_of_ours(name: str) -> None:
    def own(*args: Any) -> Any: ...

    own.__name__ = own.__qualname__ = name
    library = torch.library.Library("mhc_test", "FRAGMENT")
    library.define(f"{name}.named(Tensor x) -> Tensor")
    overload = getattr(getattr(torch.ops.mhc_test, name), "named")  # noqa: B009
    for target in (own, overload, lambda x: own(x)):
        assert op_of(call(target)) is UNKNOWN


@pytest.mark.parametrize("combine", [custom_add, add], ids=["custom_op", "allow_in_graph"])
def test_an_add_of_the_users_own_is_no_residual_add(combine: Any) -> None:
    """A7: it was taken for `+`, and the output was another one."""
    model = nn.Sequential(*(Block(combine) for _ in range(3))).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    expected = model(x)
    with pytest.raises(NoSitesError):
        mhc_compile.transform(model, n=4, example_inputs=(x,))
    assert model(x).equal(expected)


class InBranches(nn.Module):
    """Own functions inside of branches, called like others: they compute what they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + dropout(linear(x, self.weight), 0.5)


def test_functions_of_the_users_own_stay_what_they_are() -> None:
    from tests import checks
    from tests.zoo.truth import Streams, readout

    plain = nn.Sequential(InBranches(), InBranches()).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    expected = plain(x)
    model = mhc_compile.transform(plain, n=4, example_inputs=(x,))
    assert checks.error(model(x), expected) < 1e-12
    checks.assert_moves(model, (x,))
    streams = Streams(4, checks.connections(model))
    X = streams.expand(x)
    for (name, _), block in zip(checks.connections(model).items(), model, strict=True):
        X = streams.connect(X, name, lambda h, w=block.weight: (h.cumsum(-1) @ w.T).sin().flip(-1))
    assert checks.error(model(x), readout(X)) < 1e-12


MIXING = """
    F.adaptive_avg_pool2d F.avg_pool2d F.embedding F.max_pool2d F.multi_head_attention_forward
    F.scaled_dot_product_attention Tensor.bernoulli_ Tensor.bool Tensor.cumsum Tensor.int
    Tensor.long
    torch._C._fft.fft_fftn torch._functorch.predispatch._add_batch_dim
    torch._functorch.predispatch._remove_batch_dim
    torch._functorch.predispatch._vmap_decrement_nesting
    torch._functorch.predispatch._vmap_increment_nesting
    torch._functorch.predispatch.lazy_load_decompositions torch._weight_norm
    torch.adaptive_avg_pool1d torch.arange torch.cumsum torch.diff torch.histc torch.rand
    torch.tensor
""".split()
"""What models use and the table does not have on purpose: it combines tokens or channels, or no
stream passes it."""


def test_every_operation_of_the_zoo_is_known_or_mixes_on_purpose() -> None:
    """`python -m tests.passes.graph.met` adds what new models use to the list."""
    listed = LIST.read_text(encoding="utf-8").split()
    assert len(listed) > 100 and set(MIXING) <= set(listed)
    unknown = [
        text
        for text in listed
        if not (text in MIXING and text.startswith("torch._"))  # not of every version of torch
        and op_of(fx.Graph().create_node(*found(text), ())) is UNKNOWN
    ]
    assert sorted(unknown) == sorted(t for t in MIXING if not t.startswith("torch._"))
