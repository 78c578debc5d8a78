"""What Triton's compiler makes of every kernel, for GPUs that need not be there.

    python -m benchmarks.registers          compiles what has changed since the table was written
    python -m benchmarks.registers --all    compiles everything

Writes results/registers.json and docs/kernels.md.
"""

import argparse
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Sequence

import triton
from triton import knobs

from benchmarks.harness import DOCS
from tests.kernels import table
from tests.kernels.compiled import GPUS, Compiled, compiled
from tests.kernels.table import Case, Row

PAGE = DOCS / "kernels.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="compile everything again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    knobs.compilation.always_compile = True  # or seconds would be those of a cache
    cases = list(table.cases())
    found = {} if args.all else written()
    _work.update({(c.gpu, *c.recorded.code): c for c in cases if c.key not in found})
    codes: dict[tuple[str, ...], Compiled] = {}
    try:
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            codes.update(pool.imap_unordered(fresh, list(_work)))
    finally:  # the next run goes on from here
        rows = []
        for case in cases:
            one = found.get(case.key) or codes.get((case.gpu, *case.recorded.code))
            if one is not None:
                rows.append((case, one))
        table.write(rows)
    PAGE.write_text(page(rows), encoding="utf-8")


_work: dict[tuple[str, ...], Case] = {}
"""What is to be compiled; processes inherit it, since fake tensors do not travel."""


def written() -> dict[tuple[object, ...], Compiled]:
    """The rows of the last run, if it had the same compiler."""
    if not table.RESULTS.exists():
        return {}
    version, rows = table.read()
    return rows if version == triton.__version__ else {}


def fresh(code: tuple[str, ...]) -> tuple[tuple[str, ...], Compiled]:
    case = _work[code]
    found = compiled(case.recorded.launch, GPUS[case.gpu])
    where = f"{case.gpu} {case.variant} n={case.n} C={case.C} {case.dtype} {case.recorded.name}"
    print(where, found.registers, *table.faults(case, found), sep=", ", flush=True)
    return code, found


# --- the page ------------------------------------------------------------------------------------

INTRODUCTION = """\
# Kernels in machine code

`make kernels-table` (`python -m benchmarks.registers`). Every Triton kernel that the operators of a
site launch, with exactly the constants their launchers pick for C = 2560 and C = 4096, compiled by
Triton {version} for GPUs that need not be there. **This is compilation, not a measurement on a
GPU.** Registers, stack, spills, accesses and shared memory are read from the machine code, on AMD
from its assembly.

{summary}

A cell is *registers · programs · bandwidth*:

- registers of a thread, for both C. On AMD these are vector registers, of which there are 512;
- programs that fit a multiprocessor (compute unit) at a time, by registers, warps and memory;
- the share of the memory bandwidth that this can sustain. An estimate by Little's law: bytes that
  the programs of a multiprocessor ask for before they wait, against bandwidth times latency. It
  says whether enough is in flight, not how fast a kernel is. Assumed are

{gpus}

Variants other than `mhc` are compiled for sm_90; of these the table has what differs from `mhc`.
`tests/kernels/gpu/test_compiled.py` compiles a part again. It fails if a kernel has a stack or
spills, if a thread has fewer accesses of 16 bytes than it has parts of streams (and of φ, dy, y) to
load or to store, or they move a smaller share of the bytes than they would if all streams were
wide; and if this page is not what the script writes of the present kernels. Narrow are the numbers
of a token (H_pre, H_post, H_res: 4 bytes each), rows of φ that are no multiple of 16 bytes or too
short for all threads, and on gfx942 the stores of parts of dφ, up to 128 of 4 bytes in a thread of
`projection.gradients`.
Streams are loaded and none is stored by {loading}.
All numbers: [registers.json](../benchmarks/results/registers.json).
"""


def page(rows: Sequence[Row], version: str = triton.__version__) -> str:
    """Of rows in the order of `table.cases`, compiled by this version of Triton."""
    gpus = "\n".join(
        f"  {name}: {gpu.product}, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.latency * 1e9:.0f} ns  "
        for name, gpu in GPUS.items()
    )
    loading = " and ".join(f"`{name}`" for name in table.WITHOUT_STREAMS)
    introduction = INTRODUCTION.format(
        version=version, summary=summary(rows), gpus=gpus, loading=loading
    )
    groups: dict[str, list[Row]] = defaultdict(list)
    for case, found in rows:
        groups[case.recorded.name.split(" ")[0]].append((case, found))
    return "\n".join([introduction, *(section(name, group) for name, group in groups.items())])


def summary(rows: Sequence[Row]) -> str:
    faulty = [row for row in rows if table.faults(*row)]
    clean = "No kernel has a stack or spills a register" if not faulty else f"{len(faulty)} faults"
    four = (row for row in rows if row[0].n == 4)
    slowest = max((f.seconds, case.recorded.name, case.variant) for case, f in four)
    return (
        f"{len(rows)} rows. {clean}. The slowest to compile for four streams is\n`{slowest[1]}` of "
        f"`{slowest[2]}`, {slowest[0]:.1f} s of one core."
    )


def section(name: str, rows: Sequence[Row]) -> str:
    """A kernel: a line about all its forms, and a table with a line for each."""
    found = [f for _, f in rows]
    seconds = max(f.seconds for case, f in rows if case.n == 4)
    widest = " / ".join(str(max(max(getattr(f, k)) for f in found)) for k in ("loads", "stores"))
    shared = bounds([f.shared for f in found], lambda x: f"{x / 1024:.0f}")
    lines = [
        f"## {name}\n",
        f"Widest load / store {widest} bytes, shared memory {shared} KB, "
        f"compiled in {seconds:.1f} s at most for n = 4.\n",
        f"| launch | n | streams | {' | '.join(GPUS)} |",
        f"|---|---:|---|{'---|' * len(GPUS)}",
    ]
    cells: dict[tuple[str, int, str], dict[str, list[Compiled]]] = defaultdict(dict)
    for case, f in rows:
        form = case.recorded.name.partition(" ")[2] or "all"
        form = form if case.variant == "mhc" else f"{case.variant}, {form}"
        cells[form, case.n, case.dtype].setdefault(case.gpu, []).append(f)
    for (form, n, dtype), by_gpu in cells.items():
        columns = [cell(by_gpu.get(gpu, []), gpu) for gpu in GPUS]
        lines.append(f"| {form} | {n} | {dtype} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def cell(found: Sequence[Compiled], gpu: str) -> str:
    if not found:
        return ""
    registers = bounds([f.registers for f in found], str)
    programs = bounds([f.programs for f in found], str)
    bandwidth = bounds([f.bandwidth(GPUS[gpu]) for f in found], lambda x: f"{x:.0%}")
    text = f"{registers} · {programs} · {bandwidth}"
    if any(f.stack or f.spills for f in found):
        stack, spills = max(f.stack for f in found), max(f.spills for f in found)
        text += f" **{stack} bytes of stack, {spills} spills**"
    return text


def bounds(values: Sequence[float], show: Callable[[float], str]) -> str:
    texts = list(dict.fromkeys(show(value) for value in sorted(values)))
    return texts[0] if len(texts) == 1 else f"{texts[0]}-{texts[-1]}"


if __name__ == "__main__":
    main()
