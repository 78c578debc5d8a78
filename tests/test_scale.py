"""The passes' work grows linearly with the depth of a model; counted, not timed.

Work is the number of lines of `passes/` (and of networkx) that run. Twice the layers must cost
twice the lines: what one layer adds must not depend on how many there are.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.passes import runner

DEPTHS = (10, 20, 40)


class Block(nn.Module):
    """Two residual adds, and one that is rejected."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.norm(x))
        h = self.down(x)
        return x + (h + h.sigmoid())


class Tower(nn.Module):
    def __init__(self, layers: int, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LineCount:
    """Counts the lines that run in `passes/` and networkx, pass by pass."""

    def __init__(self) -> None:
        self.lines: Counter[str] = Counter()
        self._current = ""

    def run(self, function: Any, step: runner.Pass, *args: Any) -> Any:
        self._current = step.name
        before = sys.gettrace()
        sys.settrace(self._on_call)
        try:
            return function(step, *args)
        finally:
            sys.settrace(before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        return self._on_line if "/passes/" in file or "/networkx/" in file else None

    def _on_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines[self._current] += event == "line"
        return self._on_line


def work(layers: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Counter[str]]:
    """Lines run by each pass, in `transform` and in the transformed model's first call."""
    model, x = Tower(layers), torch.zeros(2, 8)
    original, counts = runner._run_one, {}
    for what, action in {
        "transform": lambda: mhc_compile.transform(model, n=2, example_inputs=(x,)),
        "first call": lambda: model(x),
    }.items():
        count = counts[what] = LineCount()
        with monkeypatch.context() as patch:
            patch.setattr(runner, "_run_one", lambda *a, c=count: c.run(original, *a))
            action()
    assert len(mhc_compile.graphs(model)[0].sites) == 2 * layers
    return {what: count.lines for what, count in counts.items()}


@pytest.fixture(scope="module")
def works() -> list[dict[str, Counter[str]]]:
    with pytest.MonkeyPatch.context() as patch:
        work(2, patch)  # what a process does once
        return [work(layers, patch) for layers in DEPTHS]


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("transform", "canonicalize"),
        ("transform", "detect"),
        ("first call", "canonicalize"),
        ("first call", "detect"),
        ("first call", "widen"),
        ("first call", "fuse_coefficients"),
        ("first call", "report_kernels"),
    ],
)
def test_twice_the_layers_are_twice_the_work(works, what, name):
    few, some, many = (counts[what][name] for counts in works)
    assert few > 0
    assert many - some <= 2.02 * (some - few), (few, some, many)
