"""Connection, Head, Connections: initial values that preserve, dtypes that stay, names that hold.

The n-stream chain is written out here once more, from the paper's equations, so that the initial
values are tested against the mathematics and not against the library's own operators.
"""

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

from mhc_compile.config import Config
from mhc_compile.model.connection import Connection, Connections, Head

SITES = 12
WIDTH = 6
STREAMS = [2, 3, 4, 5, 6, 8, 16]
VARIANTS_AND_STREAMS = [
    *[("mhc", n) for n in STREAMS],
    *[("identity", n) for n in (2, 3, 4)],
    *[("hc", n) for n in (2, 3, 4)],
    *[("mhc_lite", n) for n in (2, 3, 4)],
    *[("kromhc", n) for n in (2, 4, 8)],
]


def chain_of_connections(n: int, *, linear: bool = True, **options) -> list[Connection]:
    config = Config(n=n, **options)
    return [
        Connection(WIDTH, config, index=index, linear=linear, dtype=torch.float64)
        for index in range(SITES)
    ]


def sinkhorn(logits: Tensor, *, eps: float = 0.0) -> Tensor:
    if eps:  # DeepSeek-V4, whose matrix is the transpose
        logits = logits.softmax(-2) + eps
        logits = logits / (logits.sum(-1, keepdim=True) + eps)
    else:
        logits = logits.exp()
    for _ in range(19 if eps else 20):
        logits = logits / (logits.sum(-2, keepdim=True) + eps)
        logits = logits / (logits.sum(-1, keepdim=True) + eps)
    return logits


def mixing(variant: str, logits: Tensor, n: int) -> Tensor:
    """H_res [..., n, n] of the variants, from their papers."""
    if variant == "identity":
        return torch.eye(n, dtype=logits.dtype).expand(*logits.shape[:-1], n, n)
    if variant == "mhc_lite":
        orders = torch.tensor(list(itertools.permutations(range(n))))
        permutations = torch.eye(n, dtype=logits.dtype)[orders]
        return torch.einsum("...p,pij->...ij", logits.softmax(-1), permutations)
    if variant == "kromhc":
        product = torch.ones(*logits.shape[:-1], 1, 1, dtype=logits.dtype)
        for weights in logits.unflatten(-1, (-1, 2)).softmax(-1).unbind(-2):
            factor = torch.stack([weights, weights.flip(-1)], -2)
            product = torch.einsum("...ij,...kl->...ikjl", product, factor)
            product = product.flatten(-4, -3).flatten(-2, -1)
        return product
    logits = logits.unflatten(-1, (n, n))
    if variant == "hc":
        return logits
    return sinkhorn(logits, eps=1e-6 if variant == "deepseek_v4" else 0.0)


