"""fuse_coefficients: the open form of any variant, in any spelling, becomes three operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

import mhc_compile
from mhc_compile.kernels import reference
from mhc_compile.kernels.variants import VARIANTS, Gate, get_variant, parse_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.fuse_coefficients import fuse_coefficients
from mhc_compile.passes.open_form.defer_norm import defer_norm

from ...models import ids, pair
from ..open_sites import EPS, WIDTH, assert_as_exact, fuse, open_site, operators, parameters, traced

ONE_SITE = {"coefficients": 1, "pre": 1, "post_res": 1}
POSSIBLE = [
    (name, n)
    for name in VARIANTS
    for n in (2, 3, 4, 8)
    if not (name == "mhc_lite" and n > 4) and not (name == "kromhc" and n == 3)
]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def variant_in(gm):
    (node,) = (n for n in gm.graph.nodes if "mhc.coefficients" in str(n.target))
    return parse_variant(node.args[4])


# --- the form that widen writes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "n"), POSSIBLE)
@pytest.mark.parametrize("before", [(), (defer_norm,)], ids=["norm", "deferred"])
def test_every_variant_becomes_three_operators_of_the_same_value(name, n, dtype, before):
    variant = get_variant(name, sinkhorn_iters=5)
    inputs = parameters(variant, n, dtype)
    function = open_site(variant, n, dtype)
    gm, notes = fuse(function, inputs, *before)
    assert operators(gm) == ONE_SITE
    found = variant_in(gm)
    if (name, n) != ("kromhc", 2):  # for two streams kromhc and mhc_lite are one function
        assert found == variant
    assert notes == [f"1 x mhc.coefficients {found.text}", "1 x mhc.pre", "1 x mhc.post_res"]
    assert_as_exact(function, gm, open_site(variant, n, torch.float64), inputs)


@pytest.mark.parametrize(
    "variant",
    [
        replace(get_variant("mhc"), pre=Gate("sigmoid", 0.7, 0.25), post=Gate("linear", -1.5, 3.0)),
        replace(get_variant("hc"), inner="linear", transposed=True),
        replace(get_variant("hc"), residual="sinkhorn", iterations=3, eps=1e-3),
        replace(get_variant("mhc", sinkhorn_iters=1), transposed=True),
        replace(get_variant("identity"), inner="tanh"),
    ],
    ids=lambda v: v.text,
)
def test_variants_without_a_name_are_found(variant):
    variant = replace(
        variant, iterations=variant.iterations or 20 * (variant.residual == "sinkhorn")
    )
    inputs = parameters(variant, 4, torch.float64)
    function = open_site(variant, 4, torch.float64)
    gm, _ = fuse(function, inputs)
    assert operators(gm) == ONE_SITE
    assert replace(variant_in(gm), name="mhc") == replace(variant, name="mhc")
    assert_as_exact(function, gm, function, inputs)


@pytest.mark.parametrize("iterations", [1, 2, 19, 20, 21, 40])
def test_iterations_and_eps_come_from_the_graph(iterations):
    for name in ("mhc", "deepseek_v4"):
        variant = get_variant(name, sinkhorn_iters=iterations)
        function = open_site(variant, 4, torch.float32)
        gm, _ = fuse(function, parameters(variant, 4, torch.float32))
        assert variant_in(gm) == variant


@pytest.mark.parametrize("tokens", [(), (1,), (7,), (1, 1), (2, 1, 3)])
def test_any_leading_dimensions(tokens):
    variant = get_variant("mhc")
    inputs = parameters(variant, 4, torch.float64, tokens=tokens)
    function = open_site(variant, 4, torch.float64)
    gm, _ = fuse(function, inputs)
    assert operators(gm) == ONE_SITE
    assert_as_exact(function, gm, function, inputs)


# --- other spellings ------------------------------------------------------------------------------


def rms(x, eps=EPS):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def by_hand(X, phi, alpha, bias, W):
    """As one would write the paper down, n = 3: views, commuted operands, slices, unbind."""
    n = 3
    x = X.reshape(2, 3, n * WIDTH).float()
    y = torch.matmul(F.rms_norm(x, (n * WIDTH,), None, EPS), phi)
    a = alpha.unbind(0)
    H_pre = torch.sigmoid(bias[:n] + a[0] * y[..., :n])
    H_post = torch.sigmoid(a[1] * y[..., n : 2 * n] + bias.narrow(0, n, n)) * 2
    logits = bias[2 * n :].view(n, n) + y[..., 2 * n :].view(2, 3, n, n) * a[2]
    H_res = torch.ops.mhc.sinkhorn_knopp.default(logits, 7)
    h = torch.einsum("...n,...nc->...c", H_pre, X)
    f = torch.tanh(h) @ W
    return f.unsqueeze(-2) * H_post.unsqueeze(-1) + torch.matmul(H_res, X)


def divided_late(X, phi, alpha, bias, W):
    """Deferred norms, tokens flattened, the division behind α, H_res used as its transpose."""
    n = 3
    x = X.view(-1, n * WIDTH)
    r = torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
    pre, post, res = (x @ phi).split([n, n, n * n], dim=-1)
    H_pre = (pre * alpha[0] / r + bias[:n]).sigmoid().view(2, 3, n)
    H_post = (2.0 * (post / r * alpha[1] + bias[n : 2 * n]).sigmoid()).reshape(2, 3, n)
    logits = (alpha[2] * (res / r) + bias[2 * n :]).unflatten(-1, (n, n))
    comb = torch.ops.mhc.sinkhorn_knopp.default(logits, 7).mT.contiguous().view(2, 3, n, n)
    h = (H_pre.unsqueeze(-1) * X).sum(dim=2)
    f = torch.tanh(h) @ W
    mixed = torch.einsum("bsij,bsic->bsjc", comb, X)
    return mixed + H_post[..., None] * f[..., None, :]


def linear_with_weight(X, phi, alpha, bias, W):
    """`linear` with φ by rows, and a weight of the norm: folded into φ."""
    n = 3
    x = F.rms_norm(X.flatten(2), [n * WIDTH], W.flatten()[:18] * 0 + 1.5, EPS)
    y = F.linear(x, phi.t())
    pre, post, res = y.split((n, n, n * n), -1)
    b = bias.split((n, n, n * n))
    H_pre = torch.sigmoid(torch.add(torch.mul(pre, alpha[0]), b[0]))
    H_post = torch.sigmoid(post * alpha[1] + b[1]) + torch.sigmoid(post * alpha[1] + b[1])
    res = res.reshape(2, 3, n, n) * alpha.select(0, 2) + b[2].reshape(1, 1, n, n)
    H_res = torch.ops.mhc.sinkhorn_knopp.default(res, 7)
    h = torch.matmul(H_pre.unsqueeze(2), X).squeeze(2)
    f = torch.tanh(h) @ W
    return torch.matmul(H_res, X) + torch.matmul(H_post.unsqueeze(3), f.unsqueeze(2))


def sinkhorn_written_out(X, phi, alpha, bias, W):
    """The order of DeepSeek-V4's own code, 7 iterations: comb is [in, out]."""
    n, eps = 3, 1e-6
    y = F.rms_norm(X.flatten(2), (n * WIDTH,), eps=EPS) @ phi
    pre, post, comb = y.split([n, n, n * n], dim=-1)
    b = bias.split([n, n, n * n])
    scale = alpha.unbind(0)
    H_pre = torch.sigmoid(pre * scale[0] + b[0]) + eps
    H_post = 2 * torch.sigmoid(post * scale[1] + b[1])
    comb = comb.view(2, 3, n, n) * scale[2] + b[2].view(n, n)
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(6):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    h = (H_pre.unsqueeze(-1) * X).sum(dim=2).to(X.dtype)
    f = torch.tanh(h) @ W
    return H_post.unsqueeze(-1) * f.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), X)


