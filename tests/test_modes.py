"""One transformed model in every mode it may be called in, and every option that shapes it.

At `preserve` initialisation the plain model says what is right. Perturbed, one float64 call of the
transformed model does: causal attention and rows of a batch make every other call a part of it.
"""

import contextlib
import copy
import io
import pickle
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile.kernels import reference
from tests import checks
from tests.checks import perturb
from tests.models import GPT, WIDTH, Block, ids, pair, relative

EXACT = 1e-12


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def names(model: nn.Module) -> list[str]:
    """Names of a model's sites, in the order of its modules."""
    return list(checks.connections(model))


def output(model: nn.Module, *inputs: Any, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(*inputs)


def gradients(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """Gradients of every parameter, of a loss that weighs all entries differently."""
    model.zero_grad()
    checks.loss_of([output(model, *inputs)]).backward()
    return checks.gradients_of(model.named_parameters())


def assert_preserved(
    plain: nn.Module, model: nn.Module, *inputs: Any, error: float = EXACT, **options: Any
) -> None:
    """Preserved at the start, and another function once perturbed, which the model then stays."""
    checks.assert_transformed(plain, model, inputs, outputs=error, gradients=100 * error, **options)


def assert_changed(plain: nn.Module, model: nn.Module, *inputs: Any) -> None:
    """A perturbed model is another function, and everything in it has a finite gradient."""
    assert relative(output(model, *inputs), output(plain, *inputs)) > 1e-3
    assert all(g.isfinite().all() for g in gradients(model, *inputs).values())


# ------------------------------------------------------------------------------------------ modes

MODES: dict[str, tuple[Callable[[], Any], bool]] = {
    "train": (contextlib.nullcontext, True),
    "eval": (contextlib.nullcontext, False),
    "no_grad": (torch.no_grad, False),
    "inference_mode": (torch.inference_mode, False),
}
SHAPES = [(2, 5), (2, 3), (3, 7), (1, 5), (2, 1), (0, 5)]


def calls() -> Iterator[tuple[Any, bool, Tensor]]:
    for context, training in MODES.values():
        for batch, length in SHAPES:
            yield context, training, ids(batch, length)


def test_every_mode_equals_the_plain_model_with_no_more_graphs():
    plain, model = pair(lambda: GPT(layers=1, dropout=0.2))
    counted = []

    def count(gm, example_inputs):
        counted.append(gm)
        return gm.forward

    compiled = torch.compile(plain, backend=count)
    with torch._dynamo.config.patch(recompile_limit=64):
        for context, training, x in calls():
            plain.train(training)
            model.train(training)
            with context():
                expected, actual = output(compiled, x, seed=7), output(model, x, seed=7)
            assert actual.shape == expected.shape
            assert actual.requires_grad == expected.requires_grad
            assert actual.is_inference() == expected.is_inference()
            assert relative(actual, expected) < EXACT, (training, x.shape)
    assert len(mhc_compile.graphs(model)) <= len(counted)
    plain.train()
    model.train()
    assert_preserved(plain, model, ids())


def test_perturbed_every_mode_computes_the_same_function():
    plain, model = pair(lambda: GPT(layers=1))
    x = ids(3, 7)
    checks.assert_moves(model, (x,))
    truth = output(model, x).detach()
    assert relative(truth, output(plain, x)) > 1e-2
    for context, training in MODES.values():
        model.train(training)
        for batch, length in SHAPES:
            with context():
                actual = model(x[:batch, :length])
            assert relative(actual, truth[:batch, :length]) < EXACT


# ------------------------------------------------------------------------------------------ dtypes


def test_bfloat16_is_no_farther_from_the_truth_than_the_plain_model():
    plain, model = pair(dtype=torch.bfloat16)
    truth = output(copy.deepcopy(plain).double(), ids())
    assert {p.dtype for p in mhc_compile.parameters(model)} == {torch.float32}
    actual, expected = output(model, ids()), output(plain, ids())
    assert actual.dtype is torch.bfloat16
    assert relative(actual, truth) < 1.5 * relative(expected, truth)
    assert_preserved(plain, model, ids(), error=5e-2)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_cast_model_computes_the_same_function(dtype, error):
    if torch.__version__ < "2.12":
        pytest.skip("Dynamo of torch 2.11 keeps its graphs when parameters change their dtype")
    model = pair()[1]
    checks.assert_moves(model, (ids(),))
    truth = output(model, ids()).detach()
    assert relative(output(model.to(dtype), ids()), truth) < error


@pytest.mark.parametrize("stream_dtype", ["float64", "float32", "bfloat16", None])
def test_streams_may_have_a_dtype_of_their_own(stream_dtype):
    plain, model = pair(dtype=torch.bfloat16, stream_dtype=stream_dtype)
    truth_model = pair(dtype=torch.bfloat16)[1].double()
    checks.assert_moves(truth_model, (ids(),))
    perturb(model)
    actual, truth = output(model, ids()), output(truth_model, ids())
    assert actual.dtype is torch.bfloat16
    assert relative(actual, truth) < 5e-2
    streams = [
        n.meta["example_value"]
        for n in mhc_compile.graphs(model)[0].after.graph.nodes
        if n.op.startswith("call") and getattr(n.meta.get("example_value"), "ndim", 0) == 4
    ]
    wide = {s.dtype for s in streams if s.shape[-2:] == (4, WIDTH)}
    assert getattr(torch, stream_dtype or "bfloat16") in wide
    assert_changed(plain, model, ids())


@pytest.mark.parametrize("training", [True, False])
def test_ambient_autocast(training):
    """The streams stay float32 and the coefficients too, the branches run in bfloat16."""
    plain, model = pair(dtype=torch.float32)
    truth = output(copy.deepcopy(plain).double(), ids())
    plain.train(training)
    model.train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = output(model, ids()), output(plain, ids())
    assert actual.dtype is expected.dtype
    assert relative(actual, truth) < 1.5 * relative(expected, truth)
    assert relative(output(model, ids()), output(plain, ids())) < 1e-5

    checks.assert_moves(model, (ids(),))
    truth = output(copy.deepcopy(model).double(), ids())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(output(model, ids()), truth) < 2e-2
        assert all(g.isfinite().all() for g in gradients(model, ids()).values())


class Autocasting(GPT):
    """Autocast inside the model, around its blocks and not around its norm."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = block(x)
        return self.head(self.ln_f(x))


def test_autocast_inside_the_model():
    plain, model = pair(Autocasting, dtype=torch.float32)
    truth = output(copy.deepcopy(plain).double(), ids())
    error = relative(output(plain, ids()), truth)
    assert error > 1e-4
    assert relative(output(model, ids()), truth) < 1.5 * error
    checks.assert_moves(model, (ids(),))
    truth = output(copy.deepcopy(model).double(), ids())
    assert relative(output(model, ids()), truth) < 2e-2
    assert_changed(plain, model, ids())


# ------------------------------------------------------------------------------------ what users do


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_fused_path_of_torch_layers_does_not_hide_the_adds(norm_first, frozen):
    """In eval without gradients torch runs a whole layer as one call."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain = encoder(norm_first).double().eval().requires_grad_(not frozen)
    flags = [layer.activation_relu_or_gelu for layer in plain.layers]
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(x,))
    assert len(names(model)) == 4
    assert all(p.requires_grad for p in mhc_compile.parameters(model))
    for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        with context():
            assert relative(model(x), plain(x)) < EXACT
    checks.assert_moves(model, (x,))
    truth = model(x)
    assert truth.requires_grad
    with torch.no_grad():
        assert relative(model(x), truth) < EXACT
        assert relative(model(x), plain(x)) > 1e-3
    mhc_compile.revert(model)
    assert [layer.activation_relu_or_gelu for layer in model.layers] == flags
    assert relative(model(x), plain(x)) < EXACT


class Recurrent(nn.Module):
    """Dynamo's own setting leaves such layers out of the graph, and the adds beside them."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.norm, self.rnn = nn.LayerNorm(WIDTH), kind(WIDTH, WIDTH, batch_first=True)
        self.norm2, self.f = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rnn(self.norm(x))[0]
        return x + self.f(self.norm2(x))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("layers", [1, 3])
def test_recurrent_layers_are_branches(kind, layers):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Recurrent(kind) for _ in range(layers)))
    plain = plain.double()
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=(x,))
    assert len(names(model)) == 2 * layers
    assert_preserved(plain, model, x)
    truth = output(model, x)
    model.compile(backend="mhc")
    assert relative(output(model, x), truth) < EXACT


def test_torch_compile_says_what_lets_recurrent_layers_through():
    x = torch.randn(2, 5, WIDTH)
    model = mhc_compile.transform(nn.Sequential(Recurrent(nn.GRU)), example_inputs=(x,))
    checks.assert_moves(model, (x,))
    with pytest.raises(Exception, match=r"allow_rnn = True.*model\.compile\(backend='mhc'\)"):
        torch.compile(model, backend="mhc")(x)
    with torch._dynamo.config.patch(allow_rnn=True):
        with pytest.raises(Exception, match=r"on which Dynamo gave up.*torch\._dynamo\.reset"):
            torch.compile(model, backend="mhc")(x)
        torch._dynamo.reset()
        assert relative(torch.compile(model, backend="mhc")(x), model(x)) < 1e-5


class Checkpointed(GPT):
    """Keeps the inputs of its blocks and computes them again."""

    reentrant = False

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.ln_f(x))


def test_checkpointing_inside_the_model():
    whole = pair(lambda: GPT(dropout=0.2))[1]
    plain, model = pair(lambda: Checkpointed(dropout=0.2))
    whole.load_state_dict(model.state_dict())
    assert_preserved(plain, model, ids())
    perturb(whole)
    assert relative(output(model, ids()), output(whole, ids())) < EXACT
    assert checks.gradient_error(gradients(model, ids()), gradients(whole, ids())) < EXACT


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(saved(m), weights_only=False),
    ],
)
def test_copies_are_transformed_and_independent(copied):
    model = pair()[1]
    checks.assert_moves(model, (ids(),))
    truth = output(model, ids()).detach()
    twin = copied(model)
    assert type(twin).__name__ == "GPT" and isinstance(twin, GPT)
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert output(twin, ids()).equal(truth)
    perturb(twin)
    assert relative(output(twin, ids()), truth) > 1e-3
    assert output(model, ids()).equal(truth)


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_functional_call_uses_the_given_parameters():
    model = pair()[1]
    twin = copy.deepcopy(model)
    checks.assert_moves(twin, (ids(),))
    given = dict(twin.named_parameters())
    expected = model(ids())
    assert functional_call(model, given, (ids(),)).equal(twin(ids()))
    assert model(ids()).equal(expected)
    assert relative(expected, twin(ids())) > 1e-3


def test_revert_gives_the_plain_model_back_and_it_can_be_transformed_again():
    plain, model = pair()
    perturb(model)
    model(ids())
    assert mhc_compile.revert(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in plain.named_modules()
    }
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == {
        n: set(m.__dict__) for n, m in plain.named_modules()
    }
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert output(model, ids()).equal(output(plain, ids()))
    mhc_compile.transform(model, n=2, example_inputs=(ids(),))
    assert_preserved(plain, model, ids())
    assert next(iter(mhc_compile.parameters(model))).shape[0] == 2 * WIDTH


def test_an_encoder_alone_may_be_called():
    """Any module that contains a whole chain is a model of its own."""
    around = nn.Sequential(GPT(), nn.Linear(17, 3)).double()
    plain = copy.deepcopy(around)
    mhc_compile.transform(around, example_inputs=(ids(),))
    checks.assert_moves(around, (ids(),))
    inner = around[0](ids())
    assert relative(around(ids()), plain[1](inner)) < EXACT
    assert relative(inner, plain[0](ids())) > 1e-2


def test_hooks_see_one_stream():
    plain, model = pair()
    seen: dict[str, list[Tensor]] = {"plain": [], "model": []}
    plain.h[0].register_forward_hook(lambda m, i, o: seen["plain"].append(o))
    model.h[0].register_forward_hook(lambda m, i, o: seen["model"].append(o))
    assert_preserved(plain, model, ids())
    assert [len(s) for s in seen.values()] == [1, 2]
    at_first, perturbed = seen["model"]
    assert relative(at_first, seen["plain"][0]) < EXACT
    assert relative(perturbed, seen["plain"][0]) > 1e-3


# ------------------------------------------------------------------------------------- which sites


class Repeated(nn.Module):
    """One block applied three times, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Listed(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        block = Block()
        self.blocks = nn.ModuleList([block, Block(), block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("make", [Repeated, Listed])
def test_every_application_of_a_shared_block_has_parameters_of_its_own(make):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain, model = pair(make, example_inputs=(x,))
    expected = {
        Repeated: [f"block.{b}{k}" for k in ("", "_1", "_2") for b in ("attn", "mlp")],
        Listed: [
            *("blocks.0.attn", "blocks.0.mlp", "blocks.0.attn_1", "blocks.0.mlp_1"),
            *("blocks.1.attn", "blocks.1.mlp"),
        ],
    }[make]
    assert sorted(names(model)) == sorted(expected)
    assert_preserved(plain, model, x)
    truth = output(model, x).detach()
    # Each application uses its own: changing one set changes the result.
    for parameter in [site[2] for site in checks.connections(model).values()]:
        with torch.no_grad():
            parameter.neg_()
            assert relative(model(x), truth) > 1e-6
            parameter.neg_()


class Skipping(GPT):
    """Leaves out the layers that a flag names."""

    skipped: tuple[int, ...] = ()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, block in enumerate(self.h):
            if number not in self.skipped:
                x = block(x)
        return self.head(self.ln_f(x))


def test_layers_skipped_by_a_flag_keep_the_names_of_the_others():
    plain, model = pair(lambda: Skipping(layers=3))
    all_names = [s.name for s in sites_of(model, ids())]
    assert all_names == [f"h.{i}.{b}" for i in range(3) for b in ("attn", "mlp")]
    for skipped in ((), (0,), (1,), (0, 1, 2), (0, 2)):
        plain.skipped = model.skipped = skipped
        assert relative(output(model, ids()), output(plain, ids())) < EXACT
        expected = [n for n in all_names if int(n[2]) not in skipped]
        if expected:
            assert [s.name for s in mhc_compile.graphs(model)[-1].sites] == expected
    checks.assert_moves(model, (ids(),), idle=lambda site, group: int(site[2]) in model.skipped)
    # A shorter model with the same parameters is the truth for the skipped layers.
    short = pair(lambda: Skipping(layers=2))[1]
    kept = {k.replace("h.2", "h.1"): v for k, v in model.state_dict().items() if "h.1" not in k}
    short.load_state_dict(kept)
    model.skipped = (1,)
    assert relative(output(model, ids()), output(short, ids())) < EXACT


def sites_of(model: nn.Module, *inputs: Any) -> Any:
    model(*inputs)
    return mhc_compile.graphs(model)[-1].sites


class Watched(GPT):
    """Returns the state behind every block."""

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, states = self.embed(ids), []
        for block in self.h:
            x = block(x)
            states.append(x)
        return self.head(self.ln_f(x)), states


def test_returned_states_are_read_out():
    plain, model = pair(Watched)
    for actual, expected in zip(model(ids())[1], plain(ids())[1], strict=True):
        assert relative(actual, expected) < EXACT
    silent = pair()[1]
    silent.load_state_dict(model.state_dict())
    checks.assert_moves(model, (ids(),))
    perturb(silent)
    logits, states = model(ids())
    assert relative(logits, silent(ids())) < EXACT
    assert relative(logits, model.head(model.ln_f(states[-1]))) < EXACT
    assert relative(states[0], plain(ids())[1][0]) > 1e-3


class Three(nn.Module):
    """Three linear branches, for truths written out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        return x + self.c(x)


@pytest.mark.parametrize("options", [{"exclude": "b"}, {"include": ["a", "c"]}])
def test_an_excluded_add_stays_plain_on_every_stream(options):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain, model = pair(Three, example_inputs=(x,), **options)
    assert sorted(names(model)) == ["a", "c"]
    assert_preserved(plain, model, x)

    X = reference.expand(x, 4)
    exact: Any = {"dtype": torch.float64, "compute_dtype": torch.float64}
    for name in ("a", "b", "c"):
        branch = getattr(model, name)
        if name == "b":
            X = X + branch(X.mean(-2)).unsqueeze(-2)
            continue
        site = checks.connections(model)[name]
        variant = mhc_compile.Config().variant_object
        H_pre, H_post, H_res = reference.coefficients(
            X, *site, variant=variant, n=4, width=WIDTH, eps=1e-6, compute_dtype=torch.float64
        )
        f = branch(reference.pre(H_pre, X, **exact))
        X = reference.post_res(H_res, H_post, X, f, **exact)
    assert relative(model(x), X.mean(-2)) < EXACT


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_any_number_of_streams(n):
    plain, model = pair(n=n)
    if n == 1:
        assert type(model) is GPT
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert output(model, ids()).equal(output(plain, ids()))
        return
    assert len(names(model)) == 4
    assert_preserved(plain, model, ids())


VARIANTS = {
    "mhc": EXACT,
    "deepseek_v4": 1e-5,
    "hc": EXACT,
    "mhc_lite": EXACT,
    "kromhc": EXACT,
    "identity": EXACT,
    "low_rank": EXACT,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_preserves_and_learns(variant):
    plain, model = pair(variant=variant)

    def unseen(site: str, group: str) -> bool:
        """A matrix whose columns sum to 1 does not change the mean, which is read out at the end.

        20 iterations of Sinkhorn-Knopp leave such a matrix only to rounding.
        """
        exact = variant in ("mhc_lite", "kromhc")
        return exact and site == names(model)[-1] and group.endswith("res")

    assert_preserved(plain, model, ids(), error=VARIANTS[variant], idle=unseen)


@pytest.mark.parametrize(("readout", "error"), [("mean", EXACT), ("head", EXACT), ("sum", 1e-3)])
def test_every_readout_preserves_in_front_of_a_norm(readout, error):
    """`sum` is n times as large: the LayerNorm behind it differs by its eps only."""
    plain, model = pair(readout=readout)
    assert len(names(model)) == 4 + (readout == "head")
    assert_preserved(plain, model, ids(), error=error)


def test_paper_init_runs_and_learns():
    plain, model = pair(init="paper")
    assert relative(output(model, ids()), output(plain, ids())) > 1e-6
    assert all(g.isfinite().all() for g in gradients(model, ids()).values())


def test_fewer_sinkhorn_iterations_are_another_function():
    outputs = []
    for iterations in (1, 20):
        model = pair(sinkhorn_iters=iterations)[1]
        perturb(model)
        outputs.append(output(model, ids()))
    assert relative(*outputs) > 1e-6


# ------------------------------------------------------------------------- how parameters are made


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_parameters_made_at_the_first_call(context):
    plain = GPT().double()
    model = mhc_compile.transform(copy.deepcopy(plain), n=2)
    with context():
        assert relative(model(ids()), plain(ids())) < EXACT
    early = mhc_compile.transform(copy.deepcopy(plain), n=2, example_inputs=(ids(),))
    assert model.state_dict().keys() == early.state_dict().keys()
    assert_preserved(plain, model, ids())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not any(p.is_inference() for p in model.parameters())
    optimizer.step()
    assert_changed(plain, model, ids())


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = GPT()
    for x in (ids(), ids().to("meta")):
        twin = mhc_compile.transform(copy.deepcopy(model), example_inputs=(x,))
        assert all(p.is_meta for p in mhc_compile.parameters(twin))
        assert len(names(twin)) == 4
    twin = twin.to_empty(device="cpu")
    plain, early = pair(dtype=torch.float32)
    assert_preserved(plain, early, ids(), error=1e-5)
    twin.load_state_dict(early.state_dict())
    assert output(twin, ids()).equal(output(early, ids()))


class Remembering(GPT):
    """Keeps all kinds of things between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.seen, self.by_shape = 0, None, [], {}
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids).mT).mT
        self.calls += 1
        self.last = x.detach()
        self.fresh = 2 * self.last
        self.seen.append(self.last)
        self.by_shape[ids.shape[-1]] = self.last
        self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.1)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def test_transform_changes_neither_state_nor_random_numbers():
    model = Remembering().double()
    before = copy.deepcopy(model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    mhc_compile.transform(model, example_inputs=(ids(),))
    assert torch.get_rng_state().equal(states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert (model.calls, model.last, model.seen, model.by_shape) == (0, None, [], {})
    assert not hasattr(model, "fresh")
    assert all(model.state_dict()[k].equal(v) for k, v in before.items())
    plain = Remembering().double()
    plain.load_state_dict(before)
    for _ in range(2):
        assert relative(output(model, ids()), output(plain, ids())) < EXACT
    assert (model.calls, len(model.seen), list(model.by_shape)) == (2, 2, [5])
    assert all(
        relative(model.state_dict()[k].double(), v) < EXACT for k, v in plain.state_dict().items()
    )
    assert_preserved(plain, model, ids())


def test_threads_that_call_one_model_at_once():
    """B6: while one thread captures, `torch.compiler.is_compiling()` is true in all of them."""
    plain, model = pair()
    lengths = [3, 4, 5, 6]  # each thread captures graphs of its own
    start = threading.Barrier(len(lengths))

    def call(length: int) -> list[Tensor]:
        start.wait()
        return [output(model, ids(2, length)).detach() for _ in range(3)]

    with ThreadPoolExecutor(len(lengths)) as pool:
        results = list(pool.map(call, lengths))
    for length, outputs in zip(lengths, results, strict=True):
        expected = output(plain, ids(2, length))
        assert all(relative(out, expected) < EXACT for out in outputs)
    assert_preserved(plain, model, ids())


# -------------------------------------------------------------------------- how a block is written


class AllowedInGraph(Block):
    """A class given to `allow_in_graph`: Dynamo traces its calls, but reads no attribute of it."""


torch._dynamo.allow_in_graph(AllowedInGraph)


class WeightNormed(Block):
    """Branches whose weight is computed from two parameters, of which neither acts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = (weight_norm(nn.Linear(WIDTH, WIDTH)) for _ in range(2))


@pytest.mark.parametrize("block", [AllowedInGraph, WeightNormed])
def test_blocks_written_in_other_ways(block):
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    plain, model = pair(lambda: nn.Sequential(block(), block()), example_inputs=(x,))
    assert names(model) == [f"{i}.{branch}" for i in range(2) for branch in ("attn", "mlp")]
    assert_preserved(plain, model, x)
