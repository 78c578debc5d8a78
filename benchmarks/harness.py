"""What the benchmarks have in common: turns, processes, the machine, where results are written.

Run from the root of the repository, as modules: `python -m benchmarks.kernels`.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

ALLOCATORS = {
    "raised": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_ARENA_MAX": "1",
    },
    "default": {},
}
"""Settings that glibc reads when a process starts. `raised`: large tensors come from the heap and
stay there; by default each is mapped and unmapped anew, page by page."""


# --- measuring ------------------------------------------------------------------------------------


def elapsed(step: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    step()
    return clock() - start


def in_turn(
    steps: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[Callable[[], Any]], float] = elapsed,
) -> dict[str, list[float]]:
    """What `clock` says of every step, turn after turn: what disturbs one disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            seconds[name].append(clock(step))
    return seconds


def second_run(step: Callable[[], Any]) -> float:
    """Seconds of a step right after the same step: its data is in the caches."""
    step()
    gc.collect()
    return elapsed(step)


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(times, others, strict=True)]


def spread(times: Sequence[float]) -> float:
    """Between the quartiles, in units of the median."""
    low, median, high = statistics.quantiles(times, n=4)
    return (high - low) / median


def run_self(*arguments: str, **settings: str) -> Any:
    """The benchmark that runs, with these arguments in a process of its own: what `show` shows.

    Settings of the environment count from the start of a process: those of the allocator, say.
    """
    module = sys.modules["__main__"].__spec__
    assert module is not None, "run benchmarks as modules: python -m benchmarks.kernels"
    print(*arguments, file=sys.stderr, flush=True)
    output = subprocess.run(
        [sys.executable, "-m", module.name, *arguments],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def show(result: Any) -> None:
    """The last line of a process that `run_self` has started."""
    print(json.dumps(result))


def kept(file: Path | None, measure: Callable[[], Any]) -> Any:
    """What the file has; else measured and written there, so that an ended run can go on."""
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    result = measure()
    if file is not None:
        file.write_text(json.dumps(result), encoding="utf-8")
    return result


# --- reporting ------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a benchmark ran on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    found = {
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def read(name: str) -> Any:
    """`results/{name}.json`, or None before the first run."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write(name: str, results: Any, **pages: str) -> None:
    """`results/{name}.json`, and each page to `docs/` under its name."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for page, text in pages.items():
        (DOCS / f"{page}.md").write_text(text, encoding="utf-8")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown: the first column is words, the others are numbers."""
    lines = [
        f"| {' | '.join(heads)} |".replace("|  |", "| |"),
        f"|---|{'---:|' * (len(heads) - 1)}",
    ]
    return lines + [f"| {' | '.join(row)} |" for row in rows]
