"""Example values of new nodes, computed on the fake tensors that the capture left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .operators import value_of

__all__ = ["set_example_value"]


def set_example_value(node: fx.Node) -> None:
    """Compute ``meta["example_value"]`` of a node from its inputs' values, without data."""
    if node.op not in ("call_function", "call_method") or "example_value" in node.meta:
        return
    values = [value_of(n) for n in node.all_input_nodes]
    mode = next((v.fake_mode for v in _tensors(values) if hasattr(v, "fake_mode")), None)
    args, kwargs = fx.map_arg((node.args, node.kwargs), _value)
    with torch.no_grad(), mode if mode is not None else torch.no_grad():
        if isinstance(node.target, str):
            node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = node.target(*args, **kwargs)


def _value(node: fx.Node) -> Any:
    return value_of(node)


def _tensors(values: list[Any]) -> list[Any]:
    flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else [value])]
    return [v for v in flat if isinstance(v, torch.Tensor)]
