"""Which implementation computes a site, on devices that need not be there."""

import inspect

import pytest
import torch

from mhc_compile.kernels import backends, eager
from mhc_compile.kernels.cpu import backend as cpu
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.variants import get_variant

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """Of the CUDA device, by default Hopper's; nothing is remembered from one test to the next."""
    found = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[0])
    for remembered in (backends._has_matrix_units, backends._gpu):
        remembered.cache_clear()
    yield found
    for remembered in (backends._has_matrix_units, backends._gpu):
        remembered.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 8, 10])
def test_streams_on_cuda_run_in_triton(dtype, n):
    assert backends.implementation(CUDA, dtype, n) is gpu
    assert backends.implementation(CUDA, dtype, n, get_variant("mhc")) is gpu


@pytest.mark.parametrize(
    "device, dtype, n",
    [(CUDA, torch.float64, 4), (CUDA, torch.bfloat16, 16), (torch.device("mps"), torch.float32, 4)],
    ids=str,
)
def test_what_no_kernel_takes_runs_in_pytorch(device, dtype, n):
    assert backends.implementation(device, dtype, n) is eager


def test_devices_without_bfloat16_products_run_in_pytorch(capability):
    capability[0] = (7, 5)
    assert backends.implementation(CUDA, torch.bfloat16, 4) is eager


def test_without_triton_pytorch_runs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backends.implementation(CUDA, torch.bfloat16, 4) is eager


def test_cpu_is_left_alone():
    found = backends.implementation(torch.device("cpu"), torch.float16, 4)
    assert found is eager and found is not cpu


def test_every_implementation_has_the_functions_of_kernels():
    """Operators call whichever was chosen."""
    names = {name for name, f in vars(backends.Kernels).items() if inspect.isfunction(f)}
    names = {name for name in names if not name.startswith("_")}
    assert {"coefficients", "seam_backward", "readout"} < names
    for implementation in (eager, cpu, gpu):
        assert all(callable(getattr(implementation, name)) for name in names)
