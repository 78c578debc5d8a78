"""The private torch names of the passes; the package has its own such file."""

from __future__ import annotations

import importlib
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.proxy import GraphAppendingTracer

__all__ = [
    "PLAIN_TENSORS",
    "GraphAppendingTracer",
    "enable_python_dispatcher",
    "enter_autocast",
    "is_higher_order",
    "private_functions",
    "rename",
    "statically_known_true",
]

PLAIN_TENSORS = frozenset({FakeTensor, torch.Tensor, torch.nn.Parameter})
"""Types of values in a captured graph whose methods are those of ``torch.Tensor``."""

_PLACES = (
    "torch._C",
    "torch._C._autograd",
    "torch._C._functorch",
    "torch._C._nn",
    "torch.amp.autocast_mode",
    "torch.autograd.grad_mode",
    "torch.random",
    "torch.cuda.random",
)
"""Where functions live that Dynamo writes into graphs and that ``torch`` does not show."""


def private_functions(names: Container[str]) -> Iterator[tuple[str, Any]]:
    """The functions that have one of these names in the modules that torch keeps to itself."""
    for place in _PLACES:
        module: Any = importlib.import_module(place) if "_C." not in place else _inside(place)
        for name in dir(module):
            if name in names and callable(function := getattr(module, name)):
                yield name, function


def _inside(place: str) -> Any:
    found: Any = torch
    for part in place.split(".")[1:]:
        found = getattr(found, part)
    return found


def rename(node: fx.Node, name: str) -> None:
    """Give a node a name for people, made unique by a number."""
    node._rename(name)


def is_higher_order(target: Any, name: str) -> bool:
    """Whether a target is the higher-order operator of torch that has this name."""
    return getattr(torch.ops.higher_order, name, None) is target
