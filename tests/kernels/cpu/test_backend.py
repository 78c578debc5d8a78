"""The C++ kernels against float64 truth, and what holds bit by bit.

The truth of gradients is autograd through the reference in float64, which test_reference.py
compares with plain loops. The rule for errors: no further from the truth than twice what the
reference is when it computes in the same dtype, plus a few roundings.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mhc_compile.kernels import reference
from mhc_compile.kernels.cpu import backend as cpu
from mhc_compile.kernels.cpu import codegen as codegen_cpp
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import VARIANTS, get_variant

from .. import truth
from ..operands import EPS, variant_of

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64


# name, n, dtype of streams, T, C; every further (name, n) and (n, dtype) costs a build.
CASES = [
    *((name, 4, F64, 7, 13) for name in (*VARIANTS, "hc_linear")),
    ("mhc", 4, F32, 7, 40),
    ("mhc", 4, F32, 1, 8),
    ("mhc", 4, F32, 600, 264),  # several chunks of tokens, several parts of a row
    ("mhc", 4, BF16, 7, 13),
    ("mhc", 4, BF16, 70, 520),
    ("mhc", 3, BF16, 7, 40),
    ("mhc", 2, F32, 7, 13),
    ("mhc", 8, F32, 17, 136),
    ("deepseek_v4", 4, F32, 7, 40),
    ("mhc_lite", 3, BF16, 1, 8),
    ("kromhc", 8, F32, 7, 13),
    ("identity", 4, F32, 7, 8),
    *((name, 4, F32, 7, 13) for name in ("hc", "kromhc")),
    *((name, 4, BF16, 7, 13) for name in (*VARIANTS[1:], "hc_linear")),
    *(("mhc", n, BF16, 7, 13) for n in (2, 8)),
    *(("mhc", 16, S, 3, 13) for S in (F32, BF16)),
    # Very wide, once with an odd width: sums of 65536 products, rows of many parts.
    ("mhc", 4, F32, 3, 4099),
    ("mhc", 4, F32, 1, 16384),
    ("mhc", 4, BF16, 2, 16384),
    ("mhc", 3, BF16, 3, 4099),
]
cases = pytest.mark.parametrize(("name", "n", "S", "T", "C"), CASES)
few_cases = pytest.mark.parametrize(
    ("name", "n", "S", "T", "C"),
    [
        ("mhc", 4, F32, 600, 264),
        ("mhc", 4, BF16, 70, 520),
        ("mhc", 3, BF16, 40, 13),
        ("deepseek_v4", 4, F64, 7, 13),
        ("kromhc", 8, F32, 17, 136),
        ("mhc", 4, F32, 3, 4099),
        ("mhc", 4, BF16, 2, 16384),
        ("mhc", 16, F32, 3, 13),
    ],
)


def compute(S):
    return F64 if S == F64 else F32


def inputs(name, n, S, T, C):
    """X, f of streams, φ, α, b such that coefficients are irregular and differ between tokens."""
    columns, K = sum(variant_of(name).columns(n)), compute(S)
    X, f = torch.randn(T, n, C), torch.randn(T, C)
    phi = torch.randn(n * C, columns) / (n * C) ** 0.5
    parameters = phi, torch.randn(3), torch.randn(columns)
    return X.to(S), f.to(S), *(p.to(K) for p in parameters)


def reference_site(name, X, f, phi, alpha, bias, K):
    """All forward results of one site, in K, differentiable."""
    options = {"variant": variant_of(name), "n": X.shape[1], "width": X.shape[2], "eps": EPS}
    H_pre, H_post, H_res = reference.coefficients(X, phi, alpha, bias, **options, compute_dtype=K)
    h = reference.pre(H_pre, X, dtype=X.dtype, compute_dtype=K)
    X2 = reference.post_res(H_res, H_post, X, f, dtype=X.dtype, compute_dtype=K)
    return H_pre, H_post, H_res, h, X2


def double(tensors):
    return [t.double() for t in tensors]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def assert_close_to_truth(actual, eager, expected):
    """No further from `expected` than twice what `eager` is, plus a few roundings."""
    for k, (a, e, true) in enumerate(zip(actual, eager, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape and a.is_contiguous(), k
        if a.numel() == 0:
            continue
        error, allowed = ((t.detach().double() - true.detach()).abs().max() for t in (a, e))
        # α has three numbers: there the competitor may be lucky. In float64 it is the truth itself.
        factor = 2 if a.numel() > 3 else 8
        roundings = 32 if a.dtype == F64 else 4
        floor = roundings * torch.finfo(compute(a.dtype)).eps * true.abs().max()
        assert error <= factor * allowed + floor, (k, float(error), float(allowed), float(floor))


def gradients(outputs, wrt, grads):
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    outputs, grads = zip(*(p for p in pairs if p[0].requires_grad), strict=True)
    found = torch.autograd.grad(outputs, wrt, grads, allow_unused=True)
    return [
        torch.zeros_like(w) if g is None else g.detach() for g, w in zip(found, wrt, strict=True)
    ]


def both_gradients(function, tensors, grads, K):
    """Gradients by autograd in K (the competitor) and in float64 (the truth)."""
    ours, exact = leaves(tensors), leaves(double(tensors))
    eager = gradients(function(*ours, K), ours, grads)
    return eager, gradients(function(*exact, F64), exact, double_or_none(grads))


def double_or_none(grads):
    return [None if g is None else g.double() for g in grads]


# --- against float64 truth ----------------------------------------------------------------------


@cases
def test_forward_is_close_to_truth(name, n, S, T, C):
    X, f, phi, alpha, bias = inputs(name, n, S, T, C)
    variant = variant_of(name)
    mapping = Mapping(X, phi, alpha, bias)
    H_pre, H_post, H_res, y, inv_r = cpu.coefficients(mapping, variant=variant, eps=EPS)
    h, X2 = cpu.pre(H_pre, X), cpu.post_res(H_res, H_post, X, f)
    arguments = (X, f, phi, alpha, bias)
    eager = reference_site(name, *arguments, compute(S))
    expected = reference_site(name, *double(arguments), F64)
    assert_close_to_truth((H_pre, H_post, H_res, h, X2), eager, expected)
    flat, K = X.flatten(1), compute(S)
    rows = double([flat, phi])
    assert_close_to_truth(
        (y, inv_r),
        (flat.to(K) @ phi, (flat.to(K).square().mean(-1) + EPS).rsqrt()),
        (rows[0] @ rows[1], (rows[0].square().mean(-1) + EPS).rsqrt()),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_is_that_of_loops_over_numbers(name):
    X, _, phi, alpha, bias = inputs(name, 4, F64, 3, 5)
    actual = cpu.coefficients(Mapping(X, phi, alpha, bias), variant=variant_of(name), eps=EPS)[:3]
    X, *parameters = (t.numpy() for t in (X, phi, alpha, bias))
    expected = truth.over_tokens(lambda x: truth.coefficients(x, *parameters, name, EPS), X)
    for a, e in zip(actual, expected, strict=True):
        assert np.abs(a.numpy() - e).max() < 1e-13


@cases
def test_separate_backwards_are_close_to_truth(name, n, S, T, C):
    X, f, phi, alpha, bias = inputs(name, n, S, T, C)
    variant, K = variant_of(name), compute(S)
    mapping = Mapping(X, phi, alpha, bias)
    H_pre, H_post, H_res, y, inv_r = cpu.coefficients(mapping, variant=variant, eps=EPS)
    dH = [torch.randn_like(t) for t in (H_pre, H_post, H_res)]
    dh, dX2 = torch.randn_like(f), torch.randn_like(X)

    def coefficients(X, phi, alpha, bias, K):
        return reference_site(name, X, X[:, 0], phi, alpha, bias, K)[:3]

    saved = Saved(*mapping, y, inv_r)
    actual = cpu.coefficients_backward(dH, saved, variant=variant, eps=EPS)
    expected = both_gradients(coefficients, (X, phi, alpha, bias), dH, K)
    assert_close_to_truth(actual, *expected)

    def pre(H_pre, X, K):
        return (reference.pre(H_pre, X, dtype=X.dtype, compute_dtype=K),)

    actual = cpu.pre_backward(dh, H_pre, X)
    assert_close_to_truth(actual, *both_gradients(pre, (H_pre, X), [dh], K))

    def post_res(H_res, H_post, X, f, K):
        return (reference.post_res(H_res, H_post, X, f, dtype=X.dtype, compute_dtype=K),)

    actual = cpu.post_res_backward(dX2, H_res, H_post, X, f)
    assert_close_to_truth(actual, *both_gradients(post_res, (H_res, H_post, X, f), [dX2], K))


@cases
@pytest.mark.parametrize("with_partial", [True, False])
def test_joint_backward_is_close_to_truth(name, n, S, T, C, with_partial):
    X, _, phi, alpha, bias = inputs(name, n, S, T, C)
    variant = variant_of(name)
    mapping = Mapping(X, phi, alpha, bias)
    h, H_pre, H_post, H_res, y, inv_r = cpu.coefficients_pre(mapping, variant=variant, eps=EPS)
    dh, dH_post, dH_res = (torch.randn_like(t) for t in (h, H_post, H_res))
    partial = torch.randn_like(X) if with_partial else None

    def joint(X, phi, alpha, bias, K):
        _, H_post, H_res, h, _ = reference_site(name, X, X[:, 0], phi, alpha, bias, K)
        return H_post, H_res, h, X * 1

    opened, saved = Opened(dh, dH_post, dH_res, H_pre), Saved(*mapping, y, inv_r)
    actual = cpu.coefficients_pre_backward(opened, saved, partial, variant=variant, eps=EPS)
    grads = [dH_post, dH_res, dh, partial]
    expected = both_gradients(joint, (X, phi, alpha, bias), grads, compute(S))
    assert_close_to_truth(actual, *expected)


@cases
@pytest.mark.parametrize("with_partial", [True, False])
def test_backward_of_a_seam_is_close_to_truth(name, n, S, T, C, with_partial):
    X, f, phi, alpha, bias = inputs(name, n, S, T, C)
    options, parameters = {"variant": variant_of(name), "eps": EPS}, Parameters(phi, alpha, bias)
    _, H_post, H_res, _, _ = cpu.coefficients(Mapping(X.roll(1, 0), *parameters), **options)
    closed = Closed(H_res, H_post, X, f)
    X2, h, H_pre_next, H_post_next, H_res_next, y, inv_r = cpu.seam(closed, parameters, **options)
    grads = [torch.randn_like(t) for t in (H_post_next, H_res_next, h, X2)]
    grads[3] = grads[3] if with_partial else None

    def seam(H_res, H_post, X, f, phi, alpha, bias, K):
        X2 = reference.post_res(H_res, H_post, X, f, dtype=X.dtype, compute_dtype=K)
        if X.dtype == F64 and S == BF16:  # the truth reads what was rounded, as all others do
            X2 = X2 + (X2.detach().to(S).double() - X2.detach())
        _, H_post, H_res, h, _ = reference_site(name, X2, f, phi, alpha, bias, K)
        return H_post, H_res, h, X2

    opened = Opened(grads[2], *grads[:2], H_pre_next)
    saved = Saved(X2, *parameters, y, inv_r)
    actual = cpu.seam_backward(opened, saved, grads[3], closed, **options)
    arguments = (H_res, H_post, X, f, phi, alpha, bias)
    eager, expected = both_gradients(seam, arguments, grads, compute(S))
    ordered = ([*g[4:], *g[:4]] for g in (eager, expected))
    assert_close_to_truth(actual, *ordered)


@pytest.mark.parametrize("S", [F32, BF16])
def test_very_many_tokens_are_close_to_truth(S):
    """All results and gradients; sums over tokens are no less exact for so many terms."""
    case = "mhc", 4, S, 100_003, 8
    test_forward_is_close_to_truth(*case)
    test_separate_backwards_are_close_to_truth(*case)
    test_joint_backward_is_close_to_truth(*case, with_partial=True)
    test_backward_of_a_seam_is_close_to_truth(*case, with_partial=True)


@pytest.mark.parametrize("S", [F32, BF16, F64])
@pytest.mark.parametrize("T", [1000, 4096, 4097, 100_003])
def test_sums_over_tokens_are_as_exact_for_many_tokens(S, T):
    """T times the same token: whatever a sum loses, it loses at each addition in one direction."""
    name, n, C = "mhc", 4, 13
    options = {"variant": variant_of(name), "eps": EPS}
    X, _, *parameters = inputs(name, n, S, 1, C)
    saved = cpu.coefficients(Mapping(X, *parameters), **options)
    dH = [torch.randn_like(t) for t in saved[:3]]
    kept = Saved(X, *parameters, *saved[3:])
    of_one = cpu.coefficients_backward(dH, kept, **options)[1:]
    dH, saved = ([t.repeat(T, *[1] * (t.dim() - 1)) for t in ts] for ts in (dH, saved))
    X = X.repeat(T, 1, 1)
    kept = Saved(X, *parameters, *saved[3:])
    of_all = cpu.coefficients_backward(dH, kept, **options)[1:]
    # dα and db of a chunk, up to 512 tokens, are plain sums in float64.
    close = (64 if S == F64 else 16) * torch.finfo(compute(S)).eps
    for one, total in zip(of_one, of_all, strict=True):
        expected = one.double() * T
        assert (total - expected).abs().max() <= close * expected.abs().max()


def test_a_sum_over_tokens_beyond_the_largest_number_is_infinite():
    T, options = 100_003, {"variant": variant_of("mhc"), "eps": EPS}
    X, _, *parameters = inputs("mhc", 4, F32, 1, 8)
    X = X.sign()
    H_pre, H_post, H_res, *saved = (
        t.repeat(T, *[1] * (t.dim() - 1))
        for t in cpu.coefficients(Mapping(X, *parameters), **options)
    )
    dH = [torch.zeros_like(H_pre), 1e36 * torch.ones_like(H_post), torch.zeros_like(H_res)]
    kept = Saved(X.repeat(T, 1, 1), *parameters, *saved)
    sums = cpu.coefficients_backward(dH, kept, **options)[1:]
    dphi, dalpha, dbias = sums
    assert dphi[:, 4:8].isinf().all() and dbias[4:8].isinf().all() and dalpha[1].isinf()
    assert dphi[:, :4].isfinite().all() and not any(t.isnan().any() for t in sums)


@pytest.mark.parametrize("name", [*VARIANTS, "hc_linear"])
def test_gradcheck_of_the_emitted_code(name):
    variant = variant_of(name)

    class Coefficients(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            *H, y, inv_r = cpu.coefficients(Mapping(*arguments), variant=variant, eps=EPS)
            ctx.save_for_backward(*arguments, y, inv_r)
            return tuple(H)

        @staticmethod
        def backward(ctx, *grads):
            dH, saved = [g.contiguous() for g in grads], Saved(*ctx.saved_tensors)
            return cpu.coefficients_backward(dH, saved, variant=variant, eps=EPS)

    X, _, *parameters = inputs(name, 4, F64, 2, 2)
    torch.autograd.gradcheck(Coefficients.apply, leaves([X, *parameters]), nondet_tol=0)


def test_gradcheck_of_a_seam():
    options = {"variant": get_variant("mhc"), "eps": EPS}

    class Seam(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            closed, parameters = Closed(*arguments[:4]), Parameters(*arguments[4:])
            X2, h, H_pre, H_post, H_res, y, inv_r = cpu.seam(closed, parameters, **options)
            ctx.save_for_backward(H_pre, X2, *arguments[4:], y, inv_r, *arguments[:4])
            return X2, h, H_post, H_res

        @staticmethod
        def backward(ctx, *grads):
            dX2, *others = (g.contiguous() for g in grads)
            H_pre, *kept = ctx.saved_tensors
            opened, saved, closed = Opened(*others, H_pre), Saved(*kept[:6]), Closed(*kept[6:])
            *mapping, dH_res, dH_post, dX, df = cpu.seam_backward(
                opened, saved, dX2, closed, **options
            )
            return dH_res, dH_post, dX, df, *mapping

    X, f, *parameters = inputs("mhc", 4, F64, 2, 3)
    H = torch.randn(2, 4, 4, dtype=F64), torch.randn(2, 4, dtype=F64)
    torch.autograd.gradcheck(Seam.apply, leaves([*H, X, f, *parameters]), nondet_tol=0)


@pytest.mark.parametrize(("n", "iters"), [(2, 20), (4, 1), (4, 2), (4, 20), (8, 20)])
@pytest.mark.parametrize("name", ["mhc", "deepseek_v4"])
def test_sinkhorn_of_logits_of_any_size(name, n, iters):
    """α = 0, so that b alone decides and no rounding stands in front of Sinkhorn."""
    variant = get_variant(name, sinkhorn_iters=iters)
    for scale in (1.0, 30.0, 1e3, 1e4):
        X, _, phi, alpha, bias = inputs(name, n, F32, 1, 8)
        alpha.zero_()
        bias[2 * n :] = scale * torch.randn(n * n)
        mapping = Mapping(X, phi, alpha, bias)
        *H, y, inv_r = cpu.coefficients(mapping, variant=variant, eps=EPS)
        logits = bias[2 * n :].reshape(n, n).double().numpy()
        if name == "mhc":
            expected = truth.sinkhorn(logits, iters)
        else:
            expected = truth.sinkhorn_v4(logits, iters).T
        assert np.abs(H[2][0].double().numpy() - expected).max() < 2e-6

        grads = [torch.randn_like(t) for t in H]
        saved = Saved(*mapping, y, inv_r)
        dbias = cpu.coefficients_backward(grads, saved, variant=variant, eps=EPS)[3]
        (exact,) = leaves([bias.double()])
        options = {"variant": variant, "n": n, "width": 8, "eps": EPS, "compute_dtype": F64}
        outputs = reference.coefficients(*double((X, phi, alpha)), exact, **options)
        (wanted,) = torch.autograd.grad(outputs, exact, double(grads))
        assert (dbias - wanted).abs().max() < 1e-5


# --- bit by bit ---------------------------------------------------------------------------------


def everything(name, n, S, T, C):
    """Results of all functions, by function."""
    X, f, phi, alpha, bias = inputs(name, n, S, T, C)
    parameters = Parameters(phi, alpha, bias)
    options = {"variant": variant_of(name), "eps": EPS}
    separate = cpu.coefficients(Mapping(X, *parameters), **options)
    H_pre, H_post, H_res, y, inv_r = separate
    X2 = cpu.post_res(H_res, H_post, X, f)
    following = cpu.coefficients(Mapping(X2, *parameters), **options)
    H_next, saved = following[:3], following[3:]
    dh, dX2 = torch.randn_like(f), torch.randn_like(X)
    H = Closed(H_res, H_post, X, f)
    kept = Saved(X, *parameters, y, inv_r)
    return {
        "coefficients": separate,
        "coefficients_next": following,
        "pre": (cpu.pre(H_pre, X),),
        "pre_next": (cpu.pre(H_next[0], X2),),
        "post_res": (X2,),
        "coefficients_pre": cpu.coefficients_pre(Mapping(X, *parameters), **options),
        "seam": cpu.seam(H, parameters, **options),
        "pre_backward": cpu.pre_backward(dh, H_pre, X),
        "post_res_backward": cpu.post_res_backward(dX2, *H),
        "coefficients_backward": cpu.coefficients_backward((H_pre, H_post, H_res), kept, **options),
        "coefficients_pre_backward": cpu.coefficients_pre_backward(
            Opened(dh, H_post, H_res, H_pre), kept, dX2, **options
        ),
        "seam_backward": cpu.seam_backward(
            Opened(dh, H_post, H_res, H_next[0]), Saved(X2, *parameters, *saved), dX2, H, **options
        ),
    }


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensors in expected.items():
        for a, e in zip(actual[name], tensors, strict=True):
            assert torch.equal(a, e), name


@few_cases
def test_joint_functions_are_their_parts_bit_by_bit(name, n, S, T, C):
    results = everything(name, n, S, T, C)
    both = (*results["pre"], *results["coefficients"])
    next_both = (*results["post_res"], *results["pre_next"], *results["coefficients_next"])
    assert_equal(
        {name: results[name] for name in ("coefficients_pre", "seam")},
        {"coefficients_pre": both, "seam": next_both},
    )


@few_cases
def test_results_depend_on_nothing_but_the_inputs(name, n, S, T, C):
    """Not on the number of threads, and two runs agree."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            results.append(everything(name, n, S, T, C))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_equal(other, results[0])


