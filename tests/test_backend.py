"""`torch.compile(model, backend="mhc")`: plain and transformed models, options, graphs, passes.

Inductor is real where a test says so; elsewhere its place is taken by the graph itself, which shows
what reached it without minutes of compilation.
"""

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch._inductor.metrics
import torch.utils.checkpoint
from torch import Tensor, nn

import mhc_compile
from mhc_compile import _torch
from mhc_compile.backend import mhc
from mhc_compile.compiler import request
from mhc_compile.errors import ChainBrokenError, MhcError
from mhc_compile.model.swap import is_swapped
from mhc_compile.passes.pipeline import EVERY, EXAMINE, REPORT, REWRITE
from mhc_compile.passes.runner import Tier
from tests import checks
from tests.checks import perturb
from tests.models import GPT, WIDTH, Block, ids, pair, relative

# A hit in the cache of compiled graphs generates no kernels.
UNCACHED = torch._inductor.config.patch(force_disable_caches=True)
PASSES = [step.name for step in (*EXAMINE, *REWRITE, *REPORT)]
REQUIRED = [step.name for step in EVERY if step.tier is Tier.REQUIRED]
INPUTS = {"ids": ids()}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def inductor(monkeypatch) -> list[dict[str, Any]]:
    """Replaces Inductor by eager execution; returns the settings of each compilation."""
    settings: list[dict[str, Any]] = []

    def run(gm, example_inputs, patches):
        settings.append(patches)
        return gm.forward

    monkeypatch.setattr(_torch, "compile_inductor", run)
    return settings


def assert_equal_runs(model: nn.Module, expected: nn.Module, error: float) -> None:
    """Outputs and the gradients of the expected model's parameters agree."""
    actual, truth = (checks.run(m, INPUTS) for m in (model, expected))
    actual.gradients.update({k.removeprefix("_orig_mod."): g for k, g in actual.gradients.items()})
    assert checks.output_error(actual.outputs, truth.outputs) < error
    assert checks.gradient_error(actual.gradients, truth.gradients) < 20 * error


# --------------------------------------------------------------------------------- real Inductor


def test_a_plain_model_is_transformed_and_then_compiled():
    """The first call transforms it, the second is the first one compiled."""
    plain = GPT(layers=1)
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="mhc", options={"n": 4})
    with UNCACHED:
        torch._inductor.metrics.reset()
        assert relative(compiled(ids()), plain(ids())) < 1e-5
        assert torch._inductor.metrics.generated_kernel_count == 0
        assert len(checks.connections(model)) == 2
        assert model.state_dict().keys() - plain.state_dict().keys() == {
            "h.0.mhc._extra_state",
            *(f"h.0.mhc.attn.{leaf}" for leaf in ("phi", "alpha", "bias")),
            *(f"h.0.mhc.mlp.{leaf}" for leaf in ("phi", "alpha", "bias")),
        }
        checks.assert_transformed(
            plain, model, INPUTS, outputs=1e-5, gradients=2e-4, moves=1e-2, called=compiled
        )
        assert torch._inductor.metrics.generated_kernel_count > 10
    assert_equal_runs(compiled, copy.deepcopy(model), 1e-5)


def test_a_transformed_model_compiles_in_place():
    plain, model = pair(n=2, dtype=torch.float32)
    model.compile(backend="mhc", fullgraph=True, options={"n": 2, "epilogue_fusion": False})
    with UNCACHED, torch.no_grad():
        torch._inductor.metrics.reset()
        assert relative(model(ids()), plain(ids())) < 1e-5
        assert torch._inductor.metrics.generated_kernel_count > 5
    eager = copy.deepcopy(model)
    checks.assert_moves(eager, INPUTS)
    perturb(model)
    with torch.no_grad():
        assert relative(model(ids()), eager(ids())) < 1e-5
    assert model.state_dict().keys() == pair(n=2)[1].state_dict().keys()


# ------------------------------------------------------------------------------------- front doors


def test_the_backend_is_found_by_its_name():
    assert "mhc" in torch._dynamo.list_backends()
    (entry,) = entry_points(group="torch_dynamo_backends", name="mhc")
    assert entry.load() is mhc


