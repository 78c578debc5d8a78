"""Whose an add is: one function of four sites, held, wrapped and reached in every way.

Whatever a model looks like around them, its blocks apply `x + a(x)`, then `x + b(relu(x))`, twice.
So
one recurrence, written by hand in `truth`, says what each has to compute, perturbed as well.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

import mhc_compile
from mhc_compile import _torch
from tests import checks
from tests.zoo.truth import Streams, readout

WIDTH = 8
EXACT = 1e-12


class Block(nn.Module):
    """Two residual adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x.relu())


class Root(nn.Module):
    """Two blocks, as everybody writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x))


class Own(nn.Module):
    """The same adds, all of them in the root."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x.relu())
        x = x + self.c(x)
        return x + self.d(x.relu())


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


# --- roots whose blocks are reached in other ways -------------------------------------------------


class Decorated(Root):
    @decorator
    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x))


class DecoratedTwice(Root):
    @decorator
    @decorator
    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.p(x))


class DecoratedBlock(Block):
    @decorator
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x.relu())


class OfDecoratedBlocks(Root):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = DecoratedBlock(), DecoratedBlock()


class DecoratedOwner(Own):
    forward = decorator(Own.forward)


class WithGetattr(Root):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class OwnerWithGetattr(Own):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class CallsForward(Root):
    def forward(self, x: Tensor) -> Tensor:
        return self.q.forward(self.p.forward(x))


class PlainList(Root):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [self.p, self.q]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class PlainDict(Root):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = {"first": self.p, 2: self.q}

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[2](self.blocks["first"](x))


class Modules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"first": nn.ModuleList([Block()]), "then": Block()})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["then"](self.blocks["first"][0](x))


class Property(Root):
    @property
    def first(self) -> nn.Module:
        return self.p

    def forward(self, x: Tensor) -> Tensor:
        return self.q(self.first(x))


class Closure(Root):
    def __init__(self) -> None:
        super().__init__()
        p, q = self.p, self.q
        self.run = [lambda x: q(p(x))]

    def forward(self, x: Tensor) -> Tensor:
        return self.run[0](x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Closure:
        copied = Closure().double()
        copied.load_state_dict(self.state_dict())
        return copied


class Partial(Root):
    def forward(self, x: Tensor) -> Tensor:
        return functools.partial(self.q)(functools.partial(self.p, x=x)())


class TwoPaths(Root):
    """One block is held by the root as well, under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(Block())
        self.alias = self.q[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.p(x))


class Super(Root):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class BlockWithSuper(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OfBlocksWithSuper(Root):
    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = BlockWithSuper(), BlockWithSuper()


class HeldTwiceOver(nn.Module):
    """A wrapper in a wrapper, the outer of which is transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(Decorated())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(*args, **kwargs)


class Static(Root):
    """Methods that are none of the module that calls them."""

    @staticmethod
    def run(p: nn.Module, q: nn.Module, x: Tensor) -> Tensor:
        return q(p(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.p, self.q, x)


ROOTS = [
    Root, Own, Decorated, DecoratedTwice, OfDecoratedBlocks, DecoratedOwner, WithGetattr,
    OwnerWithGetattr, CallsForward, PlainList, PlainDict, Modules, Property, Closure, Partial,
    TwoPaths, Super, OfBlocksWithSuper, HeldTwiceOver, Static,
]  # fmt: skip


# --- what users do to a model before they transform it --------------------------------------------


def forward_on_the_root(root: nn.Module) -> None:
    root.forward = types.MethodType(Own.forward, root)


def function_on_the_root(root: nn.Module) -> None:
    root.forward = lambda x: root.q(root.p(x))


def forward_on_a_block(root: nn.Module) -> None:
    root.p.forward = types.MethodType(Block.forward, root.p)


def old_forward_wrapped(root: nn.Module) -> None:
    """As accelerate's `add_hook_to_module` does it."""
    for module in (root, root.p, root.q):
        module.forward = functools.partial(lambda old, *args: old(*args), module.forward)


def weights_parametrized(root: nn.Module) -> None:
    for linear in (root.p.a, root.q.b):
        parametrize.register_parametrization(linear, "weight", nn.Identity())


def owner_parametrized(root: nn.Module) -> None:
    for block in (root.p, root.q):
        block.scale = nn.Parameter(torch.ones(()))
        parametrize.register_parametrization(block, "scale", nn.Identity())


BEFORE = [
    (Own, forward_on_the_root),
    (Root, function_on_the_root),
    (Root, forward_on_a_block),
    (Root, old_forward_wrapped),
    (Root, weights_parametrized),
    (Root, owner_parametrized),
]


# --- the checks -----------------------------------------------------------------------------------


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="mhc")
    return model


CALLS: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="mhc"),
    "in place": in_place,
}


