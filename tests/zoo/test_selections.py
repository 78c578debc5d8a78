"""Every pass left out and every prefix of the pipeline, on the zoo: the meaning stays.

A graph that went through some of the passes is compared with the open form that `widen` writes,
with all mHC parameters perturbed: in float64 where it trains, where it only infers and with sizes
that change; in float32 and bfloat16 as far from float64 as the open form is. Left out,
`canonicalize` may be missed: where adds are spelled in other ways, written in place or recomputed,
the graph is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mhc_compile import MhcError
from tests.checks import Run, gradient_errors
from tests.zoo.models import Model, every
from tests.zoo.rewritten import Captured, Rewritten
from tests.zoo.test_every_pass import ALONE, BF16, FP32, FP64, OPEN, PREFIXES, error

SELECTIONS = tuple(dict.fromkeys((*PREFIXES, *ALONE)))

models = pytest.mark.parametrize("entry", every(6), ids=lambda entry: entry.name)
few_models = pytest.mark.parametrize("entry", every(20), ids=lambda entry: entry.name)


@models
def test_meaning_stays_where_it_trains(entry: Model) -> None:
    captured = Captured.perturbed(entry.make(FP64), entry.example(FP64))
    assert_equal(captured)


@few_models
@torch.no_grad()
def test_meaning_stays_where_it_infers(entry: Model) -> None:
    captured = Captured.perturbed(entry.make(FP64).eval(), entry.example(FP64))
    assert_equal(captured)


@few_models
def test_meaning_stays_where_sizes_change(entry: Model) -> None:
    """Where one graph serves all sizes of the plain model, it does so of the transformed one."""
    calls = [entry.example(FP64, batch, entry.length + more) for batch, more in ((4, 0), (3, 1))]
    captured = Captured.perturbed(entry.make(FP64), *calls)
    if captured.number == 1:
        assert_equal(captured)
    else:
        assert captured.number == graphs_of_plain(entry, calls)


def graphs_of_plain(entry: Model, calls: list[dict[str, Any]]) -> int:
    """How many graphs Dynamo makes of the plain model."""
    counter = CompileCounter()
    compiled = torch.compile(entry.make(FP64), backend=counter, fullgraph=True, dynamic=True)
    for call in calls:
        compiled(**call)
    return counter.frame_count


@few_models
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rounding_stays_what_it_is_in_the_open_form(entry: Model, dtype: torch.dtype) -> None:
    """As far from float64 as the open form: of a few numbers the error is one draw of many."""
    if not runs(entry, dtype):
        pytest.skip(f"the plain model does not run in {dtype}: an FFT")
    captured = Captured.perturbed(entry.make(dtype), entry.example(dtype))
    exact = Captured.perturbed(entry.make(dtype).double(), as_double(entry.example(dtype)))
    truth = exact.run(exact.eagerly(disabled=OPEN))
    allowed = rounding(captured.run(captured.eagerly(disabled=OPEN)), truth)
    for (run,) in results(captured):
        got = rounding(run, truth)
        assert got.outputs <= 2 * allowed.outputs
        assert got.gradients <= 2 * allowed.gradients
        assert got.worst_gradient <= 8 * allowed.worst_gradient


def runs(entry: Model, dtype: torch.dtype) -> bool:
    """Whether the plain model runs in a dtype; only FNet in bfloat16 may not."""
    try:
        entry.make(dtype)(**entry.example(dtype))
    except RuntimeError:
        assert entry.name == "fnet" and dtype is BF16
        return False
    return True


class Rounding(NamedTuple):
    """Relative errors; of the gradients the root of the mean square, and the largest."""

    outputs: float
    gradients: float
    worst_gradient: float


def rounding(run: Run, truth: Run) -> Rounding:
    outputs, worst = error(run, truth)
    errors = torch.tensor(gradient_errors(run.gradients, truth.gradients))
    return Rounding(outputs, errors.square().mean().sqrt().item(), worst)


def results(captured: Captured) -> Iterator[list[Run]]:
    """All calls behind every selection of passes; then partitioned, with and without seams."""
    for off in SELECTIONS:
        try:
            yield every_call(captured, captured.eagerly(disabled=off))
        except (MhcError, RuntimeError):
            if off != ("canonicalize",):
                raise
    for off in ((), ("fuse_seams",)):
        yield every_call(captured, captured.partitioned(disabled=off))


def every_call(captured: Captured, rewritten: Rewritten) -> list[Run]:
    return [captured.run(rewritten, call) for call in range(len(captured.calls))]


def as_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def assert_equal(captured: Captured) -> None:
    """In float64, whatever passes run, in every call."""
    truths = every_call(captured, captured.eagerly(disabled=OPEN))
    for found in results(captured):
        for run, truth in zip(found, truths, strict=True):
            outputs, gradients = error(run, truth)
            assert outputs < 1e-12
            assert gradients < 1e-11