FRONT_DOORS = [
    {},
    {"fullgraph": True},
    {"dynamic": True},
    {"dynamic": False},
    {"mode": "default"},
    {"mode": "max-autotune-no-cudagraphs"},
    {"options": {"max_autotune": True}},
]


@pytest.mark.parametrize("settings", FRONT_DOORS)
def test_arguments_of_compile_are_passed_on(settings, inductor):
    model = pair()[1]
    checks.assert_moves(model, INPUTS)
    truth = copy.deepcopy(model)
    compiled = torch.compile(copy.deepcopy(model), backend="mhc", **settings)
    model.compile(backend="mhc", **settings)
    for called in (model, compiled):  # the other way round the first one's code is used again
        assert relative(called(ids()), truth(ids())) < 1e-12
    assert len(inductor) == 2
    asked_for_autotuning = "max" in str(settings)
    for patches in inductor:
        assert patches.get("max_autotune", False) == asked_for_autotuning
        assert len(patches["post_grad_custom_pre_pass"].uuid()) == 64


@pytest.mark.parametrize("in_place", [True, False])
def test_a_plain_model_becomes_a_transformed_one(in_place, inductor):
    plain = GPT().double()
    model = called = copy.deepcopy(plain)
    options = {"n": 3, "exclude": ["h.0.mlp"], "readout": "head"}
    if in_place:
        model.compile(backend="mhc", options=options)
    else:
        called = torch.compile(model, backend="mhc", options=options)
    assert relative(called(ids()), plain(ids())) < 1e-12
    assert not inductor
    config = mhc_compile.Config(n=3, exclude="h.0.mlp", readout="head")
    early = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(ids(),), config=config)
    assert model.state_dict().keys() == early.state_dict().keys()
    checks.assert_moves(early, INPUTS)
    perturb(model)
    assert relative(called(ids()), early(ids())) < 1e-12
    assert len(inductor) == 1
    assert relative(model(ids()), early(ids())) < 1e-12


def test_the_first_call_of_a_plain_model_trains_it(inductor):
    """The eager first call has gradients like any other."""
    plain = GPT().double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="mhc")
    assert_equal_runs(compiled, plain, 1e-12)
    assert all(p.grad is not None for p in mhc_compile.parameters(model))
    checks.assert_moves(model, INPUTS, called=compiled)


def test_one_stream_leaves_a_plain_model_plain(inductor):
    plain = GPT().double()
    model = copy.deepcopy(plain)
    compiled = torch.compile(model, backend="mhc", options={"n": 1})
    assert compiled(ids()).equal(plain(ids()))
    assert type(model) is GPT
    assert len(inductor) == 1


def test_a_model_of_torch_itself_is_found(inductor):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, x = copy.deepcopy(plain), torch.randn(2, 5, WIDTH)
    compiled = torch.compile(model, backend="mhc")
    assert relative(compiled(x), plain(x)) < 1e-5
    checks.assert_moves(model, (x,), called=compiled)
    assert sorted(checks.connections(model)) == [
        f"layers.{layer}.{branch}" for layer in range(2) for branch in ("linear1", "self_attn")
    ]


def test_a_compiled_part_of_an_eager_model_is_what_is_transformed(inductor):
    plain = nn.Sequential(GPT(), nn.Linear(17, 3)).double()
    model = copy.deepcopy(plain)
    part = model[0]
    model[0] = torch.compile(part, backend="mhc")
    for _ in range(2):
        assert relative(model(ids()), plain(ids())) < 1e-12
    assert [is_swapped(m) for m in (model, part)] == [False, True]
    checks.assert_moves(part, (ids(),), called=model)
    assert len(checks.connections(part)) == 4


def test_a_transformed_part_of_a_compiled_model(inductor):
    plain, part = pair()
    checks.assert_moves(part, INPUTS)
    head = nn.Linear(17, 3).double()
    model = torch.compile(nn.Sequential(part, head), backend="mhc")
    assert relative(model(ids()), head(part(ids()))) < 1e-12
    assert relative(model(ids()), head(plain(ids()))) > 1e-3
    assert len(inductor) == 1


# ------------------------------------------------------------- graphs that Dynamo has met before


def compiled_by(model: nn.Module, in_place: bool, **settings: Any) -> nn.Module:
    """What is called: the model that was compiled in place, or the wrapper of torch.compile."""
    if not in_place:
        return torch.compile(model, backend="mhc", **settings)
    model.compile(backend="mhc", **settings)
    return model


