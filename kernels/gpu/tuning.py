"""What the Triton kernels take, and how their work is cut: no launch and no Triton in here.

The cut of a kernel depends on n, C, columns and dtype, and on whose GPUs this build of PyTorch is
for; of T only the number of programs does.
"""

from dataclasses import dataclass

import torch

from ..residuals.residual import padded

# --- limits ---------------------------------------------------------------------------------------

MOST_STREAMS = 10
"""Of a site."""

MOST_COLUMNS = 128
"""Columns of φ that fit one program: n² + 2n of up to 10 streams."""

MOST_FUSED_STREAMS = 4
"""Of a seam in one kernel. More do not fit the registers: those seams are made of the kernels of
both sites."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of the streams that are taken."""

# --- kernels that work token by token -------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """How a token-wise kernel cuts its work: a program has `tokens` rows, `channels` at a time."""

    tokens: int
    channels: int
    lane: int
    warps: int = 1


def blocks(C: int, dtype: torch.dtype) -> Blocks:
    """One warp a program: a token, or several where C is smaller than the warp is wide.

    A lane holds `lane` neighbouring channels, 16 bytes: one access of the widest kind per stream,
    and only 8 float32 registers for a stream of 16 bits. With a single warp, sums over channels
    and the few numbers of a token need neither shared memory nor barriers.
    """
    lane = _WIDEST_ACCESS // dtype.itemsize
    warp = lanes() * lane
    width = min(warp, padded(C))
    return Blocks(tokens=min(warp // width, lanes()), channels=width, lane=min(lane, width))


_WIDEST_ACCESS = 16


def lanes() -> int:
    """Threads of a warp: 64 on AMD's GPUs for computing, 32 on NVIDIA's."""
    return 64 if torch.version.hip else 32


def cdiv(total: int, size: int) -> int:
    """Number of blocks of a size, the last one partial."""
    return -(-total // size)


# --- the chain of coefficients --------------------------------------------------------------------

_ELEMENTS = 16
"""Numbers of H_res in the registers of a thread; a program is one warp."""


def tokens_per_program(n: int) -> int:
    """BT: a token per thread, fewer where its n² numbers do not fit the registers of one."""
    return min(lanes(), max(1, _ELEMENTS * lanes() // padded(n) ** 2))


# --- x⃗ φ and its gradients ------------------------------------------------------------------------

_TOKENS = 64
"""Tokens of a block. φ is read once per block, from L2: 64 make that as much as X, 16 four times
as much."""

_CHANNELS = 32
"""Channels of a tile. In the seam, which has n tiles of X' in registers, 64 would spill."""

_SPLIT, _MOST_SPLITS = 512, 8
"""Channels of a split, unless that makes more than 8: a split costs 4 · columns bytes twice.

Eight fill a GPU from about 1,000 tokens on."""

_SLOTS = 8
"""Parts of dφ: ranges of tokens, each as large as φ."""

_THREADS = 256
"""Of a program: as many as a tile of X has 16 bytes."""


@dataclass(frozen=True)
class Config:
    """How x⃗ φ is cut; it depends on n, C, columns and dtype alone, never on T.

    Args:
        BT, BK: tokens and channels of a tile.
        SLICE: channels of a split, a multiple of BK; `splits` of them.
        COLS: columns of a tile of φ, a power of two.
        PRECISION: how a tile is multiplied, see `multiply`.
        num_warps: of a program.
    """

    BT: int
    BK: int
    SLICE: int
    splits: int
    COLS: int
    PRECISION: str
    num_warps: int


def config(n: int, C: int, columns: int, dtype: torch.dtype) -> Config:
    """The cut for streams of this shape and dtype.

    Raises:
        ValueError: for float64 streams, which GPUs' matrix units and this file do not take, and
            for more than `MOST_COLUMNS` columns.
    """
    BK = min(_CHANNELS, max(16, padded(C)))
    splits = min(_MOST_SPLITS, cdiv(C, _SPLIT))
    SLICE = BK * cdiv(C, BK * splits)
    return Config(
        BT=_TOKENS,
        BK=BK,
        SLICE=SLICE,
        splits=cdiv(C, SLICE),
        COLS=_columns(n, columns),
        PRECISION=_precision(dtype),
        num_warps=_THREADS // lanes(),
    )


def _columns(n: int, columns: int) -> int:
    if columns > MOST_COLUMNS:
        raise ValueError(
            f"x⃗ φ has Triton kernels for up to {MOST_COLUMNS} columns of φ, got {columns} (n={n})"
        )
    return max(16, padded(columns))


def _precision(dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        taken = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"x⃗ φ has Triton kernels for {taken} streams, got {dtype}")
    if dtype == torch.float32:
        return "ieee" if torch.version.hip else "tf32x3"
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Slots:
    """How gradients are cut: a program has BK channels of GROUP streams, and a slot of tokens.

    Args:
        BT, BK: tokens and channels of a tile.
        GROUP: streams of a program, see `group`. For each further group dh is read once more.
        COLS, PRECISION, num_warps: as in `Config`.
        blocks: of channels.
        slots, size: parts of dφ, and tokens of each. They depend on T, like the order of its sums.
    """

    BT: int
    BK: int
    GROUP: int
    COLS: int
    PRECISION: str
    num_warps: int
    blocks: int
    slots: int
    size: int


def slots(T: int, n: int, C: int, columns: int, dtype: torch.dtype) -> Slots:
    """The cut for streams of this shape and dtype; errors as in `config`."""
    COLS, PRECISION = _columns(n, columns), _precision(dtype)
    # On AMD, where bfloat16 products take more registers, 64 channels would spill.
    BK = 32 if lanes() == 64 and dtype.itemsize == 2 else 64
    BK = min(BK, max(16, padded(C)))
    BT = _THREADS * 16 // dtype.itemsize // BK
    size = BT * cdiv(cdiv(T, BT), _SLOTS)
    return Slots(
        BT=BT,
        BK=BK,
        GROUP=group(n, columns),
        COLS=COLS,
        PRECISION=PRECISION,
        num_warps=_THREADS // lanes(),
        blocks=cdiv(C, BK),
        slots=cdiv(T, size) if T else 0,
        size=size,
    )


def group(n: int, columns: int) -> int:
    """Streams whose dφ fits the registers of a program: all, or so many."""
    return min(n, max(1, _MOST_SUMS // (64 * _columns(n, columns))))


_MOST_SUMS = 8192
"""Elements of dφ in the registers of a program, 32 of each thread."""
