"""A forward that goes through its own children, parameters or items finds those of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import UnsupportedError
from tests.checks import assert_moves

WIDTH = 8


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Indexed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(len(self)):
            x = x + self[i](x.tanh()) / len(self)
        return x + self[-1](x.tanh())


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x.tanh())
        for layer in self[1:]:
            x = x + layer(x.tanh())
        return x


class Named(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        for name in self:
            x = x + self[name](x.tanh())
        for _, layer in self.items():
            x = x + layer(x.sin())
        for layer in self.values():
            x = x + layer(x.cos())
        return x * len(self)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()


class Children(Two):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = x + child(x.tanh())
        for name, child in self.named_children():
            x = x + child(x.sin()) * len(name)
        return x


class Modules(Two):
    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_modules():
            x = x + module(x.tanh()) if name else x
        return x / len(list(self.modules()))


class Decay(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x.tanh())
        x = x + self.b(x.tanh())
        return x.pow(2).mean(-1) + 0.1 * sum(p.pow(2).sum() for p in self.parameters())


class DecayOfParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Children(), Children()])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x + sum(p.sum() for name, p in self.named_parameters() if "a" in name)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual sequential": lambda: nn.Sequential(*(Residual(linear(), nn.Tanh()) for _ in "abc")),
    "sequential": lambda: Indexed(linear(), linear()),
    "list": lambda: Listed([linear(), linear()]),
    "dict": lambda: Named({"one": linear(), "two": linear()}),
    "children": Children,
    "modules": Modules,
    "parameters": Decay,
    "parameters of parts": DecayOfParts,
}


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_finds_what_it_did_before(name: str, compiled: bool) -> None:
    x, plain = torch.randn(3, WIDTH), MODELS[name]()
    model = mhc_compile.transform(copy.deepcopy(plain), n=3, example_inputs=(x,))
    call: Any = torch.compile(model, backend="mhc") if compiled else model
    torch.testing.assert_close(call(x), plain(x), rtol=1e-5, atol=1e-5)
    assert_moves(model, (x,), called=call)


def test_outside_of_it_the_mhc_parameters_are_there() -> None:
    x, model = torch.randn(3, WIDTH), Indexed(linear(), linear())
    mhc_compile.transform(model, n=3, example_inputs=(x,))
    assert {name for name, _ in model.named_children()} == {"0", "1", "mhc"}
    names = {name for name, _ in model.named_parameters()}
    assert len(names) == 4 + 9 and names == set(model.state_dict()) - {"mhc._extra_state"}
    model.double()
    assert {p.dtype for p in mhc_compile.parameters(model)} == {torch.float64}
    assert len(model) == 2 and list(model) == [model[0], model[1]] and model[-1] is model[1]
    part = model[1:]
    assert type(part) is Indexed and len(part) == 1 and part[0] is model[1]


def test_the_class_of_a_model_makes_plain_ones() -> None:
    x = torch.randn(3, WIDTH)
    model = mhc_compile.transform(DecayOfParts(), n=3, example_inputs=(x,))
    new = type(model)()
    assert type(new) is DecayOfParts and list(mhc_compile.parameters(model))
    new.load_state_dict(mhc_compile.revert(copy.deepcopy(model)).state_dict())
    torch.testing.assert_close(new(x), model(x), rtol=1e-5, atol=1e-5)
    assert_moves(model, (x,))


def test_code_that_asks_for_the_exact_class_takes_another_way() -> None:
    x, model = torch.randn(3, WIDTH), Children()
    mhc_compile.transform(model, n=3, example_inputs=(x,))
    assert isinstance(model, Children) and type(model) is not Children
    assert type(model).__name__ == "Children"
    assert_moves(model, (x,))


def test_a_class_that_cannot_have_a_subclass_is_refused() -> None:
    class Keyed(Decay):
        def __init_subclass__(cls, *, key: str) -> None:
            super().__init_subclass__()

    x, model = torch.randn(3, WIDTH), Keyed()
    with pytest.raises(UnsupportedError, match=r"Keyed does not allow a subclass.*'key'"):
        mhc_compile.transform(model, n=3, example_inputs=(x,))
    assert type(model) is Keyed and "mhc" not in dict(model.named_children())


def test_a_call_that_runs_no_site_does_not_speak_of_frozen_parameters(recwarn: Any) -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Decay(), Decay()])
            self.head = linear()

        def forward(self, x: Tensor, active: tuple[bool, ...] = (True, True)) -> Tensor:
            for layer, runs in zip(self.layers, active, strict=True):
                x = x + layer.a(x.tanh()) if runs else x
            return self.head(x)

    x, model = torch.randn(3, WIDTH), Skips()
    mhc_compile.transform(model, n=3, example_inputs=(x,))
    assert_moves(model, (x,))
    model(x, (False, False))
    assert not [w for w in recwarn if "frozen" in str(w.message)]