def assert_became_transformed(plain: nn.Module, model: nn.Module, called: nn.Module) -> None:
    """A model that was called once is what `transform` would have made of it."""
    early = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(ids(),))
    assert model.state_dict().keys() == early.state_dict().keys()
    assert sorted(checks.connections(model)) == sorted(checks.connections(early))
    checks.assert_transformed(plain, model, INPUTS, called=called)
    perturb(early)
    assert_equal_runs(called, early, 1e-12)


BOTH_ROUTES = pytest.mark.parametrize("in_place", [True, False])


@BOTH_ROUTES
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_every_model_of_a_class_is_transformed(copied, grad, in_place, inductor):
    """Dynamo has a graph for the second one already: that of the first one's first call."""
    plains = [GPT().double() for _ in range(3)]
    if copied:
        plains = [plains[0]] * 3
    models = [copy.deepcopy(plain) for plain in plains]
    called = [compiled_by(model, in_place) for model in models]
    with torch.set_grad_enabled(grad):
        for plain, call in zip(plains, called, strict=True):
            assert relative(call(ids()), plain(ids())) < 1e-12
    assert not inductor  # each call was a first one
    for plain, model, call in zip(plains, models, called, strict=True):
        assert_became_transformed(plain, model, call)


@BOTH_ROUTES
def test_a_first_call_trains_its_own_model(in_place, inductor):
    plains = [GPT().double() for _ in range(2)]
    for plain in plains:
        model = copy.deepcopy(plain)
        called = compiled_by(model, in_place)
        assert_equal_runs(called, plain, 1e-12)
        assert all(p.grad is not None for p in mhc_compile.parameters(model))
        assert not inductor
        (graph,) = mhc_compile.graphs(model)
        assert graph.after.code.count("mhc.coefficients") == 4