@pytest.mark.parametrize(
    "function", [by_hand, divided_late, linear_with_weight, sinkhorn_written_out]
)
def test_a_site_written_by_hand(function):
    inputs = parameters(get_variant("mhc"), 3, torch.float32)
    gm, notes = fuse(function, inputs)
    assert operators(gm) == ONE_SITE, notes
    v4 = function is sinkhorn_written_out
    assert variant_in(gm) == get_variant("deepseek_v4" if v4 else "mhc", sinkhorn_iters=7)

    exact = open_site(get_variant("mhc", sinkhorn_iters=7), 3, torch.float64)
    assert_as_exact(function, gm, exact if function is by_hand else function, inputs)


# --- what must not match --------------------------------------------------------------------------


def near_miss(**change):
    """A site of n = 3 with one thing changed."""

    def site(X, phi, alpha, bias, W):
        n = 3
        get = change.get
        flat = X.flatten(-2)
        if get("norm") == "each stream":
            x = F.rms_norm(X, (WIDTH,), None, EPS).flatten(-2)
        elif get("norm") == "other state":
            x = flat * rms(flat + 1)
        elif get("norm") == "none":
            x = flat
        else:
            x = F.rms_norm(flat, (n * WIDTH,), None, EPS)
        y = x @ phi
        if get("norm") == "over other tokens":
            y = (flat @ phi) * rms(flat).flip(1)
        if get("norm") == "of other streams":
            y = (flat @ phi) * rms(flat + 1)
        a, b = alpha, bias
        pre = y[..., :n] * a[0] + b[:n]
        post = y[..., n : 2 * n] * a[1 if get("alpha") is None else 0] + b[n : 2 * n]
        res = (y[..., 2 * n :] * a[2] + b[2 * n :]).unflatten(-1, (n, n))
        H_pre = F.hardsigmoid(pre) if get("gate") else pre.sigmoid()
        H_post = 2 * post.sigmoid() + get("post", 0) * post
        if get("res") == "bfloat16":
            res = res.bfloat16().to(X.dtype)
        H_res = torch.ops.mhc.sinkhorn_knopp.default(res, 7)
        if get("res") == "clamped":
            H_res = torch.ops.mhc.sinkhorn_knopp.default(res.clamp(-1, 1), 7)
        if get("res") == "columns last":
            H_res = H_res / H_res.sum(-2, keepdim=True)
        if get("res") == "detached":
            H_res = H_res.detach()
        S = X.mT.unflatten(-1, (n,)).mT if get("streams") == "views" else X
        if get("h") == "largest":
            h = (H_pre.unsqueeze(-1) * S).amax(-2)
        else:
            h = (H_pre.unsqueeze(-2) @ S).squeeze(-2)
        f = torch.tanh(h) @ W
        M = H_res.mT if get("out") == "transposed" else H_res
        if get("out") == "once more":
            M = torch.ops.mhc.sinkhorn_knopp.default(res, 7).mT @ H_res
        mixed = M @ X * 2 if get("out") == "twice" else M @ X
        return mixed + H_post.unsqueeze(-1) * f.unsqueeze(-2)

    return site


