"""The reference: against loops in float64, against DeepSeek-V4's own module, and as a graph."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mhc_compile.kernels import reference
from mhc_compile.kernels.variants import VARIANTS, get_variant

from . import truth

C = 3
EPS = 1e-6
STREAMS = [2, 3, 4, 8]
POSSIBLE = [
    (name, n)
    for name, n in itertools.product(VARIANTS, STREAMS)
    if not (name == "mhc_lite" and n > 4) and not (name == "kromhc" and n == 3)
]
EXACT = {"dtype": torch.float64, "compute_dtype": torch.float64}
SINGLE = {"dtype": torch.float32, "compute_dtype": torch.float32}


def numbers(*tensors):
    return [t.detach().double().numpy() for t in tensors]


def site(name, n, tokens=3, dtype=torch.float64):
    """X, phi, alpha, bias of a site with large, irregular coefficients, and f."""
    columns = sum(get_variant(name).columns(n))
    shapes = [(tokens, n, C), (n * C, columns), (3,), (columns,), (tokens, C)]
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def coefficients(X, phi, alpha, bias, name, compute_dtype=torch.float64, eps=EPS):
    options = {"variant": get_variant(name), "n": X.shape[-2], "width": C, "eps": eps}
    return reference.coefficients(X, phi, alpha, bias, **options, compute_dtype=compute_dtype)


def true_coefficients(X, phi, alpha, bias, name, eps=EPS):
    X, phi, alpha, bias = numbers(X, phi, alpha, bias)
    return truth.over_tokens(lambda x: truth.coefficients(x, phi, alpha, bias, name, eps), X)


def error(actual, expected):
    return float(np.abs(actual.detach().double().numpy() - expected).max())


# --- orientation, by hand -----------------------------------------------------------------------


def test_h_res_is_out_in_by_hand():
    """New stream i = Σ_j H_res[i, j] · X[j] + H_post[i] · f."""
    H_res = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    H_post = torch.tensor([0.5, 2.0])
    X = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    f = torch.tensor([4.0, 8.0])
    expected = torch.tensor([[203.0, 2014.0], [411.0, 4046.0]])
    assert torch.equal(reference.post_res(H_res, H_post, X, f, **SINGLE), expected)
    assert not torch.equal(reference.post_res(H_res.T, H_post, X, f, **SINGLE), expected)


def test_h_pre_weighs_streams_by_hand():
    X = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    h = reference.pre(torch.tensor([2.0, 0.5]), X, **SINGLE)
    assert torch.equal(h, torch.tensor([52.0, 520.0]))


def test_columns_of_h_res_by_hand():
    """b for res is read row by row, [out, in]; DeepSeek-V4's is [in, out]."""
    X, phi, alpha = (
        torch.ones(2, C).double(),
        torch.zeros(2 * C, 8).double(),
        torch.ones(3).double(),
    )
    bias = torch.tensor([0.0, 0, 0, 0, 0, math.log(2), math.log(3), 0], dtype=torch.float64)
    *_, H_hc = coefficients(X, phi, alpha, bias, "hc")
    assert torch.equal(H_hc, bias[4:].reshape(2, 2))

    one = {"n": 2, "width": C, "eps": EPS, "compute_dtype": torch.float64}
    by_hand = torch.tensor([[3 / 11, 8 / 11], [9 / 13, 4 / 13]]).double()  # of [[1, 2], [3, 1]]
    paper = get_variant("mhc", sinkhorn_iters=1)
    *_, H_res = reference.coefficients(X, phi, alpha, bias, variant=paper, **one)
    torch.testing.assert_close(H_res, by_hand, atol=1e-7, rtol=0)

    # V4: comb = [[1, 2], [3, 1]] to rows, then columns: [[4/13, 8/11...]]: the same numbers turned.
    bias[4:] = bias[4:].reshape(2, 2).T.flatten()
    v4 = get_variant("deepseek_v4", sinkhorn_iters=1)
    *_, H_res = reference.coefficients(X, phi, alpha, bias, variant=v4, **one)
    torch.testing.assert_close(H_res, by_hand, atol=1e-5, rtol=0)


