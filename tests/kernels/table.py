"""The table of compiled kernels: what is in it, and what must hold of every row.

`benchmarks/registers.py` writes it, `test_compiled.py` checks it.
"""

import inspect
import json
import math
from collections import Counter
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
"""Kernels that read streams and store none: named on the page."""


def faults(case: Case, found: Compiled) -> list[str]:
    """What is wrong with a kernel: nothing, in a table that may be committed."""
    said = []
    if found.stack:
        said.append(f"{found.stack} bytes of stack")
    if found.spills:
        said.append(f"{found.spills} spills")
    if not found.loads or not found.stores:
        said.append("no code")
    if not found.programs:
        said.append("does not fit a multiprocessor")
    if case.recorded.streams:
        stores = {16: found.stores.get(16, 0)} if scattered(case) else found.stores
        said += narrow(accesses(case, "loads"), found.loads, "loads")
        said += narrow(accesses(case, "stores"), stores, "stores")
    return said


def narrow(expected: Counter[int], found: dict[int, int], kind: str) -> list[str]:
    """What says that streams are not moved by 16 bytes at a time.

    There must be as many such accesses as expected. A loop may be there several times, unrolled or
    run ahead; then the copies of other streams hide a narrow one, but it shows in the share of
    bytes that wide accesses move.
    """
    said = []
    if found.get(16, 0) < expected[16]:
        said.append(f"{found.get(16, 0)} {kind} of 16 bytes, not {expected[16]}")
    if expected[16] and _share_of_wide(found) < _share_of_wide(expected) - 1e-9:
        said.append(f"{_share_of_wide(found):.0%} of bytes in wide {kind}")
    return said


def _share_of_wide(accesses: dict[int, int]) -> float:
    total = sum(width * count for width, count in accesses.items())
    return 16 * accesses.get(16, 0) / total if total else 0.0


# What is no stream, by the names that kernels give it: how many numbers of a token, each an access
# of its own, or the sides of a tile that all threads share.
_LOADED = {
    "H_res": lambda n, c: n * n,
    "H_post": lambda n, c: n,
    "H_pre": lambda n, c: c.get("GROUP", n),
    "norm_grad": lambda n, c: 1,
}
_STORED = {
    "dH_res": lambda n, c: n * n,
    "dH_post": lambda n, c: n,
    "dH_pre": lambda n, c: n,
    "H_parts": lambda n, c: n * n + n,
    "square_parts": lambda n, c: 1,
}
_TILES = {
    "phi": ("loads", "BK"),
    "dy": ("loads", "BT"),
    "y_parts": ("stores", "BT"),
    "dphi_parts": ("stores", "BK"),
}


def accesses(case: Case, kind: str) -> Counter[int]:
    """The loads or stores of a thread by width, if every loop is there once and nothing is narrow
    that can be wide: tiles of streams are not, others as far as their rows are aligned.
    """
    launch = case.recorded.launch
    c, threads = launch.constants, launch.constants["num_warps"] * GPUS[case.gpu].target.warp_size
    numbers, rows = (_LOADED, _rows(case, threads)) if kind == "loads" else (_STORED, 1)
    source = inspect.getsource(launch.kernel.fn)
    expected: Counter[int] = Counter()
    for name, x in zip(launch.kernel.arg_names, launch.args, strict=False):
        if not isinstance(x, torch.Tensor):
            continue
        if x.ndim > 1 and x.shape[-1] == case.C:
            if (f"tl.store({name} +" in source) == (kind == "stores"):
                size = c["BT"] * c.get("BC", c.get("BK")) * x.element_size()
                _add_tiles(expected, _streams_at_once(case, x), size // threads, 16)
        elif name in numbers:
            expected[4] += rows * numbers[name](case.n, c)
        elif name in _TILES and _TILES[name][0] == kind:
            if name == "dphi_parts" and scattered(case):
                continue
            count = _streams_at_once(case) if "phi" in name else 1
            size = c[_TILES[name][1]] * c["COLS"] * 4
            _add_tiles(expected, count, size // threads, math.gcd(16, 4 * c["COLUMNS"]))
    return expected


def _streams_at_once(case: Case, x: torch.Tensor | None = None) -> int:
    """Tiles of X that are written out one by one in the text of a kernel."""
    if (x is not None and x.ndim == 2) or case.recorded.name == "projection.project":
        return 1
    return case.recorded.launch.constants.get("GROUP", case.n)


def _add_tiles(expected: Counter[int], count: int, per_thread: int, widest: int) -> None:
    width = max(4, min(per_thread, widest))
    expected[width] += count * max(1, per_thread // width)


def _rows(case: Case, threads: int) -> int:
    """Tokens of a tile that a thread has a part of; it loads the numbers of each."""
    c = case.recorded.launch.constants
    size = c["BT"] * c["BK"] * DTYPES[case.dtype].itemsize if "BK" in c else 0
    return max(1, size // (16 * threads))


def scattered(case: Case) -> bool:
    """Whether parts of dφ are stored number by number.

    On AMD the product leaves a thread numbers that are no neighbours in memory. They are no
    streams, and may be there once for every warp, so how many 4-byte stores there are says nothing.
    """
    hip = GPUS[case.gpu].target.backend == "hip"
    return hip and "dphi_parts" in case.recorded.launch.kernel.arg_names


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