NEAR = [
    ({"norm": "each stream"}, {}, "not divided by the rms"),
    ({"norm": "other state"}, {}, ""),
    ({"norm": "none"}, {}, "not divided by the rms"),
    ({"norm": "over other tokens"}, {}, ""),
    ({"norm": "of other streams"}, {}, ""),
    ({"alpha": "shared"}, {}, "nothing in it is H_post"),
    ({"gate": "hard"}, {}, "nothing in it is H_pre"),
    ({"post": 1e-9}, {}, "nothing in it is H_post"),
    ({"res": "bfloat16"}, {}, "is rounded to torch.bfloat16"),
    ({"res": "clamped"}, {}, "nothing in it is H_res"),
    ({"res": "columns last"}, {}, "nothing in it is H_res"),
    ({"res": "detached"}, {}, "nothing in it is H_res"),
    ({"h": "largest"}, {"coefficients": 1, "post_res": 1}, "H_pre X left open"),
    ({"out": "twice"}, {"coefficients": 1, "pre": 1}, "H_res X"),
    ({"out": "once more"}, {}, "nothing in it is H_res"),
]


@pytest.mark.parametrize(("change", "fused", "reason"), NEAR, ids=lambda v: str(v))
def test_a_near_miss_keeps_its_meaning_and_says_what_differs(change, fused, reason):
    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    function = near_miss(**change)
    gm, notes = fuse(function, inputs)
    made = {k: v for k, v in operators(gm).items() if k in ONE_SITE}
    assert made == fused, notes
    assert reason in " ".join(notes)
    if change.get("res") != "bfloat16":
        assert_as_exact(function, gm, function, inputs)


