"""Everything that can go wrong says what, where and what to do, and leaves the model as it was."""

import copy
import pickle
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import MhcError, _torch
from mhc_compile.errors import (
    ChainBrokenError,
    CheckpointError,
    DoubleTransformError,
    ExampleInputsError,
    GraphBreakError,
    NoSitesError,
    NotCapturedError,
    NotTransformedError,
    UnsupportedError,
)
from tests.checks import assert_moves, assert_transformed, perturb
from tests.models import GPT, WIDTH, ids, pair, relative

HERE = re.escape(__file__)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def state_of(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Whatever an error could have changed: classes, attributes, keys, values, output."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        output = model(*inputs)
    return {
        "classes": {name: type(m) for name, m in model.named_modules()},
        # torch.compile leaves that one on whatever it is given.
        "attributes": {
            k: set(m.__dict__) - {"_is_torch_compile"} for k, m in model.named_modules()
        },
        "tensors": {k: v.tolist() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "output": output.tolist(),
    }


@contextmanager
def untouched(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """What happens inside must not change the model."""
    before = state_of(model, *inputs)
    yield
    assert state_of(model, *inputs) == before


@pytest.fixture
def transformed() -> nn.Module:
    """A transformed model that does not compute what the plain one computes."""
    model = pair()[1]
    assert_moves(model, (ids(),))
    return model


# ------------------------------------------------------------------------ what transform is given


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4", None])
def test_n_must_be_a_positive_integer(n):
    model = GPT()
    message = rf"n must be a positive integer, got {re.escape(repr(n))}.*n=4"
    with untouched(model, ids()), pytest.raises(ValueError, match=message):
        config = mhc_compile.Config(n=n)
        mhc_compile.transform(model, example_inputs=(ids(),), config=config)
    if n is not None:  # which stands for the default
        with untouched(model, ids()), pytest.raises(ValueError, match=message):
            mhc_compile.transform(model, n, example_inputs=(ids(),))


def test_n_given_beside_a_config_is_the_number_of_streams():
    config = mhc_compile.Config(sinkhorn_iters=3)
    model = mhc_compile.transform(GPT(), 3, example_inputs=(ids(),), config=config)
    assert next(mhc_compile.parameters(model)).shape[0] == 3 * WIDTH


@pytest.mark.parametrize("config", [4, {"n": 4}, "mhc"])
def test_config_must_be_a_config(config):
    model = GPT()
    with untouched(model, ids()), pytest.raises(ValueError, match=r"must be a mhc_compile\.Config"):
        mhc_compile.transform(model, example_inputs=(ids(),), config=config)


@pytest.mark.parametrize("model", [None, GPT, lambda x: x + x])
def test_only_modules_can_be_transformed(model):
    with pytest.raises(
        ValueError, match=r"transform needs an nn\.Module, got (NoneType|type|func)"
    ):
        mhc_compile.transform(model, example_inputs=(ids(),))


def test_a_disabled_pass_must_exist():
    with pytest.raises(
        ValueError, match=r"no pass: nonsense; passes are canonicalize, collect, detect"
    ):
        mhc_compile.Config(disabled=("defer_norm", "nonsense"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"idz": ids()}, r"do not fit GPT\.forward\(ids.*missing a required argument: 'ids'"),
        ((), r"do not fit GPT\.forward\(ids.*missing a required argument: 'ids'"),
        ((ids(), ids()), r"do not fit GPT\.forward\(ids.*too many positional arguments"),
        (ids(), r"must be a tuple .*, a dict .* or a pair .*got Tensor.*write \(x,\)"),
        (5, "got int"),
        (("text",), r"forward of GPT failed.*models\.py:\d+.*must be Tensor, not str"),
        ((ids().float(),), "forward of GPT failed.*Expected tensor for argument.*Long, Int"),
    ],
)
def test_wrong_example_inputs_are_named(inputs, message):
    model = GPT()
    with untouched(model, ids()), pytest.raises(ExampleInputsError, match=f"(?s){message}"):
        mhc_compile.transform(model, example_inputs=inputs)


def test_explain_needs_inputs_where_the_model_offers_none():
    with pytest.raises(
        ExampleInputsError, match=r"explain needs the inputs of GPT.*explain\(model"
    ):
        mhc_compile.explain(GPT())


# --------------------------------------------------------------------------------- no residual adds


def test_a_model_without_residual_adds_is_refused():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    x = torch.randn(2, WIDTH)
    with (
        untouched(model, x),
        pytest.raises(NoSitesError, match=r"Sequential has no chain.*explain"),
    ):
        mhc_compile.transform(model, example_inputs=(x,))


def test_the_reasons_of_the_rejected_adds_are_counted():
    model = GPT(layers=0)
    message = r"no chain of at least two.*1 x the operands have different shapes"
    with untouched(model, ids()), pytest.raises(NoSitesError, match=message):
        mhc_compile.transform(model, example_inputs=(ids(),))


@pytest.mark.parametrize("options", [{"exclude": "*"}, {"include": "nothing.like.this"}])
def test_a_configuration_that_takes_no_site_is_refused(options):
    model = GPT()
    message = r"Config\.include and Config\.exclude leave none"
    with untouched(model, ids()), pytest.raises(NoSitesError, match=message):
        config = mhc_compile.Config(**options)
        mhc_compile.transform(model, example_inputs=(ids(),), config=config)


# ------------------------------------------------------------------------------------ graph breaks


class Broken(GPT):
    """Something happens between two layers, in a loop as usual."""

    def between(self, x: Tensor, layer: int) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer, block in enumerate(self.h):
            x = self.between(x, layer)
            x = block(x)
        return self.head(self.ln_f(x))


class Break(Broken):
    def between(self, x, layer):
        if layer:
            torch._dynamo.graph_break()
        return x


class Print(Broken):
    def between(self, x, layer):
        print("layer", layer)
        return x


class Unrolled(Broken):
    """Without a loop Dynamo resumes behind the break: two graphs that are parts of one function."""

    def forward(self, ids):
        x = self.h[0](self.embed(ids))
        torch._dynamo.graph_break()
        return self.head(self.ln_f(self.h[1](x)))


class InBranch(Broken):
    """The branch begins in one graph and ends in another."""

    def forward(self, ids):
        x = self.embed(ids)
        y = self.h[0].attn(self.h[0].ln_1(x))
        torch._dynamo.graph_break()
        x = x + y
        return self.head(self.ln_f(x + self.h[0].mlp(self.h[0].ln_2(x))))


@pytest.mark.parametrize("make", [Break, Print, Unrolled, InBranch])
def test_a_graph_break_inside_a_stream_is_located(make):
    model = make()
    message = rf"breaks the graph of {make.__name__} inside a residual stream.*{HERE}:\d+.*Remove"
    with untouched(model, ids()), pytest.raises(GraphBreakError, match=f"(?s){message}"):
        mhc_compile.transform(model, example_inputs=(ids(),))


def test_a_break_is_located_where_an_earlier_compilation_met_it():
    """Dynamo passes over code that it once could not capture."""
    model = Break()
    torch.compile(model, backend="eager")(ids())
    with pytest.raises(GraphBreakError, match=rf"inside a residual stream.*at {HERE}:\d+ \("):
        mhc_compile.transform(model, example_inputs=(ids(),))


class Item(Broken):
    def between(self, x, layer):
        return x if x.sum().item() > 0 else 2 * x


class If(Broken):
    def between(self, x, layer):
        if x.sum() > 0:
            return x
        return 2 * x


class LayerDrop(Broken):
    """As transformers' Wav2Vec2 and BART do it."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = block(x)
        return self.head(self.ln_f(x))


class Positions(nn.Embedding):
    """No tensor goes in: what comes out is fake in a capture of its own."""

    def forward(self, length):
        return super().forward(torch.arange(length))


class LayerDropBehindPositions(LayerDrop):
    """The frame with the loop runs by itself, its embeddings are captured."""

    def __init__(self):
        super().__init__()
        self.positions = Positions(16, WIDTH)

    def embed(self, ids):
        return self.wte(ids)

    def forward(self, ids):
        x = self.embed(ids) + self.positions(ids.shape[-1])
        for block in self.h:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("make", [Item, If, LayerDrop, LayerDropBehindPositions])
def test_a_branch_on_a_tensor_says_what_to_write_instead(make):
    model = make()
    message = rf"{make.__name__} depends on the value of a tensor at {HERE}:\d+.*mask.*layerdrop=0"
    with untouched(model, ids()), pytest.raises(GraphBreakError, match=message):
        mhc_compile.transform(model, example_inputs=(ids(),))


class BreakBehindPositions(GPT):
    """A break outside the streams: the same two kinds of fake tensors, and nothing is wrong."""

    def __init__(self):
        super().__init__()
        self.positions = Positions(16, WIDTH)

    def forward(self, ids):
        positions = self.positions(ids.shape[-1])
        torch._dynamo.graph_break()
        x = self.wte(ids) + positions
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def test_what_a_graph_without_inputs_computes_is_fake_like_the_rest():
    plain, model = pair(BreakBehindPositions)
    assert_transformed(plain, model, (ids(),))


@pytest.mark.parametrize("make", [LayerDrop, LayerDropBehindPositions])
def test_layers_that_are_dropped_only_in_training_raise_there(make):
    """In eval nothing is dropped: right; the first call in training says what to write."""
    model = make().eval()
    plain = copy.deepcopy(model)
    mhc_compile.transform(model, example_inputs=(ids(),))
    assert_transformed(plain, model, (ids(),), outputs=1e-5, gradients=1e-4)
    with pytest.raises(ChainBrokenError, match=rf"broke the graph at {HERE}:\d+.*layerdrop=0"):
        model.train()(ids())
    assert (model.eval()(ids()) - plain(ids())).norm() > 1e-2 * plain(ids()).norm()


class PythonLayerDrop(LayerDrop):
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            if random.random() < 0.5:
                continue
            x = block(x)
        return self.head(self.ln_f(x))


class NumpyLayerDrop(LayerDrop):
    def forward(self, ids):
        x = self.embed(ids)
        for block in self.h:
            if np.random.uniform() < 0.5:
                continue
            x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [PythonLayerDrop, NumpyLayerDrop])
def test_layers_dropped_by_chance_are_refused_whatever_is_drawn(make, seed):
    """Both layers, one or none may have run: the answer is the same."""
    model = make()
    random.seed(seed)
    np.random.seed(seed)
    drawn = random.getstate(), np.random.get_state()[1].tolist()
    with pytest.raises(GraphBreakError, match=r"(?s)breaks the graph.*mask.*layerdrop=0"):
        mhc_compile.transform(model, example_inputs=(ids(),))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn
    assert type(model) is make


class BrokenOutside(GPT):
    """Graph breaks before and behind the streams."""

    def forward(self, ids: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        x = self.embed(ids)
        torch._dynamo.graph_break()
        for block in self.h:
            x = block(x)
        torch._dynamo.graph_break()
        x = self.ln_f(x)
        print("behind the streams", end="")
        return self.head(x)


def test_graph_breaks_outside_the_streams_are_fine(capsys):
    plain, model = pair(BrokenOutside)
    assert len(list(mhc_compile.parameters(model))) == 3 * 4
    assert relative(model(ids()), plain(ids())) < 1e-12
    assert [len(g.sites) for g in mhc_compile.graphs(model)] == [4]
    whole = pair()[1]
    whole.load_state_dict(model.state_dict())
    assert_moves(model, (ids(),), moves=1e-2)
    perturb(whole)
    assert relative(model(ids()), whole(ids())) < 1e-12
    assert "behind" in capsys.readouterr().out


class Towers(nn.Module):
    """Two models of one class, one after the other, with a break between their graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([GPT(), GPT()])

    def forward(self, ids):
        results = []
        for tower in self.towers:
            print(end="")
            results.append(tower(ids))
        return results[0] + results[1]


def test_a_graph_that_runs_for_two_modules_is_not_taken_for_one():
    """Dynamo compiles the first tower and reuses it for the second: its names would be wrong."""
    model = Towers()
    message = r"several runs of it \(adds from .*models\.py:\d+ to"
    with untouched(model, ids()), pytest.raises(GraphBreakError, match=message):
        mhc_compile.transform(model, example_inputs=(ids(),))


class Sometimes(Broken):
    """Prints between its layers if told so after the transform."""

    noisy = False

    def between(self, x, layer):
        if self.noisy:
            print(end="")
        return x


def test_a_later_graph_break_raises_and_can_be_taken_back(capsys):
    plain, model = pair(Sometimes)
    with untouched(model, ids()):
        model.noisy = True
        message = rf"would have computed plain.*broke the graph at {HERE}:\d+"
        with pytest.raises(ChainBrokenError, match=message):
            model(ids())
        del model.noisy
    assert relative(model(ids()), plain(ids())) < 1e-12
    assert_moves(model, (ids(),))


# ----------------------------------------------------------------------------------- at wrong times


def test_a_model_is_transformed_once(transformed):
    around = nn.Sequential(transformed)
    cases = [
        (transformed, "GPT cannot be transformed: it is transformed already"),
        (transformed.h, r"its module '0' is transformed already.*revert"),
        (around, r"Sequential cannot be transformed: its module '0' is transformed already"),
    ]
    for module, message in cases:
        with (
            untouched(transformed, ids()),
            pytest.raises(DoubleTransformError, match=message),
        ):
            mhc_compile.transform(module, example_inputs=(ids(),))


def test_what_needs_a_transformed_model_says_so():
    model = GPT()
    needs = r"GPT .*(mhc_compile\.transform\(model\)|nothing to revert)"
    for function in (mhc_compile.revert, mhc_compile.graphs, mhc_compile.parameters):
        with untouched(model, ids()), pytest.raises(NotTransformedError, match=needs):
            function(model)


def test_graphs_exist_after_the_first_call():
    model = pair()[1]
    with pytest.raises(NotCapturedError, match="GPT has not been called since"):
        mhc_compile.graphs(model)


def test_an_attribute_called_mhc_is_in_the_way():
    model = GPT()
    model.h[1].mhc = "mine"
    with (
        untouched(model, ids()),
        pytest.raises(MhcError, match=r"module 'h\.1' has an attribute 'mhc' of its own.*rename"),
    ):
        mhc_compile.transform(model, example_inputs=(ids(),))


def test_a_lazy_model_is_called_first():
    model = nn.Sequential(nn.LazyLinear(WIDTH), GPT(layers=1).h[0])
    with pytest.raises(MhcError, match="Sequential has parameters whose shape is not known yet"):
        mhc_compile.transform(model, example_inputs=(torch.randn(2, 5, 3),))
    assert isinstance(model[0], nn.LazyLinear)
    model(torch.randn(2, 5, 3))
    mhc_compile.transform(model, example_inputs=(torch.randn(2, 5, 3),))
    assert len(list(mhc_compile.parameters(model))) == 6


@pytest.fixture
def pending() -> nn.Module:
    """A model that is transformed at its first call."""
    return mhc_compile.transform(GPT().double())


@pytest.mark.parametrize(
    "too_early",
    [
        lambda m: torch.optim.AdamW(m.parameters()),
        lambda m: torch.optim.AdamW(nn.Sequential(m).parameters()),
        lambda m: torch.optim.AdamW(mhc_compile.parameters(m)),
        lambda m: list(m.named_parameters()),
        lambda m: m.state_dict(),
        lambda m: nn.Sequential(m).state_dict(),
        lambda m: mhc_compile.graphs(m),
        lambda m: m.compile(backend="mhc"),
    ],
)
def test_an_optimizer_built_before_the_parameters_exist_is_refused(too_early, pending):
    with pytest.raises(ExampleInputsError, match=r"at its first call.*example_inputs.*call the"):
        too_early(pending)
    plain = copy.deepcopy(mhc_compile.revert(pending))
    assert type(plain) is GPT
    assert not any("mhc" in key for key in plain.state_dict())


@pytest.mark.parametrize("backend", ["mhc", "eager"])
def test_a_model_that_waits_for_its_first_call_is_not_compiled(backend, pending):
    with pytest.raises(Exception, match="gets its mHC parameters at its first call"):
        torch.compile(pending, backend=backend)(ids())
    with pytest.raises(DoubleTransformError, match="waiting for its first call"):
        mhc_compile.transform(pending)


def test_a_first_call_that_fails_leaves_the_model_waiting(pending):
    with pytest.raises(ExampleInputsError, match="forward of GPT failed"):
        pending(ids().float())
    with pytest.raises(ExampleInputsError, match="at its first call"):
        pending.parameters().__next__()
    for copied in (copy.deepcopy(pending), pickle.loads(pickle.dumps(pending)), pending):
        copied(ids())
        assert len(list(mhc_compile.parameters(copied))) == 12


# ----------------------------------------------------------------------------- foreign compilers


class Bare(nn.Module):
    """Two residual adds and nothing else, that Inductor compiles in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_backend_never_runs_plain_residuals(backend, transformed):
    with (
        untouched(transformed, ids()),
        pytest.raises(NotCapturedError, match=r"backend that does not know it.*backend='mhc'"),
    ):
        torch.compile(transformed, backend=backend)(ids())


def test_inductor_never_runs_plain_residuals():
    model, x = Bare(), torch.randn(2, WIDTH)
    mhc_compile.transform(model, example_inputs=(x,))
    with torch.no_grad(), pytest.raises(NotCapturedError, match="backend='mhc'"):
        torch.compile(model)(x)


@pytest.mark.parametrize("settings", [{}, *({"backend": b} for b in ("inductor", "eager"))])
def test_in_place_compile_names_the_right_backend(settings, transformed):
    message = r"GPT is transformed: backend '(inductor|eager)'.*model\.compile\(backend='mhc'\)"
    with untouched(transformed, ids()), pytest.raises(UnsupportedError, match=message):
        transformed.compile(**settings)


def test_a_callable_backend_is_refused_at_the_call(transformed):
    compiled = copy.deepcopy(transformed)
    compiled.compile(backend=lambda gm, inputs: gm.forward)
    with pytest.raises(NotCapturedError, match="backend that does not know it"):
        compiled(ids())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nn": 4}, r"unknown option 'nn'; options are the fields of mhc_compile\.Config \(n,"),
        ({"n": 2}, r"options\['n'\] = 2, but the model was transformed with 4.*revert"),
        ({"n": 0}, "n must be a positive integer, got 0"),
        ({"variant": "hc", "n": 4}, r"options\['variant'\] = 'hc'.*transformed with 'mhc'"),
        ({"exclude": ["*.mlp"]}, r"options\['exclude'\] = \('\*\.mlp',\).*transformed with \(\)"),
    ],
)
def test_options_of_the_backend_are_checked(options, message, transformed):
    with untouched(transformed, ids()):
        with pytest.raises(ValueError, match=message):
            transformed.compile(backend="mhc", options=options)
        with pytest.raises(_torch.BackendCompilerFailed, match=message):
            torch.compile(transformed, backend="mhc", options=options)(ids())


@pytest.mark.parametrize(("options", "message"), [({"nn": 4}, "'nn'"), ({"n": 0}, "got 0")])
def test_options_for_a_plain_model_are_checked(options, message):
    model = GPT()
    with untouched(model, ids()), pytest.raises(_torch.BackendCompilerFailed, match=message):
        torch.compile(model, backend="mhc", options=options)(ids())


def test_a_plain_function_has_no_place_for_parameters():
    model = GPT()
    with (
        untouched(model, ids()),
        pytest.raises(_torch.BackendCompilerFailed, match=r"plain function.*transform\(model\)"),
    ):
        torch.compile(lambda x: model(x), backend="mhc")(ids())


def test_a_plain_model_must_be_whole():
    for make in (Unrolled, Break):
        model = make()
        message = rf"breaks the graph of {make.__name__} at .*transform\(model\) first"
        failure = pytest.raises(_torch.BackendCompilerFailed, match=message)
        with untouched(model, ids()), failure:
            torch.compile(model, backend="mhc")(ids())


def test_a_plain_model_must_have_sites():
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(2, WIDTH)
    with (
        untouched(model, x),
        pytest.raises(_torch.BackendCompilerFailed, match="Sequential has no chain"),
    ):
        torch.compile(model, backend="mhc")(x)


def test_constant_parameters_are_refused(transformed):
    freezing = torch._inductor.config.patch(freezing=True)
    with (
        untouched(transformed, ids()),
        freezing,
        torch.no_grad(),
        pytest.raises(_torch.BackendCompilerFailed, match=r"freezing makes constants.*Turn it off"),
    ):
        torch.compile(transformed, backend="mhc")(ids())
    with torch.no_grad():
        expected = transformed(ids())
        with freezing:  # the library's own calls are not concerned
            assert transformed(ids()).equal(expected)


@pytest.mark.parametrize(
    "take",
    [
        lambda m: torch.export.export(m, (ids(),)),
        lambda m: torch.export.export(m, (ids(),), strict=True),
        lambda m: torch.jit.trace(m, (ids(),)),
        lambda m: torch.jit.script(m),
        lambda m: torch.fx.symbolic_trace(m),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_export_says_how_to_do_it(take, transformed):
    with (
        untouched(transformed, ids()),
        pytest.raises(
            Exception, match=r"cannot take a transformed model.*\.module\(\)\)"
        ) as raised,
    ):
        take(transformed)
    assert isinstance(raised.value, (UnsupportedError, torch._dynamo.exc.Unsupported))


# ------------------------------------------------------------------------- outside every capture


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_is_named(stance, transformed):
    with (
        untouched(transformed, ids()),
        torch.compiler.set_stance(stance),
        torch.autocast("cpu"),  # another graph: what was captured before still runs
        pytest.raises(NotCapturedError, match=rf'set_stance\("{stance}"\)'),
    ):
        transformed(ids())


def test_a_disabled_dynamo_is_named(transformed):
    with (
        untouched(transformed, ids()),
        torch._dynamo.config.patch(disable=True),
        torch.autocast("cpu"),  # another graph: what was captured before still runs
        pytest.raises(NotCapturedError, match="TORCHDYNAMO_DISABLE=1"),
    ):
        transformed(ids())


def test_a_disabled_region_runs_the_streams(transformed):
    """`torch.compiler.disable` concerns the compiler around it: a plain call in a plain region."""
    expected = transformed(ids())
    for disabled in (transformed, transformed.forward, lambda x: transformed(x)):
        assert torch.compiler.disable(disabled)(ids()).equal(expected)


def test_the_limit_of_graphs_is_named(monkeypatch):
    monkeypatch.setattr(_torch, "RECOMPILE_LIMIT", 2)
    plain, model = pair()
    model(ids())
    model.eval()
    model(ids())
    with pytest.raises(NotCapturedError, match=r"its limit of 2 graphs.*few shapes.*reset\(\)"):
        model(ids().int())
    model.train()
    assert relative(model(ids()), plain(ids())) < 1e-12
    assert_moves(model, (ids(),))


def test_an_owner_called_by_itself_is_only_a_part_of_a_chain(transformed):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with (
        untouched(transformed, ids()),
        pytest.raises(ChainBrokenError, match=r"part of chain 0 \(attn, mlp\).*called by itself"),
    ):
        transformed.h[0](x)
    # A module that owns no site is what it was.
    assert (
        transformed.h[0].attn(x).equal(mhc_compile.revert(copy.deepcopy(transformed)).h[0].attn(x))
    )


class Forked(GPT):
    """Takes another path if told so: the second half reads the embedding again."""

    restart = False

    def forward(self, ids):
        first = self.embed(ids)
        x = self.h[0](first)
        y = self.h[1](first @ first.mT @ first if self.restart else x)
        return self.head(self.ln_f(x - y))


def test_a_call_whose_path_cuts_the_chain_is_refused():
    plain, model = pair(Forked)
    model.restart = True
    message = r"chain 0 do not reach the residual add 'h\.1\.attn' \(.*models\.py:\d+\).*revert"
    with pytest.raises(ChainBrokenError, match=message):
        model(ids())
    model.restart = False
    assert relative(model(ids()), plain(ids())) < 1e-12
    assert_moves(model, (ids(),))


class Replacing(nn.Module):
    """Runs all of its branches, but told so it does not add the first."""

    replace = False

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.a(x) if self.replace else x + self.a(x)
        x = x + self.b(x)
        return x + self.c(x)


def test_a_branch_that_runs_without_its_add_is_refused():
    model, x = Replacing(), torch.randn(2, 5, WIDTH)
    mhc_compile.transform(model, example_inputs=(x,))
    model.replace = True
    message = r"branch 'a' of module '<root>' is declared but is not in the captured graph"
    with pytest.raises(ChainBrokenError, match=message):
        model(x)


# --------------------------------------------------------------------------------------- the rest


def test_a_state_dict_of_another_n_is_refused_with_both_numbers(transformed):
    other = pair(n=2)[1]
    message = r"GPT: h\.0\.mhc and 1 more: the checkpoint has n=4, this model has n=2;.*n=4"
    with untouched(other, ids()), pytest.raises(CheckpointError, match=message):
        other.load_state_dict(transformed.state_dict())


def test_gradients_of_gradients_are_refused(transformed):
    loss = transformed(ids()).square().sum()
    (gradient,) = torch.autograd.grad(loss, transformed.wte.weight, create_graph=True)
    with (
        untouched(transformed, ids()),
        pytest.raises(RuntimeError, match=r"double backward \(create_graph=True.*is not supported"),
    ):
        gradient.square().sum().backward()


# ------------------------------------------------------------------------------------- torch.func


FUNCTORCH = {
    "grad": lambda f, p: torch.func.grad(lambda q: f(q).sum())(p),
    "vjp": lambda f, p: torch.func.vjp(f, p),
    "jvp": lambda f, p: torch.func.jvp(f, (p,), (p,)),
    "vmap": lambda f, p: torch.func.vmap(lambda i: f(p, i[None]))(ids()),
    "jacrev": lambda f, p: torch.func.jacrev(lambda q: f(q).sum())(p),
    "hessian": lambda f, p: torch.func.hessian(lambda q: f(q).sum())(p),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", FUNCTORCH)
def test_transforms_of_torch_func_are_named(name, in_place, transformed):
    """B4: Dynamo captures nothing under them, and says nothing."""
    parameters, batch = dict(transformed.named_parameters()), ids()

    def call(values, tokens=batch):
        return torch.func.functional_call(transformed, values, (tokens,))

    with untouched(transformed, ids()):
        if in_place:
            transformed.compile(backend="mhc")
        with pytest.raises(UnsupportedError, match=r"under a transform of torch\.func"):
            FUNCTORCH[name](call, parameters)
        transformed.__dict__.pop("_compiled_call_impl", None)
    # What the message advises.
    outputs = call(parameters)
    assert all(g is not None for g in torch.autograd.grad(outputs.sum(), parameters.values()))


# ----------------------------------------------------------------------- errors of the user's own


class Refusing(GPT):
    """Checks its arguments, before the streams or between two sites."""

    def forward(self, ids: Tensor, where: str = "") -> Tensor:
        if where == "first":
            raise ValueError("give where another value")
        x = self.h[0](self.embed(ids))
        if where == "between":
            raise ValueError("give where another value")
        return self.head(self.h[1](x))


@pytest.mark.parametrize("where", ["first", "between"])
@pytest.mark.parametrize("called_before", [False, True])
def test_what_the_forward_itself_raises_is_told(where, called_before):
    model = pair(Refusing)[1]
    if called_before:
        model(ids())
    for _ in range(2):
        with pytest.raises(NotCapturedError, match=r"raised ValueError\(.*give where another"):
            model(ids(), where)
    assert model(ids()).isfinite().all()
