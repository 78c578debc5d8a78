"""runner: passes are named, timed, linted and remembered; failures say which pass."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from mhc_compile.errors import NoSitesError
from mhc_compile.passes.context import PassResult
from mhc_compile.passes.pipeline import EXAMINE
from mhc_compile.passes.runner import Pass, Tier, run_pipeline

from .graphs import captured


def identity(gm, context):
    return PassResult(gm, changed=False)


def broken(gm, context):
    raise KeyError("x")


def refusing(gm, context):
    raise NoSitesError("nothing here")


def test_history_has_the_capture_and_every_pass_as_python() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    _, history = run_pipeline(gm, context, EXAMINE)
    assert [e.name for e in history] == ["capture", "canonicalize", "collect", "detect"]
    assert all("def forward" in e.code and e.notes for e in history)
    assert str(history[1]).startswith("# canonicalize (")


def test_a_failure_names_the_pass_and_those_before_it() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    with pytest.raises(RuntimeError, match=r"pass 'second' failed \(after capture, first\)"):
        run_pipeline(gm, context, [Pass("first", identity), Pass("second", broken)])


def test_a_broken_postcondition_is_an_error() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    step = Pass("first", identity, ensures=lambda gm, context: ["no good"])
    with pytest.raises(RuntimeError, match=r"pass 'first' broke its postcondition.*no good"):
        run_pipeline(gm, context, [step])


def test_a_pass_does_not_run_where_what_it_requires_does_not_hold() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    step = Pass("first", broken, requires=lambda gm, context: ["no good"])
    with pytest.raises(RuntimeError, match=r"pass 'first' cannot run \(after capture\): no good"):
        run_pipeline(gm, context, [step])


def test_errors_meant_for_the_user_pass_through() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    with pytest.raises(NoSitesError, match="nothing here"):
        run_pipeline(gm, context, [Pass("first", refusing)])


def test_a_disabled_pass_does_not_run_and_is_recorded() -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    context.options = replace(context.options, disabled=("first",))
    _, history = run_pipeline(gm, context, [Pass("first", broken)])
    assert history[-1].notes == ("disabled",) and not history[-1].changed
    with pytest.raises(RuntimeError, match="pass 'first' failed"):
        run_pipeline(gm, context, [Pass("first", broken, tier=Tier.REQUIRED)])


def test_passes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    gm, context = captured(lambda m, x: x + m.a(x))
    with caplog.at_level(logging.INFO, logger="mhc_compile.passes"):
        run_pipeline(gm, context, EXAMINE)
    assert "detect:" in caplog.text