def test_the_site_that_the_near_misses_change_is_one():
    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    gm, notes = fuse(near_miss(), inputs)
    assert operators(gm) == ONE_SITE, notes


def test_streams_mixed_with_the_transpose_are_a_site():
    """Sinkhorn-Knopp that ends with columns, for one: it is the transpose of one with rows."""
    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    function = near_miss(out="transposed")
    gm, notes = fuse(function, inputs)
    assert {k: v for k, v in operators(gm).items() if k in ONE_SITE} == ONE_SITE, notes
    assert_as_exact(function, gm, function, inputs)


def test_transposing_twice_is_no_transposing():
    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    variant = get_variant("mhc", sinkhorn_iters=4)

    def twice(X, phi, alpha, bias, W):
        options = {"n": 3, "width": WIDTH, "eps": EPS, "compute_dtype": X.dtype}
        H = reference.coefficients(X, phi, alpha, bias, variant=variant, **options)
        mixed = torch.ops.mhc.matmul.default(H[2].mT.transpose(-1, -2), X)
        h = reference.pre(H[0], X, dtype=torch.float64, compute_dtype=torch.float64)
        return mixed + H[1].unsqueeze(-1) * (h @ W).unsqueeze(-2)

    gm, notes = fuse(twice, inputs)
    assert operators(gm) == ONE_SITE, notes


def test_eps_of_the_norm_is_the_one_in_the_graph():
    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    inputs[0] = (inputs[0].detach() * 1e-3).requires_grad_()

    def function(X, phi, alpha, bias, W):
        options = {"variant": get_variant("mhc"), "n": 3, "width": WIDTH}
        H = reference.coefficients(
            X, phi, alpha, bias, eps=1e-2, compute_dtype=torch.float64, **options
        )
        h = reference.pre(H[0], X, dtype=torch.float64, compute_dtype=torch.float64)
        options = {"dtype": torch.float64, "compute_dtype": torch.float64}
        return reference.post_res(H[2], H[1], X, h @ W, **options)

    for before in ((), (defer_norm,)):
        gm, _ = fuse(function, inputs, *before)
        assert operators(gm) == ONE_SITE
        assert_as_exact(function, gm, function, inputs)


# --- values that others read ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["H_pre", "H_post", "H_res", "H_res.mT", "sigmoid", "mapped", "h"])
def test_values_that_others_read_stay_alive(what):
    def function(X, phi, alpha, bias, W):
        n = 3
        y = F.rms_norm(X.flatten(-2), (n * WIDTH,), None, EPS) @ phi
        H_pre = (y[..., :n] * alpha[0] + bias[:n]).sigmoid()
        half = (y[..., n : 2 * n] * alpha[1] + bias[n : 2 * n]).sigmoid()
        H_post = 2 * half
        res = (y[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))
        H_res = torch.ops.mhc.sinkhorn_knopp.default(res, 7)
        h = (H_pre.unsqueeze(-2) @ X).squeeze(-2)
        out = H_res @ X + H_post.unsqueeze(-1) * (h @ W).unsqueeze(-2)
        extra = {"H_pre": H_pre, "H_post": H_post, "H_res": H_res, "H_res.mT": H_res.mT}
        extra |= {"sigmoid": half, "mapped": y, "h": h}
        return out + torch.sin(extra[what]).sum()

    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    gm, notes = fuse(function, inputs)
    assert operators(gm) == ONE_SITE, notes
    kept = {str(n.target) for n in gm.graph.nodes} & {"sigmoid", "rms_norm"}
    assert bool(kept) == (what == "sigmoid")
    assert_as_exact(function, gm, function, inputs)


