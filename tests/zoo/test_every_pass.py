"""Every pass alone and every prefix, on a small GPT: dtypes, modes, sizes, and the history."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile.passes.graph.operators import op_name
from mhc_compile.passes.pipeline import EXAMINE, REPORT, REWRITE
from mhc_compile.passes.runner import Tier, run_pipeline
from tests.checks import Run, gradient_error, output_error
from tests.models import GPT, ids
from tests.passes.graphs import captured as captured_program
from tests.zoo.rewritten import Captured

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
PASSES = (*EXAMINE, *REWRITE, *REPORT)
NAMES = [step.name for step in PASSES]
WIDENED = NAMES.index("widen") + 1
OPEN = tuple(NAMES[WIDENED:])
"""Passes without which a graph has the open form that `widen` writes: the meaning of the rest."""

PREFIXES = [tuple(NAMES[count:]) for count in range(WIDENED + 1, len(NAMES) + 1)]
ALONE = [(step.name,) for step in PASSES if step.tier is not Tier.REQUIRED]


def error(actual: Run, truth: Run) -> tuple[float, float]:
    """Of the outputs and of the gradients, in float64."""
    outputs = [o.double() for o in actual.outputs]
    gradients = {k: g.double() for k, g in actual.gradients.items()}
    return (
        output_error(outputs, [o.double() for o in truth.outputs]),
        gradient_error(gradients, truth.gradients) if gradients else 0.0,
    )


def gpt(dtype: torch.dtype, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT(layers=1, dropout=dropout).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_each_selection_of_passes_is_as_exact_as_the_open_form(dtype: torch.dtype) -> None:
    """At most twice as far from the open form in float64."""
    captured = Captured.perturbed(gpt(dtype), {"ids": ids()})
    exact = Captured.perturbed(gpt(dtype).double(), {"ids": ids()})
    truth = exact.run(exact.eagerly(disabled=OPEN))
    selections = [captured.eagerly(disabled=off) for off in (*PREFIXES, *ALONE)]
    selections += [captured.partitioned(disabled=off) for off in ((), ("fuse_seams",))]
    plain = error(captured.run(captured.eagerly(disabled=OPEN)), truth)
    slack = 1e-13 if dtype is FP64 else 0.0
    for rewritten in selections:
        for got, allowed in zip(error(captured.run(rewritten), truth), plain, strict=True):
            assert got <= 2 * allowed + slack


def test_dropout_draws_the_same_numbers_whatever_passes_run() -> None:
    captured = Captured.perturbed(gpt(FP64, dropout=0.3).train(), {"ids": ids()})
    truth = captured.run(captured.eagerly(disabled=OPEN))
    for rewritten in (
        *(captured.eagerly(disabled=off) for off in (*PREFIXES, *ALONE)),
        captured.partitioned(),
        captured.partitioned(disabled=("fuse_seams",)),
    ):
        assert max(error(captured.run(rewritten), truth)) < 1e-12


@torch.no_grad()
def test_inference_graphs_equal_the_open_form() -> None:
    captured = Captured.perturbed(gpt(FP64, dropout=0.3).eval(), {"ids": ids()})
    truth = captured.run(captured.eagerly(disabled=OPEN))
    fused = captured.partitioned()
    for rewritten in (*(captured.eagerly(disabled=off) for off in (*PREFIXES, *ALONE)), fused):
        assert max(error(captured.run(rewritten), truth)) < 1e-13
    assert fused.operators("inference") == [
        "expand",
        "coefficients_pre",
        "seam",
        "post_res",
        "readout",
    ]


def test_one_graph_for_all_sizes() -> None:
    calls = [{"ids": ids(batch, length)} for batch, length in ((2, 5), (3, 7))]
    captured = Captured.perturbed(gpt(FP64), *calls)
    widened = captured.eagerly(disabled=OPEN)
    for off in (*PREFIXES, *ALONE):
        rewritten = captured.eagerly(disabled=off)
        for call in range(len(calls)):
            truth = captured.run(widened, call)
            assert max(error(captured.run(rewritten, call), truth)) < 1e-13


class Grid(nn.Module):
    """Sizes that Dynamo writes in two ways, H // 2 and (H // 2)² // (H // 2); one kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        half = x.size(1) // 2
        x = x[:, :half, :half]
        for over_grid, over_tokens in zip(self.maps[:2], self.maps[2:], strict=True):
            batch, height, _, width = size = x.size()
            x = x + over_grid(x.flatten(1, 2)).reshape(batch, height, -1, width)
            x = x.reshape(-1, width)
            x = (x + over_tokens(x)).view(size)
        return x


