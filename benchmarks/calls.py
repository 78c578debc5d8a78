"""How many Python calls a model of four sites costs in this package, counted.

    python -m benchmarks.calls                     writes results/calls.json, docs/calls.md
    python -m benchmarks.calls --before CHECKOUT   an older checkout beside it; printed only

Counted are calls (and resumed generators) of code in `mhc_compile/`, `passes/` and `kernels/`, on
one thread by `sys.setprofile`: of `transform`, of the first step, which captures the model, and of
a steady step, as the model is and compiled by `backend="mhc"`. Either is counted in a process of
its own, in which a smaller model has gone before, so that our C++ operators are there. On one
machine with one version of PyTorch a count is the same in every run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import mhc_compile
from benchmarks import harness
from tests.models import GPT, ids

PACKAGE = Path(mhc_compile.__file__).parent
FORMS = ("plain call", "compiled")
STEADY = 3
Counts = dict[str, dict[str, int]]
"""Calls by stage and file."""


def counted(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """The result of `run`, and the calls in each file of this package."""
    found: Counter[str] = Counter()

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found[frame.f_code.co_filename] += 1

    sys.setprofile(profile)
    try:
        result = run()
    finally:
        sys.setprofile(None)
    ours = {file: count for file, count in found.items() if Path(file).is_relative_to(PACKAGE)}
    return result, {Path(file).relative_to(PACKAGE).as_posix(): n for file, n in ours.items()}


def measure(form: str, layers: int = 2) -> Counts:
    """The calls of every stage, for a model with two sites a layer."""
    torch._dynamo.reset()
    plain, tokens = GPT(layers), ids()
    stages: Counts = {}
    model, stages["transform"] = counted(
        lambda: mhc_compile.transform(plain, n=4, example_inputs=(tokens,))
    )
    if form == "compiled":
        model.compile(backend="mhc")
    for step in range(STEADY):
        name = "first" if step == 0 else "steady"
        output, stages[f"{name} forward"] = counted(lambda: model(tokens))
        _, stages[f"{name} backward"] = counted(output.sum().backward)
    return stages


def alone(form: str) -> Counts:
    """As `measure`, the same in every process: with operators built and loaded, and no graphs."""
    torch.set_num_threads(1)
    measure(FORMS[0], layers=1)
    with torch.compiler.config.patch(force_disable_caches=True):
        return measure(form)


def total(calls: dict[str, int]) -> int:
    return sum(calls.values())


# --- the report -----------------------------------------------------------------------------------


FILES = 12
"""How many files the page lists; `results/calls.json` has all of them."""


def document(results: dict[str, Any]) -> str:
    where = results["machine"]
    lines = [
        "# Python calls",
        "",
        "`python -m benchmarks.calls`: calls in this package for a GPT of four sites, n = 4, on a "
        "CPU, counted",
        f"with torch {where['torch']}, Python {where['python']}.",
    ]
    for checkout, forms in results["calls"].items():
        stages = list(forms[FORMS[0]])
        lines += ["", f"## {checkout}", ""]
        lines += harness.table(
            ["", *stages],
            [[form, *(f"{total(counts[s]):,}" for s in stages)] for form, counts in forms.items()],
        )
        for form, counts in forms.items():
            most = Counter({f: max(c.get(f, 0) for c in counts.values()) for f in _files(counts)})
            files = [file for file, _ in most.most_common(FILES)]
            lines += ["", f"The {FILES} files with the most, {form}:", ""]
            lines += harness.table(
                ["file", *stages],
                [[file, *(f"{counts[s].get(file, 0):,}" for s in stages)] for file in files],
            )
    return "\n".join([*lines, ""])


def _files(counts: Counts) -> set[str]:
    return {file for calls in counts.values() for file in calls}


def main(before: Path | None) -> None:
    checkouts = {"Now": harness.ROOT} | ({"Before": before.resolve()} if before else {})
    calls = {
        name: {form: harness.run_self("--form", form, **_importing(root)) for form in FORMS}
        for name, root in checkouts.items()
    }
    results = {"machine": harness.machine(), "calls": calls}
    print(document(results))
    if not before:
        harness.write("calls", results, calls=document(results))


def _importing(root: Path) -> dict[str, str]:
    """Settings of a process that has this package from that checkout."""
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{root}:{harness.ROOT}"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="count this one as well")
    parser.add_argument("--form", choices=FORMS, help="count in this process and print it")
    arguments = parser.parse_args()
    if arguments.form:
        harness.show(alone(arguments.form))
    else:
        main(arguments.before)