def test_groups_are_pre_post_res_with_one_gate_each_by_hand():
    """n = 1, C = 1: x⃗ / r = ±1, so H̃ = α φ + b can be read off."""
    X = torch.tensor([[2.0]], dtype=torch.float64)
    phi = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    alpha = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    bias = torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    linear = replace(get_variant("hc"), inner="linear")
    options = {"variant": linear, "n": 1, "width": 1, "compute_dtype": torch.float64}
    H = reference.coefficients(X, phi, alpha, bias, eps=0.0, **options)
    assert [float(h) for h in H] == [2.5, 30.25, 500.125]
    H = reference.coefficients(-X, phi, alpha, bias, eps=12.0, **options)
    assert [float(h) for h in H] == [-0.5, -14.75, -249.875]  # r = 4; b is not divided by r


# --- against loops in float64 -------------------------------------------------------------------


@pytest.mark.parametrize(("name", "n"), POSSIBLE)
def test_coefficients_equal_float64_truth(name, n):
    X, phi, alpha, bias, _ = site(name, n)
    expected = true_coefficients(X, phi, alpha, bias, name)
    for actual, wanted in zip(coefficients(X, phi, alpha, bias, name), expected, strict=True):
        assert actual.shape == wanted.shape
        assert error(actual, wanted) < 1e-12
    single = coefficients(*(t.float() for t in (X, phi, alpha, bias)), name, torch.float32)
    for actual, wanted in zip(single, expected, strict=True):
        assert error(actual, wanted) < 2e-5
    if name not in ("kromhc", "identity") and (name, n) != ("mhc_lite", 2):  # all symmetric
        assert error(single[2].mT, expected[2]) > 1e-2


@pytest.mark.parametrize("eps", [1e-20, 1e-6, 1.0])
def test_eps_stands_under_the_root(eps):
    X, phi, alpha, bias, _ = site("mhc", 4)
    X[0] = 0  # r = sqrt(eps)
    X[1] *= 1e-3
    for actual, wanted in zip(
        coefficients(X, phi, alpha, bias, "mhc", eps=eps),
        true_coefficients(X, phi, alpha, bias, "mhc", eps=eps),
        strict=True,
    ):
        assert error(actual, wanted) < 1e-12


def test_hc_has_a_linear_form():
    X, phi, alpha, bias, _ = site("hc", 4)
    variant = replace(get_variant("hc"), inner="linear")
    options = {"variant": variant, "n": 4, "width": C, "eps": EPS, "compute_dtype": torch.float64}
    linear = reference.coefficients(X, phi, alpha, bias, **options)
    expected = true_coefficients(X, phi, alpha, bias, "hc_linear")
    for actual, wanted, tanh in zip(
        linear, expected, true_coefficients(X, phi, alpha, bias, "hc"), strict=True
    ):
        assert error(actual, wanted) < 1e-12
        assert error(actual, tanh) > 0.1


@pytest.mark.parametrize("n", STREAMS)
def test_pre_and_post_res_equal_float64_truth(n):
    X, f = torch.randn(5, n, C).double(), torch.randn(5, C).double()
    H_pre, H_post, H_res = (torch.randn(5, *s).double() for s in [(n,), (n,), (n, n)])
    h = truth.over_tokens(truth.pre, *numbers(H_pre, X))
    new = truth.over_tokens(truth.post_res, *numbers(H_res, H_post, X, f))
    assert error(reference.pre(H_pre, X, **EXACT), h) < 1e-14
    assert error(reference.post_res(H_res, H_post, X, f, **EXACT), new) < 1e-14
    assert error(reference.post_res(H_res.mT, H_post, X, f, **EXACT), new) > 0.1


@pytest.mark.parametrize("eps", [0.0, 1e-6], ids=["paper", "v4"])
@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_knopp_equals_float64_truth_and_the_operator(n, eps):
    logits = 2 * torch.randn(3, n, n).double()
    result = reference.sinkhorn_knopp(logits, 20, eps)
    for matrix, actual in zip(logits.numpy(), result, strict=True):
        wanted = truth.sinkhorn_v4(matrix.T, 20).T if eps else truth.sinkhorn(matrix, 20)
        assert error(actual, wanted) < 1e-14
    operator = torch.ops.mhc.sinkhorn_knopp(logits, 20, eps)
    torch.testing.assert_close(operator, result, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1e3, 1e4])
