"""Passes on the graphs that AOTAutograd makes of a captured one: forward, backward, inference.

Inductor calls a custom pass on each of them, and puts the pass's ``uuid`` into the keys of its
caches and of AOTAutograd's. A graph that comes out of a cache was rewritten before it was put
there: then no pass runs, and the history says so.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import fx

from .. import _torch
from ..config import Config
from ..passes.context import Context
from ..passes.pipeline import PARTITIONED
from ..passes.runner import HistoryEntry, run_pipeline
from . import history
from .context import options_of

__all__ = ["PartitionedPasses", "digest", "sources"]


class PartitionedPasses(_torch.InferenceAwareGraphPass):
    """The pass to give to Inductor for one captured graph.

    Args:
        config: with which the captured graph was rewritten; part of the key.
        entries: the history, extended by what becomes of each graph.
        after: passes that the user has set for the same place; they see the rewritten graph.
    """

    def __init__(self, config: Config, entries: list[HistoryEntry], after: Any = None) -> None:
        self._config, self._entries = config, entries
        self._after = _torch.graph_passes(after)
        self._is_called = False

    def note_cache(self) -> None:
        """Say in the history that Inductor has called no pass, if that is so."""
        if not self._is_called:
            why = "the forward and backward come from Inductor's cache, rewritten before"
            self._entries.append(HistoryEntry("cache", 0.0, (why,), False, graph="forward"))

    def __call__(self, graph: fx.Graph, is_inference: bool = False) -> None:
        self._is_called = True
        if any(str(node.target).startswith("mhc.") for node in graph.nodes):
            self._run(graph, is_inference)
        for user_pass in self._after:
            _torch.call_graph_pass(user_pass, graph, is_inference)

    def _run(self, graph: fx.Graph, is_inference: bool) -> None:
        gm = graph.owning_module
        assert gm is not None
        gm.recompile()  # Inductor may have changed the graph since its code was last written
        kind = "backward" if _torch.is_backward(graph) else "forward"
        _, done = run_pipeline(
            gm,
            Context(options_of(self._config)),
            PARTITIONED,
            graph="inference" if is_inference else kind,
        )
        self._entries.extend(history.kept(done, self._config))

    def uuid(self) -> str | None:
        """Sources, options and the user's passes; None, which means no caching, if one has none."""
        after = [_torch.uuid_of(user_pass) for user_pass in self._after]
        if None in after:
            return None
        key = repr((_source_hash(), self._config.meaning(), after))
        return hashlib.sha256(key.encode()).hexdigest()


def sources(package: Path = Path(__file__).parents[1]) -> list[Path]:
    """The files that decide what a compiled graph computes, kernels in C++ included."""
    # passes/ and kernels/ may be links, into which a recursive search does not go.
    folders = (package, package / "passes", package / "kernels")
    files = {path.resolve() for folder in folders for path in folder.rglob("*")}
    return sorted(path for path in files if path.suffix in (".py", ".h", ".cpp"))


def digest(files: Iterable[Path]) -> str:
    """What changes with the name or the text of any of these files."""
    found = hashlib.sha256()
    for path in files:
        found.update(repr((path.name, path.read_bytes())).encode())
    return found.hexdigest()


@functools.cache
def _source_hash() -> str:
    return digest(sources())
