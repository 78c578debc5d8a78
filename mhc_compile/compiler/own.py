"""Models that were written with hyper-connections: nothing is added, theirs run on our operators.

``torch.compile(model, backend="mhc")`` transforms a plain model. One whose graph has connections of
its own keeps its parameters and its numerics; only those that are read as ours become operators.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..capture import copy_graph
from ..config import Config
from ..errors import UnsupportedError
from ..passes.context import Context
from ..passes.pipeline import OWN
from ..passes.runner import HistoryEntry, run_pipeline
from ..passes.sites.records import Site
from .context import options_of

__all__ = ["connections", "has_connections", "rewrite"]

_APPLICABLE = ("defer_norms", "disabled")
"""Options that mean something where nothing is added."""

# Modules of which some graph had connections: those of their graphs that have none stay plain.
_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def connections(gm: fx.GraphModule) -> Context:
    """The hyper-connections in a graph, in ``.own`` of the context; the graph is rewritten."""
    context = Context(options_of(Config(n=1)))
    run_pipeline(gm, context, OWN[:-1])
    return context


def has_connections(module: nn.Module | None) -> bool:
    """Whether a graph of a module was met that had connections of its own."""
    return module is not None and module in _known


def rewrite(
    gm: fx.GraphModule, module: nn.Module | None, options: Mapping[str, Any]
) -> tuple[Context, list[HistoryEntry]] | None:
    """Rewrite the graph of a model with connections of its own; None for any other model.

    Args:
        gm: a captured graph, which may be changed.
        module: whose graph it is, if that is known.
        options: fields of ``Config`` that were given.

    Raises:
        UnsupportedError: an option describes connections that would be added.
    """
    found = connections(copy_graph(gm)).own
    if found and module is not None and module not in _known:
        _known.add(module)
        _say_if_none_is_read(module, found)
    if not found and not has_connections(module):
        return None
    _refuse_options(module, found, options)
    config = Config(**{**options, "n": 1})
    context = Context(options_of(config), grad_enabled=torch.is_grad_enabled())
    _, entries = run_pipeline(gm, context, OWN, disabled=config.disabled)
    return context, entries


def _say_if_none_is_read(module: nn.Module, found: Sequence[Any]) -> None:
    """What only looks like connections keeps others from being added: not in silence."""
    if not any(isinstance(site, Site) for site in found):
        warnings.warn(
            f"{type(module).__name__} seems to have hyper-connections of its own, at "
            f"{found[0].location}, but none that backend 'mhc' can read: it adds nothing and "
            "replaces nothing. mhc_compile.explain(model, *inputs) says what differs; "
            "mhc_compile.transform(model, ...) adds connections all the same.",
            stacklevel=2,
        )


def _refuse_options(
    module: nn.Module | None, found: Sequence[Any], options: Mapping[str, Any]
) -> None:
    given = [
        name
        for name, value in options.items()
        if name not in _APPLICABLE and not (name == "n" and value == 1)
    ]
    if not given:
        return
    whose = "The model" if module is None else type(module).__name__
    first = f", for one {found[0].name} ({found[0].location})" if found else ""
    sites = sum(isinstance(site, Site) for site in found)
    names = ", ".join(f"options[{name!r}]" for name in given)
    raise UnsupportedError(
        f"{whose} has hyper-connections of its own ({sites} recognised{first}), to which backend "
        f"'mhc' adds none: {names} would describe new ones. Leave them out; n, variant and the "
        "rest are read from the model."
    )