@pytest.fixture(params=CALLS)
def called(request, monkeypatch) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    """How a transformed model is called; Inductor's place is taken by the graph itself."""
    monkeypatch.setattr(_torch, "compile_inductor", lambda graph, inputs, patches: graph.forward)
    yield CALLS[request.param]
    torch._dynamo.reset()


NOT_IN_PLACE = pytest.mark.parametrize("called", ["plain", "compiled"], indirect=True)
CHANGEABLE = pytest.mark.parametrize("called", ["plain", "in place"], indirect=True)
"""`torch.compile(model)` compares no forwards that were replaced: see `test_..._is_named`."""


def tokens() -> Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)).double()


def branches(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The four branches in their order: all such models hold their linears in it."""
    a, b, c, d = (m for m in model.modules() if type(m).__name__.endswith("Linear"))
    return [a, lambda x: b(x.relu()), c, lambda x: d(x.relu())]


def truth(model: nn.Module, x: Tensor, n: int = 4) -> Tensor:
    """The recurrence with the model's own weights, sites in the order in which they run."""
    parameters = checks.connections(model)
    names = [site.name for site in mhc_compile.graphs(model)[-1].sites]
    names = [next(p for p in parameters if f".{p}".endswith(f".{n}")) for n in names]
    assert len(names) == 4 and set(names) == parameters.keys()
    streams = Streams(n, parameters)
    X = streams.expand(x)
    for name, branch in zip(names, branches(model), strict=True):
        X = streams.connect(X, name, branch)
    return readout(X)


def assert_rewritten(plain: nn.Module, model: nn.Module, call: Callable[..., Any]) -> None:
    """Equal at the start; perturbed it moves, has gradients, and is the recurrence."""
    x = tokens()
    compared = checks.assert_transformed(plain, model, (x,), called=call)
    assert checks.output_error(compared.perturbed.outputs, [truth(model, x)]) < EXACT


@NOT_IN_PLACE
@pytest.mark.parametrize("make", ROOTS)
def test_blocks_are_found_however_they_are_reached(make, called):
    plain = make().double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    assert_rewritten(plain, model, called(model))


@pytest.mark.parametrize(("make", "change"), BEFORE)
def test_what_was_done_before_a_model_was_transformed_counts(make, change, called):
    plain = make().double()
    model = copy.deepcopy(plain)
    change(plain)
    change(model)
    mhc_compile.transform(model, example_inputs=(tokens(),))
    assert_rewritten(plain, model, called(model))


@pytest.mark.parametrize(("make", "change"), BEFORE)
@CHANGEABLE
@pytest.mark.parametrize("run_first", [False, True], ids=["never called", "called before"])
def test_what_is_done_afterwards_counts(make, change, run_first, called):
    plain = make().double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    call = called(model)
    if run_first:
        call(tokens())
    change(plain)
    change(model)
    if change is owner_parametrized:
        plain.p.scale.requires_grad_(False)
    assert_rewritten(plain, model, call)


def halved(self: nn.Module, x: Tensor) -> Tensor:
    """Another forward, with the same sites."""
    x = x + self.a(0.5 * x)
    return x + self.b(x.relu())


def test_a_forward_replaced_on_the_class_counts_at_the_next_call(called, monkeypatch):
    plain = Root().double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    call = called(model)
    before = call(tokens())
    monkeypatch.setattr(Block, "forward", halved)
    assert checks.error(call(tokens()), before) > 1e-3
    checks.assert_transformed(plain, model, (tokens(),), called=call)


@CHANGEABLE
def test_a_forward_replaced_on_an_instance_counts_at_the_next_call(called):
    plain = Root().double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(tokens(),))
    call = called(model)
    call(tokens())
    for root in (plain, model):
        root.q.forward = types.MethodType(halved, root.q)
    checks.assert_transformed(plain, model, (tokens(),), called=call)
    with checks.parameters_kept(model):
        checks.perturb(model)
        replaced = model(tokens())
    del plain.q.forward, model.q.forward
    assert checks.error(model(tokens()), replaced) > 1e-3


