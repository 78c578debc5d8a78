"""`backend="mhc"` on models that were written with hyper-connections: theirs, nothing added."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.passes import _tensorify_python_scalars
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile import Config, Reason, _torch
from mhc_compile.errors import NoSitesError, NotTransformedError, UnsupportedError
from mhc_compile.model.swap import is_swapped
from tests.checks import assert_moves, gradient_error, output_error, run
from tests.zoo import hyper
from tests.zoo.rewritten import partition

MIRROR = {
    "coefficients_pre": "coefficients_pre_backward",
    "seam": "seam_backward",
    "post_res": "post_res_backward",
}


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch: Any) -> Iterator[None]:
    monkeypatch.setattr(_torch, "compile_inductor", partial(partition, saved=[]))
    yield
    torch._dynamo.reset()


def chain_of(sites: int) -> list[str]:
    return ["coefficients_pre", *["seam"] * (sites - 1), "post_res"]


def operators(graph: Any, kind: str) -> list[str]:
    """The `mhc::` operators of the last version of a graph."""
    return [e for e in graph.history if e.graph == kind][-1].operators


def notes(graph: Any, name: str) -> list[str]:
    return list(next(e for e in graph.history if e.name == name).notes)


def signal(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, 16), generator=torch.Generator().manual_seed(0))


def assert_nothing_added(model: nn.Module, plain: nn.Module, parameters: list[Any]) -> None:
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert not any(is_swapped(m) for m in model.modules())


def assert_one_chain(model: nn.Module, inputs: dict[str, Tensor], names: list[str]) -> Any:
    """All connections are recognised, fused to one chain of seams, and compute what they did."""
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    model.compile(backend="mhc")
    actual, expected = run(model, inputs), run(plain, inputs)
    assert output_error(actual.outputs, expected.outputs) < 1e-5
    assert gradient_error(actual.gradients, expected.gradients) < 1e-3
    assert_nothing_added(model, plain, parameters)
    (graph,) = mhc_compile.graphs(model)
    assert [site.name for site in graph.sites] == names
    assert [(s.chain, s.position) for s in graph.sites] == [(0, i) for i in range(len(names))]
    separate = ["coefficients", "pre", "post_res"] * len(names)
    assert operators(graph, "captured") == separate
    forward = chain_of(len(names))
    assert operators(graph, "forward") == forward
    assert operators(graph, "backward") == [MIRROR[name] for name in reversed(forward)]
    return graph


# --- transformers ---------------------------------------------------------------------------------


def test_deepseek_v4() -> None:
    """Two sites a layer; the head is a learned readout, no site."""
    model, ids = hyper.deepseek_v4(layers=3), hyper.tokens()
    assert all(
        p.std() >= 0.1 for name, p in model.named_parameters() if name.endswith((".fn", ".hc_fn"))
    )
    names = [f"model.layers.{i}.{part}" for i in range(3) for part in ("attn_hc", "ffn_hc")]
    explained = mhc_compile.explain(model, ids)
    graph = assert_one_chain(model, {"input_ids": ids}, names)
    assert {site.reason for site in graph.sites} == {"recognised: deepseek_v4(iterations=20)"}
    assert {site.width for site in graph.sites} == {hyper.WIDTH}
    assert [p.name.rsplit("hc_parameters_")[1] for p in graph.sites[0].parameters] == [
        "scale_",
        "base_",
        "fn_",
    ]

    assert [site.name for site in explained.sites] == names
    assert explained.own and explained.n == 4 and [len(c) for c in explained.chains] == [6]
    assert "6 sites of its own in 1 chain, n = 4" in str(explained)
    assert {site.reason for site in explained.sites} == {site.reason for site in graph.sites}
    assert all("modeling_deepseek_v4.py" in site.location for site in explained.sites)


def test_hy_v4() -> None:
    """H_res is I and stands nowhere."""
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in ("attn_hc", "ffn_hc")]
    graph = assert_one_chain(hyper.hy_v4(), {"input_ids": hyper.tokens()}, names)
    text = "identity(pre.offset=1e-06, post.offset=1e-06)"
    assert {site.reason for site in graph.sites} == {f"recognised: {text}"}


def test_glm5_next() -> None:
    names = ["layers.0.attn_hc", "layers.0.ffn_hc"]
    explained = mhc_compile.explain(hyper.glm5_next(), hyper.tokens())
    assert [site.name for site in explained.sites] == names
    graph = assert_one_chain(hyper.glm5_next(), {"input_ids": hyper.tokens()}, names)
    for found in (explained, graph):
        assert {site.reason for site in found.sites} == {"recognised: deepseek_v4(iterations=20)"}


def test_qwen4_exp() -> None:
    """A near miss of another kind: nothing is recognised, nothing is added, and it says why."""
    model, ids = hyper.qwen4_exp(), hyper.tokens()
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    explained = mhc_compile.explain(model, ids)
    model.compile(backend="mhc")
    with torch.no_grad(), pytest.warns(UserWarning, match="none that backend 'mhc' can read"):
        assert model(ids).logits.allclose(plain(ids).logits, atol=1e-6)
    assert_nothing_added(model, plain, parameters)
    (graph,) = mhc_compile.graphs(model)
    assert not graph.sites and not operators(graph, "captured")
    why = "each of its 4 streams is normalised by itself"
    assert sum(why in note for note in notes(graph, "recognize")) == 2
    differing = [add for add in explained.rejected if add.reason is Reason.OWN_NORM]
    assert [add.detail for add in differing] == [why] * 2
    assert not explained.sites and "are not normalised together" in str(explained)


def test_the_package_hyper_connections() -> None:
    """lucidrains' connections are another function: they run as they are, and it says why."""
    name = "hyper_connections.manifold_constrained_hyper_connections"
    package = pytest.importorskip(name, reason="pip install 'mhc-compile[bench]'")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                package.mHC(4, dim=16, layer_index=i, branch=nn.Linear(16, 16)) for i in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            X = x.repeat_interleave(4, 0)
            for layer in self.layers:
                X = layer(X)
            return X.unflatten(0, (-1, 4)).sum(1)

    model = Model()
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    explained = mhc_compile.explain(model, signal())
    different = [add for add in explained.rejected if add.reason is Reason.OWN_NORM]
    assert [add.name for add in different] == ["layers.0", "layers.1"]
    assert {add.detail for add in different} == {
        "each of its 4 streams is normalised and projected by itself"
    }
    model.compile(backend="mhc")
    torch.testing.assert_close(model(signal()), plain(signal()))
    assert_nothing_added(model, plain, parameters)


