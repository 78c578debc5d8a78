"""What code of a model finds among its own children and parameters: not those of this library.

A forward may loop over ``self.children()``, add up ``self.parameters()`` or be that of a container:
it computes what it did before the mHC parameters stood on its module. From outside (optimizers,
state dicts, ``to``) they are there; a container counts and iterates what the user put into it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .connection import Connections

__all__ = ["overrides"]


def overrides(original: type[nn.Module], swapped: Callable[[], Any]) -> dict[str, Any]:
    """Methods for the class that is made of another one (traced by Dynamo)."""

    def named_children(self: Any) -> Iterator[tuple[str, Any]]:
        found = super(swapped(), self).named_children()
        if torch.compiler.is_dynamo_compiling():
            return iter([(k, m) for k, m in found if not isinstance(m, Connections)])
        return found

    def named_modules(self: Any, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        found = super(swapped(), self).named_modules(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            pairs = list(found)
            hidden = [k for k, m in pairs if isinstance(m, Connections)]
            return iter([(k, m) for k, m in pairs if not _is_within(k, hidden)])
        return found

    def named_parameters(
        self: Any, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        found = super(swapped(), self).named_parameters(prefix, recurse, remove_duplicate)
        if torch.compiler.is_dynamo_compiling():
            modules = super(swapped(), self).named_modules(None, prefix)
            hidden = [k for k, m in modules if isinstance(m, Connections)]
            return iter([(k, p) for k, p in found if not _is_within(k, hidden)])
        return found

    found: dict[str, Any] = {
        "named_children": named_children,
        "named_modules": named_modules,
        "named_parameters": named_parameters,
    }
    if issubclass(original, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        found["__len__"] = _len
    if issubclass(original, nn.ModuleDict):
        found |= {"__iter__": _keys, "keys": _keys, "items": _items, "values": _values}
    elif issubclass(original, nn.Sequential | nn.ModuleList):
        found |= {"__iter__": _values, "__getitem__": _getitem(original)}
    return {k: f for k, f in found.items() if _is_torchs(original, k)}


def _is_torchs(original: type[nn.Module], name: str) -> bool:
    """Whether a class has a method from torch, not one that its author wrote."""
    return getattr(getattr(original, name, None), "__module__", "").startswith("torch.nn")


def _is_within(name: str, paths: list[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


# --- containers ---------------------------------------------------------------------------------


def _own(container: nn.Module) -> dict[str, Any]:
    return {k: m for k, m in container._modules.items() if not isinstance(m, Connections)}


def _len(self: nn.Module) -> int:
    return len(_own(self))


def _keys(self: nn.Module) -> Iterator[str]:
    return iter(list(_own(self)))


def _items(self: nn.Module) -> Iterator[tuple[str, Any]]:
    return iter(list(_own(self).items()))


def _values(self: nn.Module) -> Iterator[Any]:
    return iter(list(_own(self).values()))


def _getitem(original: type[nn.Module]) -> Callable[..., Any]:
    def getitem(self: nn.Module, index: Any) -> Any:
        own = _own(self)
        if not isinstance(index, slice):
            return list(own.values())[index]
        if issubclass(original, nn.Sequential):
            return original(OrderedDict(list(own.items())[index]))
        return original(list(own.values())[index])

    return getitem
