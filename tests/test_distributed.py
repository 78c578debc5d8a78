"""DistributedDataParallel: two real processes on gloo, and more than a bucket of parameters."""

from __future__ import annotations

import copy
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile import _torch
from mhc_compile.errors import ExampleInputsError, UnsupportedError

from .checks import assert_moves
from .models import GPT, ids, relative

WIDTH, LAYERS = 128, 4
MEBIBYTE = 2**20


def build() -> nn.Module:
    """A transformed, perturbed model with more parameters than DDP's first bucket of 1 MiB."""
    torch.manual_seed(0)
    model = GPT(layers=LAYERS, width=WIDTH)
    mhc_compile.transform(model, n=2, example_inputs=(ids(4),))
    assert_moves(model, (ids(4),))
    return model


def gradients(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    model(tokens).float().square().mean().backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad for name, p in inner.named_parameters()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = DistributedDataParallel(build())
    found = gradients(model, ids(4)[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(found, os.path.join(folder, "gradients.pt"))
    dist.barrier()
    # On a busy machine the end of the group, or of Python, may wait for ever: for gloo's thread,
    # which waits for Python's lock to let go of a tensor.
    os._exit(0)


def test_two_processes_have_the_gradients_of_one() -> None:
    model = build()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 2 * MEBIBYTE
    expected = gradients(model, ids(4))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder,), nprocs=2)
        found = torch.load(os.path.join(folder, "gradients.pt"))
    assert found.keys() == expected.keys()
    assert sum(".mhc." in name for name in found) == 3 * 2 * LAYERS
    for name, gradient in expected.items():
        scale = gradient.norm().clamp_min(1e-6)
        assert (found[name] - gradient).norm() < 1e-4 * scale, name


@pytest.fixture
def alone() -> object:
    """A process group of this process only."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("transformed", [True, False])
def test_compiling_around_ddp_is_refused_in_words(transformed: bool) -> None:
    model = build() if transformed else GPT(layers=LAYERS, width=2 * WIDTH)
    message = r"cut at its gradient buckets.*model\.compile\(backend='mhc'\).*optimize_ddp = False"
    with pytest.raises(Exception, match=message):
        torch.compile(DistributedDataParallel(model), backend="mhc")(ids(4))


@pytest.mark.usefixtures("alone")
def test_compiling_inside_ddp_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, for forward and backward; Inductor's place is taken by the graph itself."""
    graphs = []

    def run(gm: torch.fx.GraphModule, *_: object) -> object:
        graphs.append(gm)
        return gm.forward

    monkeypatch.setattr(_torch, "compile_inductor", run)
    model = build()
    expected = gradients(copy.deepcopy(model), ids(4))
    model.compile(backend="mhc")
    found = gradients(DistributedDataParallel(model), ids(4))
    assert len(graphs) == 1
    assert all(relative(found[name], gradient) < 1e-4 for name, gradient in expected.items())


@pytest.mark.usefixtures("alone")
def test_parameters_made_after_ddp_are_not_left_out_silently() -> None:
    """DDP averages the gradients of the parameters that it was made with."""
    wrapped = DistributedDataParallel(GPT())
    comes_last = r"DistributedDataParallel\(mhc_compile\.transform\(model\)\)"
    with pytest.raises(UnsupportedError, match=comes_last):
        mhc_compile.transform(wrapped, example_inputs=(ids(),))
    mhc_compile.transform(wrapped.module, example_inputs=(ids(),))
    with pytest.raises(UnsupportedError, match=comes_last):
        wrapped(ids())
    with pytest.raises(ExampleInputsError, match="at its first call"):
        DistributedDataParallel(mhc_compile.transform(GPT()))
    model = mhc_compile.transform(GPT(), example_inputs=(ids(),))
    for parameter in mhc_compile.parameters(model):
        parameter.requires_grad_(False)
    DistributedDataParallel(model)(ids())  # which has nothing to average for frozen ones
