"""fuse_seams: what lies between two branches is one operator, in forward and in backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.kernels.variants import get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.fuse_seams import fuse_seams
from mhc_compile.passes.fusion.replace import sum_of
from mhc_compile.passes.graph.operators import op_name, value_of
from tests.checks import error
from tests.passes.seams import EPS, WIDTH, Chain, Result, loss, ops, run

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def assert_exact(chain: Callable[..., Any], leaves: list[Tensor]) -> Result:
    """Forward bit-equal to the separate operators, gradients as close to float64 as theirs."""
    fused, separate = run(chain, leaves), run(chain, leaves, fuse=False)
    for a, b in zip(fused.outputs, separate.outputs, strict=True):
        assert a.equal(b) and a.isfinite().all()
    assert fused.saved == separate.saved
    if isinstance(chain, Chain) and leaves[0].dtype is not FP64:
        truth = truth_of(chain, leaves)
    else:
        truth = separate.gradients
    rounding = {BF16: 2**-4, FP32: 2e-6, FP64: 1e-14}[leaves[0].dtype]
    errors = [
        [error(g.double(), t.double()) for g, t in zip(result.gradients, truth, strict=True)]
        for result in (fused, separate)
    ]
    assert all(a <= 2 * b + rounding for a, b in zip(*errors, strict=True))
    assert sum(errors[0]) <= 1.5 * sum(errors[1]) + rounding
    return fused


def truth_of(chain: Chain, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the chain in float64, from the same values."""
    exact = replace(chain, dtype=FP64, branch=None)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    learned = [x for x in wide if x.requires_grad]
    return list(torch.autograd.grad(loss(exact(*wide)), learned)) if learned else []


def stream_additions(result: Result) -> list[str]:
    """Additions of tensors as large as the streams in the backward graph."""
    nodes = result.graphs["backward"].graph.nodes
    return [n.name for n in nodes if op_name(n) == "add" and value_of(n).dim() == 4]  # type: ignore


# ------------------------------------------------------------------------------------- whole chains

KINDS = [
    pytest.param({}, id="fp32"),
    pytest.param({"n": 2, "dtype": FP64, "layers": 2}, id="fp64"),
    pytest.param({"dtype": BF16}, id="bf16"),
    pytest.param({"dtype": FP32, "branch": BF16}, id="bf16 branches"),
    pytest.param({"variant": get_variant("deepseek_v4", sinkhorn_iters=3), "n": 3}, id="v4"),
    pytest.param({"variant": get_variant("mhc_lite"), "n": 2}, id="lite"),
    pytest.param({"parallel": True}, id="parallel"),
    pytest.param({"layers": 1}, id="one site"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_seams(kind: dict[str, Any]) -> None:
    """L sites: one opening, L - 1 seams, one post_res; and the mirror image."""
    chain = Chain(**kind)
    result = assert_exact(chain, chain.leaves())
    seams = chain.layers - 1
    assert result.operators("forward") == ["coefficients_pre", *["seam"] * seams, "post_res"]
    assert result.operators("backward") == [
        "post_res_backward",
        *["seam_backward"] * seams,
        "coefficients_pre_backward",
    ]
    assert not stream_additions(result)
    apart = [n for notes in result.notes.values() for n in notes if "apart" in n or "alone" in n]
    assert not apart


def test_nothing_is_left_to_do_for_a_second_run() -> None:
    chain = Chain(layers=2)
    result = run(chain, chain.leaves())
    for gm in result.graphs.values():
        again = fuse_seams(gm, Context(Options(4, get_variant("mhc"))))
        assert not again.changed and not again.notes


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3), (0, 1, 2, 3), (5, 6, 7)], ids=str)
def test_frozen_inputs(frozen: tuple[int, ...]) -> None:
    """Without a gradient of x, or of φ, α, b, what is left of the chain is fused as before."""
    chain = Chain(frozen=frozen)
    result = assert_exact(chain, chain.leaves())
    whole = ["post_res_backward", "seam_backward", "seam_backward", "coefficients_pre_backward"]
    nothing_to_learn_in_front = frozen == (0, 1, 2, 3)
    assert result.operators("backward") == whole[: 3 if nothing_to_learn_in_front else 4]


def test_an_inference_graph_is_a_forward_graph() -> None:
    chain = Chain(frozen=tuple(range(13)))
    result = assert_exact(chain, chain.leaves())
    assert result.operators("forward") == ["coefficients_pre", "seam", "seam", "post_res"]


