"""Every model of the zoo, transformed: sites, function preservation, gradients, hand-written truth.

Two kinds of equality. At initialisation a transformed model equals the plain one, whatever is wrong
with H_res. Therefore everything is looked at a second time with all mHC parameters perturbed: the
output must then differ from the plain model's, every group of parameters must have a gradient, and
five models must equal `truth.py`.
"""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.models.gptj.modeling_gptj import GPTJAttention

import mhc_compile
from mhc_compile import Reason
from tests import checks
from tests.zoo.models import BY_NAME, ZOO, Model, every
from tests.zoo.truth import TRUTHS

N = 4
zoo = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Drop the compiled code of a model together with the model."""
    yield
    torch._dynamo.reset()


def plain_and_transformed(entry: Model, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The plain model and a transformed copy, checked for what transform adds to it."""
    plain = entry.make(dtype)
    model = copy.deepcopy(plain)
    assert mhc_compile.transform(model, n=N, example_inputs=entry.example(dtype)) is model

    before, after = set(plain.state_dict()), set(model.state_dict())
    assert before <= after
    added = {key for key in after - before if not key.endswith("mhc._extra_state")}
    assert len(added) == 3 * entry.sites
    sites = checks.connections(model)
    assert len(sites) == entry.sites, sorted(sites)
    assert all(p.dtype is dtype for site in sites.values() for p in site)
    return plain, model


def chains_of(model: nn.Module) -> list[list[str]]:
    """Names of the sites of every chain, in the order of the forward, from the rewritten graph."""
    chains: dict[int, list[str]] = {}
    for site in mhc_compile.graphs(model)[-1].sites:
        chains.setdefault(site.chain, []).append(site.name)
    return list(chains.values())


def step(model: nn.Module, rate: float = 1e-2) -> None:
    """One AdamW step on the mHC parameters with the gradients they have."""
    parameters = list(mhc_compile.parameters(model))
    torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0).step()


@pytest.mark.parametrize("entry", every(3), ids=lambda entry: entry.name)
def test_equals_plain_model_in_float32(entry: Model) -> None:
    plain, model = plain_and_transformed(entry, torch.float32)
    checks.assert_transformed(
        plain, model, entry.example(), outputs=entry.output_error, gradients=entry.gradient_error
    )


@zoo
def test_equals_plain_model_in_float64_and_every_group_learns(entry: Model) -> None:
    plain, model = plain_and_transformed(entry, torch.float64)
    inputs = entry.example(torch.float64)

    # At initialisation, and far from it.
    with checks.parameters_kept(model):
        compared = checks.assert_transformed(plain, model, inputs)
        if entry.name in TRUTHS:
            assert_equals_truth(entry, model, compared.perturbed)
    chains = chains_of(model)
    assert len(chains) == entry.chains
    assert sorted(name for chain in chains for name in chain) == sorted(checks.connections(model))
    firsts = {chain[0] for chain in chains}

    def equal_streams(site: str, group: str) -> bool:
        """H_res acts on equal streams at the first site, whatever the parameters."""
        return group.endswith("res") and site in firsts

    # phi = 0 leaves alpha without a gradient, and streams are equal throughout non-linear chains.
    checks.run(model, inputs)
    checks.assert_learning(
        model,
        lambda site, group: (
            group.startswith("alpha")
            or equal_streams(site, group)
            or (group.endswith("res") and not entry.linear)
        ),
    )

    # One step later the streams have parted everywhere, and alpha follows where phi has moved.
    step(model)
    checks.run(model, inputs)
    checks.assert_learning(
        model,
        lambda site, group: (
            equal_streams(site, group) or (group == "alpha_res" and not entry.linear)
        ),
    )


