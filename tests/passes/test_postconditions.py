"""Every pass does something on a graph of its own here, and what it ensures would notice if not.

Each pass is then made wrong in one place; `tests/mutations.py` makes further ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

from mhc_compile.kernels.variants import get_variant
from mhc_compile.passes.context import Context, Options
from mhc_compile.passes.fusion import fuse_coefficients as fusing
from mhc_compile.passes.fusion import fuse_seams as seams
from mhc_compile.passes.fusion import hoist_views as hoisting
from mhc_compile.passes.fusion import report_kernels as reporting
from mhc_compile.passes.open_form import defer_norm as deferring
from mhc_compile.passes.open_form import widen as widening
from mhc_compile.passes.pipeline import EVERY, EXAMINE, OWN
from mhc_compile.passes.recognition import recognize as recognising
from mhc_compile.passes.runner import run_pipeline
from mhc_compile.passes.sites import canonicalize as canonical
from mhc_compile.passes.sites import declared
from mhc_compile.passes.sites.find import Finder
from tests.models import GPT, ids
from tests.zoo.models import BY_NAME
from tests.zoo.rewritten import Captured

from .graphs import captured
from .open_sites import traced
from .recognition.test_recognize import NEAR, SQUARE, leaves


def examined() -> None:
    """A spelling of an add, one that shares its branch with another, and one that is none."""

    def function(m: Any, x: Any) -> Any:
        x = torch.add(x, m.a(x), alpha=2)
        h = m.b(x)
        first, second = x + torch.relu(h) @ m.c.weight, x + torch.sin(h) @ m.d.weight
        return first, second, m.a(first), m.b(second)

    gm, context = captured(function)
    run_pipeline(gm, context, EXAMINE)


def own_connection() -> None:
    """One that is none of ours."""
    function, shapes, *_ = NEAR["folded"]
    gm = traced(function, leaves(SQUARE, *shapes))
    run_pipeline(gm, Context(Options(2, get_variant("mhc"))), OWN)


@cache
def model(name: str) -> Captured:
    if name == "gpt":
        return Captured.perturbed(GPT(layers=1).double(), {"ids": ids()})
    entry = BY_NAME[name]
    return Captured.perturbed(entry.make(torch.float64), entry.example(torch.float64))


def rewritten() -> None:
    model("gpt").eagerly()


def with_views() -> None:
    model("opt").eagerly()


def partitioned() -> None:
    gpt = model("gpt")
    gpt.run(gpt.partitioned())


def kept(self: Finder, node: fx.Node, reason: Any) -> None:
    self.rejected[node] = reason


WRONG: dict[str, tuple[Callable[[], None], Any, str, Any]] = {
    "canonicalize": (examined, canonical, "_unify_adds", lambda graph, context: 0),
    "detect": (examined, Finder, "forget", kept),
    "widen": (rewritten, widening._Widener, "_close_site", lambda self, site: None),
    "recognize": (own_connection, recognising, "_noted", lambda context, rejected: None),
    "defer_norm": (rewritten, deferring, "_divide_behind", lambda product, x, inv_r: None),
    "fuse_coefficients": (rewritten, fusing, "fuse_open", lambda graph, context, report: None),
    "hoist_views": (with_views, hoisting, "_hoist", lambda view, post_res: None),
    "report_kernels": (rewritten, reporting, "_counted", lambda nodes: reporting.Counter()),
    "fuse_seams": (partitioned, seams.Fusion, "apply", lambda self: None),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_pass_ensures_holds_and_notices_a_wrong_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act, place, function, wrong = WRONG[name]
    act()
    monkeypatch.setattr(place, function, wrong)
    with pytest.raises(RuntimeError, match=f"pass '{name}' broke its postcondition"):
        act()


def test_declarations_that_are_left_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = declared.declaration_nodes
    monkeypatch.setattr(declared, "declaration_nodes", lambda graph: iter(()))
    assert nodes is not declared.declaration_nodes
    with pytest.raises(RuntimeError, match="pass 'collect' broke its postcondition"):
        rewritten()


def test_a_part_that_another_pass_put_away_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cast that changes nothing, for example: it is what the site's h or X' is known by."""
    fuse_open = fusing.fuse_open

    def behind_another(graph: fx.Graph, context: Any, report: Any) -> None:
        for node in [part for o in context.open_sites for part in (o.h, o.end)]:
            if node.target == "to":
                node.replace_all_uses_with(node.args[0])
                graph.erase_node(node)
        fuse_open(graph, context, report)

    monkeypatch.setattr(fusing, "fuse_open", behind_another)
    with pytest.raises(RuntimeError, match=r"a part of \S+ is still open"):
        rewritten()


def test_every_pass_is_here() -> None:
    assert {step.name for step in EVERY} == {*WRONG, "collect"}
