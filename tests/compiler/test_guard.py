"""What ties a site to its module, broken one piece at a time: an error each time, never plain.

The pieces are what Dynamo says of modules (stacks, keys, identities), what modules declare (nodes,
their texts, their parameters), what is looked up by them, and the weights by which the guard knows
a branch. Nothing here tells the guard what was broken.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile import _torch, backend
from mhc_compile.capture import copy_graph
from mhc_compile.compiler import context, guard, known_graphs, request
from mhc_compile.compiler.routes import declared as route
from mhc_compile.errors import ChainBrokenError
from mhc_compile.model import swap
from mhc_compile.model.swap import SPEC
from mhc_compile.passes.runner import Pass
from mhc_compile.passes.sites import declared as collecting
from mhc_compile.passes.sites import detect as detecting
from mhc_compile.passes.sites import find as finding
from mhc_compile.passes.sites import names as naming
from mhc_compile.passes.sites import records as sites
from mhc_compile.passes.sites import whole
from mhc_compile.passes.sites.declared import declaration_nodes
from tests import checks
from tests.models import WIDTH, relative
from tests.test_ownership import CALLS, Block, Own, Root, tokens, truth


@pytest.fixture(params=CALLS)
def called(request, monkeypatch) -> Iterator[Callable[[nn.Module], Callable[..., Any]]]:
    monkeypatch.setattr(_torch, "compile_inductor", lambda graph, inputs, patches: graph.forward)
    yield CALLS[request.param]
    torch._dynamo.reset()


def transformed(make: Callable[[], nn.Module]) -> nn.Module:
    model = mhc_compile.transform(make().double(), example_inputs=(tokens(),))
    checks.perturb(model)
    return model


# ----------------------------------------------------------------------------- broken one at a time

Breaking = Callable[[nn.Module, pytest.MonkeyPatch], None]


def on_capture(change: Callable[[fx.GraphModule], None]) -> Breaking:
    """Change the graph as Dynamo hands it over."""

    def breaking(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        original = backend.Request

        def changed(gm: fx.GraphModule, *rest: Any) -> Any:
            copied = copy_graph(gm)
            change(copied)
            return original(copied, *rest)

        patch.setattr(backend, "Request", changed)

    return breaking


def no_declarations(gm: fx.GraphModule) -> None:
    for node in list(declaration_nodes(gm.graph)):
        gm.graph.erase_node(node)


def with_parameters(gm: fx.GraphModule) -> list[fx.Node]:
    """The declarations of owners; what only holds owners declares that it is home to a chain."""
    return [n for n in declaration_nodes(gm.graph) if n.args[0]]


def first_declaration_missing(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(with_parameters(gm)[0])


def last_declaration_missing(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(with_parameters(gm)[-1])


def no_stack_on_declarations(gm: fx.GraphModule) -> None:
    for node in declaration_nodes(gm.graph):
        node.meta.pop("nn_module_stack", None)


def no_stacks(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)


def other_keys(gm: fx.GraphModule) -> None:
    """The identities in the stacks are none that anybody knows."""
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {f"{k}0": v for k, v in stack.items()}


def keys_of_adds_missing(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if "add" in node.name:
            node.meta.pop("nn_module_stack", None)


def parameters_of_another(gm: fx.GraphModule) -> None:
    """Each block declares the parameters of the other."""
    first, *_, last = with_parameters(gm)
    first.args, last.args = (last.args[0], first.args[1]), (first.args[0], last.args[1])


def parameters_in_another_order(gm: fx.GraphModule) -> None:
    """The first site is given the parameters of the second."""
    for node in declaration_nodes(gm.graph):
        tensors, text = node.args
        node.args = ([*tensors[3:6], *tensors[:3], *tensors[6:]], text)


def parameters_missing(gm: fx.GraphModule) -> None:
    for node in declaration_nodes(gm.graph):
        node.args = (list(node.args[0])[:3], node.args[1])


def keys_exchanged(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """What one block computes is said to be the other's; what it declares is not."""
    blocks = [str(id(m)) for m in model.children()]
    exchange = dict(zip(blocks, reversed(blocks), strict=True))

    def exchanged(gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            if "declare" not in node.name:
                node.meta["nn_module_stack"] = {
                    re.sub(r"\d{6,}", lambda found: exchange.get(found[0], found[0]), key): value
                    for key, value in stack.items()
                }

    on_capture(exchanged)(model, patch)


def in_specs(change: Callable[[list[Any]], None]) -> Breaking:
    """Change what the modules say of each of their sites."""

    def breaking(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
        for module in model.modules():
            if SPEC in module.__dict__:
                config, declared, homes = json.loads(module.__dict__[SPEC])
                for site in declared:
                    change(site)
                module.__dict__[SPEC] = json.dumps([config, declared, homes])

    return breaking


def other_name(site: list[Any]) -> None:
    site[0] += "2"


def name_exchanged(site: list[Any]) -> None:
    exchange = "abcd"
    site[0] = exchange[::-1][exchange.index(site[0])] if len(site[0]) == 1 else site[0]


def no_parameters(site: list[Any]) -> None:
    site[4] = 0


def other_chain(site: list[Any]) -> None:
    site[1] = ord(site[0])


def no_sites(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if SPEC in module.__dict__:
            config, _, homes = json.loads(module.__dict__[SPEC])
            module.__dict__[SPEC] = json.dumps([config, [], homes])


def never_declares(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(swap, "_declared_tensors", lambda module: [])
    patch.setattr(swap, "declare", lambda tensors, spec: None)


def identities_forgotten(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for module in (sites, finding, naming, detecting, collecting, whole, request, known_graphs):
        if hasattr(module, "identity_of"):
            patch.setattr(module, "identity_of", lambda key: "0")


def owners_forgotten(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    for module in (context, request):
        patch.setattr(module, "owners_in", lambda *models: {})


def owners_mistaken(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Each module's identity leads to the path of another."""
    original = context.owners_in

    def mistaken(*models: nn.Module) -> dict[str, Any]:
        found = dict(original(*models))
        return dict(zip(found, reversed(list(found.values())), strict=True))

    for module in (context, request):
        patch.setattr(module, "owners_in", mistaken)


def connections_exchanged(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """Two sites of one owner have each other's parameters: nobody but their weights can tell."""
    for module in model.modules():
        if isinstance(module, guard.Connections):
            parts = dict(module._modules)
            module._modules.update(zip(parts, reversed(list(parts.values())), strict=True))


def declared_sites_lost(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    """What is collected lacks one site."""

    def fewer(context: Any) -> None:
        owner = list(context.declarations)[-1]
        context.declarations[owner] = context.declarations[owner][:-1]

    change_behind("collect", fewer, patch)


def nothing_detected(model: nn.Module, patch: pytest.MonkeyPatch) -> None:
    def nothing(context: Any) -> None:
        context.detection = replace(context.detection, sites=[], chains=[])

    change_behind("detect", nothing, patch)


def change_behind(name: str, change: Callable[[Any], None], patch: pytest.MonkeyPatch) -> None:
    """Change what a pass has found; nothing ensures any more that it is right."""
    (step,) = (p for p in route.EXAMINE if p.name == name)

    def run(gm: fx.GraphModule, context: Any) -> Any:
        result = step.run(gm, context)
        change(context)
        return result

    wrong = Pass(name, run)
    patch.setattr(route, "EXAMINE", tuple(wrong if p is step else p for p in route.EXAMINE))


BREAKINGS: dict[str, Breaking] = {
    **{
        f.__name__: on_capture(f)
        for f in (
            no_declarations,
            first_declaration_missing,
            last_declaration_missing,
            no_stack_on_declarations,
            no_stacks,
            other_keys,
            keys_of_adds_missing,
            parameters_of_another,
            parameters_in_another_order,
            parameters_missing,
        )
    },
    **{f.__name__: in_specs(f) for f in (other_name, name_exchanged, no_parameters, other_chain)},
    **{
        f.__name__: f
        for f in (
            keys_exchanged,
            no_sites,
            never_declares,
            identities_forgotten,
            owners_forgotten,
            owners_mistaken,
            connections_exchanged,
            declared_sites_lost,
            nothing_detected,
        )
    },
}

WITHOUT_EFFECT = {
    # Paths are for people to read.
    Root: {"owners_mistaken"},
    # All adds are the root's, which is known without a stack.
    Own: {
        "keys_of_adds_missing",
        "no_stack_on_declarations",
        "other_keys",
        "owners_forgotten",
    },
}
CASES = [(name, make) for name in BREAKINGS for make in (Root, Own)]
CASES.remove(("parameters_of_another", Own))  # it has one declaration


@pytest.mark.parametrize(("name", "make"), CASES)
def test_every_broken_tie_is_an_error(name, make, called, monkeypatch):
    """Or, where nothing hangs on it, the right result all the same; never plain residuals."""
    model = transformed(make)
    x, call, twin = tokens(), called(model), copy.deepcopy(model)
    whole = twin(x)
    BREAKINGS[name](model, monkeypatch)
    if name not in WITHOUT_EFFECT[make]:
        with pytest.raises((mhc_compile.MhcError, _torch.BackendCompilerFailed)) as raised:
            call(x)
        inner = getattr(raised.value, "inner_exception", raised.value)
        assert isinstance(inner, mhc_compile.MhcError), inner
        return
    assert relative(whole, truth(twin, x)) < 1e-12
    assert relative(call(x), whole) < 1e-12


# ------------------------------------------------------------------------ skipped, lost, exchanged


class Flagged(Root):
    """A block may be skipped, and the forward of another may go without its add."""

    def forward(self, x: Tensor, skip: bool = False, bare: bool = False) -> Tensor:
        x = self.p(x)
        if bare:
            x = x + self.q.a(x)
            return x + self.q.b(x.relu())
        return x if skip else self.q(x)


def test_a_skipped_block_is_not_a_lost_one(called):
    model = transformed(Flagged)
    x, call = tokens(), called(model)
    with pytest.raises((ChainBrokenError, _torch.BackendCompilerFailed), match="would be plain"):
        call(x, bare=True)
    names = [s.name for s in (call(x, skip=True), mhc_compile.graphs(model)[-1].sites)[1]]
    assert names == ["p.a", "p.b"]
    assert relative(call(x), truth(model, x)) < 1e-12


class Weightless(nn.Module):
    """Branches that apply no weight: nothing but undeclared adds can tell that they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q = (nn.Identity() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.p(x).cumsum(-1)
        x = x + self.q(x).softmax(-1).cumsum(-1)
        return self.head(x)


@pytest.mark.parametrize("name", ["no_declarations", "never_declares"])
def test_branches_without_weights(name, called, monkeypatch):
    model = transformed(Weightless)
    call = called(model)
    BREAKINGS[name](model, monkeypatch)
    with pytest.raises((ChainBrokenError, _torch.BackendCompilerFailed), match="declared"):
        call(tokens())


def test_a_branch_exchanged_after_the_model_was_transformed(called):
    """A new linear in the old place, as LoRA's and quantization's are, is the site's branch."""
    model = transformed(Root)
    call = called(model)
    call(tokens())
    model.q.b = nn.Linear(WIDTH, WIDTH).double()
    assert relative(call(tokens()), truth(model, tokens())) < 1e-12


def test_a_block_exchanged_for_a_plain_one_is_an_error(called):
    """Its sites went with the old block: only the adds in their place can tell."""
    for names in (["q"], ["p"], ["p", "q"]):
        model = transformed(Root)
        call = called(model)
        for name in names:
            setattr(model, name, Block().double())
        with pytest.raises(
            (ChainBrokenError, _torch.BackendCompilerFailed), match="exchanged or added"
        ):
            call(tokens())


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_an_added_block_is_an_error(where, called):
    """In front, between and behind: found in the place of a site, and none of them."""
    model = mhc_compile.transform(
        nn.Sequential(*(Block() for _ in range(3))).double(), example_inputs=(tokens(),)
    )
    call = called(model)
    call(tokens())
    model.insert(where, Block().double())
    message = rf"would be plain: '{where}\.a' \(.*'{where}\.b' \(.*exchanged or added"
    with pytest.raises((ChainBrokenError, _torch.BackendCompilerFailed), match=message):
        call(tokens())
    del model[where]
    assert call(tokens()).isfinite().all()


@pytest.mark.parametrize("owners", [["p"], ["q"], ["p", "q"]])
def test_deleted_parameters_are_an_error(owners, called):
    model = transformed(Root)
    call = called(model)
    call(tokens())
    for name in owners:
        del getattr(model, name).mhc
    message = f"parameters of site 'a' of module '{owners[0]}' are gone"
    with pytest.raises((ChainBrokenError, _torch.BackendCompilerFailed), match=message):
        call(tokens())


class Optional(Root):
    """Takes another way if it is told to, which nobody showed to transform."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = Block()

    def forward(self, x: Tensor, longer: bool = False) -> Tensor:
        x = self.q(self.p(x))
        return self.extra(x) if longer else x


def test_a_way_that_was_not_shown_is_an_error(called):
    model = transformed(Optional)
    call = called(model)
    assert call(tokens()).isfinite().all()
    with pytest.raises((ChainBrokenError, _torch.BackendCompilerFailed), match=r"'extra\.a'"):
        call(tokens(), longer=True)


class Unread(Root):
    """A branch that transform saw and left alone stays alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.p(x)
        self.seen = self.q(x)  # nothing that is returned is computed from it
        return self.p(x)


def test_what_transform_left_out_is_no_error(called):
    model = transformed(Unread)
    assert called(model)(tokens()).isfinite().all()