def test_a_token_does_not_depend_on_its_neighbours():
    X, _, *parameters = inputs("mhc", 4, F32, 37, 264)
    options = {"variant": get_variant("mhc"), "eps": EPS}
    together = cpu.coefficients_pre(Mapping(X, *parameters), **options)
    alone = [cpu.coefficients_pre(Mapping(x, *parameters), **options) for x in X.split(1)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_very_many_tokens():
    """An odd number of them: the first and the last come out as they do alone."""
    T = 100_003
    X, _, *parameters = inputs("mhc", 4, F32, T, 8)
    options = {"variant": get_variant("mhc"), "eps": EPS}
    h, *ends = (
        cpu.coefficients_pre(Mapping(X[k], *parameters), **options)[0]
        for k in (slice(T), slice(7), slice(-7, T))
    )
    assert torch.equal(torch.cat((h[:7], h[-7:])), torch.cat(ends))


@pytest.mark.parametrize(("S", "n"), [(F32, 2), (F32, 4), (F32, 8), (BF16, 3)])
def test_a_nan_stays_in_its_token(S, n):
    """In all but dφ, dα and db, which are sums over tokens."""
    T, bad = 37, 5
    results = []
    for poison in (False, True):
        torch.manual_seed(0)
        X, f, *parameters = inputs("mhc", n, S, T, 40)
        if poison:
            X[bad, 1, 3] = torch.nan
        options = {"variant": get_variant("mhc"), "eps": EPS}
        parameters = Parameters(*parameters)
        H_pre, H_post, H_res, y, inv_r = cpu.coefficients(Mapping(X, *parameters), **options)
        before = Closed(H_res, H_post, X, f)
        X2, h, *H_next, y2, inv_r2 = cpu.seam(before, parameters, **options)
        per_token = [H_pre, H_post, H_res, y, inv_r, X2, h, *H_next]
        opened = Opened(f, H_next[1], H_next[2], H_next[0])
        grads = opened, Saved(X2, *parameters, y2, inv_r2), X
        per_token += cpu.coefficients_pre_backward(*grads, **options)[:1]
        per_token += cpu.seam_backward(*grads, before, **options)[3:]
        results.append(per_token)
    others = torch.arange(T) != bad
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean[others], poisoned[others])
        assert poisoned[bad].isnan().any()


