"""Bytes of the operators: the tables of `kernels.traffic`, and what kernels really ask for."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import traffic as pages
from mhc_compile.kernels import eager, traffic
from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.gpu import post_res, pre, readout, tuning
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import get_variant

from ..counting import requested_bytes
from ..sites import Site

# For n = 4, in units of C elements a token: floor, and what is requested of L2 or memory.
UNITS = {
    "add": (3, 3),
    "coefficients_pre": (5, 9),
    "post_res": (9, 9),
    "seam": (10, 14),
    "post_res_backward": (14, 14),
    "coefficients_pre_backward": (13, 18),
    "seam_backward": (19, 24),
}

CALLS = {
    "expand": lambda s, n: (readout.expand, s.f, n),
    "readout": lambda s, n: (readout.readout, s.X, "mean"),
    "expand_backward": lambda s, n: (readout.expand_backward, s.X),
    "readout_backward": lambda s, n: (readout.readout_backward, s.f, n, "mean"),
    "pre": lambda s, n: (pre.pre, s.H_pre, s.X),
    "pre_backward": lambda s, n: (pre.pre_backward, s.dh, s.H_pre, s.X),
    "post_res": lambda s, n: (post_res.post_res, s.H_res, s.H_post, s.X, s.f),
    "post_res_backward": lambda s, n: (
        post_res.post_res_backward,
        s.dX2,
        s.H_res,
        s.H_post,
        s.X,
        s.f,
    ),
}


@pytest.mark.parametrize("operator", UNITS)
def test_table_for_four_streams(operator):
    T, C = 100, 2560
    moved = traffic.traffic(operator, T=T, n=4, C=C, columns=24)
    assert (moved.floor, moved.requested) == tuple(2 * T * C * units for units in UNITS[operator])


def test_site_forward_and_backward():
    """A site between two others: 29C with seams; 41C without, which a chain's ends have."""

    def floor(*operators):
        found = (traffic.traffic(name, T=1, n=4, C=8, columns=24) for name in operators)
        return sum(moved.floor for moved in found) // 16

    assert floor("seam", "seam_backward") == 29
    assert floor("coefficients_pre", "post_res") == 14
    assert floor("coefficients_pre_backward", "post_res_backward") == 27


def mapping(site, n):
    """X, φ, α, b of the paper's variant, and what a backward keeps of them."""
    T, _, C = site.X.shape
    columns = n * n + 2 * n
    mapped = site.X, torch.randn(n * C, columns), torch.ones(3), torch.zeros(columns)
    return Saved(*mapped, torch.randn(T, columns), torch.ones(T))


def closed(site):
    return Closed(site.H_res, site.H_post, site.X, site.f)


def opened(site):
    return Opened(site.dh, site.H_post, site.H_res, site.H_pre)


SITE_CALLS = {
    "coefficients": lambda s, n: (gpu.coefficients, Mapping(*mapping(s, n)[:4])),
    "coefficients_pre": lambda s, n: (gpu.coefficients_pre, Mapping(*mapping(s, n)[:4])),
    "seam": lambda s, n: (gpu.seam, closed(s), Parameters(*mapping(s, n)[1:4])),
    "coefficients_backward": lambda s, n: (
        gpu.coefficients_backward,
        (s.H_pre, s.H_post, s.H_res),
        mapping(s, n),
    ),
    "coefficients_pre_backward": lambda s, n: (
        gpu.coefficients_pre_backward,
        *(opened(s), mapping(s, n), s.dX2),
    ),
    "seam_backward": lambda s, n: (
        gpu.seam_backward,
        *(opened(s), mapping(s, n), s.dX2, closed(s)),
    ),
}


def assert_as_the_table_says(counted, operator, dtype=torch.bfloat16, **shape):
    """Bytes of streams, and those apart, exactly.

    Of more than four streams the gradient of X' is float32 between two kernels of a seam; float32
    streams are counted together with what is apart.
    """
    moved = traffic.traffic(operator, **shape, dtype=dtype)
    apart = traffic.apart_bytes(traffic.apart(operator, **shape, dtype=dtype), dtype)
    seam_of_many = operator == "seam_backward" and shape["n"] > tuning.MOST_FUSED_STREAMS
    between = 2 * shape["T"] * shape["n"] * shape["C"] * 4 if seam_of_many else 0
    expected = {4: apart + between}
    expected[dtype.itemsize] = expected.get(dtype.itemsize, 0) + moved.requested - between
    assert counted == {size: count for size, count in expected.items() if count}


BLOCKS = [(70, 4, 520), (70, 2, 200), (5, 3, 136), (9, 8, 136)]
"""(T, n, C): at least three blocks of channels, for some kernels several of tokens; the last ones
are partial."""

WIDE = ["seam", "coefficients_pre_backward", "seam_backward"]
AS_THE_LAUNCHER_CUTS = [
    *((*shape, operator, torch.bfloat16) for shape in BLOCKS for operator in SITE_CALLS),
    *((5, 4, 2560, operator, torch.bfloat16) for operator in WIDE),
    *((35, 4, 136, operator, dtype) for operator in WIDE for dtype in (torch.float16, torch.float)),
]