@CHANGEABLE
@pytest.mark.parametrize("place", ["", "q"])
@pytest.mark.parametrize("run_first", [False, True], ids=["never called", "called before"])
def test_forwards_that_are_set_again_and_taken_away_count(place, run_first, called):
    """One around another, as accelerate's hooks are; each has an effect of its own."""
    model = mhc_compile.transform(Root().double(), example_inputs=(tokens(),))
    checks.perturb(model)
    call, x, part = called(model), tokens(), model.get_submodule(place)
    if run_first:
        call(x)
    results = [call(x)]
    for factor in (2.0, 3.0):
        inner = part.forward
        part.forward = lambda h, inner=inner, factor=factor: factor * inner(h)
        results.append(call(x))
    assert checks.error(results[1], 2 * results[0]) < EXACT or place
    assert checks.error(results[2], 6 * results[0]) < EXACT or place
    assert all(checks.error(a, b) > 1e-2 for a, b in itertools.combinations(results, 2))
    with pytest.raises(mhc_compile.MhcError, match=r"another transformed model|would be plain"):
        copy.deepcopy(model)(x)  # the functions still refer to this model
    part.forward = lambda h: torch.zeros_like(h)
    assert not call(x).any()
    del part.forward
    assert checks.error(call(x), results[0]) < EXACT


@CHANGEABLE
def test_a_forward_replaced_on_the_class_that_transform_made_is_refused(called):
    model = mhc_compile.transform(Root().double(), example_inputs=(tokens(),))
    call = called(model)
    original = type(model).forward
    type(model).forward = lambda self, x: self.q(self.p(x))
    try:
        with pytest.raises(mhc_compile.MhcError, match="Replace it on the class that you wrote"):
            call(tokens())
    finally:
        type(model).forward = original


# --- wrappers -------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What a user writes around a model for a trainer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["x"])


@NOT_IN_PLACE
@pytest.mark.parametrize("make", [Root, Own, Decorated, WithGetattr])
def test_a_wrapper_around_a_transformed_model(make, called):
    plain = Wrapper(make().double())
    model = copy.deepcopy(plain)
    mhc_compile.transform(model.model, example_inputs=(tokens(),))
    x = tokens()
    compared = checks.assert_transformed(plain, model, ({"x": x},), called=called(model))
    assert checks.output_error(compared.perturbed.outputs, [truth(model, x)]) < EXACT


@NOT_IN_PLACE
@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, nn.Sequential])
@pytest.mark.parametrize("make", [Root, Own, Decorated, WithGetattr])
def test_wrappers_of_torch(make, wrap, called):
    plain = wrap(make().double())
    model = wrap(mhc_compile.transform(make().double(), example_inputs=(tokens(),)))
    inner = plain.state_dict()
    model.load_state_dict({**model.state_dict(), **inner})
    assert_rewritten(plain, model, called(model))


def test_a_parametrization_of_an_owner_outlives_revert():
    """E3: what was added to an owner since it was transformed is not ours to take away."""
    model = mhc_compile.transform(Root().double(), example_inputs=(tokens(),))
    owner_parametrized(model)
    mhc_compile.revert(model)
    assert parametrize.is_parametrized(model.p, "scale")
    assert type(model.p).__mro__[1] is Block
    plain = Root().double()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert model(tokens()).equal(plain(tokens()))