def test_bf16_is_rounded_as_torch_rounds():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(BF16).reshape(-1, 1, 64)
    other = x[torch.randperm(len(x))]
    X = torch.cat((x, other), 1)
    H_pre = torch.tensor([1.0, 2.0**-9]).expand(len(X), 2).contiguous()
    expected = X[:, 0].float() + X[:, 1].float() * 2.0**-9
    actual = cpu.pre(H_pre, X)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected.to(BF16)[~nan])


# --- shapes, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize(("S", "n"), [(F32, 4), (BF16, 3)])
def test_no_tokens(S, n):
    results = everything("mhc", n, S, 0, 40)
    shapes = [tuple(t.shape) for t in results["coefficients"]]
    assert shapes == [(0, n), (0, n), (0, n, n), (0, n * n + 2 * n), (0,)]
    sums = [*results["coefficients_backward"][1:], *results["seam_backward"][:3]]
    assert all(t.numel() > 0 and not t.any() for t in sums)


@pytest.mark.parametrize(
    ("S", "n", "C"), [(F32, 4, 13), (BF16, 3, 40), (F64, 4, 8), (BF16, 16, 13), (F32, 4, 16384)]
)
def test_readout_and_expand(S, n, C):
    X, x, K = torch.randn(7, n, C).to(S), torch.randn(7, C).to(S), compute(S)
    close = {"rtol": 2 * torch.finfo(S).eps, "atol": 0}
    for kind in ("mean", "sum"):
        expected = reference.readout(X, kind, dtype=S, compute_dtype=K)
        atol = 4 * torch.finfo(compute(S)).eps
        torch.testing.assert_close(cpu.readout(X, kind), expected, **close | {"atol": atol})
        factor = 1 / n if kind == "mean" else 1
        dX = (x.to(K) * factor).to(S).unsqueeze(1).expand(7, n, C)
        torch.testing.assert_close(cpu.readout_backward(x, n, kind), dX, **close)
    assert torch.equal(cpu.expand(x, n), x.unsqueeze(1).expand(7, n, C))
    with pytest.raises(ValueError, match="'mean' or 'sum', got 'max'"):
        cpu.readout(X, "max")


