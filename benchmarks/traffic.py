"""Bytes and operations of every operator, and times PREDICTED from them.

    python -m benchmarks.traffic

Computes, measures nothing. Writes docs/traffic.md.
"""

from collections.abc import Iterator

from benchmarks.harness import DOCS
from mhc_compile.kernels.traffic import (
    GPUS,
    KINDS,
    OPERATORS,
    apart,
    apart_bytes,
    predicted_seconds,
    traffic,
)
from tests.kernels import compiled

PAGE = DOCS / "traffic.md"

TOKENS, STREAMS, WIDTHS = 16384, (4, 2, 8), (2560, 4096)

CUT_AS = {"MI300X": "gfx942"}
"""Where launchers choose other constants than for GPUs of NVIDIA."""


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


INTRODUCTION = """\
# Bytes, operations and predicted times

`python -m benchmarks.traffic` (`make kernels-table`): what `kernels/traffic/` says of each
operator with {tokens:,} tokens of bfloat16 streams and the n² + 2n columns of φ of the `mhc`
variant. **Nothing here is measured on a GPU. Microseconds are PREDICTED**, by a roofline: launches
one after the other, plus the slowest of device memory, last cache and matrix units. They are what
a kernel that reaches the copy rate of the device would take.

- *floor*, *requested*: streams, in MiB and, in brackets, in units of C elements a token. Floor is
  each tensor once; requested is what the loads and stores of the kernels ask for.
- *apart*: what the kernels request besides streams, in MiB, in three parts:
{kinds}.
  Most of it is asked for again and again and comes from a cache: φ by each block of 64 tokens, dy
  by each block of channels, in a seam also H_res and H_post.
- *Gflop*: of products with φ and of sums over streams, by their definition. Matrix units do up to
  three times the former, since φ and dy are two terms of bfloat16 each.

Requested and apart are, byte for byte, what Triton's interpreter counts
(`tests/kernels/traffic/test_traffic.py`). Apart is cut as for GPUs of NVIDIA; the prediction for
MI300X is of the cut for AMD. `add` is the residual add of a plain model, for comparison.

Assumed of the GPUs:

| | copy (TB/s) | last cache (MB) | from it (TB/s) | matrix units (Tflop/s) | launch (µs) |
|---|---:|---:|---:|---:|---:|
{gpus}

Copy and matrix rate of the H200 were measured on one; those of the others follow from data sheets.
"""


def page() -> str:
    gpus = "\n".join(
        f"| {name} | {gpu.copy / 1e12:.1f} | {gpu.cache / 1e6:.0f} | {gpu.cache_rate / 1e12:.1f} | "
        f"{gpu.matmul / 1e12:.0f} | {gpu.launch * 1e6:.0f} |"
        for name, gpu in GPUS.items()
    )
    kinds = ";\n".join(f"  - {words}" for words in KINDS.values())
    introduction = INTRODUCTION.format(tokens=TOKENS, kinds=kinds, gpus=gpus)
    return "\n".join([introduction, *(section(n, C) for n in STREAMS for C in WIDTHS)])


def section(n: int, C: int) -> str:
    """A table with a row for each operator."""
    parts = " | ".join(("φ, dφ", "x⃗ φ", "H"))
    return "\n".join(
        [
            f"## n = {n}, C = {C}\n",
            f"| operator | floor | requested | apart: {parts} | Gflop | "
            f"{' | '.join(f'{name}, predicted µs' for name in GPUS)} |",
            f"|---|---:|---:|---:|---:|---:|---:|{'---:|' * len(GPUS)}",
            *(f"| {' | '.join(cells(operator, n, C))} |" for operator in OPERATORS),
            "",
        ]
    )


def cells(operator: str, n: int, C: int) -> Iterator[str]:
    shape = {"T": TOKENS, "n": n, "C": C, "columns": n * n + 2 * n}
    moved = traffic(operator, **shape)
    yield f"`{operator}`"
    for streams in (moved.floor, moved.requested):
        yield f"{mebibytes(streams)} ({streams / (2 * TOKENS * C):.0f}C)"
    with compiled.recorded_for(compiled.GPUS["sm_90"]):
        others = apart(operator, **shape)
    for kind in KINDS:
        yield mebibytes(apart_bytes([each for each in others if each.kind == kind]))
    yield f"{moved.flops / 1e9:.1f}"
    for name, gpu in GPUS.items():
        with compiled.recorded_for(compiled.GPUS[CUT_AS.get(name, "sm_90")]):
            yield f"{1e6 * predicted_seconds(operator, gpu, **shape):.0f}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}" if count >= 2**20 or not count else f"{count / 2**20:.1f}"


if __name__ == "__main__":
    main()