def test_writes_in_place_are_left_alone():
    def function(X, phi, alpha, bias, W):
        n = 3
        y = F.rms_norm(X.flatten(-2), (n * WIDTH,), None, EPS) @ phi
        pre = y[..., :n] * alpha[0] + bias[:n]
        half = y[..., n : 2 * n] * alpha[1]
        half.mul_(3)
        H_post = 2 * (half + bias[n : 2 * n]).sigmoid()
        res = (y[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))
        H_res = torch.ops.mhc.sinkhorn_knopp.default(res, 7)
        h = (pre.sigmoid().unsqueeze(-2) @ X).squeeze(-2)
        return H_res @ X + H_post.unsqueeze(-1) * (h @ W).unsqueeze(-2)

    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    gm, notes = fuse(function, inputs)
    assert "coefficients" not in operators(gm) and "written in place" in notes[0]
    assert_as_exact(function, gm, function, inputs)


def test_writes_in_place_behind_the_coefficients_are_left_alone():
    def function(X, phi, alpha, bias, W):
        n = 3
        y = F.rms_norm(X.flatten(-2), (n * WIDTH,), None, EPS) @ phi
        H_pre = (y[..., :n] * alpha[0] + bias[:n]).sigmoid()
        H_post = 2 * (y[..., n : 2 * n] * alpha[1] + bias[n : 2 * n]).sigmoid()
        res = (y[..., 2 * n :] * alpha[2] + bias[2 * n :]).unflatten(-1, (n, n))
        H_res = torch.ops.mhc.sinkhorn_knopp.default(res, 7)
        weighted = H_pre.unsqueeze(-1) * X
        weighted.mul_(3)
        mixed = H_res @ X
        mixed.add_(1)
        return mixed + H_post.unsqueeze(-1) * (weighted.sum(-2) @ W).unsqueeze(-2)

    inputs = parameters(get_variant("mhc"), 3, torch.float64)
    gm, notes = fuse(function, inputs)
    assert {k: v for k, v in operators(gm).items() if k in ONE_SITE} == {"coefficients": 1}
    assert sum("written in place" in note for note in notes) == 2
    assert_as_exact(function, gm, function, inputs)


@pytest.mark.parametrize(
    ("first", "made"),
    [("matmul_default", []), ("matmul_default_1", ["coefficients", "post_res"])],
    ids=["between coefficients", "between streams"],
)
def test_what_is_recomputed_in_part_is_left_open(first, made):
    """A checkpoint begins in the middle of a group: one operator can only be in it or not."""
    variant = get_variant("mhc")
    inputs = parameters(variant, 2, torch.float32)
    gm, context = traced(open_site(variant, 2, torch.float32), inputs), Context(Options(2, variant))
    nodes = list(gm.graph.nodes)
    for node in nodes[[n.name for n in nodes].index(first) + 1 :]:
        node.meta["ac_graph_id"] = 0
    result = fuse_coefficients(gm, context)
    assert sorted(k for k in operators(gm) if k in ONE_SITE) == made
    assert any("different checkpointed regions" in note for note in result.notes)


# --- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", DTYPES, ids=lambda d: f"X {d}")
@pytest.mark.parametrize("branch", DTYPES[:2], ids=lambda d: f"f {d}")
@pytest.mark.parametrize("out", DTYPES, ids=lambda d: f"out {d}")
def test_streams_branch_and_result_may_have_different_dtypes(streams, branch, out):
    """h and f in one dtype, X in another, X' in a third: every value as in the open form."""
    variant = get_variant("mhc", sinkhorn_iters=5)
    exact = torch.float64 if streams is torch.float64 else torch.float32

    def function(X, phi, alpha, bias, W):
        options = {"variant": variant, "n": 3, "width": WIDTH, "eps": EPS, "compute_dtype": exact}
        H_pre, H_post, H_res = reference.coefficients(X, phi, alpha, bias, **options)
        f = reference.pre(H_pre, X, dtype=branch, compute_dtype=exact)
        return reference.post_res(H_res, H_post, X, f, dtype=out, compute_dtype=exact)

    inputs = [t.detach() for t in parameters(variant, 3, streams)]
    gm, notes = fuse(function, inputs)
    assert operators(gm) == ONE_SITE, notes
    got, want = gm(*inputs), function(*inputs)
    assert got.dtype == want.dtype == out
    slack = 1e-13 if exact is torch.float64 else 1e-5
    rounded = {torch.bfloat16: 2**-8, torch.float32: 2**-23, torch.float64: 0.0}
    slack += rounded[out] + rounded[branch]
    torch.testing.assert_close(got.double(), want.double(), rtol=slack, atol=4 * slack)


