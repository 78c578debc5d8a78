"""One mHC site, forward and backward: this library's operators against every peer and a roofline.

    python -m benchmarks.kernels                    writes results/kernels-cpu.json, docs/speed.md
    python -m benchmarks.kernels --only n4-C512     cases whose name contains this; nothing written
    python -m benchmarks.kernels --device cuda      adds Liger; writes results/kernels-cuda.json

All contestants of a case run in one process, in turn, repeat after repeat; medians are reported.
So are the rates of the roofline, a copy of a buffer of X's size and a matmul of 1024³. As in a
model, where branches run between sites, nobody finds its data in the cache from the last time; the
rate of a copy that does is given beside it. A case whose copy rate varied by more than 20 %
(between quartiles) is thrown away and measured again; after five such cases in a row the steadiest
is kept, marked as noisy.

On a CPU fresh memory is expensive: with glibc's defaults every large tensor is mapped and unmapped
anew, page by page. Cases therefore run with `MALLOC_MMAP_MAX_=0` (large tensors come from the
heap and stay there), those of n = 4 once more with the defaults.

The roofline of a site moves 9n + 5 rows of C channels a token (41 for n = 4), or 6n + 5 (29)
between two seams, and computes 6 · columns · nC flops a token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import harness
from benchmarks.contestants import (
    CUDA_PEERS,
    MATMUL,
    OURS,
    PEERS,
    ROOFLINE,
    Case,
    Step,
    parts,
    products,
)
from benchmarks.harness import ALLOCATORS, in_turn, spread, table
from mhc_compile.kernels.traffic import OPERATORS, traffic

CASES = {
    f"n{n}-C{C}-{str(dtype).removeprefix('torch.')}": (n, C, dtype)
    for dtype, C, n in itertools.product((torch.float32, torch.bfloat16), (512, 2048), (2, 4, 8))
}
LIMITS = (
    "## What limits it",
    "",
    "post_res, which has no product with φ, moves its bytes at between half and more than the",
    "rate of a copy; the others are held up by their products. The three of a site (x⃗ φ, dy",
    "φᵀ, x⃗ᵀ dy) are skinny, n² + 2n columns, and run below the rate of a square one. Here are",
    "their times alone by PyTorch's matmul, in float32, and the time of the 9n + 5 rows at the",
    "rate of the copy; the operators compute the chain of coefficients as well. In bfloat16 too",
    "the products are computed in float32, because y and dφ have to be that exact: a bfloat16",
    "dot instruction does two products at once, but φ or dy in two bfloat16 terms need two. The",
    "roofline above counts them at the rate of a bfloat16 matmul, the exact roofline here at",
    "that of a float32 one.",
)
NOISE = 0.2
ATTEMPTS = 5


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, and what the roofline's rates make of the case."""
    makers = OURS | PEERS | (CUDA_PEERS if case.device == "cuda" else {}) | ROOFLINE
    steps, missing = _build(makers, case)
    runs: list[dict[str, list[float]]] = []
    while not runs or (spread(runs[-1]["copy"]) > NOISE and len(runs) < ATTEMPTS):
        runs.append(in_turn(steps, repeats, clock(case.device)))
    seconds = min(runs, key=lambda run: spread(run["copy"]))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    alone, skinny, warm = (
        in_turn(some, repeats, clock(case.device))
        for some in (parts(case), products(case), {"copy": steps["copy"]})
    )
    return {
        "milliseconds": {name: 1e3 * t for name, t in medians.items() if name not in ROOFLINE},
        "roofline": _roofline(case, *(medians[name] for name in ROOFLINE)),
        "warm_copy_GB/s": 2 * case.n * case.row / statistics.median(warm["copy"]) * 1e-9,
        "parts": {name: _part(case, name, times) for name, times in alone.items()},
        "products_ms": {name: 1e3 * statistics.median(times) for name, times in skinny.items()},
        "copy_spread": spread(seconds["copy"]),
        "thrown_away": len(runs) - 1,
        "missing": missing,
    }


