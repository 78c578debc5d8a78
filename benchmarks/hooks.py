"""What a plain call pays for noticing hooks and forwards that were changed since the last one.

    python benchmarks/hooks.py                 prints; a minute on one core

Three copies of a transformed model take turns in one process: as it is; without guards on empty
dictionaries of hooks; and without comparing forwards as well. The difference of two is the median
of the differences in the same turn, in microseconds of the processor and as a share of the median
step. A step is forward and backward, a call a forward without gradients.

On two cores shared with other work (load 10), so only a bound: in four settings the guards differ
from none by -0.7 to +0.5 %, which is noise, and comparing forwards costs +0.2 to +1.6 %.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import _torch
from mhc_compile.model import swap

SIZES = {"tiny": (2, 32, 16), "small": (12, 256, 128)}
"""Layers, width, tokens."""
TURNS = {"tiny": 300, "small": 30}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.mix_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm1(x)).chunk(3, -1)
        x = x + self.mix_out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


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


CONTESTANTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "as it is": nullcontext,
    "without guards on hooks": _without_guards,
    "without comparing forwards": _without_both,
}


def measure(size: str, train: bool) -> None:
    layers, width, tokens = SIZES[size]
    x = torch.randn(1, tokens, width)
    plain = nn.Sequential(*(Block(width) for _ in range(layers)))
    model = mhc_compile.transform(plain, example_inputs=(x,))
    models = {name: copy.deepcopy(model) for name in CONTESTANTS}
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for turn in range(TURNS[size] + 3):
        for name, settings in CONTESTANTS.items():
            with settings(), torch.set_grad_enabled(train):
                start = time.thread_time()
                result = models[name](x)
                if train:
                    result.sum().backward()
                seconds = time.thread_time() - start
            if turn >= 3:
                times[name].append(seconds)
    names = list(CONTESTANTS)
    step = statistics.median(times[names[0]])
    what = "step" if train else "call"
    print(f"{size}, {layers} layers, width {width}, {tokens} tokens: {what} {1e3 * step:.2f} ms")
    for more, less in pairwise(names):
        differences = [a - b for a, b in zip(times[more], times[less], strict=True)]
        cost = statistics.median(differences)
        print(f"  {less}: {1e6 * cost:+.0f} us less, {100 * cost / step:+.1f} %")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        for train in (True, False):
            torch._dynamo.reset()
            measure(size, train)
