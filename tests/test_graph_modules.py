"""Models that are graphs already: torch.fx.symbolic_trace and torch.export."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile.errors import UnsupportedError

from .checks import assert_moves, perturb
from .models import GPT, WIDTH, ids, relative


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (ids(),)).module()


class Blocks(nn.Module):
    """Blocks that `symbolic_trace` can take: no sizes in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for branch in (self.a, self.b, self.c):
            x = x + torch.tanh(branch(x))
        return x


def make(kind: str) -> tuple[nn.Module, nn.Module, Tensor, int]:
    """A model, the same model as a graph, an input, and how many sites it has."""
    if kind == "export":
        model: nn.Module = GPT(layers=2).double()
        return model, exported(model), ids(), 4
    model = Blocks().double()
    return model, fx.symbolic_trace(model), torch.randn(2, 5, WIDTH).double(), 3


KINDS = pytest.mark.parametrize("kind", ["symbolic_trace", "export"])


@KINDS
def test_a_traced_graph_is_transformed_like_its_model(kind: str) -> None:
    model, graph, x, sites = make(kind)
    expected = model(x)
    mhc_compile.transform(graph, example_inputs=(x,))
    assert len(list(mhc_compile.parameters(graph))) == 3 * sites
    assert relative(graph(x), expected) < 1e-12

    mhc_compile.transform(model, example_inputs=(x,))
    assert_moves(graph, (x,))
    values = list(mhc_compile.parameters(graph))
    with torch.no_grad():
        for target, value in zip(mhc_compile.parameters(model), values, strict=True):
            target.copy_(value)
    assert relative(graph(x), model(x)) < 1e-12


@KINDS
def test_gradients_reach_every_parameter_of_a_traced_graph(kind: str) -> None:
    _, graph, x, _ = make(kind)
    mhc_compile.transform(graph, example_inputs=(x,))
    perturb(graph)
    graph(x).square().sum().backward()
    assert all(p.grad is not None for p in graph.parameters())


@KINDS
def test_copies_and_recompilation_keep_the_transformation(kind: str) -> None:
    _, graph, x, _ = make(kind)
    plain = graph(x)
    mhc_compile.transform(graph, example_inputs=(x,))
    assert_moves(graph, (x,))
    expected = graph(x)
    twin = copy.deepcopy(graph)
    assert relative(twin(x), expected) < 1e-14
    with torch.no_grad():
        next(mhc_compile.parameters(twin)).add_(1.0)
    assert relative(graph(x), expected) == 0.0

    graph.recompile()
    assert relative(graph(x), expected) < 1e-14
    mhc_compile.revert(graph)
    assert relative(graph(x), plain) == 0.0


def test_an_edited_graph_is_captured_again() -> None:
    _, graph, x, _ = make("symbolic_trace")
    mhc_compile.transform(graph, example_inputs=(x,))
    before = graph(x)
    for node in graph.graph.nodes:
        if node.target is torch.tanh:
            node.target = torch.sin
    graph.recompile()
    assert relative(graph(x), before) > 1e-3


def test_a_traced_part_of_a_model_belongs_to_the_model() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = fx.symbolic_trace(Blocks())
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x))

    model = Outer().double()
    x = torch.randn(2, 5, WIDTH).double()
    expected = model(x)
    mhc_compile.transform(model, example_inputs=(x,))
    assert relative(model(x), expected) < 1e-12
    assert_moves(model, (x,))


@KINDS
def test_a_transformed_graph_is_not_pickled(kind: str) -> None:
    """fx writes the graph and not the class: the copy would be plain."""
    _, graph, x, _ = make(kind)
    mhc_compile.transform(graph, example_inputs=(x,))
    for module in (graph, nn.Sequential(graph)):
        with pytest.raises(UnsupportedError, match=r"cannot be pickled.*mhc_compile\.save"):
            pickle.dumps(module)


def test_an_exported_module_keeps_its_dynamic_shapes() -> None:
    model = GPT().double()
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=2, max=8)}
    graph = torch.export.export(model, (ids(),), dynamic_shapes={"ids": sizes}).module()
    mhc_compile.transform(graph, example_inputs=(ids(),))
    for shape in ((2, 5), (3, 7), (4, 2)):
        assert relative(graph(ids(*shape)), model(ids(*shape))) < 1e-12
    mhc_compile.transform(model, example_inputs=(ids(),))
    perturb(model)
    assert_moves(graph, (ids(),))
    for shape in ((3, 7), (4, 2)):
        assert relative(graph(ids(*shape)), model(ids(*shape))) < 1e-12


def test_an_unflattened_export_has_the_names_of_its_model() -> None:
    model = GPT().double()
    graph = torch.export.unflatten(torch.export.export(model, (ids(),)))
    mhc_compile.transform(graph, example_inputs=(ids(),))
    mhc_compile.transform(model, example_inputs=(ids(),))
    keys = [{k for k in m.state_dict() if "mhc" in k} for m in (graph, model)]
    assert keys[0] == keys[1]
    assert_moves(graph, (ids(),))
    model.load_state_dict({k: v for k, v in graph.state_dict().items() if "mhc" in k}, strict=False)
    assert relative(graph(ids()), model(ids())) < 1e-12
