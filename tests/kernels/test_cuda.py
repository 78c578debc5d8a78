"""The Triton kernels on a real GPU: numerics against PyTorch, CUDA graphs. Skipped without one."""

import pytest
import torch

from mhc_compile.kernels import eager
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import get_variant

from .operands import EPS, random_site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PAPER = get_variant("mhc")


def on_gpu(n, C, T, dtype):
    site = random_site(PAPER, n, C, (T,)).to(dtype)
    return [t.cuda() for t in (site.X, site.f, site.phi, site.alpha, site.bias)]


def forward(kernels, X, f, phi, alpha, bias):
    parameters = Parameters(phi, alpha, bias)
    h, H_pre, H_post, H_res, y, inv_r = kernels.coefficients_pre(
        Mapping(X, *parameters), variant=PAPER, eps=EPS
    )
    closed = Closed(H_res, H_post, X, f)
    following = kernels.seam(closed, parameters, variant=PAPER, eps=EPS)
    return h, H_pre, H_post, H_res, y, inv_r, *following


def backward(kernels, dh, X, f, phi, alpha, bias):
    parameters = Parameters(phi, alpha, bias)
    mapping = Mapping(X, *parameters)
    _, _, H_post, H_res, *_ = kernels.coefficients_pre(mapping, variant=PAPER, eps=EPS)
    closed = Closed(H_res, H_post, X, f)
    X2, _, H_pre, *_, y, inv_r = kernels.seam(closed, parameters, variant=PAPER, eps=EPS)
    dH_post, dH_res = torch.ones_like(H_post), torch.eye(X.shape[1]).to(H_res).expand_as(H_res)
    opened = Opened(dh, dH_post, dH_res.contiguous(), H_pre)
    saved = Saved(X2, *parameters, y, inv_r)
    return kernels.seam_backward(opened, saved, X2, closed, variant=PAPER, eps=EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "C", "T"), [(4, 2560, 300), (2, 136, 7), (3, 13, 65), (8, 776, 129)])
def test_no_further_from_float64_than_pytorch(n, C, T, dtype):
    operands = on_gpu(n, C, T, dtype)
    dh = torch.randn_like(operands[1])
    wide = [t.double() for t in operands]
    for function, given, exact in (
        (forward, operands, wide),
        (backward, [dh, *operands], [dh.double(), *wide]),
    ):
        true = function(eager, *exact)
        for ours, plain, t in zip(
            function(gpu, *given), function(eager, *given), true, strict=True
        ):
            assert (ours - t).norm() <= 2 * (plain - t).norm() + 1e-5 * t.norm()


def test_two_runs_are_bit_equal():
    operands = on_gpu(4, 4096, 1000, torch.bfloat16)
    dh = torch.randn_like(operands[1])
    for function, given in ((forward, operands), (backward, [dh, *operands])):
        first, second = function(gpu, *given), function(gpu, *given)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_cuda_graph_captures_every_launch():
    """Nothing waits for the device, and a replay computes the same."""
    operands = on_gpu(4, 2560, 300, torch.bfloat16)
    dh = torch.randn_like(operands[1])
    expected = *forward(gpu, *operands), *backward(gpu, dh, *operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = *forward(gpu, *operands), *backward(gpu, dh, *operands)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