def test_coefficients_less_exact_than_their_streams_are_left_open():
    """float64 streams on a float32 model: the operator would need float64 parameters."""
    variant = get_variant("mhc")
    inputs = parameters(variant, 3, torch.float32)
    inputs[0] = inputs[0].detach().double()

    def function(X, phi, alpha, bias, W):
        options = {"variant": variant, "n": 3, "width": WIDTH, "eps": EPS}
        H = reference.coefficients(X, phi, alpha, bias, compute_dtype=torch.float32, **options)
        return reference.pre(H[0], X, dtype=torch.float32, compute_dtype=torch.float32) @ W

    gm, notes = fuse(function, inputs)
    assert "coefficients" not in operators(gm)
    assert "its torch.float64 streams are rounded" in " ".join(notes)


# --- whole models ---------------------------------------------------------------------------------


def history_of(model, name="fuse_coefficients"):
    (graph,) = mhc_compile.graphs(model)
    return next(entry for entry in graph.history if entry.name == name), graph


@pytest.mark.parametrize("readout", ["mean", "sum", "head"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_site_of_a_model_is_fused(variant, readout):
    _, model = pair(variant=variant, readout=readout)
    model(ids())
    entry, graph = history_of(model)
    counts = operators(graph.after)
    assert [counts[name] for name in ONE_SITE] == [4, 4, 4]
    assert counts["sinkhorn_knopp"] == 0
    assert counts["matmul"] == 0
    assert counts["expand"] == counts["head" if readout == "head" else "readout"] == 1
    assert [note.split()[:2] for note in entry.notes] == [["4", "x"]] * 3 + [["1", "x"]] * 2


def test_new_nodes_carry_origin_values_and_recompute_tags():
    def checkpointed(m, x):
        def body(x):
            x = x + m.a(x)
            return x + m.b(x)

        x = torch.utils.checkpoint.checkpoint(body, x, use_reentrant=False)
        return x + m.c(x)

    from ..graphs import Program, stream

    model, x = Program(checkpointed).double(), stream().double()
    mhc_compile.transform(model, n=2, example_inputs=(x,))
    with torch.no_grad():
        for p in mhc_compile.parameters(model):
            p.add_(0.7 * torch.randn_like(p))
    model(x.requires_grad_())
    _, graph = history_of(model)
    nodes = [n for n in graph.after.graph.nodes if "mhc." in str(n.target)]
    assert operators(graph.after) == dict.fromkeys(ONE_SITE, 3) | {"expand": 1, "readout": 1}
    assert all(n.meta["stack_trace"] and "example_value" in n.meta for n in nodes)
    tags = [n.meta.get("ac_graph_id") for n in nodes]
    assert tags.count(0) == 7 and tags.count(None) == 4


def test_a_graph_without_mappings_is_unchanged():
    gm, notes = fuse(lambda x: F.rms_norm(x, (6,)) @ x.mT, [torch.randn(3, 6)])
    assert notes == [] and not operators(gm)


def test_the_cost_of_a_site_does_not_grow_with_the_graph():
    """Searching stays near its site: twice the sites visit twice the nodes."""
    from mhc_compile.passes.recognition import token_rules

    calls = []
    original = token_rules.evaluate
    variant = get_variant("mhc")
    inputs = parameters(variant, 2, torch.float32)
    site = open_site(variant, 2, torch.float32)

    def chain(count):
        def function(X, phi, alpha, bias, W):
            for _ in range(count):
                X = site(X, phi, alpha, bias, W)
            return X

        return function

    from mhc_compile.passes.recognition import evaluation as match

    match.evaluate = lambda *a: (calls.append(1), original(*a))[1]
    try:
        counts = []
        for count in (2, 4):
            calls.clear()
            gm, _ = fuse(chain(count), inputs)
            assert operators(gm)["coefficients"] == count
            counts.append(len(calls))
    finally:
        match.evaluate = original
    assert counts[1] == 2 * counts[0]
    assert traced(chain(1), inputs) is not None
