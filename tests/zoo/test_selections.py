"""Every pass left out and every prefix of the pipeline, on the zoo: the meaning stays.

A graph that went through some of the passes is compared in float64 with the open form that `widen`
writes, with all mHC parameters perturbed. Left out, `canonicalize` may be missed: where adds are
spelled in other ways, written in place or recomputed, the graph is refused.
"""

from __future__ import annotations

import pytest
import torch

from mhc_compile import MhcError
from tests.zoo.checks import Run
from tests.zoo.models import Model, every
from tests.zoo.rewritten import Captured
from tests.zoo.test_every_pass import ALONE, OPEN, PREFIXES, error


@pytest.mark.parametrize("entry", every(6), ids=lambda entry: entry.name)
def test_meaning_stays_whatever_passes_run(entry: Model) -> None:
    captured = Captured.perturbed(entry.make(torch.float64), entry.example(torch.float64))
    truth = captured.run(captured.eagerly(disabled=OPEN))
    for off in dict.fromkeys((*PREFIXES, *ALONE)):
        try:
            found = captured.run(captured.eagerly(disabled=off))
        except (MhcError, RuntimeError):
            if off != ("canonicalize",):
                raise
        else:
            assert_equal(found, truth)
    for off in ((), ("fuse_seams",)):
        assert_equal(captured.run(captured.partitioned(disabled=off)), truth)


def assert_equal(actual: Run, truth: Run) -> None:
    outputs, gradients = error(actual, truth)
    assert outputs < 1e-12
    assert gradients < 1e-11
