"""Every pass left out and every prefix of the pipeline, on the zoo: the meaning stays.

A graph that went through some of the passes is compared with the open form that `widen` writes,
with all mHC parameters perturbed: in float64 where it trains, where it only infers and with sizes
that change; in float32 and bfloat16 as far from float64 as the open form is. Left out,
`canonicalize` may be missed: where adds are spelled in other ways, written in place or recomputed,
the graph is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from mhc_compile import MhcError
from tests.zoo.checks import Run
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
    calls = [entry.example(FP64, batch, entry.length + more) for batch, more in ((4, 0), (3, 1))]
    captured = Captured.perturbed(entry.make(FP64), *calls)
    assert_equal(captured)


@few_models
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rounding_stays_what_it_is_in_the_open_form(entry: Model, dtype: torch.dtype) -> None:
    """At most twice as far from the open form in float64."""
    captured = Captured.perturbed(entry.make(dtype), entry.example(dtype))
    exact = Captured.perturbed(entry.make(dtype).double(), as_double(entry.example(dtype)))
    truth = exact.run(exact.eagerly(disabled=OPEN))
    plain = error(captured.run(captured.eagerly(disabled=OPEN)), truth)
    for rewritten in selections(captured):
        for got, allowed in zip(error(captured.run(rewritten), truth), plain, strict=True):
            assert got <= 2 * allowed


def selections(captured: Captured) -> Iterator[Rewritten]:
    """A graph behind every selection of passes; then partitioned, with and without seams."""
    for off in SELECTIONS:
        try:
            yield captured.eagerly(disabled=off)
        except (MhcError, RuntimeError):
            if off != ("canonicalize",):
                raise
    for off in ((), ("fuse_seams",)):
        yield captured.partitioned(disabled=off)


def as_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def assert_equal(captured: Captured) -> None:
    """In float64, whatever passes run, in every call."""
    widened = captured.eagerly(disabled=OPEN)
    truths: list[Run] = [captured.run(widened, call) for call in range(len(captured.calls))]
    for rewritten in selections(captured):
        for call, truth in enumerate(truths):
            outputs, gradients = error(captured.run(rewritten, call), truth)
            assert outputs < 1e-12
            assert gradients < 1e-11
