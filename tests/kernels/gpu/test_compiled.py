"""Kernels in machine code: a part of the table compiled again, and the committed table."""

import functools
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import registers
from mhc_compile.kernels.gpu.launch import Launch
from mhc_compile.kernels.variants import get_variant

from .. import table
from ..compiled import GPUS, Compiled, compiled
from ..launches import source_hash
from ..table import Case

# Of every shape, the kernels that press hardest on registers.
HARDEST = {"post_res.backward", "projection.gradients", "seam.backward"}


@functools.cache
def case_list(n: int, C: int, dtype: str, gpu: str) -> list[Case]:
    return list(table.cases_of(get_variant("mhc"), n, C, dtype, gpu))


def compile_again(
    n: int,
    C: int,
    dtype: str,
    gpu: str,
    names: set[str] | None = None,
    known: dict[str, list[str]] | None = None,
) -> int:
    """Number of kernels compiled, none with a fault but those that are known."""
    chosen = [c for c in case_list(n, C, dtype, gpu) if names is None or c.recorded.name in names]
    wrong = {}
    for case in chosen:
        if found := table.faults(case, compiled(case.recorded.launch, GPUS[gpu])):
            wrong[case.recorded.name] = found
    assert wrong == (known or {})
    return len(chosen)


def test_every_kernel_of_four_streams():
    assert compile_again(4, 4096, "bf16", "sm_90") >= 18


# What Triton 3.8.0 does not fit into the registers of a thread; 3.6, 3.7 and 3.9 do.
SPILLED_BY_3_8 = {
    "sm_80": {"seam.backward": ["16 bytes of stack", "8 spills"]},
    "sm_90": {"seam.backward": ["8 bytes of stack", "2 spills"]},
}


@pytest.mark.parametrize("gpu", GPUS)
def test_hardest_kernels_of_float32(gpu):
    known = SPILLED_BY_3_8.get(gpu) if triton.__version__.startswith("3.8.") else None
    assert compile_again(4, 2560, "fp32", gpu, HARDEST, known) == 3


def test_hardest_kernels_of_eight_streams():
    assert compile_again(8, 4096, "bf16", "sm_80", HARDEST) == 2


# --- the committed table -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> dict[tuple[object, ...], Compiled]:
    return table.read()[1]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return list(table.cases())


def test_table_is_of_the_present_kernels(rows, cases):
    """Otherwise: make kernels-table."""
    expected = {case.key for case in cases}
    assert (len(expected - rows.keys()), len(rows.keys() - expected)) == (0, 0)


def test_table_has_no_faults(rows, cases):
    wrong = {case.key: table.faults(case, rows[case.key]) for case in cases if case.key in rows}
    assert {key: found for key, found in wrong.items() if found} == {}


def test_page_is_of_the_table(cases):
    """Otherwise: make kernels-table, which compiles only what is missing."""
    version, rows = table.read()
    written = registers.PAGE.read_text(encoding="utf-8")
    assert written == registers.page([(case, rows[case.key]) for case in cases], version)


@pytest.mark.parametrize("kind", ["loads", "stores"])
def test_a_single_narrow_stream_is_a_fault(rows, cases, kind):
    """However often the loop is there in which it is: as if one of its accesses were cut up.

    Where dφ is scattered, only if the loop is there once.
    """
    seen = 0
    for case in (case for case in cases if case.recorded.streams and case.C == 2560):
        found, expected = rows[case.key], table.accesses(case, kind)
        widths = getattr(found, kind)
        copies = widths.get(16, 0) // expected[16] if expected[16] else 0
        if not copies or (table.scattered(case) and copies > 1):
            continue
        for width in (4, 8):
            moved = {16: widths[16] - copies, width: widths.get(width, 0) + copies * 16 // width}
            assert table.faults(case, replace(found, **{kind: widths | moved})), case.key
        seen += 1
    assert seen > 300


# --- what is read from machine code --------------------------------------------------------------


@triton.jit
def _crowded(out, x, SIZE: tl.constexpr):
    """Has more numbers at a time than a thread has registers."""
    at = tl.arange(0, SIZE)
    numbers = tl.load(x + at)
    for _ in tl.range(0, tl.load(x).to(tl.int32)):
        numbers = numbers * numbers
    tl.store(out + at, numbers)


@triton.jit
def _shifted(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at * 3, tl.load(x + at * 3))


def compile_test_kernel(kernel, size: int, gpu: str) -> Compiled:
    x = torch.empty(1)
    return compiled(Launch(kernel, (1,), (x, x), {"SIZE": size, "num_warps": 1}), GPUS[gpu])


@pytest.mark.parametrize("gpu, size", [("sm_90", 8192), ("gfx942", 32768)])
def test_spills_are_seen(gpu, size):
    found = compile_test_kernel(_crowded, size, gpu)
    assert found.stack > 0 and found.spills > 0


@pytest.mark.parametrize("gpu", ["sm_90", "gfx942"])
def test_widths_are_seen(gpu):
    """64 × 16 bytes side by side, and the same number of elements apart."""
    wide = compile_test_kernel(_crowded, 256, gpu)
    apart = compile_test_kernel(_shifted, 256, gpu)
    assert max(wide.loads) == max(wide.stores) == 16
    assert max(apart.loads) == max(apart.stores) == 4


def test_bytes_in_flight_follow_from_the_loads(gpu="sm_90"):
    """32 threads with two loads of 16 bytes before the first use."""
    assert compile_test_kernel(_crowded, 256, gpu).in_flight == 32 * 2 * 16 + 32 * 4


def test_programs_that_fit():
    """64 warps, 32 programs, and what a few registers or shared memory leave of them."""
    found = compile_test_kernel(_crowded, 256, "sm_90")
    assert found.programs == 32 and found.shared == 0


def test_source_hash_follows_calls_but_not_words():
    types = (torch.float32,)
    assert source_hash(_crowded, types) != source_hash(_shifted, types)
    assert source_hash(_crowded, types) != source_hash(_crowded, (torch.bfloat16,))