def assert_equals_truth(entry: Model, model: nn.Module, actual: checks.Run) -> None:
    """Outputs and all gradients are those of the n-stream model written by hand."""
    plain = entry.make(torch.float64)
    sites = {
        name: tuple(p.detach().clone().requires_grad_() for p in site)
        for name, site in checks.connections(model).items()
    }
    torch.manual_seed(0)
    outputs = TRUTHS[entry.name](plain, sites, N, **entry.example(torch.float64))
    checks.loss_of(outputs).backward()

    assert checks.output_error(actual.outputs, [o.detach() for o in outputs]) <= 1e-10
    expected = checks.gradients_of(plain.named_parameters())
    assert checks.gradient_error(actual.gradients, expected) <= 1e-8
    names = {id(p): name for name, p in model.named_parameters()}
    for name, site in checks.connections(model).items():
        for parameter, truth in zip(site, sites[name], strict=True):
            gradient = actual.gradients[names[id(parameter)]]
            torch.testing.assert_close(gradient, truth.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", TRUTHS)
def test_hand_written_model_with_equal_streams_is_the_plain_model(name: str) -> None:
    """The truth itself: H_post = 1 and H_pre = 1/n keep the streams equal, whatever H_res is."""
    entry = BY_NAME[name]
    plain, inputs = entry.make(torch.float64), entry.example(torch.float64)

    generator = torch.Generator().manual_seed(0)  # dropout draws from the global one

    def noise(count: int) -> torch.Tensor:
        return torch.randn(count, dtype=torch.float64, generator=generator)

    class EqualStreams(dict):
        def __missing__(self, site: str) -> tuple[torch.Tensor, ...]:
            width = 16 if "stages.0" in site else 32
            phi = torch.zeros(N * width, N * N + 2 * N, dtype=torch.float64)
            pre, post = torch.full((N,), 1 / N, dtype=torch.float64).logit(), phi.new_zeros(N)
            self[site] = phi, noise(3), torch.cat([pre, post, noise(N * N)])
            return self[site]

    sites = EqualStreams()
    expected = checks.run(plain, inputs).outputs
    torch.manual_seed(0)
    outputs = TRUTHS[name](entry.make(torch.float64), sites, N, **inputs)
    assert len(sites) == entry.sites
    assert checks.output_error(outputs, expected) <= 1e-12


@pytest.mark.parametrize("name", TRUTHS)
def test_streams_part_with_the_first_optimizer_step(name: str) -> None:
    """By 10 % or more on linear chains, where they start apart; from zero on the others."""
    entry = BY_NAME[name]
    inputs = entry.example(torch.float64)
    model = entry.make(torch.float64)
    mhc_compile.transform(model, n=N, example_inputs=inputs)

    def spreads() -> list[float]:
        streams: list[torch.Tensor] = []
        sites = checks.connections(model)
        with torch.no_grad():
            TRUTHS[name](entry.make(torch.float64), sites, N, **inputs, trace=streams)
        return [checks.spread(X) for X in streams]

    before = spreads()
    checks.run(model, inputs)
    step(model)
    after = spreads()
    if entry.linear:
        assert min(after) >= 0.1
    else:
        assert max(before) <= 1e-12 and min(after) > 1e-6


def test_layers_skipped_by_a_flag_keep_their_names() -> None:
    entry = BY_NAME["skippable"]
    plain, model = plain_and_transformed(entry, torch.float64)
    inputs = entry.example(torch.float64)
    keys = set(model.state_dict())
    everything = (True, True, True)
    for active in (everything, (True, False, True), (False, True, False)):
        call = {**inputs, "active": active}
        skipped = {str(i) for i, runs in enumerate(active) if not runs}

        def is_skipped(site: str, group: str, skipped: set[str] = skipped) -> bool:
            return site.split(".")[1] in skipped

        with checks.parameters_kept(model):
            checks.assert_transformed(plain, model, call, idle=is_skipped)
        assert set(model.state_dict()) == keys
    call = {**inputs, "active": everything}  # again the graph of the first call
    outputs = [checks.outputs_of(m, call) for m in (model, plain)]
    assert checks.output_error(*outputs) < 1e-12


class TwoLayers(nn.Module):
    """x + Ax, then y + By, with literal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
            self.b.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x)
        return x + self.b(x)


@pytest.mark.parametrize(("iterations", "kept"), [(1, 2 / 3), (20, 40 / 41)])
def test_h_res_is_indexed_out_in(iterations: int, kept: float) -> None:
    """Literal numbers, n = 2, one token x = (1, 2).

    A doubly stochastic 2 x 2 matrix is symmetric, so the orientation is visible only before
    Sinkhorn converges: from [[1, 0], [1, 1]], t iterations (columns, then rows) give
    [[1, 0], [1/(2t+1), 2t/(2t+1)]].

    Site 1: h = x, A h = (2, 1). H_post = (1, 3/2) gives X = [(3, 3), (4, 3.5)].
    Site 2: H_pre = (1/4, 3/4): h = (3.75, 3.375), B h = (7.125, 6.75), H_post = (1/2, 1):
        X' = [(3, 3) + (3.5625, 3.375), (1 - kept)(3, 3) + kept (4, 3.5) + (7.125, 6.75)].
    """

    def row(*numbers: float) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    model, x = TwoLayers().double(), row(1, 2)[None]
    config = mhc_compile.Config(n=2, sinkhorn_iters=iterations)
    mhc_compile.transform(model, example_inputs=(x,), config=config)

    def set_bias(connection: nn.Module, pre: list[float], post: list[float]) -> None:
        """Biases for given H_pre and H_post, and for H_res from exp(b) = [[1, 0], [1, 1]]."""
        res = row(0.0, -1000.0, 0.0, 0.0)
        with torch.no_grad():
            connection.bias.copy_(torch.cat([row(*pre).logit(), (row(*post) / 2).logit(), res]))

    set_bias(model.mhc.a, [0.5, 0.5], [1.0, 1.5])
    set_bias(model.mhc.b, [0.25, 0.75], [0.5, 1.0])

    second = row(3 + kept, 3 + kept / 2) + row(7.125, 6.75)
    expected = (row(6.5625, 6.375) + second) / 2
    torch.testing.assert_close(model(x), expected[None], rtol=1e-12, atol=0)


def per_layer(layers: str, *adds: tuple[str, Reason]) -> list[tuple[str, Reason]]:
    """The same rejected adds in each of three layers, by the module's path within the layer."""
    return [(f"{layers}.{i}{path}", reason) for i in range(3) for path, reason in adds]


# Read from each model's source: every add of two tensors that is no site, by the module whose
# forward contains it. Rotary embeddings (q * cos + rotate(q) * sin, the same for k), tanh GELU
# (x + 0.044715 x^3), embeddings, attention masks, projected skips, parts of parallel sums.
REJECTED: dict[str, list[tuple[str, Reason]]] = {
    "llama": per_layer("model.layers", *2 * [(".self_attn", Reason.POINTWISE_BRANCH)]),
    "gpt2": [
        ("transformer", Reason.BROADCAST),  # positions [1, S, C]
        *per_layer("transformer.h", (".mlp.act", Reason.POINTWISE_BRANCH)),
    ],
    "gptj": per_layer(
        "transformer.h",
        *2 * [(".attn", Reason.POINTWISE_BRANCH)],
        *[(".attn", Reason.BROADCAST)] * hasattr(GPTJAttention, "_attn"),  # before 5.24: a mask
        (".mlp.act", Reason.POINTWISE_BRANCH),
        ("", Reason.PART_OF_SITE),
    ),
    "bert": [
        ("bert.embeddings", Reason.INDEPENDENT),  # token types
        ("bert.embeddings", Reason.BROADCAST),  # positions [1, S, C]
    ],
    "roberta": 2 * [("roberta.embeddings", Reason.INDEPENDENT)],  # positions come from the ids
    "resnet": [("encoder.stages.1.layers.0", Reason.PROJECTED_SKIP)],
}


@pytest.mark.parametrize("name", REJECTED)
def test_every_rejected_add_has_its_reason(name: str) -> None:
    entry = BY_NAME[name]
    explanation = mhc_compile.explain(entry.make(), **entry.example())
    found = [(add.owner, add.reason) for add in explanation.rejected]
    assert sorted(found) == sorted(REJECTED[name])
    assert len(explanation.sites) == entry.sites
    assert len(explanation.chains) == entry.chains
