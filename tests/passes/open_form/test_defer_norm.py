"""defer_norm: matmuls read x instead of its RMSNorm, and their results are divided by r."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

import mhc_compile
from mhc_compile import Config
from mhc_compile.kernels.variants import get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.graph.norms import rms_norm_of
from mhc_compile.passes.graph.operators import op_name
from mhc_compile.passes.open_form.defer_norm import defer_norm
from mhc_compile.passes.sites.canonicalize import canonicalize
from tests import checks
from tests.models import ids, pair
from tests.zoo.models import randomize

from ..graphs import captured
from ..open_sites import open_site, parameters, traced

C, EPS = 32, 1e-2
"""An eps as large as that shows where it is lost."""

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Function = Callable[..., Any]


def deferred(
    function: Function, inputs: list[Tensor], *, own: bool = True
) -> tuple[fx.GraphModule, list[str], bool]:
    """The graph of a function behind canonicalize and defer_norm; its notes; whether it changed."""
    gm = traced(function, inputs)
    context = Context(Options(2, get_variant("mhc"), defer_norms=own))
    canonicalize(gm, context)
    result = defer_norm(gm, context)
    gm.graph.lint()
    gm.recompile()
    return gm, result.notes, result.changed


def norms_in(gm: fx.GraphModule) -> int:
    return sum(rms_norm_of(node) is not None for node in gm.graph.nodes)


def run(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, and the gradients of all inputs for a loss that weighs every entry."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(checks.loss_of(outputs), leaves, materialize_grads=True)
    return [o.detach().double() for o in (*outputs, *gradients)]


def assert_as_exact(candidate: Function, function: Function, inputs: list[Tensor]) -> None:
    """Every output and gradient is at most twice as far from float64 as the function's own."""
    truth = run(function, [t.double() for t in inputs])
    rounding = {BF16: 0.0, FP32: 4 * 2**-23, FP64: 100 * 2**-52}[inputs[0].dtype]
    for exact, plain, got in zip(truth, run(function, inputs), run(candidate, inputs), strict=True):
        assert got.isfinite().all()
        assert (got - exact).norm() <= 2 * (plain - exact).norm() + rounding * exact.norm()


def operands(dtype: torch.dtype, *, scale: float = 1.0) -> list[Tensor]:
    """x of uneven rows, a weight of the norm, matrices and a bias."""
    rows = torch.tensor([1e-2, 0.3, 1.0, 5.0]).repeat(5)[:, None]
    shapes = [(4, 5, C), (C,), (24, C), (24,), (24, C), (C, 24)]
    drawn = [torch.randn(shape) for shape in shapes]
    drawn[0] = (drawn[0].flatten(0, 1) * rows).view(4, 5, C) * scale
    for i in (2, 4, 5):
        drawn[i] /= C**0.5
    return [t.to(dtype) for t in drawn]


# ------------------------------------------------------------------------------------- spellings


def fused(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, (C,), g, EPS)


def without_weight(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x, [C], eps=EPS)


def default_eps(x: Tensor, g: Tensor) -> Tensor:
    return F.rms_norm(x * 1e-3, (C,), g)


def llama(x: Tensor, g: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, FP32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return g * wide.to(x.dtype)


def gemma(x: Tensor, g: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, FP32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (y * (1.0 + g.to(wide.dtype))).type_as(x)


def divided(x: Tensor, g: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, FP32))
    y = wide / torch.sqrt(EPS + torch.mean(wide * wide, dim=-1, keepdim=True))
    return y.to(x.dtype) * g


def two_scales(x: Tensor, g: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, FP32))
    y = (torch.square(wide).mean(2, True) + EPS) ** -0.5 * wide
    return torch.mul(y.to(x.dtype) * g, g)


