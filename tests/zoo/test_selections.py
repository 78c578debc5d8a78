"""Every pass left out and every prefix of the pipeline, on the zoo: the meaning stays.

A graph that went through some of the passes is compared in float64 with the open form that `widen`
writes, with all mHC parameters perturbed.
"""

from __future__ import annotations

import pytest
import torch

from tests.zoo.models import Model, every
from tests.zoo.rewritten import Captured
from tests.zoo.test_every_pass import ALONE, OPEN, PREFIXES, error


@pytest.mark.parametrize("entry", every(6), ids=lambda entry: entry.name)
def test_meaning_stays_whatever_passes_run(entry: Model) -> None:
    captured = Captured.perturbed(entry.make(torch.float64), entry.example(torch.float64))
    truth = captured.run(captured.eagerly(disabled=OPEN))
    eager = [captured.eagerly(disabled=off) for off in dict.fromkeys((*PREFIXES, *ALONE))]
    compiled = [captured.partitioned(disabled=off) for off in ((), ("fuse_seams",))]
    for rewritten in (*eager, *compiled):
        outputs, gradients = error(captured.run(rewritten), truth)
        assert outputs < 1e-12
        assert gradients < 1e-11