def coefficients(site: Connection, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, variant = site.config.n, site.config.variant
    flat = streams.flatten(-2)
    norm = (flat.square().mean(-1, keepdim=True) + site.config.eps).sqrt()
    mapped = flat / norm @ site.phi
    if variant == "hc":
        mapped = mapped.tanh()
    sizes = [n, n, mapped.shape[-1] - 2 * n]
    pre, post, res = (
        gate * part + offset
        for gate, part, offset in zip(
            site.alpha, mapped.split(sizes, -1), site.bias.split(sizes), strict=True
        )
    )
    if variant == "hc":
        return pre, post, mixing(variant, res, n)
    small = 1e-6 if variant == "deepseek_v4" else 0.0
    return pre.sigmoid() + small, 2 * post.sigmoid(), mixing(variant, res, n)


class Branches(nn.Module):
    """One small non-linear branch per site, random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            torch.randn(WIDTH, WIDTH, dtype=torch.float64) / WIDTH**0.5 for _ in range(SITES)
        )

    def plain(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + (x @ weight).tanh()
        return x

    def widened(self, x: Tensor, sites: list[Connection]) -> Tensor:
        """The streams after the last site, [tokens, n, width]."""
        streams = x.unsqueeze(-2).expand(-1, sites[0].config.n, -1)
        for weight, site in zip(self.weights, sites, strict=True):
            pre, post, res = coefficients(site, streams)
            branch = (torch.einsum("tn,tnc->tc", pre, streams) @ weight).tanh()
            streams = res @ streams + post.unsqueeze(-1) * branch.unsqueeze(-2)
        return streams


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(("variant", "n"), VARIANTS_AND_STREAMS)
def test_a_chain_computes_the_plain_residual_at_the_start(variant, n, x):
    branches, sites = Branches(), chain_of_connections(n, variant=variant)
    streams = branches.widened(x, sites)
    plain = branches.plain(x)
    assert relative(streams.mean(-2), plain) < 1e-12
    difference = (streams - streams.mean(-2, keepdim=True)).norm() / streams.norm()
    assert difference > 0.1, "streams that stay equal give H_res no gradient"

    original = list(branches.weights)
    got = torch.autograd.grad(streams.mean(-2).sin().sum(), original)
    expected = torch.autograd.grad(plain.sin().sum(), original)
    assert max(map(relative, got, expected)) < 1e-11


@pytest.mark.parametrize("n", [2, 4])
def test_deepseek_v4_preserves_up_to_its_eps(n, x):
    branches, sites = Branches(), chain_of_connections(n, variant="deepseek_v4")
    error = relative(branches.widened(x, sites).mean(-2), branches.plain(x))
    assert error < 1e-6 * SITES * 10


@pytest.mark.parametrize(("variant", "n"), VARIANTS_AND_STREAMS)
def test_a_perturbed_chain_computes_something_else(variant, n, x):
    branches, sites = Branches(), chain_of_connections(n, variant=variant)
    with torch.no_grad():
        for site in sites:
            for parameter in site.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.5)
    assert relative(branches.widened(x, sites).mean(-2), branches.plain(x)) > 1e-2


def gradient_norms(sites: list[Connection], branches: Branches, x: Tensor) -> list[dict]:
    """Norms per site of the gradients of φ and b by group, and of α."""
    for site in sites:
        site.zero_grad()
    branches.widened(x, sites).mean(-2).square().sum().backward()
    norms = []
    for site in sites:
        columns = site.config.variant_object.columns(site.config.n)
        groups = zip(
            ("pre", "post", "res"),
            site.phi.grad.split(columns, -1),
            site.bias.grad.split(columns),
            strict=True,
        )
        found = {name: min(phi.norm(), bias.norm()) for name, phi, bias in groups if phi.numel()}
        norms.append(found | {"alpha": site.alpha.grad.norm()})
    return norms


@pytest.mark.parametrize(("variant", "n"), [*VARIANTS_AND_STREAMS, ("deepseek_v4", 4)])
def test_every_group_learns_by_the_second_step(variant, n, x):
    branches, sites = Branches(), chain_of_connections(n, variant=variant)
    first = gradient_norms(sites, branches, x)
    assert all(norms["post"] > 1e-8 and norms["alpha"] == 0 for norms in first)
    assert all(norms["pre"] > 1e-8 for norms in first[1:])

    torch.optim.SGD([p for site in sites for p in site.parameters()], lr=1e-3).step()
    second = gradient_norms(sites, branches, x)
    # Mathematics, not defects: at the first site the streams are equal and no H_res matters; at
    # the last one a matrix that is exactly doubly stochastic cannot change their mean.
    if variant in ("mhc_lite", "kromhc"):
        assert second.pop().pop("res") < 1e-12
    assert all(norm > 1e-9 for norms in second[1:] for norm in norms.values())


@pytest.mark.parametrize("n", [3, 4, 8])
def test_h_res_learns_from_the_first_step(n, x):
    """Because the streams differ: the reason for preserving with unequal streams."""
    branches, sites = Branches(), chain_of_connections(n)
    assert all(norms["res"] > 1e-8 for norms in gradient_norms(sites, branches, x)[1:])


def initial_vectors(site: Connection) -> tuple[Tensor, Tensor]:
    """a = H_pre - 1/n and d = H_post - 1 of a site with a sigmoid parametrisation."""
    n = site.config.n
    pre, post, _ = site.bias.detach().split([n, n, site.bias.numel() - 2 * n])
    return pre.sigmoid() - 1 / n, 2 * post.sigmoid() - 1


@pytest.mark.parametrize("n", STREAMS)
def test_reading_is_orthogonal_to_all_that_was_written_before(n):
    read, written = zip(*map(initial_vectors, chain_of_connections(n)), strict=True)
    for site in range(SITES):
        assert abs(read[site].sum()) < 1e-13
        assert abs(written[site].sum()) < 1e-13
        for earlier in range(site):
            assert abs(read[site] @ written[earlier]) < 1e-13
    largest = 0.0 if n == 2 else min(0.1, 0.4 / n)
    assert all(abs(a.abs().max() - largest) < 1e-12 for a in read)
    assert all(abs(d.abs().max() - 0.5) < 1e-12 for d in written)


@pytest.mark.parametrize("n", STREAMS)
def test_no_two_streams_start_alike(n):
    _, written = zip(*map(initial_vectors, chain_of_connections(n)), strict=True)
    streams = torch.stack(written, -1)
    assert (torch.cdist(streams, streams) + torch.eye(n)).min() > 0.1


def test_four_streams_use_these_vectors():
    read, written = zip(*map(initial_vectors, chain_of_connections(4)), strict=True)
    u1 = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    u2 = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    u3 = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    for site, (a, d) in enumerate(zip(read, written, strict=True)):
        torch.testing.assert_close(a, 0.1 * u1 * (-1) ** site)
        torch.testing.assert_close(d, 0.5 * (u3 if site % 2 else u2) * (-1) ** (site // 2))


def test_two_streams_read_evenly_and_write_with_alternating_signs():
    read, written = zip(*map(initial_vectors, chain_of_connections(2)), strict=True)
    direction = torch.tensor([0.5, -0.5], dtype=torch.float64)
    for site, (a, d) in enumerate(zip(read, written, strict=True)):
        torch.testing.assert_close(a, torch.zeros_like(a))
        torch.testing.assert_close(d, direction * (-1) ** site)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_h_res_starts_near_the_identity_alike_in_all_variants(n):
    # b_res = 6I - 3: rows e³ and (n - 1) times e⁻³, normalised.
    expected = (6 * torch.eye(n, dtype=torch.float64) - 3).softmax(-1)
    for variant in ("mhc", "mhc_lite", *(["kromhc"] if n == 2 else [])):
        logits = chain_of_connections(n, variant=variant)[1].bias.detach()[2 * n :]
        torch.testing.assert_close(mixing(variant, logits, n), expected)


@pytest.mark.parametrize("spread", [0.0, 0.01])
def test_streams_of_a_non_linear_chain_start_apart_by_spread_only(spread):
    read, written = zip(
        *map(initial_vectors, chain_of_connections(4, linear=False, spread=spread)), strict=True
    )
    assert all(abs(a.abs().max() - 0.1) < 1e-12 for a in read)
    assert all(abs(d.abs().max() - spread) < 1e-12 for d in written)


def test_paper_init_has_the_published_values():
    sites = chain_of_connections(4, init="paper")
    for index, site in enumerate(sites):
        pre, post, res = site.bias.detach().split([4, 4, 16])
        home = torch.full((4,), -3.0, dtype=torch.float64)
        home[index % 4] = 3.0
        torch.testing.assert_close(pre, home)
        torch.testing.assert_close(post, torch.zeros_like(post))
        torch.testing.assert_close(res.view(4, 4), 6 * torch.eye(4, dtype=torch.float64) - 3)
        assert 0.01 < site.phi.std() < 0.03
        assert (site.alpha == 0.01).all()


def test_paper_init_of_hyper_connections_is_that_of_their_paper():
    site = chain_of_connections(4, init="paper", variant="hc")[5]
    pre, post, res = site.bias.detach().split([4, 4, 16])
    assert pre.tolist() == [0, 1, 0, 0]
    assert post.tolist() == [1, 1, 1, 1]
    assert res.view(4, 4).equal(torch.eye(4, dtype=torch.float64))
    assert site.phi.abs().max() == 0


def test_preserve_draws_no_random_numbers():
    before = torch.get_rng_state()
    chain_of_connections(4)
    assert torch.get_rng_state().equal(before)


def connection(dtype: torch.dtype = torch.float32, device: str | None = None, **options):
    return Connection(WIDTH, Config(**options), index=1, linear=True, dtype=dtype, device=device)


CASTS = {
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "to": lambda module: module.to(torch.bfloat16),
    "to_device": lambda module: module.to("cpu", torch.float16),
    "type": lambda module: module.type(torch.bfloat16),
    "float": lambda module: module.float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_of_the_model_leaves_every_digit(cast):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "site": connection()})
    with torch.no_grad():
        model.site.phi.normal_()
    model.site.phi.grad = torch.randn_like(model.site.phi)
    parameter, value, gradient = model.site.phi, model.site.phi.clone(), model.site.phi.grad.clone()
    cast(model)
    assert model.site.phi is parameter
    assert parameter.dtype is torch.float32
    assert parameter.equal(value)
    assert parameter.grad.dtype is torch.float32
    assert parameter.grad.equal(gradient)


def test_the_parameters_of_a_float64_model_are_float64():
    site = connection()
    bias = site.bias.detach().double()
    site.phi.grad = torch.ones_like(site.phi)
    site.double()
    assert {p.dtype for p in site.parameters()} == {torch.float64}
    assert site.phi.grad.dtype is torch.float64
    assert site.bias.equal(bias)
    assert {p.dtype for p in site.float().parameters()} == {torch.float32}
    assert {p.dtype for p in site.double().bfloat16().parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_parameters_of_low_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="float32 or float64"):
        connection(dtype=dtype)


def test_one_stream_has_no_parameters():
    with pytest.raises(ValueError, match="n=1"):
        connection(n=1)


def test_a_connection_follows_a_move_and_a_cast_at_once():
    site = connection().to("meta", torch.bfloat16)
    assert all(p.is_meta and p.dtype is torch.float32 for p in site.parameters())


def test_a_meta_connection_is_materialised_by_reset_parameters():
    site = connection(device="meta")
    assert all(p.is_meta for p in site.parameters())
    site = site.to_empty(device="cpu")
    site.reset_parameters()
    for name, parameter in connection().named_parameters():
        assert site.get_parameter(name).equal(parameter)


def test_the_default_device_does_not_disturb_the_initial_values():
    with torch.device("meta"):
        on_cpu, on_meta = connection(device="cpu"), connection()
    assert on_cpu.bias.equal(connection().bias)
    assert on_meta.bias.is_meta


def test_parameters_made_under_inference_mode_are_trainable():
    with torch.inference_mode():
        site = connection()
    assert not any(p.is_inference() for p in site.parameters())
    site.bias.sum().backward()


def test_freezing_deepcopy_and_pickle():
    site = connection().requires_grad_(False)
    for other in (copy.deepcopy(site), pickle.loads(pickle.dumps(site))):
        assert other.config == site.config
        assert not any(p.requires_grad for p in other.parameters())
        assert all(a.equal(b) for a, b in zip(other.parameters(), site.parameters(), strict=True))
        assert other.bfloat16().phi.dtype is torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_dict_is_plain_and_loads_exactly(assign):
    state = {name: torch.randn_like(p) for name, p in connection().named_parameters()}
    assert list(connection().state_dict()) == list(state) == ["phi", "alpha", "bias"]
    site = connection()
    site.load_state_dict(state, assign=assign)
    assert all(site.get_parameter(name).equal(value) for name, value in state.items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_low_precision_loads_into_float32(assign):
    state = {name: p.detach().bfloat16() for name, p in connection().named_parameters()}
    site = connection()
    site.load_state_dict(state, assign=assign)
    assert {p.dtype for p in site.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_n_is_refused_with_both_numbers(strict):
    model = nn.ModuleDict({"site": connection(n=4)})
    other = nn.ModuleDict({"site": connection(n=2)})
    with pytest.raises(RuntimeError, match=r"site: the checkpoint has n=2 .* this model has n=4"):
        model.load_state_dict(other.state_dict(), strict=strict)
    head = Head(WIDTH, Config(n=4))
    with pytest.raises(RuntimeError, match=r"n=3 .* n=4"):
        head.load_state_dict(Head(WIDTH, Config(n=3)).state_dict())


def test_a_checkpoint_of_another_width_or_variant_is_refused_with_the_shapes():
    wider = Connection(2 * WIDTH, Config(), index=0, linear=True)
    with pytest.raises(RuntimeError, match="width 6"):
        connection().load_state_dict(wider.state_dict())
    lite = connection(variant="kromhc")
    with pytest.raises(RuntimeError, match="variant 'mhc'"):
        connection().load_state_dict(lite.state_dict())


def test_a_missing_parameter_is_reported_as_torch_does():
    missing, unexpected = connection().load_state_dict({"phi": connection().phi}, strict=False)
    assert missing == ["alpha", "bias"]
    assert unexpected == []


def test_a_head_starts_as_the_mean():
    head = Head(WIDTH, Config(n=4), dtype=torch.float64)
    assert [tuple(p.shape) for p in head.parameters()] == [(4 * WIDTH, 4), (1,), (4,)]
    torch.testing.assert_close(head.bias.sigmoid(), torch.full((4,), 0.25, dtype=torch.float64))
    assert head.phi.abs().max() == 0
    assert head.alpha.item() == 0.01


def test_any_branch_name_can_be_registered():
    owner = nn.Module()
    owner.mhc = Connections()
    branches = ["self_attn", "norm", "0", "type", "type_", "half", "forward", "training", "_apply"]
    for branch in branches:
        assert branch not in owner.mhc
        owner.mhc[branch] = connection()
        assert branch in owner.mhc
    assert len({id(owner.mhc[branch]) for branch in branches}) == len(branches)
    assert owner.get_parameter("mhc.self_attn.phi") is owner.mhc["self_attn"].phi
    assert owner.mhc.type_ is owner.mhc["type"]
    assert owner.mhc.type__ is owner.mhc["type_"]
    assert len(list(owner.parameters())) == 3 * len(branches)
    copied = copy.deepcopy(owner)
    assert list(copied.state_dict()) == list(owner.state_dict())
    owner.half()
    assert owner.mhc["half"].phi.dtype is torch.float32


def test_repr_says_what_a_site_is():
    assert repr(connection()) == "Connection(n=4, width=6, variant='mhc')"