@pytest.mark.parametrize("T, n, C, operator, dtype", AS_THE_LAUNCHER_CUTS)
def test_functions_of_a_site_ask_for_what_the_table_says(interpreted, T, n, C, operator, dtype):
    """With the constants that the launchers pick, of the paper's variant."""
    site = Site.random(T, n, C, dtype)
    call = SITE_CALLS[operator](site, n)
    counted = interpreted(requested_bytes, *call, variant=get_variant("mhc"), eps=1e-6)
    shape = {"T": T, "n": n, "C": C, "columns": n * n + 2 * n}
    assert_as_the_table_says(counted, operator, dtype, **shape)


def test_apart_is_listed_by_kind():
    """Parts of H_res and H_post that a seam's backward writes and reads: 1.25C of 16 bits, as
    there are 20 numbers of 4 bytes for every 64 channels, each twice."""
    T, n, C = 1000, 4, 2560
    found = traffic.apart("seam_backward", T=T, n=n, C=C, columns=24)
    assert {each.kind for each in found} == set(traffic.KINDS)
    parts = [each for each in found if each.numbers >= T * 20 * C // 64 and each.kind == "H"]
    assert sum(4 * each.numbers for each in parts) == pytest.approx(2 * T * 1.25 * C, rel=0.02)


def test_bytes_are_counted_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from mhc_compile.kernels.traffic import GPUS, predicted_seconds\n"
        "print(predicted_seconds('seam', GPUS['H200'], T=64, n=4, C=64, columns=24) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    "n, C, dtype",
    [
        *((n, C, torch.bfloat16) for n, C in [(4, 2560), (8, 776), (2, 776), (3, 40)]),
        *((4, 776, dtype) for dtype in (torch.float16, torch.float32)),
    ],
)
@pytest.mark.parametrize("operator", CALLS)
def test_kernels_ask_for_what_the_table_says(interpreted, operator, n, C, dtype):
    """Several blocks of channels, at 776 the last one partial; at 40 tokens share a program."""
    T = 3
    site = Site.random(T, n, C, dtype)
    counted = interpreted(requested_bytes, *CALLS[operator](site, n))
    assert_as_the_table_says(counted, operator, dtype, T=T, n=n, C=C)


def test_coefficients_are_read_once_up_to_four_streams():
    """With more, once for every block of 256 channels."""
    shape = {"T": 1, "C": 2560, "columns": 0}
    assert [each.times for each in traffic.apart("post_res", n=4, **shape)] == [1]
    assert [each.times for each in traffic.apart("post_res", n=8, **shape)] == [10]


FLOPS = {
    "coefficients": lambda s, n: (eager.coefficients, Mapping(*mapping(s, n)[:4])),
    "post_res": lambda s, n: (eager.post_res, s.H_res, s.H_post, s.X, s.f),
    "seam": lambda s, n: (eager.seam, closed(s), Parameters(*mapping(s, n)[1:4])),
}


@pytest.mark.parametrize("operator", FLOPS)
def test_flops_are_those_of_the_products_in_ordinary_pytorch(operator):
    """`H_pre X`, which PyTorch counts, is left out here: n of what makes n² + 2n columns."""
    T, n, C = 5, 4, 64
    function, *args = FLOPS[operator](Site.random(T, n, C, torch.float32), n)
    settings = {} if operator == "post_res" else {"variant": get_variant("mhc"), "eps": 1e-6}
    with FlopCounterMode(display=False) as counter:
        function(*args, **settings)
    of_pre = 2 * T * n * C if operator == "seam" else 0
    moved = traffic.traffic(operator, T=T, n=n, C=C, columns=24)
    assert counter.get_total_flops() == moved.flops + of_pre


@pytest.mark.parametrize("name", traffic.GPUS)
def test_prediction_is_no_better_than_its_limits(name):
    gpu, shape = traffic.GPUS[name], {"T": 16384, "n": 4, "C": 4096, "columns": 24}
    for operator, known in traffic.OPERATORS.items():
        moved = traffic.traffic(operator, **shape)
        seconds = traffic.predicted_seconds(operator, gpu, **shape)
        assert seconds >= known.launches * gpu.launch + moved.floor / gpu.copy
        assert moved.requested >= moved.floor
        assert seconds < 1.5 * moved.requested / gpu.copy + known.launches * gpu.launch


def test_seam_is_predicted_faster_than_its_parts():
    shape = {"T": 16384, "n": 4, "C": 4096, "columns": 24}

    def seconds(operator):
        return traffic.predicted_seconds(operator, traffic.GPUS["H200"], **shape)

    assert seconds("seam") < seconds("post_res") + seconds("coefficients_pre")
    parts = seconds("post_res_backward") + seconds("coefficients_pre_backward")
    assert seconds("seam_backward") < parts


def test_page_is_what_the_script_writes_now():
    """Otherwise: python -m benchmarks.traffic."""
    assert pages.PAGE.read_text(encoding="utf-8") == pages.page()


def test_unknown_operator_raises():
    with pytest.raises(KeyError, match="seem"):
        traffic.traffic("seem", T=1, n=4, C=8)