@BOTH_ROUTES
def test_a_reverted_model_is_transformed_again(in_place, inductor):
    plain = GPT().double()
    model = copy.deepcopy(plain)
    for _ in range(3):
        called = compiled_by(model, in_place)
        called(ids())
        assert_became_transformed(plain, model, called)
        mhc_compile.revert(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        model.h[0] = copy.deepcopy(model.h[0])  # another module at the same place


def test_a_wrapper_transforms_a_reverted_model_again(inductor):
    plain = GPT().double()
    model = copy.deepcopy(plain)
    called = torch.compile(model, backend="mhc")
    called(ids())
    checks.assert_moves(model, INPUTS, called=called)
    mhc_compile.revert(model)
    called(ids())
    assert_became_transformed(plain, model, called)


@BOTH_ROUTES
def test_each_block_of_a_model_can_be_compiled_alone(in_place, inductor):
    """Each is a model of its own; the rest, and what runs between them, stays plain."""
    plain = GPT(layers=4).double()
    model = copy.deepcopy(plain)
    for number, block in enumerate(list(model.h)):
        model.h[number] = compiled_by(block, in_place)
    blocks = [_torch.unwrapped(block) for block in model.h]
    for _ in range(2):
        assert relative(model(ids()), plain(ids())) < 1e-12
    assert [len(checks.connections(block)) for block in blocks] == [2] * 4
    assert not is_swapped(model)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for expected, block, called in zip(plain.h, blocks, model.h, strict=True):
        checks.assert_transformed(expected, block, (x,), called=called)


def test_a_first_call_with_sizes_of_its_own(inductor):
    """The graph that Dynamo has is one of any size."""
    plain = GPT().double()
    for length in (5, 7, 3):
        model = copy.deepcopy(plain)
        called = torch.compile(model, backend="mhc", dynamic=True)
        tokens = ids(length=length)
        assert relative(called(tokens), plain(tokens)) < 1e-12
        assert not inductor
        checks.assert_moves(model, (tokens,), called=called)
        inductor.clear()


class Checkpointed(GPT):
    """Its blocks are recomputed, and lie in graphs inside of the graph."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return self.head(self.ln_f(x))


def test_a_first_call_through_bodies(inductor):
    plains = [Checkpointed().double() for _ in range(2)]
    for plain in plains:
        model = copy.deepcopy(plain)
        model.compile(backend="mhc")
        assert_equal_runs(model, plain, 1e-12)
        assert not inductor
        assert sorted(checks.connections(model)) == sorted(
            f"h.{layer}.{branch}" for layer in range(2) for branch in ("attn", "mlp")
        )
        perturbed = checks.assert_moves(model, INPUTS)
        assert perturbed.gradients["h.1.attn.qkv.weight"].any()
        inductor.clear()


def test_one_stream_leaves_every_model_plain(inductor):
    plains = [GPT().double() for _ in range(2)]
    for plain in plains:
        model = copy.deepcopy(plain)
        model.compile(backend="mhc", options={"n": 1})
        assert_equal_runs(model, plain, 1e-12)
        assert type(model) is GPT
    assert len(inductor) == 1


class Listed(nn.Module):
    """Runs blocks from a list, which has nothing to do with the names that they have."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block() for _ in order)
        self.__dict__["listed"] = [self.h[number] for number in order]

    def forward(self, x):
        for block in self.listed:
            x = block(x)
        return x


def test_a_known_graph_under_other_names_is_refused(inductor):
    x = torch.randn(2, 5, WIDTH)
    first, second = Listed([0, 1]), Listed([1, 0])
    expected = second(x)
    for model in (first, second):
        model.compile(backend="mhc")
    first(x)
    checks.assert_moves(first, (x,))
    inductor.clear()
    with pytest.raises(MhcError, match=r"met the code of Listed before.*other names.*transform"):
        second(x)
    assert not is_swapped(second) and not checks.connections(second)
    torch.compiler.reset()
    assert relative(second(x), expected) < 1e-5
    checks.assert_moves(second, (x,))


class Halves(nn.Module):
    """Two parts, each captured by itself: Dynamo passes over a loop with a graph break in it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        for part in (self.first, self.second):
            torch._dynamo.graph_break()
            x = part(x)
        return x


class Two(nn.Module):
    """Two blocks: a part without a site, or a model."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.h(x)


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_that_stays_plain_and_a_model_of_its_class(part_first, inductor):
    """What is a part without a site to one caller is a plain model to another."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plains = Halves(Two(), Two()).double(), Two().double()
    halves, model = copy.deepcopy(plains)
    mhc_compile.transform(halves.first, example_inputs=(x,))
    models = [(plains[0], halves), (plains[1], model)]
    calls = [(p, torch.compile(m, backend="mhc")) for p, m in models]
    with torch.no_grad():  # with gradients the part would have guards of its own
        for plain, called in calls if part_first else reversed(calls):
            for _ in range(2):
                assert relative(called(x), plain(x)) < 1e-12
        assert [is_swapped(m) for m in (model, halves.first, halves.second)] == [True, True, False]
        with checks.parameters_kept(model):
            perturb(model)
            assert relative(calls[1][1](x), plains[1](x)) > 1e-3
            assert relative(calls[0][1](x), plains[0](x)) < 1e-12
        perturb(halves)
        expected = plains[0].second(halves.first(x))
        assert relative(calls[0][1](x), expected) < 1e-12
        assert relative(plains[0](x), expected) > 1e-3
    assert not is_swapped(halves.second)
    checks.assert_transformed(plains[1], model, (x,), called=calls[1][1])
    checks.assert_moves(halves.first, (x,), called=calls[0][1])


def test_revert_forgets_the_compilation(inductor):
    plain, model = pair()
    model.compile(backend="mhc")
    checks.assert_moves(model, INPUTS)
    mhc_compile.revert(model)
    assert model(ids()).equal(plain(ids()))
    assert len(inductor) == 1


# ---------------------------------------------------------------------------------- graphs, passes


def test_graphs_keep_the_whole_history():
    model = pair(history="full")[1]
    model(ids())
    with torch.no_grad():
        model(ids())
    training, inference = mhc_compile.graphs(model)
    for graph in (training, inference):
        assert "declare" in graph.before.code and "mhc.coefficients" not in graph.before.code
        assert "declare" not in graph.after.code
        assert graph.after.code.count("mhc.coefficients") == 4
        assert [entry.name for entry in graph.history] == ["capture", *PASSES]
        assert all(entry.milliseconds >= 0 and entry.notes for entry in graph.history)
        assert graph.history[0].code == graph.before.code
        assert graph.history[-1].code == graph.after.code
        assert [s.name for s in graph.sites] == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]
        assert all(s.location.split(":")[0].endswith("models.py") for s in graph.sites)
        graph.after.graph.lint()


@pytest.mark.parametrize("through", ["a plain call", "transform", "options", "a first call"])
def test_code_is_kept_where_it_is_asked_for(through, inductor):
    """Otherwise notes, times and operators are, and what is missing says how to have it."""
    texts = {}
    for history in ("notes", "full"):
        options = {"history": history}
        model = GPT().double() if through == "a first call" else pair()[1]
        if through in ("a plain call", "transform"):
            model = pair(**options)[1]
        if through != "a plain call":
            model.compile(backend="mhc", options={} if through == "transform" else options)
        model(ids())
        (graph,) = mhc_compile.graphs(model)
        entries = [entry for entry in graph.history if entry.graph == "captured"]
        assert [entry.name for entry in entries] == ["capture", *PASSES]
        texts[history] = [(e.name, e.notes, e.changed, e.operators) for e in entries]
        assert len(entries[-1].operators) == 3 * 4 + 2
        if history == "full":
            assert all("def forward" in e.code and e.code in str(e) for e in entries)
            assert "coefficients" not in graph.before.code
            continue
        assert "def forward" not in repr(graph.history)
        for entry in entries:
            assert entry.notes[0] in str(entry) and "Config(history='full')" in str(entry)
            with pytest.raises(mhc_compile.MhcError, match="was not kept: transform with Config"):
                _ = entry.code
        with pytest.raises(mhc_compile.MhcError, match="was not kept: transform with Config"):
            _ = graph.before
    assert texts["notes"] == texts["full"]


def test_a_first_call_leaves_out_what_is_disabled():
    model = GPT().double()
    model.compile(backend="mhc", options={"disabled": ("fuse_coefficients",)})
    model(ids())
    (graph,) = mhc_compile.graphs(model)
    assert [entry.name for entry in graph.history] == ["capture", *PASSES]
    (entry,) = (e for e in graph.history if e.name == "fuse_coefficients")
    assert entry.notes == ("disabled",) and "coefficients" not in graph.history[-1].operators


@pytest.mark.parametrize("through", ["a plain call", "a compiled call", "a first call"])
def test_nothing_outlives_a_model(through, inductor):
    """Neither its parameters nor its graphs, once Dynamo has forgotten it."""
    model = GPT().double() if through == "a first call" else pair(history="full")[1]
    if through != "a plain call":
        model.compile(backend="mhc")
    model(ids()).sum().backward()
    (graph,) = mhc_compile.graphs(model)
    kept = [*model.parameters(), *model.modules(), graph.after, *graph.sites]
    left = [weakref.ref(one) for one in kept]
    assert len(list(mhc_compile.parameters(model))) == 12
    del model, graph, kept
    torch._dynamo.reset()
    for _ in range(3):  # what finalizers let go of is found the next time
        gc.collect()
    assert [ref() for ref in left if ref() is not None] == []


def _torch_keeps_a_class() -> bool:
    """Without this package: torch 2.14 does on Python 3.12."""

    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    torch.compile(Plain(2, 2), backend="eager")(torch.zeros(2, 2))
    kept = weakref.ref(Plain)
    del Plain
    torch._dynamo.reset()
    for _ in range(3):
        gc.collect()
    return kept() is not None


@pytest.mark.parametrize("called", [True, False], ids=["called", "waiting"])
def test_nothing_outlives_a_class(called):
    """A notebook defines its classes again and again."""

    class Other(GPT):
        pass

    model = mhc_compile.transform(Other(), example_inputs=(ids(),) if called else None)
    if called:
        model(ids())
    left = [weakref.ref(Other), weakref.ref(type(model))]
    assert left[0]() is not left[1]()
    del model, Other
    if called and _torch_keeps_a_class():
        pytest.skip("this torch keeps the classes that it has compiled, on this Python")
    torch._dynamo.reset()
    for _ in range(3):
        gc.collect()
    assert [ref() for ref in left] == [None, None]


def test_a_plain_graph_is_copied_once(monkeypatch, inductor):
    copies = []
    original = request.copy_graph
    monkeypatch.setattr(request, "copy_graph", lambda gm: copies.append(gm) or original(gm))
    model = GPT()
    model.compile(backend="mhc")
    model(ids())
    assert len(copies) == 1 and is_swapped(model)


def test_graphs_of_a_copy_are_its_own():
    model = pair()[1]
    model(ids())
    twin = copy.deepcopy(model)
    twin(ids())
    assert len(mhc_compile.graphs(model)) == len(mhc_compile.graphs(twin)) == 1
    assert mhc_compile.graphs(model) != mhc_compile.graphs(twin)


class WithoutWeights(nn.Module):
    """Branches that nothing but their adds can tell."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + x * x.cumsum(-1)
        return x + x * x.cumsum(-1)


def test_sizes_of_one_model_make_those_of_another_no_symbols():
    """Dynamo learns sizes by the name of code, and all declaring forwards had one."""
    first, x = pair()[1], torch.randn(3, 5, 7, dtype=torch.float64)
    first(ids())
    model = mhc_compile.transform(WithoutWeights().double(), n=4, example_inputs=(x,))
    checks.assert_moves(model, (x,))
    (graph,) = mhc_compile.graphs(model)
    assert len(graph.sites) == 2 and "SymInt" not in graph.after.code


def test_channels_whose_number_is_a_symbol_are_refused():
    """They computed plain residuals in silence where no weight told that the branch ran."""
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    model = mhc_compile.transform(WithoutWeights().double(), n=4, example_inputs=(x,))
    torch._dynamo.mark_dynamic(x, 2)
    with pytest.raises(ChainBrokenError, match=r"'cumsum' .* in this call: .*mark it"):
        model(x)


def test_sites_point_at_the_operators_of_the_graph_that_runs():
    _, model = pair()
    model(ids())
    (graph,) = mhc_compile.graphs(model)
    there = set(graph.after.graph.nodes)
    assert [list(site.nodes) for site in graph.sites] == [["coefficients", "pre", "post_res"]] * 4
    assert all(there.issuperset(site.nodes.values()) for site in graph.sites)
    assert all(there.issuperset(site.parameters) for site in graph.sites)
    before = [None, *(site.name for site in graph.sites[:-1])]
    assert [site.previous for site in graph.sites] == before


def one_layer() -> nn.Module:
    return GPT(layers=1)


@pytest.mark.parametrize("count", range(PASSES.index("widen") + 1, len(PASSES) + 1))
def test_every_prefix_of_the_pipeline_can_be_run(count):
    """From `widen` on the graph is the transformed model's; shorter ones are refused below."""
    plain, model = pair(one_layer, disabled=tuple(PASSES[count:]))
    whole = pair(one_layer)[1]
    checks.assert_transformed(plain, model, INPUTS, gradients=2e-11, moves=1e-2)
    perturb(whole)
    assert_equal_runs(model, whole, 1e-12)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_pass_without_which_residuals_stay_plain_cannot_be_left_out(name, inductor):
    message = f"{name} cannot be disabled: without it a model would run its plain residuals"
    with pytest.raises(ValueError, match=message):
        mhc_compile.Config(disabled=(name,))
    plain = GPT()
    plain.compile(backend="mhc", options={"disabled": (name,)})
    with pytest.raises(_torch.BackendCompilerFailed, match=message):
        plain(ids())
    assert not inductor and not is_swapped(plain)


@pytest.mark.parametrize("name", [name for name in PASSES if name not in REQUIRED])
def test_every_pass_can_be_left_out(name):
    """The others make a graph of the same function."""
    plain, model = pair(one_layer, disabled=(name,))
    whole = pair(one_layer)[1]
    checks.assert_transformed(plain, model, INPUTS, gradients=2e-11, moves=1e-2)
    perturb(whole)
    assert_equal_runs(model, whole, 1e-12)
    (entry,) = (e for e in captured_history(model) if e.name == name)
    assert (entry.changed, list(entry.notes)) == (False, ["disabled"])


def captured_history(model: nn.Module) -> Any:
    (graph,) = mhc_compile.graphs(model)
    return graph.history


def test_a_call_that_trains_everything_but_the_streams_warns():
    model = pair()[1]
    for parameter in mhc_compile.parameters(model):
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match="All mHC parameters of this model are frozen"):
        model(ids())
    for parameter in model.parameters():  # nothing is trained: as for inference
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids())
        next(mhc_compile.parameters(model)).requires_grad_()
        model(ids())
