"""What Triton's compiler makes of recorded launches, for GPUs that need not be there.

    compiled(launch, GPUS["sm_90"])    -> registers, stack, spills, accesses, shared memory, ...

The launch goes through the same function that specialises and compiles a kernel when it runs; only
the device is a stand-in. Registers, stack and instructions are read from the machine code.
"""

import re
import resource
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mhc_compile.kernels.gpu.launch import Launch


@dataclass(frozen=True)
class Gpu:
    """What an architecture gives to the programs of one multiprocessor (compute unit).

    Args:
        target: as Triton names it.
        registers: 32-bit registers of a multiprocessor; `unit`: given to a warp in steps of this.
        warps, programs: most at a time.
        shared: bytes of shared memory; `reserved` of them go to each program beside its own.
        columns: of tensor memory; 0 where there is none.
        multiprocessors, bandwidth: of the product that is named, bytes per second.
        latency: seconds from a request to its data under load, a round figure.
    """

    product: str
    target: GPUTarget
    registers: int
    unit: int
    warps: int
    programs: int
    shared: int
    reserved: int
    columns: int
    multiprocessors: int
    bandwidth: float
    latency: float


GPUS = {
    "sm_80": Gpu(
        "A100", GPUTarget("cuda", 80, 32), 65536, 256, 64, 32, 164 << 10, 1024, 0,
        108, 2.0e12, 6e-7,
    ),
    "sm_90": Gpu(
        "H100", GPUTarget("cuda", 90, 32), 65536, 256, 64, 32, 228 << 10, 1024, 0,
        132, 3.35e12, 7e-7,
    ),
    "sm_100": Gpu(
        "B200", GPUTarget("cuda", 100, 32), 65536, 256, 64, 32, 228 << 10, 1024, 512,
        148, 8.0e12, 8e-7,
    ),
    "gfx942": Gpu(
        "MI300X", GPUTarget("hip", "gfx942", 64), 131072, 512, 32, 32, 64 << 10, 0, 0,
        304, 5.3e12, 8e-7,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """Of one kernel on one GPU.

    Args:
        registers: of a thread.
        stack: bytes of a thread in local memory.
        spills: instructions that read or write local memory; on AMD, registers that were spilled.
        loads, stores: global accesses in the machine code, by bytes a thread moves.
        shared: bytes of a program.
        programs: at a time on a multiprocessor.
        in_flight: most bytes that a program has asked for and not waited for yet.
        seconds: of processor time to compile.
    """

    registers: int
    stack: int
    spills: int
    loads: dict[int, int]
    stores: dict[int, int]
    shared: int
    programs: int
    in_flight: int
    seconds: float

    def bandwidth(self, gpu: Gpu) -> float:
        """Share of the GPU's bandwidth that so many bytes in flight sustain; an estimate.

        Bytes that are stored come on top, in the ratio that the machine code has them: nothing
        waits for them.
        """
        loaded, stored = (sum(w * k for w, k in x.items()) for x in (self.loads, self.stores))
        if not loaded:
            return 0.0
        requested = self.programs * self.in_flight * (loaded + stored) / loaded
        return min(1.0, requested * gpu.multiprocessors / gpu.latency / gpu.bandwidth)


@contextmanager
def recorded_for(gpu: Gpu) -> Iterator[None]:
    """Launchers inside choose as on this kind of GPU."""
    with patch.object(torch.version, "hip", "6" if gpu.target.backend == "hip" else None):
        yield


def compiled(launch: Launch, gpu: Gpu) -> Compiled:
    begin = _processor_seconds()
    kernel = _compile(launch, gpu)
    seconds = _processor_seconds() - begin
    read = _read_amd if gpu.target.backend == "hip" else _read_nvidia
    found = read(kernel)
    found["in_flight"] *= kernel.metadata.num_warps * gpu.target.warp_size
    return Compiled(
        shared=kernel.metadata.shared,
        programs=_programs(gpu, found["registers"], kernel.metadata),
        seconds=round(seconds, 2),
        **found,
    )


class _Device:
    """The driver of a GPU that is not there; each target counts as a device of its own."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: str) -> int:
        return 0


def _compile(launch: Launch, gpu: Gpu) -> Any:
    """Triton takes a dtype in place of a tensor, and assumes its pointer is aligned to 16 bytes."""
    args = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in launch.args]
    with patch.object(driver, "_active", _Device(gpu.target)):
        return launch.kernel.warmup(*args, grid=launch.grid, **launch.constants)


def _processor_seconds() -> float:
    """Of this process and of the assemblers it has waited for."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(t.ru_utime + t.ru_stime for t in times)


def _programs(gpu: Gpu, registers: int, metadata: Any) -> int:
    """How many fit a multiprocessor at a time."""
    warps = metadata.num_warps
    per_warp = -(-registers * gpu.target.warp_size // gpu.unit) * gpu.unit
    limits = [gpu.programs, gpu.warps // warps, gpu.registers // (per_warp * warps)]
    if metadata.shared:
        limits.append(gpu.shared // (metadata.shared + gpu.reserved))
    if columns := getattr(metadata, "tmem_size", 0):
        limits.append(gpu.columns // columns)
    return min(limits)


# --- NVIDIA --------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        text = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    code = [match.groups() for match in map(_INSTRUCTION.match, text.splitlines()) if match]
    names = [name.split(".") for name, _ in code]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "spills": sum(name[0] in ("LDL", "STL") for name in names),
        "loads": _widths(name for name in names if name[0] in ("LDG", "LDGSTS")),
        "stores": _widths(name for name in names if name[0] == "STG"),
        "in_flight": _in_flight(code),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _widths(names: Iterable[list[str]]) -> dict[int, int]:
    return dict(sorted(Counter(map(_width, names)).items()))


def _width(name: list[str]) -> int:
    return next((_BYTES[part] for part in name if part in _BYTES), 4)


_REGISTER = re.compile(r"\bR(\d+)")


def _in_flight(code: list[tuple[str, str]]) -> int:
    """Most bytes of a thread's loads whose registers nothing has read yet, or whose group of copies
    to shared memory was not waited for, in the order of the text."""
    waiting: dict[int, int] = {}  # first register of a load: its bytes
    groups = [0]
    most = 0
    for name, operands in code:
        parts = name.split(".")
        touched = {int(number) for number in _REGISTER.findall(operands)}
        for first, width in list(waiting.items()):
            if touched & set(range(first, first + max(1, width // 4))):
                del waiting[first]
        if parts[0] == "LDG":
            waiting[int(_REGISTER.search(operands)[1])] = _width(parts)  # type: ignore[index]
        elif parts[0] == "LDGSTS":
            groups[-1] += _width(parts)
        elif parts[0] == "LDGDEPBAR":
            groups.append(0)
        elif parts[0] == "DEPBAR" and "SB0" in operands:
            left = int(operands.rsplit("0x", 1)[1], 16)
            groups = groups[len(groups) - 1 - left :] if left < len(groups) else groups
        most = max(most, sum(waiting.values()) + sum(groups))
    return most


# --- AMD -----------------------------------------------------------------------------------------

_AMD_ACCESS = re.compile(r"^\s+(?:global|buffer)_(load|store)_(\w+)")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _read_amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        match = re.search(rf"{name}:?\s+(\d+)", text)
        assert match is not None, name
        return int(match[1])

    accesses: dict[str, Counter] = {"load": Counter(), "store": Counter()}
    waiting: list[int] = []  # loads and stores, oldest first
    most = 0
    for line in text.splitlines():
        if match := _AMD_ACCESS.match(line):
            width = next((b for name, b in _AMD_BYTES.items() if match[2] == name), 2)
            accesses[match[1]][width] += 1
            waiting.append(width if match[1] == "load" else 0)
        elif match := re.search(r"s_waitcnt.*vmcnt\((\d+)\)", line):
            waiting = waiting[max(0, len(waiting) - int(match[1])) :]
        most = max(most, sum(waiting))
    return {
        "registers": field(r"\.vgpr_count"),
        "stack": field(r"\.private_segment_fixed_size"),
        "spills": field(r"\.vgpr_spill_count"),
        "loads": dict(sorted(accesses["load"].items())),
        "stores": dict(sorted(accesses["store"].items())),
        "in_flight": most,
    }
