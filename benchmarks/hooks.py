"""What a plain call pays for noticing hooks and forwards that were changed since the last one.

    python -m benchmarks.hooks                 prints; a minute on one core

Three copies of a transformed model take turns in one process: as it is; without guards on empty
dictionaries of hooks; and without comparing forwards as well. The difference of two is the median
of the differences in the same turn, in microseconds of the processor and as a share of the median
step. A step is forward and backward, a call a forward without gradients.

On two quiet cores of an Intel Xeon, in four settings: guards on hooks cost -0.7 to +1.0 % of a step
or call, comparing forwards -0.5 to +2.0 % (27 µs of a call that takes 1.3 ms); noise is as large.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mhc_compile
from benchmarks import harness
from mhc_compile import _torch
from mhc_compile.model import swap
from tests.models import Block

SIZES = {"tiny": (2, 32, 16), "small": (12, 256, 128)}
"""Layers, width, tokens."""
TURNS = {"tiny": 300, "small": 30}


def _without_guards() -> AbstractContextManager[Any]:
    """Our settings as they are, with Dynamo's own choice of guards."""
    settings = _torch.dynamo_settings

    def changed() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(settings())
        stack.enter_context(torch._dynamo.config.patch(skip_nnmodule_hook_guards=True))
        return stack

    return mock.patch.object(_torch, "dynamo_settings", changed)


def _without_both() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(_without_guards())
    stack.enter_context(mock.patch.object(swap.Forwards, "changed", lambda self: False))
    return stack


Settings = Callable[[], AbstractContextManager[Any]]
CONTESTANTS: dict[str, Settings] = {
    "as it is": nullcontext,
    "without guards on hooks": _without_guards,
    "without comparing forwards": _without_both,
}


def step(model: nn.Module, x: Tensor, settings: Settings, train: bool) -> float:
    """Seconds of the processor, without those of the settings."""

    def run() -> None:
        result = model(x)
        if train:
            result.sum().backward()

    with settings(), torch.set_grad_enabled(train):
        return harness.elapsed(run, time.thread_time)


def measure(size: str, train: bool) -> None:
    layers, width, tokens = SIZES[size]
    x = torch.randn(1, tokens, width)
    plain = nn.Sequential(*(Block(width) for _ in range(layers)))
    model = mhc_compile.transform(plain, example_inputs=(x,))
    steps = {
        name: partial(step, copy.deepcopy(model), x, settings, train)
        for name, settings in CONTESTANTS.items()
    }
    harness.in_turn(steps, 3)
    times = harness.in_turn(steps, TURNS[size], lambda step: step())
    names = list(CONTESTANTS)
    median = statistics.median(times[names[0]])
    what = "step" if train else "call"
    print(f"{size}, {layers} layers, width {width}, {tokens} tokens: {what} {1e3 * median:.2f} ms")
    for more, less in pairwise(names):
        differences = [a - b for a, b in zip(times[more], times[less], strict=True)]
        cost = statistics.median(differences)
        print(f"  {less}: {1e6 * cost:+.0f} us less, {100 * cost / median:+.1f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        for train in (True, False):
            torch._dynamo.reset()
            measure(size, train)