def test_sinkhorn_knopp_survives_logits_of_any_size_in_float32(scale):
    logits = scale * torch.randn(20, 4, 4)
    result = reference.sinkhorn_knopp(logits, 20)
    wanted = np.stack([truth.sinkhorn(m, 20) for m in logits.double().numpy()])
    # What half a unit in the last place of such logits changes.
    assert error(result, wanted) < 1e-6 + scale * 2**-24


@pytest.mark.parametrize(("name", "n"), POSSIBLE)
def test_h_res_is_as_doubly_stochastic_as_it_can_be(name, n):
    """Finite iterations: rows exact, columns near. Permutations and their products: both exact."""
    X, phi, alpha, bias, _ = site(name, n, tokens=50)
    *_, H = coefficients(X, phi, alpha, bias, name)
    rows, columns = ((H.sum(dim) - 1).abs().max() for dim in (-1, -2))
    if name in ("hc", "low_rank"):
        assert rows > 0.1  # unconstrained
        return
    assert (H >= 0).all()
    assert rows < (1e-5 if name == "deepseek_v4" else 1e-14)
    assert columns < (0.5 if name in ("mhc", "deepseek_v4") else 1e-14)
    if name not in ("mhc", "deepseek_v4"):
        assert torch.linalg.matrix_norm(H, 2).max() < 1 + 1e-12


@pytest.mark.parametrize(("name", "n"), [(name, 2) for name in VARIANTS] + [("mhc_lite", 3)])
def test_gradcheck_of_a_whole_site(name, n):
    inputs = [t.requires_grad_() for t in site(name, n, tokens=2)]

    def forward(X, phi, alpha, bias, f):
        H_pre, H_post, H_res = coefficients(X, phi, alpha, bias, name)
        h = reference.pre(H_pre, X, **EXACT)
        return reference.post_res(H_res, H_post, X, f * h.sin(), **EXACT)

    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def test_impossible_streams_are_refused():
    X, phi, alpha, bias, _ = site("mhc", 3)
    with pytest.raises(ValueError, match="power of two"):
        coefficients(X, phi, alpha, bias, "kromhc")
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        reference.readout(X, "head", **EXACT)


# --- streams from and to one --------------------------------------------------------------------


def test_expand_and_readouts():
    x = torch.randn(2, 3, C)
    X = reference.expand(x, 4)
    assert X.shape == (2, 3, 4, C)
    assert all(torch.equal(X[..., i, :], x) for i in range(4))
    assert torch.equal(reference.readout(X, "mean", **SINGLE), x)
    assert torch.equal(reference.readout(X, "sum", **SINGLE), 4 * x)


