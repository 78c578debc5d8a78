"""The one doorway through which every pass goes: named, checked, timed, remembered."""

from __future__ import annotations

import enum
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from .context import Context, PassResult
from .errors import MhcError
from .graph.values import Snapshot

__all__ = ["NOT_KEPT", "HistoryEntry", "Pass", "Tier", "run_pipeline"]

log = logging.getLogger("mhc_compile.passes")

_IMPORTS = "from math import inf, nan\n\nimport torch\nfrom torch import device\n"
"""What the code of an ``fx`` graph takes for granted."""

_VERIFY = "MHC_COMPILE_VERIFY"
"""Environment variable: if set, shapes and dtypes are propagated again behind every pass."""

Condition = Callable[[fx.GraphModule, Context], Sequence[str]]
"""What is wrong with a graph; nothing where the condition holds."""


def _nothing(gm: fx.GraphModule, context: Context) -> Sequence[str]:
    return ()


class Tier(enum.Enum):
    """What depends on a pass: only an optimisation can be left out."""

    REQUIRED = "required"
    OPTIMISATION = "optimisation"


NOT_KEPT = (
    "The code of this version was not kept: transform with Config(history='full'), or compile with "
    "options={'history': 'full'}."
)


@dataclass(frozen=True)
class Pass:
    """A step of the pipeline.

    Attributes:
        name: by which it is reported and disabled.
        run: ``(gm, context) -> PassResult``.
        requires: what must hold in front of it.
        ensures: what would be false behind it if it were wrong.
        tier: whether it can be disabled.
    """

    name: str
    run: Callable[[fx.GraphModule, Context], PassResult]
    requires: Condition = _nothing
    ensures: Condition = _nothing
    tier: Tier = Tier.OPTIMISATION


@dataclass(frozen=True)
class HistoryEntry:
    """One version of the graph, signed by the pass that made it.

    Attributes:
        name: the pass; ``capture`` for the graph as it came, and for the graphs that AOTAutograd
            made of it ``forward``, ``backward`` or ``inference``.
        milliseconds: what the pass took.
        notes: what it did, in words.
        changed: whether the graph differs from the version before.
        text: the graph as Python; None where it was not kept.
        operators: the ``mhc::`` operators of this version, by name and in order.
        graph: which graph it is a version of, ``captured``, ``forward``, ``backward`` or
            ``inference``.
    """

    name: str
    milliseconds: float
    notes: Sequence[str] = field(default_factory=tuple)
    changed: bool = True
    text: str | None = field(default="", repr=False)
    graph: str = "captured"
    operators: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.operators:
            self.operators.extend(re.findall(r"torch\.ops\.mhc\.(\w+)", self.text or ""))

    @property
    def code(self) -> str:
        """The graph as Python.

        Raises:
            MhcError: it was not kept.
        """
        if self.text is None:
            raise MhcError(NOT_KEPT)
        return self.text

    def without_code(self) -> HistoryEntry:
        """The same, in the few bytes that can be kept as long as a model lives."""
        return replace(self, text=None)

    def __str__(self) -> str:
        """Python that runs: ``forward(self, *inputs)``, self a module with its constants."""
        head = f"# {self.name} ({self.milliseconds:.1f} ms): {'; '.join(self.notes)}"
        return f"{head}\n# {NOT_KEPT}" if self.text is None else f"{head}\n{_IMPORTS}{self.text}"


def run_pipeline(
    gm: fx.GraphModule,
    context: Context,
    passes: Iterable[Pass],
    history: list[HistoryEntry] | None = None,
    *,
    graph: str = "captured",
) -> tuple[fx.GraphModule, list[HistoryEntry]]:
    """Run the passes in order on a graph that may be changed.

    Args:
        context: among its options are the names of the passes that are left out.
        history: of the passes before, which goes on; None where the graph has just come.
        graph: which graph it is, as ``HistoryEntry.graph`` says it.

    Returns:
        The resulting graph module and the history, the graph as it came first.

    Raises:
        MhcError: from a pass, unchanged, where the user can do something about it.
        RuntimeError: a pass failed, or what it requires or ensures does not hold; says which, and
            after which others.
    """
    history = [_as_it_came(gm, graph)] if history is None else history
    for step in passes:
        if step.tier is Tier.OPTIMISATION and step.name in context.options.disabled:
            left_out = HistoryEntry(step.name, 0.0, ("disabled",), False, history[-1].text, graph)
            history.append(left_out)
            continue
        gm, entry = _run_one(step, gm, context, history)
        history.append(entry)
        log.info("%s: %.1f ms, %s", entry.name, entry.milliseconds, "; ".join(entry.notes))
        log.debug("%s", entry)
    return gm, history


def _as_it_came(gm: fx.GraphModule, graph: str) -> HistoryEntry:
    captured = graph == "captured"
    name, note = ("capture", "as captured") if captured else (graph, "as AOTAutograd made it")
    return HistoryEntry(name, 0.0, (note,), text=gm.code, graph=graph)


def _run_one(
    step: Pass, gm: fx.GraphModule, context: Context, history: Sequence[HistoryEntry]
) -> tuple[fx.GraphModule, HistoryEntry]:
    done = f"(after {', '.join(e.name for e in history)})"
    start = time.perf_counter()
    try:
        _require(step.requires(gm, context), f"pass '{step.name}' cannot run {done}")
        before = Snapshot(gm.graph) if os.environ.get(_VERIFY) else None
        result = step.run(gm, context)
        if result.changed:
            result.gm.graph.lint()
            result.gm.recompile()
        broke = f"pass '{step.name}' broke its postcondition {done}"
        if before is not None:
            _require(before.violations(result.gm.graph), broke)
        _require(step.ensures(result.gm, context), broke)
    except (MhcError, _ConditionError):
        raise
    except Exception as error:
        raise RuntimeError(f"pass '{step.name}' failed {done}: {error}") from error
    elapsed = (time.perf_counter() - start) * 1e3
    notes = tuple(result.notes) or ("nothing to do",)
    entry = HistoryEntry(
        step.name, elapsed, notes, result.changed, result.gm.code, history[-1].graph
    )
    return result.gm, entry


class _ConditionError(RuntimeError):
    """Something that must hold in front of or behind a pass does not."""


def _require(violations: Sequence[str], what: str) -> None:
    if violations:
        raise _ConditionError(f"{what}: {'; '.join(violations)}")
