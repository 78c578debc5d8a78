"""What a benchmark ran on, for its result file, and how it asks for memory."""

import os
import platform
from pathlib import Path

import torch

ALLOCATORS = {
    "raised": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_ARENA_MAX": "1",
    },
    "default": {},
}
"""Settings that glibc reads when a process starts. `raised`: large tensors come from the heap and
stay there; by default each is mapped and unmapped anew, page by page."""


def machine() -> dict[str, str]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    found = {
        "processor": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