def test_sums_over_streams_accumulate_in_float32():
    """256 + 1 = 256 in bfloat16, three times over; 259 rounds to 260."""
    X = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    bf16 = {"dtype": torch.bfloat16, "compute_dtype": torch.float32}
    ones = torch.ones(4)
    total = torch.tensor([260.0], dtype=torch.bfloat16)
    naive = ((X[0] + X[1]) + X[2]) + X[3]
    assert naive.item() == 256
    assert torch.equal(reference.readout(X, "sum", **bf16), total)
    assert torch.equal(reference.readout(X, "mean", **bf16), total / 4)
    assert torch.equal(reference.pre(ones, X, **bf16), total)
    mixed = reference.post_res(torch.ones(4, 4), 0 * ones, X, X[0], **bf16)
    assert torch.equal(mixed, total.expand(4, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coefficients_of_16_bit_streams_are_those_of_the_same_numbers_in_float32(dtype):
    X, phi, alpha, bias, _ = site("mhc", 4, dtype=torch.float32)
    X = X.to(dtype)
    results = coefficients(X, phi, alpha, bias, "mhc", torch.float32)
    wanted = coefficients(X.float(), phi, alpha, bias, "mhc", torch.float32)
    for result, same in zip(results, wanted, strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, same)


def test_head_readout_equals_float64_truth():
    X, phi = torch.randn(5, 4, C).double(), torch.randn(4 * C, 4).double()
    alpha, bias = torch.randn(1).double(), torch.randn(4).double()
    options = {"n": 4, "width": C, "eps": EPS, "offset": 0.25}
    actual = reference.head_readout(X, phi, alpha, bias, **options, **EXACT)

    def by_loops(x):
        weights = truth.sigmoid(float(alpha) * truth.mapped(x, phi.numpy(), EPS) + bias.numpy())
        return truth.pre(weights + 0.25, x)

    assert error(actual, truth.over_tokens(by_loops, X.numpy())) < 1e-13


def test_head_readout_is_the_mean_when_its_weights_are():
    X = torch.randn(5, 4, C)
    phi, alpha, bias = torch.zeros(4 * C, 4), torch.ones(1), torch.full((4,), 1 / 4).logit()
    actual = reference.head_readout(X, phi, alpha, bias, n=4, width=C, eps=EPS, **SINGLE)
    torch.testing.assert_close(actual, X.mean(-2))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("name", VARIANTS)
def test_any_leading_dimensions(name, lead):
    _, phi, alpha, bias, _ = site(name, 4)
    x = torch.randn(*lead, C).double().requires_grad_()
    X = reference.expand(x, 4)
    H_pre, H_post, H_res = coefficients(X, phi, alpha, bias, name)
    new = reference.post_res(H_res, H_post, X, reference.pre(H_pre, X, **EXACT), **EXACT)
    result = reference.readout(new, "mean", **EXACT)
    assert result.shape == x.shape
    result.sum().backward()
    assert x.grad.shape == x.shape


def test_autocast_changes_nothing():
    inputs = site("mhc", 4, dtype=torch.float32)

    def forward(X, phi, alpha, bias, f):
        H_pre, H_post, H_res = coefficients(X, phi, alpha, bias, "mhc", torch.float32)
        new = reference.post_res(H_res, H_post, X, f + reference.pre(H_pre, X, **SINGLE), **SINGLE)
        return reference.readout(new, "mean", **SINGLE)

    expected = forward(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(*inputs), expected)


# --- against DeepSeek-V4's own module -----------------------------------------------------------


@pytest.fixture(scope="module")
def v4():
    name = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    return pytest.importorskip(name, reason="transformers without deepseek_v4")


def v4_config(n, iters=20):
    return SimpleNamespace(
        hc_mult=n, hc_sinkhorn_iters=iters, hc_eps=1e-6, rms_norm_eps=EPS, hidden_size=C
    )


@pytest.mark.parametrize(("n", "iters"), [(2, 20), (4, 20), (4, 1), (4, 3), (8, 20)])
def test_deepseek_v4_is_its_own_module_with_its_own_weights(v4, n, iters):
    module = v4.DeepseekV4HyperConnection(v4_config(n, iters))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    X, f = torch.randn(2, 5, n, C), torch.randn(2, 5, C)
    post, comb, collapsed = module(X)
    new = post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), X)

    variant = get_variant("deepseek_v4", sinkhorn_iters=iters)
    options = {"variant": variant, "n": n, "width": C, "eps": EPS, "compute_dtype": torch.float32}
    H_pre, H_post, H_res = reference.coefficients(
        X, module.fn.T, module.scale, module.base, **options
    )
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(H_post, post, **close)
    torch.testing.assert_close(H_res, comb.mT, **close)
    torch.testing.assert_close(reference.pre(H_pre, X, **SINGLE), collapsed, **close)
    torch.testing.assert_close(reference.post_res(H_res, H_post, X, f, **SINGLE), new, **close)
    assert n == 2 or (H_res - comb).abs().max() > 0.05  # at n = 2 nearly symmetric


def test_deepseek_v4_gradients_are_those_of_its_own_module(v4):
    module = v4.DeepseekV4HyperConnection(v4_config(4))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    X = torch.randn(7, 1, 4, C, requires_grad=True)
    weights = torch.randn(7, 1, 4, 4)
    leaves = [X, *module.parameters()]
    _, comb, collapsed = module(X)
    expected = torch.autograd.grad((comb.mT * weights).sum() + collapsed.sum(), leaves)
    H_pre, _, H_res = coefficients(
        X, module.fn.T, module.scale, module.base, "deepseek_v4", torch.float32
    )
    h = reference.pre(H_pre, X, **SINGLE)
    actual = torch.autograd.grad((H_res * weights).sum() + h.sum(), leaves)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_deepseek_v4_readout_is_its_own_head(v4):
    head = v4.DeepseekV4HyperHead(v4_config(4))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    X = torch.randn(2, 5, 4, C)
    options = {"n": 4, "width": C, "eps": EPS, "offset": get_variant("deepseek_v4").pre.offset}
    parameters = head.hc_fn.T, head.hc_scale, head.hc_base
    actual = reference.head_readout(X, *parameters, **options, **SINGLE)
    torch.testing.assert_close(actual, head(X), rtol=1e-5, atol=2e-6)


