"""The table of compiled kernels: what is in it, and what must hold of every row.

`benchmarks/registers.py` writes it, `test_compiled.py` checks it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
import triton

from mhc_compile.kernels.variants import VARIANTS, Variant, get_variant

from .compiled import GPUS, Compiled, recorded_for
from .launches import Recorded, recorded

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (2560, 4096)


@dataclass(frozen=True)
class Case:
    """A kernel of the table, for one shape and one GPU."""

    variant: str
    n: int
    C: int
    dtype: str
    gpu: str
    recorded: Recorded

    @property
    def key(self) -> tuple[object, ...]:
        """What a row of the table is found by; another source or other constants make another."""
        return self.variant, self.n, self.C, self.dtype, self.gpu, *self.recorded.code


def cases() -> Iterator[Case]:
    """All kernels of `mhc` on all GPUs, and those that other variants add, on sm_90."""
    for gpu, n, C, dtype in product(GPUS, (4, 2, 8), WIDTHS, DTYPES):
        yield from cases_of(get_variant("mhc"), n, C, dtype, gpu)
    for n, C, dtype in product((4, 8), WIDTHS, DTYPES):
        known = {c.recorded.code for c in cases_of(get_variant("mhc"), n, C, dtype, "sm_90")}
        for name in VARIANTS[1:]:
            if name != "mhc_lite" or n <= 4:
                new = cases_of(get_variant(name), n, C, dtype, "sm_90")
                yield from (case for case in new if case.recorded.code not in known)


def cases_of(variant: Variant, n: int, C: int, dtype: str, gpu: str) -> Iterator[Case]:
    with recorded_for(GPUS[gpu]):
        found = recorded(variant, n, C, DTYPES[dtype])
    yield from (Case(variant.name, n, C, dtype, gpu, launch) for launch in found)


# --- what must hold ------------------------------------------------------------------------------

WITHOUT_STREAMS = ("pre.backward without dX, H_pre", "projection.project")
"""Kernels that read streams and store none."""


def faults(case: Case, found: Compiled) -> list[str]:
    """What is wrong with a kernel: nothing, in a table that may be committed."""
    r = case.recorded
    said = []
    if found.stack:
        said.append(f"{found.stack} bytes of stack")
    if found.spills:
        said.append(f"{found.spills} spills")
    if not found.loads or not found.stores:
        said.append("no code")
    if not found.programs:
        said.append("does not fit a multiprocessor")
    if r.streams and max(found.loads, default=0) < 16:
        said.append("no load of 16 bytes")
    if r.streams and r.name not in WITHOUT_STREAMS and max(found.stores, default=0) < 16:
        said.append("no store of 16 bytes")
    return said


# --- on disk -------------------------------------------------------------------------------------

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "registers.json"

Row = tuple[Case, Compiled]


def write(rows: list[Row], path: Path = RESULTS) -> None:
    """One line a row."""
    lines = [json.dumps({"key": case.key, **asdict(found)}) for case, found in rows]
    head = json.dumps({"triton": triton.__version__})[:-1]
    text = f'{head}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.write_text(text, encoding="utf-8")


def read(path: Path = RESULTS) -> tuple[str, dict[tuple[object, ...], Compiled]]:
    """The version of Triton that compiled the table, and its rows by `Case.key`."""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = {}
    for row in table["rows"]:
        key = tuple(row.pop("key"))
        widths = {k: {int(w): n for w, n in row[k].items()} for k in ("loads", "stores")}
        rows[key] = Compiled(**{**row, **widths})
    return table["triton"], rows