def _build(makers: dict[str, Any], case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    steps, missing = {}, {}
    for name, maker in makers.items():
        try:
            steps[name] = maker(case)
            steps[name]()
        except (ImportError, NotImplementedError) as error:
            missing[name] = str(error)
    return steps, missing


def clock(device: str) -> Callable[[Step], float]:
    def cuda(step: Step) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    return cuda if device == "cuda" else harness.elapsed


def _roofline(case: Case, copy: float, matmul: float, exact_matmul: float) -> dict[str, float]:
    rate = 2 * case.n * case.row / copy
    alone, seam = ((k * case.n + 5) * case.row / rate for k in (9, 6))
    square = 2 * MATMUL**3
    flops = 6 * case.columns * case.n * case.C * case.tokens
    return {
        "copy_GB/s": rate * 1e-9,
        "matmul_TFLOP/s": square / matmul * 1e-12,
        "exact_matmul_TFLOP/s": square / exact_matmul * 1e-12,
        "rows": 1e3 * alone,
        "operators": 1e3 * (alone + flops * matmul / square),
        "operators, seams": 1e3 * (seam + flops * matmul / square),
        "operators, exact": 1e3 * (alone + flops * exact_matmul / square),
    }


def _part(case: Case, name: str, times: Sequence[float]) -> dict[str, float]:
    """One operator: its time, and the rate of the bytes that it has to move, if it is known."""
    shape = {"T": case.tokens, "n": case.n, "C": case.C, "columns": case.columns}
    seconds = statistics.median(times)
    if name not in OPERATORS:
        return {"milliseconds": 1e3 * seconds}
    moved = traffic(name, **shape, dtype=case.dtype).floor
    return {"milliseconds": 1e3 * seconds, "GB/s": moved / seconds * 1e-9}


# --- the report -----------------------------------------------------------------------------------


def document(results: dict[str, Any]) -> str:
    where = results["machine"]
    names = [*OURS, *PEERS]
    lines = [
        "# The speed of one site on a CPU",
        "",
        "`python -m benchmarks.kernels`: one mHC site, forward and backward, 1024 tokens; median",
        f"milliseconds of {results['repeats']} repeats in which all contestants take turns. "
        f"Measured on {where['processor']},",
        f"{where['cores']} cores, torch {where['torch']}, Python {where['python']}. The seam form "
        "is what an inner site of a",
        "chain costs. The roofline is the time that the bytes take at the rate of a copy, and the "
        "flops at",
        "that of a matmul of 1024³, both measured in the same loop, where nobody finds its data in "
        "the cache.",
        "Warm: the rate of the same copy, repeated. Noisy: the copy rate varied by more than "
        f"{NOISE:.0%}.",
    ]
    for allocator in ALLOCATORS:
        lines += ["", f"## Allocator: {allocator}", ""]
        heads = ["case", *names, "roofline", "seam roofline", "copy GB/s", "warm"]
        lines += table(heads, [_row(case, r, names) for case, r in results[allocator].items()])
    raised = results["raised"]
    lines += ["", "## Times of others / operators, and of ours / roofline (allocator raised)", ""]
    heads = ["case", "reference, eager", "fastest eager peer", "reference, Inductor"]
    heads += ["fastest compiled peer", "operators / roofline", "seams / seam roofline"]
    lines += table(heads, [_against_peers(case, r) for case, r in raised.items()])
    lines += ["", *_standing(raised)]
    lines += ["", "## Operator by operator (allocator raised)", ""]
    lines += [
        "Milliseconds, and the share of the copy rate at which the bytes that each has to move"
    ]
    lines += [
        "are moved: kernels/traffic/. Products with φ take the rest of the time; the chain (at 8 "
        "channels, where",
        "the product is nothing) is a part of what has coefficients in its name, and of seams.",
        "",
    ]
    detailed = {case: r for case, r in raised.items() if "parts" in r}
    names = list(next(iter(detailed.values()))["parts"])
    lines += table(["case", *names], [_parts(case, r) for case, r in detailed.items()])
    lines += ["", *LIMITS, ""]
    heads = ["case", "x⃗ φ", "dy φᵀ", "x⃗ᵀ dy", "rows", "sum", "operators"]
    heads += ["operators / sum", "operators / exact roofline"]
    lines += table(heads, [_limit(case, r) for case, r in raised.items()])
    return "\n".join([*lines, ""])


def _row(case: str, result: dict[str, Any], names: Sequence[str]) -> list[str]:
    times, roof = result["milliseconds"], result["roofline"]
    noisy = " (noisy)" if result["copy_spread"] > NOISE else ""
    cells = [f"{times[n]:.2f}" if n in times else "—" for n in names]
    cells += [f"{roof[n]:.2f}" for n in OURS] + [f"{roof['copy_GB/s']:.1f}{noisy}"]
    cells += [f"{result['warm_copy_GB/s']:.1f}"]
    return [case, *cells]


def _against_peers(case: str, result: dict[str, Any]) -> list[str]:
    times = result["milliseconds"]
    ours = times["operators"]
    cells = []
    for form in ("eager", "Inductor"):
        cells += [f"{times[f'reference, {form}'] / ours:.1f}", f"{_fastest_peer(result, form):.1f}"]
    cells += [f"{times[name] / result['roofline'][name]:.2f}" for name in OURS]
    return [case, *cells]


AIMS = {"eager": 3.5, "Inductor": 1.7, "float32": 1.5, "bfloat16": 2.0}
"""Times of the fastest peer over ours, and ours over the roofline by dtype."""


def _standing(cases: dict[str, Any]) -> list[str]:
    """In how many cases each aim is reached, and in which it is not."""
    lines = []
    for form in ("eager", "Inductor"):
        missed = [case for case, r in cases.items() if _fastest_peer(r, form) < AIMS[form] - 0.05]
        what = f"at least {AIMS[form]} times as fast as the fastest {form} peer"
        lines.append(_aim(what, len(cases), missed))
    for dtype in ("float32", "bfloat16"):
        chosen = {case: r for case, r in cases.items() if case.endswith(dtype)}
        missed = [
            case
            for case, r in chosen.items()
            if r["milliseconds"]["operators"] > (AIMS[dtype] + 0.05) * r["roofline"]["operators"]
        ]
        lines.append(_aim(f"within {AIMS[dtype]} of the roofline in {dtype}", len(chosen), missed))
    return lines


def _fastest_peer(result: dict[str, Any], form: str) -> float:
    times = result["milliseconds"]
    peers = [t for name, t in times.items() if name in PEERS and name.endswith(form)]
    return min(peers[1:]) / times["operators"]  # the first is the reference


def _aim(what: str, cases: int, missed: Sequence[str]) -> str:
    short = f"; not in {', '.join(missed)}" if missed else ""
    return f"- Aim: {what}. Reached in {cases - len(missed)} of {cases}{short}."


def _limit(case: str, result: dict[str, Any]) -> list[str]:
    """Against products by a library and bytes at the rate of a copy, one after the other."""
    floor = [*result["products_ms"].values(), result["roofline"]["rows"]]
    ours = result["milliseconds"]["operators"]
    ratios = ours / sum(floor), ours / result["roofline"]["operators, exact"]
    cells = [f"{t:.2f}" for t in (*floor, sum(floor), ours, *ratios)]
    return [case, *cells]


def _parts(case: str, result: dict[str, Any]) -> list[str]:
    copy = result["roofline"]["copy_GB/s"]
    cells = [
        f"{part['milliseconds']:.2f}" + (f" ({part['GB/s'] / copy:.0%})" if "GB/s" in part else "")
        for part in result["parts"].values()
    ]
    return [case, *cells]


def main(device: str, only: str, repeats: int) -> None:
    chosen = [name for name in CASES if only in name]
    results: dict[str, Any] = {"machine": harness.machine(), "repeats": repeats}
    allocators = ALLOCATORS if device == "cpu" else {"raised": {}}
    for allocator, settings in allocators.items():
        results[allocator] = {}
        for name in chosen:
            if allocator == "default" and CASES[name][0] != 4:
                continue
            command = ("--case", name, "--device", device, "--repeats", str(repeats))
            results[allocator][name] = harness.run_self(*command, **settings)
            print(allocator, name, json.dumps(results[allocator][name]), flush=True)
    if not only:
        page = {"speed": document(results)} if device == "cpu" else {}
        harness.write(f"kernels-{device}", results, **page)


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
        harness.show(measure(case, arguments.repeats))
    else:
        main(arguments.device, arguments.only, arguments.repeats)