# --- as a graph ---------------------------------------------------------------------------------


def whole_site(name):
    """expand, a site, every readout: all functions that are written into graphs."""
    variant = get_variant(name)
    options = {"variant": variant, "n": 4, "width": C, "eps": EPS, "compute_dtype": torch.float32}

    def forward(x, phi, alpha, bias, head_phi, head_alpha, head_bias):
        X = reference.expand(x, 4)
        H_pre, H_post, H_res = reference.coefficients(X, phi, alpha, bias, **options)
        h = reference.pre(H_pre, X, **SINGLE)
        new = reference.post_res(H_res, H_post, X, h.sin(), **SINGLE)
        head = reference.head_readout(
            new, head_phi, head_alpha, head_bias, n=4, width=C, eps=EPS, offset=1e-6, **SINGLE
        )
        mean, total = (reference.readout(new, kind, **SINGLE) for kind in ("mean", "sum"))
        return mean, total, head, reference.sinkhorn_knopp(H_res, 3)

    return forward


def whole_site_inputs(name, *lead):
    _, phi, alpha, bias, _ = site(name, 4, dtype=torch.float32)
    head = [torch.randn(4 * C, 4), torch.randn(1), torch.randn(4)]
    return [torch.randn(*lead, C), phi, alpha, bias, *head]


def by_symbolic_trace(function, count):
    return fx.symbolic_trace(function)


def by_proxies_of_a_graph(function, count):
    """As a pass writes into a graph that it has: no tracing, only calls on proxies."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i in range(count)]
    graph.output(tuple(proxy.node for proxy in function(*proxies)))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("trace", [by_symbolic_trace, by_proxies_of_a_graph])
@pytest.mark.parametrize("name", VARIANTS)
def test_written_as_a_graph_and_run_bit_equal(name, trace):
    function = whole_site(name)
    gm = trace(function, 7)
    asked = {n.target for n in gm.graph.nodes if n.op == "call_method"} | {
        n.args[1] for n in gm.graph.nodes if n.target is getattr
    }
    assert not asked & {"size", "shape", "dim", "ndim", "dtype", "device", "item", "numel"}
    assert not [n for n in gm.graph.nodes if n.op == "get_attr"]  # no constants
    for lead in [(2, 5), (3,), (), (0,)]:
        inputs = whole_site_inputs(name, *lead)
        for actual, expected in zip(gm(*inputs), function(*inputs), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_for_all_shapes_under_fake_tensors(name):
    gm = by_symbolic_trace(whole_site(name), 7)
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    x, *parameters = whole_site_inputs(name, 5, 7)

    def fake(tensor, *dims):
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(list(dims)))

    static = DimDynamic.STATIC
    x = fake(x, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, static)
    batch, length = x.shape[:2]
    with mode:
        mean, total, head, matrix = gm(x, *(fake(p, *[static] * p.dim()) for p in parameters))
    assert not shapes.replacements  # neither symbol was found to be a number, or the other
    for result in (mean, total, head):
        assert result.shape == (batch, length, C)
    assert matrix.shape == (batch, length, 4, 4)


def test_one_compiled_graph_for_all_shapes_forward_and_backward(name="mhc"):
    torch._dynamo.reset()
    function, graphs = by_symbolic_trace(whole_site(name), 7), []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for lead in [(2, 5), (3, 4), (5, 9)]:
        plain = [t.requires_grad_() for t in whole_site_inputs(name, *lead)]
        twins = [t.detach().clone().requires_grad_() for t in plain]
        torch._dynamo.mark_dynamic(twins[0], (0, 1))  # raises where one of them is specialised
        expected, actual = function(*plain), compiled(*twins)
        sum(e.square().sum() for e in expected).backward()
        sum(a.square().sum() for a in actual).backward()
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
        for a, e in zip(twins, plain, strict=True):
            torch.testing.assert_close(a.grad, e.grad, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
