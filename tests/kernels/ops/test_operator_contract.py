"""What every `mhc::` operator of the kernels promises, whichever it is.

An operator that is not listed in `operators` fails here; so does a variant that cannot keep a
promise.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from mhc_compile.kernels import backends, eager, ops
from mhc_compile.kernels.ops import register, site
from mhc_compile.kernels.variants import VARIANTS, get_variant

from ..operands import (
    EPS,
    IN_CPP_AND_EAGER,
    assert_not_autocast,
    assert_same,
    assert_strides_do_not_matter,
    random_site,
)

mhc = torch.ops.mhc
PAPER = get_variant("mhc")
MODULES = [
    importlib.import_module(f"{ops.__name__}.{found.name}")
    for found in pkgutil.iter_modules(ops.__path__)
]


def operators(dtype=torch.float32, variant=PAPER, leading=(2, 3)):
    """Every operator with operands; backwards with such as need no gradient."""
    n, C, exact = 4, 8, torch.float64 if dtype is torch.float64 else torch.float32
    previous, following = (
        random_site(variant, n, C, leading, seed=seed).to(dtype) for seed in (1, 2)
    )
    X, f, text = previous.X, previous.f, variant.text
    H_pre, H_post, H_res, *kept = mhc.coefficients(*previous.mapping, text, EPS)
    dH = [torch.randn_like(t) for t in (H_pre, H_post, H_res)]
    dh, partial = torch.randn_like(f), torch.randn_like(X)
    opened = (dh, *dH[1:], H_pre)
    closed = (H_res, H_post, X, f)
    mapping = following.mapping
    head = (X, torch.randn(n * C, n, dtype=exact), *torch.randn(1 + n, dtype=exact).split([1, n]))
    weighted = mhc.head(*head, EPS, 1e-6, dtype)
    saved = (*previous.mapping, *kept)
    logits, by = torch.randn(*leading, n, n).to(dtype), torch.randn(5, 7).to(dtype)
    forward = {
        "matmul": (torch.randn(*leading, 5).to(dtype), by),
        "sinkhorn_knopp": (logits, 5, EPS),
        "coefficients": (*mapping, text, EPS),
        "pre": (H_pre, X, torch.bfloat16),
        "post_res": closed,
        "coefficients_pre": (*mapping, text, EPS, torch.bfloat16),
        "seam": (*closed, *mapping[1:], text, EPS, torch.float32),
        "expand": (f, n),
        "readout": (X, "mean", dtype),
        "readout_backward": (f, n, "mean", dtype),
        "head": (*head, EPS, 1e-6, dtype),
    }
    backward = {
        "sinkhorn_knopp_backward": (torch.randn_like(logits), logits, 5, EPS),
        "coefficients_backward": (*dH, *saved, text, EPS),
        "pre_backward": (dh, H_pre, X),
        "post_res_backward": (partial, *closed),
        "coefficients_pre_backward": (*opened, *saved, partial, text, EPS),
        "seam_backward": (*opened, *saved, partial, *closed, text, EPS),
        "head_backward": (dh, torch.randn_like(weighted[1]), *head, *weighted[1:]),
    }
    return {name: with_gradients(given) for name, given in forward.items()} | backward


def with_gradients(operands):
    """The same numbers, as leaves that need a gradient."""
    return tuple(
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in operands
    )


NAMES = list(operators())
FORWARD = [name for name in NAMES if name == "readout_backward" or "backward" not in name]
OF_A_VARIANT = [name for name in NAMES if "coefficients" in name or "seam" in name]
CASES = [(name, "mhc") for name in NAMES]
CASES += [(name, variant) for variant in VARIANTS[1:] for name in OF_A_VARIANT]

every_operator = pytest.mark.parametrize(("name", "variant"), CASES)
every_dtype = pytest.mark.parametrize("dtype", IN_CPP_AND_EAGER, ids=str)


def operands_of(name, variant, dtype=torch.float32, leading=(2, 3)):
    return operators(dtype, get_variant(variant), leading)[name]


def test_every_operator_is_here_and_its_module_says_what_it_is():
    found = set()
    for module in MODULES:
        for name, definition in vars(module).items():
            if isinstance(definition, type(site.pre)):
                found.add(name)
                assert f"mhc::{name}" in module.__doc__
                assert definition._init_fn.__name__ == name and definition._init_fn.__doc__
    assert found == set(NAMES)


def test_a_backward_returns_a_tuple_of_one_gradient_too():
    def one_backward(X: Tensor) -> Tensor:
        return X

    with pytest.raises(TypeError, match="one_backward must return a tuple of gradients"):
        register.operator(like="X")(one_backward)


def test_operands_have_the_names_of_what_they_are():
    call = register.Call(torch.ones(2, 4, 8), torch.ones(2, 4))
    with pytest.raises(ValueError, match="does not say what 'norms' is"):
        call.flat(("norms",), torch.ones(2, 4))


@every_operator
def test_opcheck(name, variant):
    opcheck(getattr(mhc, name).default, operands_of(name, variant))


@every_dtype
@pytest.mark.parametrize("name", [name for name in NAMES if name != "matmul"])  # that is BLAS
def test_strides_do_not_matter(name, dtype):
    assert_strides_do_not_matter(getattr(mhc, name), operators(dtype)[name])


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_into_operators(name, dtype):
    assert_not_autocast(getattr(mhc, name), operators(dtype)[name])


@every_dtype
@pytest.mark.parametrize("name", FORWARD)
def test_gradients_under_autocast_are_those_without(name, dtype):
    operands = operators(dtype)[name]
    plain = results(name, operands)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(name, operands)
    assert_same(inside, plain)


def results(name, operands):
    """Of a forward, and gradients of its differentiable results; drawn the same each time."""
    outputs = getattr(mhc, name)(*operands)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    random = torch.Generator().manual_seed(7)
    differentiable = [t for t in outputs if t.requires_grad]
    grads = [torch.randn(t.shape, generator=random).to(t.dtype) for t in differentiable]
    leaves = [t for t in operands if isinstance(t, Tensor)]
    gradients = torch.autograd.grad(differentiable, leaves, grads, materialize_grads=True)
    return [*outputs, *gradients]


@every_operator
def test_two_runs_are_bit_equal(name, variant):
    operands = operands_of(name, variant)
    operator = getattr(mhc, name)
    assert_same(operator(*operands), operator(*operands))


@every_operator
def test_arguments_are_left_alone(name, variant):
    operands = operands_of(name, variant)
    before = [t.detach().clone() for t in operands if isinstance(t, Tensor)]
    getattr(mhc, name)(*operands)
    assert_same([t for t in operands if isinstance(t, Tensor)], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_operator
def test_no_tokens_give_no_results_and_no_gradients_of_parameters(name, variant, dtype):
    for leading in ((0,), (2, 0)):
        operands = operands_of(name, variant, dtype, leading)
        given = getattr(mhc, name)(*operands)
        found = [given] if isinstance(given, Tensor) else list(given)
        found += results(name, operands) if name in FORWARD else []
        for t in found:
            assert t.numel() == 0 or (0 not in t.shape and not t.any())


@every_operator
def test_one_token_needs_no_leading_dimension(name, variant):
    """The same bits as in a batch of one."""
    alone, batch = (operands_of(name, variant, leading=lead) for lead in ((), (1,)))
    given = [
        t.reshape(other.shape) if isinstance(t, Tensor) else t
        for t, other in zip(batch, alone, strict=True)
    ]
    operator = getattr(mhc, name)
    found, expected = operator(*given), operator(*batch)
    if isinstance(found, Tensor):
        found, expected = [found], [expected]
    assert_same([t.flatten() for t in found], [t.flatten() for t in expected])


REFUSAL = dict.fromkeys(
    (name for name in NAMES if name not in FORWARD), r"disabled=\('fuse_coefficients',\)"
)
REFUSAL["sinkhorn_knopp_backward"] = "variant 'identity'"


@pytest.mark.parametrize("name", REFUSAL)
def test_double_backward_is_refused_and_says_what_to_do(name):
    operands = with_gradients(operators()[name])
    output = getattr(mhc, name)(*operands)
    with pytest.raises(RuntimeError, match=f"double backward.*{REFUSAL[name]}"):
        (output if isinstance(output, Tensor) else output[0]).sum().backward()


@pytest.mark.parametrize("name", FORWARD)
def test_inference_mode_gives_the_same(name):
    operands = operators()[name]
    expected = getattr(mhc, name)(*operands)
    with torch.inference_mode():
        assert_same(getattr(mhc, name)(*operands), expected)


def python_calls(function):
    """Calls of functions that lie in kernels/, while `function` runs."""
    folder, found = str(Path(site.__file__).resolve().parents[1]), []

    def count(frame, event, argument):
        if event == "call" and str(Path(frame.f_code.co_filename).resolve()).startswith(folder):
            found.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", [*OF_A_VARIANT, "pre", "post_res"])
def test_a_step_costs_few_calls_in_python(name):
    """What device, dtypes, n and variant decide is decided once, and tensors are checked together.

    Some 150 calls a site and step would be as long as the kernels of a GPU.
    """
    if backends.implementation(torch.device("cpu"), torch.float32, 4) is eager:
        pytest.skip("no C++ compiler: PyTorch is called from Python, and that is what is counted")
    operands, operator = operators()[name], getattr(mhc, name)
    with torch.no_grad():
        operator(*operands)
        found = python_calls(lambda: operator(*operands))
    assert 5 < len(found) <= 16, found