def test_one_graph_where_equal_sizes_are_written_in_two_ways() -> None:
    calls = [{"x": torch.randn(2, h, h, 8, dtype=FP64)} for h in (6, 8)]
    captured = Captured.perturbed(Grid().to(FP64), *calls)
    fused = captured.partitioned()
    for number, call in enumerate(calls):
        for rewritten in (captured.eagerly(), fused):
            (output,) = captured.run(rewritten, number).outputs
            torch.testing.assert_close(output, captured.model(**call), rtol=1e-13, atol=1e-13)
    nodes = fused.graphs["forward"].graph.nodes
    operators = [op_name(node) for node in nodes if str(node.target).startswith("mhc.")]
    assert operators == ["expand", "coefficients_pre", *["seam"] * 3, "post_res", "readout"]


# --------------------------------------------------------------------------------------- history


def test_each_version_in_the_history_is_python_that_runs() -> None:
    """From `widen` on it computes the same; what a pass says of itself is true."""
    captured = Captured.perturbed(gpt(FP64), {"ids": ids()})
    rewritten = captured.eagerly(history="full")
    truth, code = captured.run(rewritten), ""
    assert [entry.name for entry in rewritten.history] == ["capture", *NAMES]
    for entry in rewritten.history:
        assert entry.notes and entry.changed == (entry.code != code)
        code = entry.code
        function = forward_of(str(entry))
        if entry.name in NAMES[WIDENED - 1 :]:
            rewritten.function = lambda *a, forward=function: forward(None, *a)
            assert max(error(captured.run(rewritten), truth)) < 1e-13


def test_each_version_of_a_partitioned_graph_is_python_that_runs() -> None:
    captured = Captured.perturbed(gpt(FP64), {"ids": ids()})
    fused = captured.partitioned(history="full")
    captured.run(fused)
    entries = [entry for entry in fused.history if entry.graph != "captured"]
    assert [(e.graph, e.name) for e in entries] == [
        ("forward", "forward"),
        ("forward", "fuse_seams"),
        ("backward", "backward"),
        ("backward", "fuse_seams"),
    ]
    before, after = (forward_of(str(entry)) for entry in entries[:2])
    values = given_to(entries[0].code, captured)
    results = [flat(forward(None, *values)) for forward in (before, after)]
    assert all(a.equal(b) for a, b in zip(*results, strict=True))
    for first, second in pairwise(entries):
        if second.graph == first.graph:
            assert second.changed and second.code != first.code


def test_a_pass_with_nothing_to_do_says_so() -> None:
    """A graph without sites; a pass that is left out is named as that."""
    gm, context = captured_program(lambda m, x: m.a(x))
    context.options = replace(context.options, disabled=("report_kernels",))
    _, history = run_pipeline(gm, context, (*EXAMINE, *REWRITE, *REPORT))
    for entry in history[4:]:
        said = {"widen": "no sites in this graph", "report_kernels": "disabled"}
        assert entry.notes == (said.get(entry.name, "nothing to do"),) and not entry.changed


def forward_of(text: str) -> Any:
    names: dict[str, Any] = {}
    exec(text, names)
    return names["forward"]


def given_to(code: str, captured: Captured) -> list[Any]:
    """The inputs of a forward graph: those of the captured graph that it names, by number."""
    head = code[code.index("(self, ") + 7 : code.index("):")]
    numbers = [int(name.removeprefix("primals_")) - 1 for name in head.split(", ")]
    return [captured.calls[0][number] for number in numbers]


def flat(outputs: Any) -> list[Tensor]:
    return [o for o in outputs if isinstance(o, Tensor)]


# --------------------------------------------------------------------- the norms of the user's own


class Normed(nn.Module):
    """Two branches with an RMSNorm in front of a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(8) for _ in range(2))
        self.up, self.gate = (nn.ModuleList(nn.Linear(8, 16) for _ in range(2)) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, gate, down in zip(self.norms, self.up, self.gate, self.down, strict=True):
            h = norm(x)
            x = x + down(up(h) * gate(h).sigmoid())
        return x


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_deferring_the_users_norms_keeps_at_most_their_products(dtype: torch.dtype) -> None:
    """The derivative of 1 / r reads them; without, x̂ is computed again from x and r."""
    torch.manual_seed(0)
    captured = Captured.perturbed(Normed().to(dtype), {"x": torch.randn(5, 8, dtype=dtype)})
    plain, deferred = captured.partitioned(), captured.partitioned(defer_norms=True)
    for rewritten in (plain, deferred):
        captured.run(rewritten)
    assert "2 of norms deferred" in deferred.notes("defer_norm")
    products = 2 * 2 * 5 * 16 * dtype.itemsize
    assert deferred.kept_bytes <= plain.kept_bytes + products
