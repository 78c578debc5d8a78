"""What a run of the passes is told of a configuration, a model and the inputs of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from ..config import Config
from ..passes.context import Context, Options

__all__ = ["context_of", "options_of", "owners_in"]


def options_of(config: Config) -> Options:
    """The part of a configuration that the passes read."""
    return Options(
        n=config.n,
        variant=config.variant_object,
        eps=config.eps,
        readout=config.readout,
        stream_dtype=config.stream_torch_dtype,
        defer_norms=config.defer_norms,
        include=config.include,
        exclude=config.exclude,
        disabled=config.disabled,
    )


def context_of(
    gm: fx.GraphModule, inputs: Sequence[Any], *models: nn.Module, config: Config, **known: Any
) -> Context:
    """The context of a graph of some models; unless ``known`` has declarations, every site counts.

    Args:
        inputs: the values of the placeholders.
        **known: other fields of ``Context``.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    trainable = {
        p.name for p, v in zip(placeholders, inputs, strict=True) if isinstance(v, nn.Parameter)
    }
    owners = owners_in(*models)
    return Context(options_of(config), trainable=frozenset(trainable), owners=owners, **known)


def owners_in(*models: nn.Module) -> dict[str, tuple[str, ...]]:
    """From the identity of each module of the models to its paths, for ``Context.owners``.

    A module of several models has the paths of the first.
    """
    owners: dict[str, tuple[str, ...]] = {}
    for model in models:
        paths: dict[str, list[str]] = {str(id(model)): [""]}
        for path, module in model.named_modules(remove_duplicate=False):
            if module is not model:
                paths.setdefault(str(id(module)), []).append(path)
        owners = {identity: tuple(known) for identity, known in paths.items()} | owners
    return owners
