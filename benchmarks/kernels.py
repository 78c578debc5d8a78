"""One mHC site, forward and backward: this library's operators against every peer and a roofline.

    python benchmarks/kernels.py                    writes results/kernels-cpu.json, docs/speed.md
    python benchmarks/kernels.py --only n4-C512     cases whose name contains this; nothing written
    python benchmarks/kernels.py --device cuda      adds Liger; writes results/kernels-cuda.json

All contestants of a case run in one process, in turn, repeat after repeat; medians are reported.
So are the rates of the roofline, a copy of a buffer of X's size and a matmul of 1024³. A case whose
copy rate varied by more than 20 % (10th to 90th percentile) is measured again, up to three times,
and reported as noisy after that.

On a CPU fresh memory is expensive: with glibc's defaults every large tensor is mapped and unmapped
anew, page by page. Cases therefore run with `MALLOC_MMAP_MAX_=0` (large tensors come from the
heap and stay there), and once more with the defaults.

The roofline of a site moves 9n + 5 rows of C channels a token (41 for n = 4), or 6n + 5 (29)
between two seams, and computes 6 · columns · nC flops a token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from contestants import CUDA_PEERS, MATMUL, OURS, PEERS, ROOFLINE, Case, Step
from machine import ALLOCATORS, machine

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    f"n{n}-C{C}-{str(dtype).removeprefix('torch.')}": (n, C, dtype)
    for dtype, C, n in itertools.product((torch.float32, torch.bfloat16), (512, 2048), (2, 4, 8))
}
NOISE = 0.2
Seconds = dict[str, list[float]]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, and what the roofline's rates make of the case."""
    makers = OURS | PEERS | (CUDA_PEERS if case.device == "cuda" else {}) | ROOFLINE
    steps, missing = _build(makers, case)
    attempts, spread = 0, float("inf")
    while attempts < 3 and spread > NOISE:
        seconds = _in_turn(steps, repeats, _clock(case.device))
        spread = _spread(seconds["copy"])
        attempts += 1
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "milliseconds": {name: 1e3 * t for name, t in medians.items() if name not in ROOFLINE},
        "roofline": _roofline(case, medians["copy"], medians["matmul"]),
        "copy_spread": spread,
        "attempts": attempts,
        "missing": missing,
    }


def _build(makers: dict[str, Any], case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    steps, missing = {}, {}
    for name, maker in makers.items():
        try:
            steps[name] = maker(case)
            steps[name]()
        except ImportError as error:
            missing[name] = str(error)
    return steps, missing


def _in_turn(steps: dict[str, Step], repeats: int, clock: Callable[[Step], float]) -> Seconds:
    seconds: Seconds = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            step()  # its own data in the caches, whoever ran before
            seconds[name].append(clock(step))
    return seconds


def _clock(device: str) -> Callable[[Step], float]:
    def cpu(step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def cuda(step: Step) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    return cuda if device == "cuda" else cpu


def _spread(times: Sequence[float]) -> float:
    cuts = statistics.quantiles(times, n=10)
    return (cuts[-1] - cuts[0]) / statistics.median(times)


def _roofline(case: Case, copy: float, matmul: float) -> dict[str, float]:
    row = case.tokens * case.C * case.dtype.itemsize
    rate = 2 * case.n * row / copy
    flops = 6 * case.columns * case.n * case.C * case.tokens
    arithmetic = flops / (2 * MATMUL**3 / matmul)
    return {
        "copy_GB/s": rate * 1e-9,
        "matmul_TFLOP/s": 2 * MATMUL**3 / matmul * 1e-12,
        "operators": 1e3 * ((9 * case.n + 5) * row / rate + arithmetic),
        "operators, seams": 1e3 * ((6 * case.n + 5) * row / rate + arithmetic),
    }


# --- the report -----------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    where = results["machine"]
    names = [*OURS, *PEERS]
    lines = [
        "# The speed of one site on a CPU",
        "",
        "`python benchmarks/kernels.py`: one mHC site, forward and backward, 1024 tokens; median",
        f"milliseconds of {results['repeats']} repeats in which all contestants take turns. "
        f"Measured on {where['processor']},",
        f"{where['cores']} cores, torch {where['torch']}, Python {where['python']}. The seam form "
        "is what an inner site of a",
        "chain costs. The roofline is the time that the bytes take at the rate of a copy, and the "
        "flops at",
        "that of a matmul of 1024³, both measured in the same loop.",
    ]
    for allocator in ALLOCATORS:
        lines += ["", f"## Allocator: {allocator}", ""]
        lines += [f"| case | {' | '.join(names)} | roofline | seam roofline | copy GB/s |"]
        lines += [f"|---|{'---:|' * (len(names) + 3)}"]
        lines += [_row(case, r, names) for case, r in results[allocator].items()]
    best = [_against_peers(case, r) for case, r in results["raised"].items()]
    lines += ["", "## Against the fastest peer (allocator raised)", ""]
    lines += [
        "| case | eager peer / operators | compiled peer / operators | operators / roofline |"
    ]
    lines += ["|---|---:|---:|---:|", *best, ""]
    return "\n".join(lines)


def _row(case: str, result: dict[str, Any], names: Sequence[str]) -> str:
    times, roof = result["milliseconds"], result["roofline"]
    noisy = " (noisy)" if result["copy_spread"] > NOISE else ""
    cells = [f"{times[n]:.2f}" if n in times else "—" for n in names]
    cells += [f"{roof[n]:.2f}" for n in OURS] + [f"{roof['copy_GB/s']:.1f}{noisy}"]
    return f"| {case} | {' | '.join(cells)} |"


def _against_peers(case: str, result: dict[str, Any]) -> str:
    times = result["milliseconds"]
    ours = times["operators"]
    eager = min(t for name, t in times.items() if name in PEERS and "eager" in name)
    compiled = min(t for name, t in times.items() if name in PEERS and "Inductor" in name)
    roof = result["roofline"]["operators"]
    return f"| {case} | {eager / ours:.1f} | {compiled / ours:.1f} | {ours / roof:.2f} |"


def main(device: str, only: str, repeats: int) -> None:
    chosen = [name for name in CASES if only in name]
    results: dict[str, Any] = {"machine": machine(), "repeats": repeats}
    allocators = ALLOCATORS if device == "cpu" else {"raised": {}}
    for allocator, settings in allocators.items():
        results[allocator] = {}
        for name in chosen:
            results[allocator][name] = _in_process(name, device, repeats, settings)
            print(allocator, name, json.dumps(results[allocator][name]), flush=True)
    if only:
        return
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    text = json.dumps(results, indent=2) + "\n"
    (folder / f"kernels-{device}.json").write_text(text, encoding="utf-8")
    if device == "cpu":
        (ROOT / "docs" / "speed.md").write_text(document(results), encoding="utf-8")


def _in_process(name: str, device: str, repeats: int, settings: dict[str, str]) -> Any:
    """The allocator reads its settings when a process starts."""
    command = [sys.executable, __file__, "--case", name, "--device", device]
    output = subprocess.run(
        [*command, "--repeats", str(repeats)],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="cases whose name contains this; prints only")
    parser.add_argument("--case", help="measure this case in this process and print it")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.case:
        n, C, dtype = CASES[arguments.case]
        tokens = 1024 if arguments.device == "cpu" else 16384
        case = Case(n, C, dtype, tokens, arguments.device)
        print(json.dumps(measure(case, arguments.repeats)))
    else:
        main(arguments.device, arguments.only, arguments.repeats)
