"""report_kernels: who computes each operator, as notes and as readable source."""

import pytest
import torch

import mhc_compile
from mhc_compile.kernels import backends
from mhc_compile.kernels.variants import get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion.report_kernels import emitted, report_kernels

from ...models import ids, pair
from ..open_sites import fuse, open_site, parameters

PAPER = get_variant("mhc")


def fused(n=4, dtype=torch.float32):
    gm, _ = fuse(open_site(PAPER, n, dtype), parameters(PAPER, n, dtype))
    return gm


def notes(gm):
    result = report_kernels(gm, Context(Options(4, PAPER)))
    assert not result.changed
    return result.notes


@pytest.mark.parametrize(
    ("n", "dtype", "how"),
    [(4, torch.float32, "C++"), (4, torch.bfloat16, "C++"), (17, torch.float32, "PyTorch")],
)
def test_notes_say_who_computes(n, dtype, how):
    names = ("coefficients", "post_res", "pre")
    assert notes(fused(n, dtype)) == [f"1 x mhc.{name}.default: {how}" for name in names]


def test_notes_without_a_compiler(monkeypatch):
    monkeypatch.setattr(backends.cpu, "supports", lambda *args: False)
    assert all(note.endswith(": PyTorch") for note in notes(fused()))


def test_generated_source_can_be_read():
    ((title, text),) = emitted(fused()).items()
    assert title == "mhc(iterations=20), n = 4, C++"
    assert 'variant "mhc", n = 4' in text and "chain_backward" in text


def test_graphs_show_the_source():
    model = pair()[1]
    model(ids())
    (graph,) = mhc_compile.graphs(model)
    assert list(graph.sources) == ["mhc(iterations=20), n = 4, C++"]