class DeltaRule(nn.Module):
    """Linear attention that writes v - S k into a state; its keys are as few as streams."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        key, value, query = self.key(x), self.value(x), self.query(x)
        state, out = x.new_zeros(x.shape[0], 8, 8), []
        for t in range(x.shape[1]):
            k = 0.3 * key[:, t].unsqueeze(-1)
            state = state + k * (value[:, t] - (state * k).sum(-2)).unsqueeze(-2)
            out.append((state * query[:, t].unsqueeze(-1)).sum(-2))
        return torch.stack(out, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rules = nn.ModuleList(DeltaRule() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for rule in self.rules:
            x = x + rule(x)
        return x


def test_what_only_looks_like_connections_is_not_left_in_silence() -> None:
    """An outer product added to a state of as many rows as there are tokens."""
    model, x = Recurrent().double(), signal(2, 8, 8).double()
    plain, parameters = copy.deepcopy(model), list(model.parameters())
    model.compile(backend="mhc")
    with pytest.warns(UserWarning, match="transform.* adds connections all the same"):
        torch.testing.assert_close(model(x), plain(x))
    assert_nothing_added(model, plain, parameters)

    transformed = mhc_compile.transform(copy.deepcopy(plain), n=2, example_inputs=(x,))
    transformed.compile(backend="mhc")
    torch.testing.assert_close(transformed(x), plain(x))
    (graph,) = mhc_compile.graphs(transformed)
    assert [site.name for site in graph.sites] == ["rules_0", "rules_1"]
    assert_moves(transformed, (x,))


def test_deepseek_v4_in_bfloat16_is_fused_where_it_does_not_round() -> None:
    """It rounds H_post and H_res to bfloat16, which our post_res does not: that stays open."""
    model, ids = hyper.deepseek_v4(layers=1).bfloat16(), hyper.tokens()
    plain, truth = copy.deepcopy(model), copy.deepcopy(model).float()
    model.compile(backend="mhc")
    results = [run(m, {"input_ids": ids}) for m in (model, plain, truth)]
    (graph,) = mhc_compile.graphs(model)
    assert operators(graph, "captured") == ["coefficients", "pre"] * 2
    why = "left open: a value is rounded to torch.bfloat16, not torch.float32"
    assert all(site.reason.endswith(why) for site in graph.sites) and len(graph.sites) == 2
    assert [site.position for site in graph.sites] == [0, 1]
    ours, theirs = (
        output_error([o.float() for o in r.outputs], results[2].outputs) for r in results[:2]
    )
    assert ours <= 1.5 * theirs


# --- as the paper writes it -----------------------------------------------------------------------


PAPER_SITES = [f"blocks.{i}.{part}_hc" for i in range(2) for part in ("mixer", "mlp")]


def test_a_model_that_follows_the_paper() -> None:
    graph = assert_one_chain(hyper.PaperModel().double(), {"x": signal().double()}, PAPER_SITES)
    assert notes(graph, "recognize") == ["4 connections", "12 projections joined"]


class Watched(hyper.Connection):
    """Says how far H_res is from doubly stochastic: one more sum of its rows and of its columns."""

    def forward(self, X: Tensor, branch: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        streams = super().forward(X, lambda h: seen.append(h) or branch(h))
        H_res = self.logits(self.norm(X.flatten(-2)), "res").unflatten(-1, (self.n, self.n)).exp()
        for _ in range(self.iterations):
            H_res = H_res / H_res.sum(-2, keepdim=True)
            H_res = H_res / H_res.sum(-1, keepdim=True)
        self.off = (H_res.sum(-1) - 1).abs().mean() + (H_res.sum(-2) - 1).abs().mean()
        return streams


@pytest.mark.parametrize("iterations", [2, 19, 20, 21, 30])
@pytest.mark.parametrize("watched", [False, True])
def test_iterations_are_counted_where_they_converge(iterations: int, watched: bool) -> None:
    """A7: behind 20 iterations one more is hard to see; 21 were read where a monitor sums again."""
    plain = hyper.PaperModel(layers=1).double()
    for block in plain.blocks:
        for name in ("mixer_hc", "mlp_hc"):
            own = (Watched if watched else hyper.Connection)(4, 16, iterations).double()
            own.load_state_dict(getattr(block, name).state_dict())
            setattr(block, name, own)
    with torch.no_grad():  # hard logits, for which it matters
        for name, parameter in plain.named_parameters():
            if "bias.res" in name:
                parameter.mul_(4)
    found = mhc_compile.explain(plain, signal().double())
    assert [f"iterations={iterations}" in site.reason for site in found.sites] == [True, True]
    model = copy.deepcopy(plain)
    model.compile(backend="mhc")
    actual, expected = (run(m, {"x": signal().double()}) for m in (model, plain))
    assert output_error(actual.outputs, expected.outputs) < 1e-11


@pytest.mark.parametrize("tensorify", [True, False], ids=["tensorify", "not"])
@pytest.mark.filterwarnings("error:.*seems to have hyper-connections of its own")
def test_other_shapes_and_modes(tensorify: bool, monkeypatch: Any) -> None:
    """Whether or not AOTAutograd captures anew where a norm's epsilon was taken for an input."""
    switch = "_is_tensorify_enabled"  # torch 2.13 and newer have it
    monkeypatch.setattr(_tensorify_python_scalars, switch, lambda: tensorify, raising=False)
    plain = hyper.PaperModel(layers=1)
    model = torch.compile(copy.deepcopy(plain), backend="mhc", dynamic=True)
    for length in (5, 7):
        x = signal(2, length, 16)
        torch.testing.assert_close(model(x), plain(x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    training, inference = mhc_compile.graphs(model._orig_mod)
    for graph in (training, inference):
        assert [site.name for site in graph.sites] == PAPER_SITES[:2]
    assert operators(inference, "inference") == chain_of(2)


def test_a_block_alone() -> None:
    plain = hyper.PaperModel()
    model = copy.deepcopy(plain)
    for block in model.blocks:
        block.compile(backend="mhc")
    torch.testing.assert_close(model(signal()), plain(signal()))
    for block in model.blocks:
        assert [len(graph.sites) for graph in mhc_compile.graphs(block)] == [2]
    with pytest.raises(NotTransformedError, match="hyper-connections of its own"):
        mhc_compile.graphs(plain)


def test_checkpointed_blocks() -> None:
    """Nothing spans a region that is recomputed and one that is not."""
    plain = hyper.PaperModel().double()
    model = copy.deepcopy(plain)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    model.compile(backend="mhc")
    actual, expected = (run(m, {"x": signal().double()}) for m in (model, plain))
    assert output_error(actual.outputs, expected.outputs) < 1e-12
    assert gradient_error(actual.gradients, expected.gradients) < 1e-11
    (graph,) = mhc_compile.graphs(model)
    assert len(graph.sites) == 4


@pytest.mark.parametrize(
    ("broken", "options"), [("in front", {}), ("in front", {"n": 1}), ("behind", {})], ids=str
)
def test_graph_breaks(broken: str, options: dict[str, int]) -> None:
    """A graph without connections is one of a model that has some: known, or said by n = 1."""
    plain = hyper.PaperModel(layers=1, broken=broken)
    model = torch.compile(copy.deepcopy(plain), backend="mhc", options=options)
    if broken == "in front" and not options:
        with pytest.raises(_torch.BackendCompilerFailed, match=r"options=\{'n': 1\}"):
            model(signal())
        return
    torch.testing.assert_close(model(signal()), plain(signal()))
    (graph,) = mhc_compile.graphs(model._orig_mod)
    assert [site.name for site in graph.sites] == PAPER_SITES[:2]
    assert not any(is_swapped(m) for m in model.modules())


class Turns(nn.Module):
    """Connections of its own in one call, plain residuals in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.paper = hyper.PaperModel(layers=1)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, own: bool) -> Tensor:
        if own:
            return self.paper(x)
        y = x + self.a(x)
        return y + self.b(y)


def test_that_a_model_has_its_own_is_known_of_all_its_graphs() -> None:
    """It is kept on the model: a copy knows it too, and nothing outlives them."""
    plain = Turns().double()
    model, x = copy.deepcopy(plain), signal().double()
    model.compile(backend="mhc")
    for own in (True, False):
        torch.testing.assert_close(model(x, own), plain(x, own))
    assert_nothing_added(model, plain, list(model.parameters()))
    twin = copy.deepcopy(model)
    twin.compile(backend="mhc")
    torch.testing.assert_close(twin(x, False), plain(x, False))
    assert not any(is_swapped(m) for m in twin.modules())
    first = copy.deepcopy(plain)  # in this one the plain call comes first: it is transformed
    first.compile(backend="mhc", options={"n": 2})
    torch.testing.assert_close(first(x, False), plain(x, False))
    assert is_swapped(first)

    (graph,) = mhc_compile.graphs(model)
    left = [weakref.ref(one) for one in (model, twin, graph.after, *model.parameters())]
    del model, twin, graph
    torch._dynamo.reset()
    for _ in range(3):
        gc.collect()
    assert [ref() for ref in left if ref() is not None] == []


def test_autocast_rounds_the_projection() -> None:
    """Ours is never rounded, so nothing is fused; plain eager under autocast says the same."""
    plain = hyper.PaperModel(layers=1)
    model = copy.deepcopy(plain)
    model.compile(backend="mhc")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(model, {"x": signal()}), run(plain, {"x": signal()})
    assert output_error(actual.outputs, expected.outputs) < 1e-5
    (graph,) = mhc_compile.graphs(model)
    assert not operators(graph, "captured") and not graph.sites
    assert "computed in bfloat16, float32" in " ".join(notes(graph, "fuse_coefficients"))


def test_options_of_new_connections_are_refused() -> None:
    model = hyper.PaperModel(layers=1)
    compiled = torch.compile(model, backend="mhc", options={"n": 4, "readout": "head"})
    with pytest.raises(_torch.BackendCompilerFailed) as caught:
        compiled(signal())
    message = str(caught.value)
    assert "UnsupportedError: PaperModel has hyper-connections of its own (2 recog" in message
    assert "for one blocks.0.mixer_hc (" in message
    assert "options['n'], options['readout'] would describe new ones. Leave them out" in message


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("deepseek_v4", NoSitesError, r"seems to have hyper-connections of its own \(.*py:\d+\)"),
        ("glm5_next", NoSitesError, r"seems to have hyper-connections of its own \(.*py:\d+\)"),
        ("hy_v4", UnsupportedError, r"of its own, of \d+ streams \(.*modeling_hy_v4.py:\d+\)"),
        ("qwen4_exp", UnsupportedError, r"of its own, of \d+ streams \(.*qwen4_exp.py:\d+\)"),
    ],
)
def test_transform_adds_none_to_those_of_a_model(
    name: str, error: type[Exception], message: str
) -> None:
    """Also where its sums look like residual adds of all streams at once."""
    model = getattr(hyper, name)()
    parameters = list(model.parameters())
    with pytest.raises(error, match=message) as caught:
        mhc_compile.transform(model, example_inputs={"input_ids": hyper.tokens()})
    assert 'model.compile(backend="mhc") runs' in str(caught.value)
    assert_nothing_added(model, getattr(hyper, name)(), parameters)


@pytest.mark.parametrize("disabled", ["recognize", "fuse_coefficients"])
def test_passes_can_be_left_out(disabled: str) -> None:
    """The model is left as it is all the same: never transformed."""
    plain = hyper.PaperModel(layers=1).double()
    model = copy.deepcopy(plain)
    parameters = list(model.parameters())
    model.compile(backend="mhc", options={"disabled": [disabled], "n": 1})
    torch.testing.assert_close(model(signal().double()), plain(signal().double()))
    assert_nothing_added(model, plain, parameters)


def test_a_transformed_model_with_a_part_of_its_own() -> None:
    """`transform` adds to the plain part, and the other part's connections are recognised."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.paper = hyper.PaperModel(layers=1)
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.paper(x)
            y = y + self.a(y)
            return y + self.b(y)

    plain = Both().double()
    model = copy.deepcopy(plain)
    x = signal().double()
    mhc_compile.transform(model, example_inputs=(x,), config=Config(n=2))
    torch.testing.assert_close(model(x), plain(x))
    (graph,) = mhc_compile.graphs(model)
    own = ["paper.blocks.0.mixer_hc", "paper.blocks.0.mlp_hc"]
    assert [site.name for site in graph.sites] == ["a", "b", *own]
    two = ["coefficients", "pre", "post_res"] * 2
    assert operators(graph, "captured") == [*two, "expand", *two, "readout"]
    assert_moves(model, (x,))