def test_sizes_may_be_symbolic() -> None:
    """The new nodes have the symbolic shapes of the old ones, and install no guard."""
    chain, shapes, runs = Chain(layers=2), [], []

    def backend(gm: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        def compiler(graph: Any, inputs: Any) -> Any:
            graph.graph.eliminate_dead_code()
            runs.append(fuse_seams(graph, Context(Options(4, get_variant("mhc")))).notes)
            graph.recompile()
            shapes.extend(
                str(n.args[0].meta["val"][n.args[1]].shape) + str(n.meta["val"].shape)
                for n in graph.graph.nodes
                if op_name(n) == "getitem" and "seam" in n.args[0].name
            )
            return graph.forward

        return aot_autograd(fw_compiler=compiler)(gm, inputs)

    compiled = torch.compile(chain, backend=backend, dynamic=True, fullgraph=True)
    for tokens in (4, 7):
        leaves = chain.leaves()
        leaves[0] = torch.randn(3, tokens, WIDTH).requires_grad_()
        assert error(compiled(*leaves)[0], chain(*leaves)[0]) < 1e-6
        compiled(*leaves)[0].sum().backward()
    assert [len(notes) for notes in runs] == [2, 2]
    assert any("s" in shape for shape in shapes)
    torch._dynamo.reset()


@pytest.mark.parametrize("spelling", ["alpha", "twice", "promoted", "broadcast", "read"])
def test_an_addition_that_is_no_sum_of_gradients(spelling: str) -> None:
    """Only additions of two tensors of one shape and dtype, each read and counted once, are it."""
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    dtype = BF16 if spelling == "promoted" else FP32
    a.meta["val"] = torch.empty(2, 3, dtype=dtype)
    b.meta["val"] = torch.empty(2, 1 if spelling == "broadcast" else 3)
    add = torch.ops.aten.add.Tensor
    if spelling == "alpha":
        total = graph.call_function(add, (a, b), {"alpha": 2})
    else:
        total = graph.call_function(add, (a, a if spelling == "twice" else b))
    total.meta["val"] = torch.empty(2, 3)
    graph.output((total, b) if spelling in ("twice", "read") else total)
    assert sum_of(a, a if spelling == "twice" else b) is None


# ---------------------------------------------------------------------------- what stays apart, why


def test_a_state_that_is_read_out_in_the_middle() -> None:
    """Its gradient is one more term: added to the others in front of the seam."""
    chain = Chain(hidden=True)
    result = assert_exact(chain, chain.leaves())
    assert result.operators("forward") == ["coefficients_pre", "seam", "seam", "post_res"]
    assert result.operators("backward")[1:3] == ["seam_backward", "seam_backward"]
    assert len(stream_additions(result)) == 3


BETWEEN = [
    (lambda X: torch.nn.functional.layer_norm(X, (WIDTH,)), "native_layer_norm"),
    (lambda X: X.relu(), "relu"),
    (lambda X: X.to(BF16).to(FP32), "_to_copy"),
]
BACK = {"native_layer_norm": "native_layer_norm_backward", "relu": "threshold_backward"}


@pytest.mark.parametrize(("between", "name"), BETWEEN, ids=[name for _, name in BETWEEN])
def test_what_acts_on_each_stream_keeps_sites_apart(between: Any, name: str) -> None:
    chain = Chain(between=between)
    result = (
        assert_exact(chain, chain.leaves()) if name != "_to_copy" else run(chain, chain.leaves())
    )
    assert result.operators("forward") == ["coefficients_pre", "post_res"] * 3
    assert result.operators("backward") == ["post_res_backward", "coefficients_pre_backward"] * 3
    assert not stream_additions(result)
    for kind, operation in (("forward", name), ("backward", BACK.get(name, name))):
        apart = [note for note in result.notes[kind] if "stay apart" in note]
        assert len(apart) == 2 and all(f"{operation} between them" in n for n in apart)


def two_sites(second: Callable[..., Any]) -> Callable[..., Any]:
    """A chain of two sites whose second one is written by the caller."""
    chain = Chain(layers=2)

    def function(x: Tensor, *leaves: Tensor) -> list[Tensor]:
        X = x.unsqueeze(-2).tile((4, 1))
        phi, alpha, bias, weight = leaves[:4]
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, chain.text, EPS)
        X = ops.post_res(H_res, H_post, X, (ops.pre(H_pre, X, X.dtype) @ weight).tanh())
        return second(X, *leaves[4:], chain.text)

    return function


def apart(result: Result, kind: str) -> str:
    (note,) = (n for n in result.notes[kind] if "apart" in n or "alone" in n)
    return note


def test_parameters_that_depend_on_the_streams() -> None:
    """A seam would have to be computed before its own φ."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        phi = phi * (1 + X.mean())
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        return [ops.post_res(H_res, H_post, X, (ops.pre(H_pre, X, X.dtype) @ weight).tanh())]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    assert result.operators("forward") == ["coefficients_pre", "post_res"] * 2
    assert "mul depends on one of them" in apart(result, "forward")
    assert result.operators("backward") == [
        "post_res_backward",
        "pre_backward",
        "coefficients_backward",
        "post_res_backward",
        "coefficients_pre_backward",
    ]
    assert "depends on one of them" in apart(result, "backward")


def test_two_readers_of_h_pre() -> None:
    """The gradient of H_pre is then not ⟨dh, X⟩ alone."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        h = ops.pre(H_pre, X, X.dtype)
        return [ops.post_res(H_res, H_post, X, (h @ weight).tanh()), H_pre.square()]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    assert result.operators("forward") == ["coefficients_pre", "seam", "post_res"]
    assert "coefficients_backward" in result.operators("backward")
    assert "H_pre has other readers" in apart(result, "backward")


