"""The one doorway through which every pass goes: named, timed, linted, remembered."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from .context import Context, PassResult
from .errors import MhcError

__all__ = ["NOT_KEPT", "HistoryEntry", "Pass", "run_pipeline"]

log = logging.getLogger("mhc_compile.passes")

_IMPORTS = "from math import inf, nan\n\nimport torch\nfrom torch import device\n"
"""What the code of an ``fx`` graph takes for granted."""


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
        ensures: the pass's postcondition; a list of violations, empty when it holds.
    """

    name: str
    run: Callable[[fx.GraphModule, Context], PassResult]
    ensures: Callable[[fx.GraphModule, Context], list[str]] = lambda gm, context: []


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
    *,
    disabled: Sequence[str] = (),
    graph: str = "captured",
) -> tuple[fx.GraphModule, list[HistoryEntry]]:
    """Run the passes in order on a graph that may be changed.

    Args:
        graph: which graph it is, as ``HistoryEntry.graph`` says it.

    Returns:
        The resulting graph module and the history, the graph as it came first.

    Raises:
        MhcError: from a pass, unchanged, where the user can do something about it.
        RuntimeError: a pass failed or broke its postcondition; says which, and after which.
    """
    captured = graph == "captured"
    name, note = ("capture", "as captured") if captured else (graph, "as AOTAutograd made it")
    history = [HistoryEntry(name, 0.0, (note,), text=gm.code, graph=graph)]
    for step in passes:
        if step.name in disabled:
            history.append(
                HistoryEntry(step.name, 0.0, ("disabled",), False, history[-1].text, graph)
            )
            continue
        gm, entry = _run_one(step, gm, context, history)
        history.append(entry)
        log.info("%s: %.1f ms, %s", entry.name, entry.milliseconds, "; ".join(entry.notes))
        log.debug("%s", entry)
    return gm, history


def _run_one(
    step: Pass, gm: fx.GraphModule, context: Context, history: Sequence[HistoryEntry]
) -> tuple[fx.GraphModule, HistoryEntry]:
    done = ", ".join(e.name for e in history)
    start = time.perf_counter()
    try:
        result = step.run(gm, context)
        if result.changed:
            result.gm.graph.lint()
            result.gm.recompile()
        violations = step.ensures(result.gm, context)
    except MhcError:
        raise
    except Exception as error:
        raise RuntimeError(f"pass '{step.name}' failed (after {done}): {error}") from error
    if violations:
        raise RuntimeError(
            f"pass '{step.name}' broke its postcondition (after {done}): {'; '.join(violations)}"
        )
    elapsed = (time.perf_counter() - start) * 1e3
    notes = tuple(result.notes) or ("nothing to do",)
    entry = HistoryEntry(
        step.name, elapsed, notes, result.changed, result.gm.code, history[-1].graph
    )
    return result.gm, entry