SPELLINGS = [fused, without_weight, default_eps, llama, gemma, divided, two_scales]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
@pytest.mark.parametrize("norm", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_of_a_norm_in_front_of_qkv(norm: Function, dtype: torch.dtype) -> None:
    def qkv(x: Tensor, g: Tensor, Q: Tensor, bias: Tensor, K: Tensor, V: Tensor) -> Any:
        h = norm(x, g)
        return F.linear(h, Q, bias), F.linear(h, K), h @ V

    inputs = operands(dtype)
    gm, notes, changed = deferred(qkv, inputs)
    assert notes == ["1 of norms deferred"] and changed
    assert norms_in(gm) == 0
    assert_as_exact(gm, qkv, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gate_and_up(dtype: torch.dtype) -> None:
    def mlp(x: Tensor, g: Tensor, gate: Tensor, _: Tensor, up: Tensor, down: Tensor) -> Any:
        h = llama(x, g)
        return (x + F.linear(F.silu(F.linear(h, gate)) * F.linear(h, up), down),)

    inputs = operands(dtype)
    gm, notes, _ = deferred(mlp, inputs)
    assert notes == ["1 of norms deferred"] and norms_in(gm) == 0
    assert_as_exact(gm, mlp, inputs)


def test_weights_of_a_higher_precision_than_the_stream() -> None:
    """The weight of a norm in float32, everything else in bfloat16."""

    def function(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
        wide = x.float()
        wide = g * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS))
        return (F.linear(wide.to(Q.dtype), Q),)

    inputs = operands(BF16)[:3]
    inputs[1] = inputs[1].float()
    gm, notes, _ = deferred(function, inputs)
    assert notes == ["1 of norms deferred"] and norms_in(gm) == 0
    leaves = [t.detach().requires_grad_() for t in inputs]
    got = torch.autograd.grad(gm(*leaves)[0].float().sum(), leaves)
    assert [t.dtype for t in got] == [t.dtype for t in inputs]
    exact = run(lambda x, g, Q: (F.linear(fused(x, g), Q),), [t.double() for t in inputs])
    for result, plain, truth in zip(run(gm, inputs), run(function, inputs), exact, strict=True):
        assert (result - truth).norm() <= 2 * (plain - truth).norm()


# --------------------------------------------------------------------------------------- mappings


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_the_norm_of_a_mapping_is_deferred_by_default(dtype: torch.dtype) -> None:
    variant = get_variant("mhc", sinkhorn_iters=4)
    inputs = [t.detach() for t in parameters(variant, 3, dtype)]

    def site(*inputs: Tensor) -> list[Tensor]:
        return [open_site(variant, 3, inputs[0].dtype)(*inputs)]

    def as_written(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, W: Tensor) -> list[Tensor]:
        return [open_site(variant, 3, dtype)(X, phi, alpha, bias, W)]

    gm, notes, changed = deferred(as_written, inputs, own=False)
    assert notes == ["1 of mappings deferred"] and changed
    assert norms_in(gm) == 0
    assert_as_exact(gm, site, inputs)


def test_the_users_own_norms_are_kept_by_default() -> None:
    def function(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
        return (F.linear(fused(x, g), Q),)

    gm, notes, changed = deferred(function, operands(FP32), own=False)
    assert (notes, changed) == ([], False)
    assert norms_in(gm) == 1


# ------------------------------------------------------------------------------- what is refused


def returned(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    h = fused(x, g)
    return F.linear(h, Q), h


def added(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    h = fused(x, g)
    return (F.linear(h, Q).sum(-1, True) + h,)


def read_behind_its_weight(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    h = without_weight(x, g) * g
    return F.linear(h, Q), h.sin()


def scaled_for_each_token(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    return (F.linear(without_weight(x, g) * x.mean(-1, True), Q),)


def a_matrix_for_each_sample(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    return (fused(x, g) @ torch.stack([Q.t()] * 4),)


def on_the_right(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    return (Q @ fused(x[0], g).t(), Q[:5, :5] @ fused(x[0], g))


def a_product_with_itself(x: Tensor, g: Tensor, *_: Tensor) -> Any:
    h = fused(x[0], g)
    return (F.linear(h, h),)


def a_part_of_it(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    return (F.linear(fused(x, g)[:, 1:], Q),)


OTHER_READERS = [
    returned,
    added,
    read_behind_its_weight,
    scaled_for_each_token,
    a_matrix_for_each_sample,
    on_the_right,
    a_product_with_itself,
    a_part_of_it,
]


def assert_kept(function: Function, inputs: list[Tensor], reason: str) -> fx.GraphModule:
    gm, notes, changed = deferred(function, inputs)
    assert len(notes) == 1 and reason in notes[0] and not changed
    assert norms_in(gm)
    return gm


@pytest.mark.parametrize("function", OTHER_READERS, ids=lambda f: f.__name__)
def test_a_norm_that_is_read_otherwise_is_kept(function: Function) -> None:
    inputs = operands(FP64)
    gm = assert_kept(function, inputs, "kept: not only matmuls read them")
    for got, want in zip(gm(*inputs), function(*inputs), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize(
    ("stream", "product"), [(FP16, FP16), (FP32, FP16), (FP64, FP32), (FP64, BF16)], ids=str
)
def test_a_product_of_less_range_than_the_stream_is_kept(
    stream: torch.dtype, product: torch.dtype
) -> None:
    """Its normalised value fits, x itself need not."""

    def function(x: Tensor, Q: Tensor) -> Any:
        wide = x.to(torch.promote_types(x.dtype, FP32))
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (F.linear(y.to(Q.dtype), Q),)

    x, Q = operands(FP32)[0], operands(FP32)[2]
    reason = f"kept: {product} products could overflow before the division"
    assert_kept(function, [(x * 1e3).to(stream), Q.to(product)], reason)


def test_float16_products_of_a_large_stream_would_overflow() -> None:
    """Why they are kept: a residual stream of 10³ to 10⁴, times weights of 1."""
    x, Q = (t.half() for t in (operands(FP32)[0] * 3e3, torch.ones(24, C)))
    assert F.linear(F.rms_norm(x, (C,)), Q).isfinite().all()
    assert F.linear(x, Q).isinf().any()


def test_products_that_autocast_computes_in_another_dtype_are_kept() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            h = F.rms_norm(x, (6,), m.scale)
            return m.a(h) + m.b(h)

    gm, context = captured(function)
    options = Options(2, get_variant("mhc"), defer_norms=True)
    result = defer_norm(gm, Context(options))
    assert not result.changed
    assert result.notes == ["1 of norms kept: autocast computes their products in another dtype"]
    assert context.detection is None


def test_under_autocast_a_norm_of_its_dtype_is_deferred() -> None:
    """Weights are float32 there; the products round them as autocast does."""

    def function(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", BF16):
            h = F.rms_norm(m.a(x), (6,), eps=EPS)
            return m.b(h) * torch.sigmoid(m.c(h))

    torch.manual_seed(0)
    gm, _ = captured(function)
    inputs = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
    values = [torch.randn(v.shape) for v in inputs]
    (plain,) = gm(*values)
    result = defer_norm(gm, Context(Options(2, get_variant("mhc"), defer_norms=True)))
    assert result.notes == ["1 of norms deferred"]
    gm.graph.lint()
    gm.recompile()
    assert norms_in(gm) == 0
    (got,) = gm(*values)
    assert got.dtype == plain.dtype == BF16
    assert checks.error(got, plain) < 2**-6


def written_before(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    h = fused(x, g)
    x.mul_(3)
    return (F.linear(h, Q),)


def written_through_a_view(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    x = x * 1
    rows = x.view(20, C)
    h = fused(x, g)
    F.relu(rows, inplace=True)
    return (F.linear(h, Q) + x.sum(),)


def written_weight(x: Tensor, g: Tensor, Q: Tensor, *_: Tensor) -> Any:
    h = fused(x, g)
    g.copy_(Q[0])
    return (F.linear(h, Q),)


@pytest.mark.parametrize(
    "function", [written_before, written_through_a_view, written_weight], ids=lambda f: f.__name__
)
def test_a_norm_of_something_written_in_place_is_kept(function: Function) -> None:
    """The product would read it too late."""
    inputs = operands(FP64)
    gm = assert_kept(function, inputs, "written in place")
    copies = [[t.clone() for t in inputs] for _ in range(2)]
    assert gm(*copies[0])[0].equal(function(*copies[1])[0])


# ------------------------------------------------------------------------------- extreme streams


def qk(x: Tensor, g: Tensor, Q: Tensor, bias: Tensor, K: Tensor, *_: Tensor) -> Any:
    h = llama(x, g)
    return F.linear(h, Q, bias), F.linear(h, K)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e12, 1e18])
def test_streams_of_any_size_are_as_exact_as_before(scale: float, dtype: torch.dtype) -> None:
    inputs = operands(dtype, scale=scale)
    gm, notes, _ = deferred(qk, inputs)
    assert notes == ["1 of norms deferred"]
    truth = qk(*(t.double() for t in inputs))
    rounding = 4 * torch.finfo(dtype).eps if dtype is FP32 else 0.0
    for exact, plain, got in zip(truth, qk(*inputs), gm(*inputs), strict=True):
        assert got.isfinite().all()
        far, plainly = ((v.double() - exact).norm() for v in (got, plain))
        assert far <= 2 * plainly + rounding * exact.norm()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gradients_of_large_streams_are_as_exact_as_before(dtype: torch.dtype) -> None:
    """1 / r³ in the derivative of 1 / r is a float32 number up to r = 10¹²."""
    inputs = operands(dtype, scale=1e11)
    gm, _, _ = deferred(qk, inputs)
    assert_as_exact(gm, qk, inputs)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_stream_of_zeros(dtype: torch.dtype) -> None:
    inputs = operands(dtype, scale=0.0)
    gm, _, _ = deferred(qk, inputs)
    assert_as_exact(gm, qk, inputs)
    for got, want in zip(gm(*inputs), qk(*inputs), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_where_the_norm_itself_overflows_both_are_equally_wrong(dtype: torch.dtype) -> None:
    """mean(x²) is infinite in float32 from |x| = 10¹⁹ on: the norm is zero."""
    inputs = operands(dtype, scale=1e30)
    inputs[0] = inputs[0][:, 1:]  # no row small enough
    gm, _, _ = deferred(qk, inputs)
    for got, want in zip(gm(*inputs), qk(*inputs), strict=True):
        assert got.equal(want)
    largest = [torch.full_like(inputs[0], 3e38), *inputs[1:2], torch.ones_like(inputs[2])]
    assert qk(*largest, *inputs[3:])[0].equal(inputs[3].expand(4, 4, 24))
    assert gm(*largest, *inputs[3:])[0].isnan().all()


# ------------------------------------------------------------------------------------ whole models


def history_of(model: torch.nn.Module) -> Any:
    (graph,) = mhc_compile.graphs(model)
    (entry,) = (e for e in graph.history if e.name == "defer_norm")
    return entry


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_llama_trains_with_its_norms_deferred(dtype: torch.dtype) -> None:
    """Those of q/k/v and of gate/up; the last norm is sliced before the head reads it."""
    inputs = {"input_ids": torch.randint(3, 97, (2, 12))}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    original = LlamaForCausalLM(LlamaConfig(**size, **heads, use_cache=False)).to(dtype)
    randomize(original)
    runs, notes = {}, {}
    settings = {"deferred": (True, dtype), "plain": (False, dtype), "truth": (False, FP64)}
    for key, (defer_norms, precision) in settings.items():
        model = copy.deepcopy(original).to(precision).train()
        config = Config(defer_norms=defer_norms)
        mhc_compile.transform(model, example_inputs=inputs, config=config)
        runs[key] = checks.assert_moves(model, inputs)
        notes[key] = sorted(history_of(model).notes)
    kept = "1 of norms kept: not only matmuls read them"
    assert notes["deferred"] == [kept, "2 of mappings deferred", "2 of norms deferred"]
    assert notes["plain"] == ["2 of mappings deferred"]

    def errors(key: str) -> tuple[float, float]:
        truth, actual = runs["truth"], runs[key]
        outputs = [o.double() for o in actual.outputs]
        gradients = {k: g.double() for k, g in actual.gradients.items()}
        return (
            checks.output_error(outputs, truth.outputs),
            checks.gradient_error(gradients, truth.gradients),
        )

    for got, plain in zip(errors("deferred"), errors("plain"), strict=True):
        assert got <= 2 * plain


def test_a_model_whose_norms_are_layer_norms_has_nothing_of_its_own_to_defer() -> None:
    _, model = pair(defer_norms=True, history="full")
    model(ids())
    assert list(history_of(model).notes) == ["4 of mappings deferred"]
    assert "rms_norm" not in history_of(model).code
    assert all(op_name(n) != "rms_norm" for n in mhc_compile.graphs(model)[0].after.graph.nodes)