def test_a_gradient_of_the_streams_that_is_read_twice() -> None:
    """A seam would not return it: the opening is fused, post_res_backward stands alone."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        X = X + weight[0]
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        return [ops.post_res(H_res, H_post, X, (ops.pre(H_pre, X, X.dtype) @ weight).tanh())]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    assert "add between them" in apart(result, "forward")
    assert result.operators("backward")[-2:] == ["post_res_backward", "coefficients_pre_backward"]
    assert "reads add" in apart(result, "backward")


def test_h_of_other_streams() -> None:
    """A pre that applies the coefficients to streams that they do not come from."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        h = ops.pre(H_pre, X.relu(), X.dtype)
        return [ops.post_res(H_res, H_post, X, (h @ weight).tanh())]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    assert result.operators("forward")[-4:] == ["post_res", "coefficients", "pre", "post_res"]
    for kind in ("forward", "backward"):
        assert "stays alone" in apart(result, kind)


def test_streams_in_another_shape() -> None:
    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        X = X.flatten(0, 1)
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        return [ops.post_res(H_res, H_post, X, (ops.pre(H_pre, X, X.dtype) @ weight).tanh())]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    for kind in ("forward", "backward"):
        assert "view between them" in apart(result, kind)


def test_two_sites_on_the_same_streams() -> None:
    """One of them gets the seam, the other its own opening; their gradients of X are one sum."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        outputs = []
        for scale in (1, 2):
            H = ops.coefficients(X, phi * scale, alpha, bias, text, EPS)
            h = ops.pre(H[0], X, X.dtype)
            outputs.append(ops.post_res(H[2], H[1], X, (h @ weight).tanh()))
        return outputs

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    assert sorted(result.operators("forward")) == [
        *["coefficients_pre"] * 2,
        *["post_res"] * 2,
        "seam",
    ]
    assert result.operators("backward").count("seam_backward") == 1
    assert result.operators("backward").count("coefficients_pre_backward") == 2


def test_random_numbers_are_drawn_in_the_same_order() -> None:
    """What draws them is not moved behind a seam."""

    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        early = torch.dropout(X, 0.5, True).mean(-2)
        H_pre, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        h = ops.pre(H_pre, X, X.dtype)
        return [early, ops.post_res(H_res, H_post, X, (h @ weight).tanh())]

    result = run(two_sites(second), Chain(layers=2).leaves())
    assert result.operators("forward") == ["coefficients_pre", "post_res"] * 2
    assert "has to keep its place" in apart(result, "forward")


def test_a_branch_wider_than_its_streams() -> None:
    chain = Chain(dtype=BF16, branch=FP32)
    result = assert_exact(chain, chain.leaves())
    assert result.operators("forward") == ["coefficients", "pre", "post_res"] * 3
    notes = [n for n in result.notes["forward"] if "h is torch.float32" in n]
    assert len(notes) == 3
    assert result.operators("backward").count("seam_backward") == 2


def test_coefficients_without_pre() -> None:
    def second(X: Any, phi: Any, alpha: Any, bias: Any, weight: Any, text: str) -> list[Tensor]:
        _, H_post, H_res, _, _ = ops.coefficients(X, phi, alpha, bias, text, EPS)
        return [ops.post_res(H_res, H_post, X, (X.mean(-2) @ weight).tanh())]

    result = assert_exact(two_sites(second), Chain(layers=2).leaves())
    for kind in ("forward", "backward"):
        assert "stays alone" in apart(result, kind)


def test_recomputed_operators_stay_as_they_are() -> None:
    """Tags replay pre and post_res in backward; coefficients are kept, not computed again."""

    def partition(joint: Any, inputs: Any, **settings: Any) -> Any:
        for node in joint.graph.nodes:
            if node.target in (ops.pre.default, ops.post_res.default):
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = 0
        return min_cut_rematerialization_partition(joint, inputs, **settings)

    chain = Chain()
    replayed = run(chain, chain.leaves(), partition=partition)
    separate = run(chain, chain.leaves(), partition=partition, fuse=False)
    kept = run(chain, chain.leaves())
    assert replayed.saved == separate.saved != kept.saved
    assert replayed.operators("forward") == kept.operators("forward")
    names = replayed.operators("backward")
    assert [n for n in names if n.endswith("backward")] == kept.operators("backward")
    assert {n for n in names if not n.endswith("backward")} <= {
        "pre",
        "post_res",
    } and "post_res" in names
    for a, b in zip(replayed.gradients, kept.gradients, strict=True):
        assert a.equal(b)