def test_what_is_supported(monkeypatch):
    assert cpu.supports(F32, 4, get_variant("mhc"))
    assert not cpu.supports(torch.float16, 4)
    assert not cpu.supports(F32, 1)
    assert not cpu.supports(F32, 17)
    monkeypatch.setattr(cpu, "_chain", lambda *_: None)
    assert cpu.supports(F32, 4)
    assert not cpu.supports(F32, 4, get_variant("mhc"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda X: X.double(),
        lambda X: X[:-1],
        lambda X: X.mT.contiguous().mT,
        lambda X: X.to("meta"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(spoil):
    X, f, *_ = inputs("mhc", 4, F32, 7, 40)
    H_res, H_post = torch.randn(7, 4, 4), torch.randn(7, 4)
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        cpu.post_res_backward(spoil(X), H_res, H_post, X, f)


# --- the emitted text ---------------------------------------------------------------------------


def test_names_cannot_leave_their_comment():
    evil = 'x"\n#include "/etc/passwd"\n// \\\n'
    variant = replace(get_variant("mhc"), name=evil)
    text = codegen_cpp.chain_source(variant, 4, F32)
    plain = codegen_cpp.chain_source(get_variant("mhc"), 4, F32)
    assert text.splitlines()[1:] == plain.splitlines()[1:]
    assert text.splitlines()[0].startswith("//") and not text.splitlines()[0].endswith("\\")


@pytest.mark.parametrize("name", [*VARIANTS, "hc_linear"])
def test_text_says_what_it_is_and_holds_the_numbers(name):
    variant = variant_of(name)
    text = codegen_cpp.chain_source(variant, 4, F32)
    assert f'variant "{variant.name}", n = 4' in text.splitlines()[0]
    assert f"constexpr int COLUMNS = {sum(variant.columns(4))};" in text
    assert ("ITERATIONS = 20;" in text) == (variant.residual == "sinkhorn")
    assert max(map(len, text.splitlines())) <= 100 or name == "mhc_lite"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_of_a_variant_are_finite(bad):
    variant = replace(get_variant("deepseek_v4"), eps=bad)
    with pytest.raises(ValueError, match="finite"):
        codegen_cpp.chain_source(variant, 4, F32)


def test_impossible_variants_raise():
    with pytest.raises(ValueError, match="power of two"):
        codegen_cpp.chain_source(get_variant("kromhc"), 3, F32)
    with pytest.raises(ValueError, match="n <= 4"):
        codegen_cpp.chain_source(get_variant("mhc_lite"), 5, F32)
