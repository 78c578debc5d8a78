"""Captured graphs of plain functions, for tests of single passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile import Config
from mhc_compile.capture import capture, merge
from mhc_compile.compiler.context import context_of
from mhc_compile.passes.context import Context
from mhc_compile.passes.sites.detect import detect
from mhc_compile.passes.sites.records import Detection

WIDTH = 6


class Program(nn.Module):
    """A function of a stream and of this module, with four linear maps to make branches of."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def stream(*shape: int) -> Tensor:
    """An input of the usual shape `[2, 3, WIDTH]`, or of another."""
    return torch.randn(*(shape or (2, 3, WIDTH)))


def captured(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, Context]:
    """The graph of a program and the context in which every site found is taken."""
    program = Program(function)
    gm, values = merge(capture(program, inputs or (stream(),), {}))
    return gm, context_of(gm, values, program, config=Config())


def detected(function: Callable[..., Any], *inputs: Tensor) -> Detection:
    """What `detect` finds in a program, canonicalized first."""
    from mhc_compile.passes.sites.canonicalize import canonicalize

    gm, context = captured(function, *inputs)
    canonicalize(gm, context)
    detect(gm, context)
    assert context.detection is not None
    return context.detection


def operations(gm: fx.GraphModule) -> list[str]:
    """Names of the operations of a graph, in order."""
    from mhc_compile.passes.graph.operators import op_name

    return [op_name(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
