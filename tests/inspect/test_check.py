"""`mhc_compile.check`: all is well where it is, and every way in which it is not is said.

What can be wrong is made wrong here: each test breaks one thing that nothing else notices.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile import _torch
from mhc_compile.compiler import guard, history
from mhc_compile.errors import CheckError, NotTransformedError
from mhc_compile.model import initial, swap
from mhc_compile.model.declare import Spec
from mhc_compile.model.swap import SPEC
from mhc_compile.passes.sites import detect
from tests import checks
from tests.models import GPT, ids, pair

CLAIMS = (
    "parameters are trained",
    "at the start equal to the plain model",
    "perturbed, the outputs move",
    "every group of every site has a gradient",
    "compiled, outputs and gradients are the same",
)


@pytest.fixture(autouse=True)
def inductor(monkeypatch) -> Iterator[None]:
    """The graph itself runs in Inductor's place; one test below has the real one."""
    monkeypatch.setattr(_torch, "compile_inductor", lambda graph, inputs, patches: graph.forward)
    yield
    torch._dynamo.reset()


def failing(found: mhc_compile.Check) -> str:
    """The claim that does not hold; there is one, it ends the check, and it can be raised."""
    *held, failed = found.steps
    assert not found and not found.ok and not failed.holds and all(s.holds for s in held)
    assert [s.claim for s in found.steps] == list(CLAIMS[: len(found.steps)])
    assert "NOT WELL" in str(found) and failed.found in str(found)
    with pytest.raises(CheckError, match=failed.claim):
        found.raise_for_problems()
    return f"{failed.claim}: {failed.found}"


# --------------------------------------------------------------------------------- all is well


def test_a_model_that_is_well(monkeypatch):
    monkeypatch.undo()  # with Inductor
    model = pair(dtype=torch.float32)[1]
    found = mhc_compile.check(model, ids())
    assert found and found.problems == [] and found.notes == []
    assert [s.claim for s in found.steps] == list(CLAIMS)
    assert (found.model, found.n, len(found.sites)) == ("GPT", 4, 4)
    assert str(found).startswith("GPT: 4 sites, n = 4: all is well\n+  parameters are trained")
    assert "33 groups of 4 sites" in str(found)
    found.raise_for_problems()


@pytest.mark.parametrize(
    ("dtype", "training"),
    [(torch.float64, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, False)],
)
def test_every_precision_and_mode(dtype, training):
    model = pair(lambda: GPT(dropout=0.2), dtype=dtype)[1].train(training)
    found = mhc_compile.check(model, ids())
    assert found, str(found)
    assert model.training is training


@pytest.mark.parametrize(
    ("variant", "readout"),
    [
        ("mhc", "sum"),
        ("deepseek_v4", "mean"),
        ("hc", "head"),
        ("mhc_lite", "mean"),
        ("kromhc", "mean"),
        ("identity", "sum"),
    ],
)
def test_every_variant_and_readout(variant, readout):
    found = mhc_compile.check(pair(variant=variant, readout=readout)[1], ids())
    assert found, str(found)
    assert any("not compared" in note for note in found.notes) is (readout == "sum")


@pytest.mark.parametrize(
    "options", [{"init": "paper"}, {"spread": 0.3}, {"exclude": ("h.0.attn",)}]
)
def test_whatever_the_parameters_start_with(options):
    """It starts from the values that preserve; a first site that is excluded has no H_res."""
    found = mhc_compile.check(pair(**options)[1], ids())
    assert found, str(found)


def test_trained_parameters_and_frozen_models():
    model = pair()[1]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in mhc_compile.parameters(model):
        p.requires_grad_()
    checks.perturb(model)
    assert mhc_compile.check(model, ids())


class Counting(nn.Module):
    """Has state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gpt = nn.BatchNorm1d(5), GPT(dropout=0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids: Tensor) -> dict[str, Any]:
        self.calls += 1
        logits = self.norm(self.gpt(ids))
        return {"logits": [logits], "best": logits.argmax(-1), "none": None}


def test_the_model_is_left_as_it_was():
    model = pair(Counting)[1]
    model.compile(backend="mhc")
    model(ids())["logits"][0].sum().backward()
    checks.perturb(model)
    before = copy.deepcopy(model.state_dict())
    gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
    buffers, compiled = dict(model.named_buffers()), model._compiled_call_impl
    states = torch.random.get_rng_state(), random.getstate()
    classes = [type(m) for m in model.modules()]
    assert mhc_compile.check(model, ids())
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert all(p.grad.equal(gradients[k]) for k, p in model.named_parameters())
    assert all(b is buffers[k] for k, b in model.named_buffers())
    assert model._compiled_call_impl is compiled
    assert torch.random.get_rng_state().equal(states[0]) and random.getstate() == states[1]
    assert [type(m) for m in model.modules()] == classes


def test_a_wrapper_and_a_compiled_module():
    model = pair()[1]
    assert mhc_compile.check(torch.compile(model, backend="mhc"), ids())
    assert mhc_compile.check(nn.Sequential(model), ids()).sites == [
        "0.h.0.attn", "0.h.0.mlp", "0.h.1.attn", "0.h.1.mlp",
    ]  # fmt: skip


def test_a_model_that_waits_for_its_first_call():
    model = mhc_compile.transform(GPT().double())
    assert mhc_compile.check(model, ids())


class Skipping(GPT):
    def forward(self, ids: Tensor, active: tuple[bool, ...] = (True, True, True)) -> Tensor:
        x = self.embed(ids)
        for block, runs in zip(self.h, active, strict=True):
            if runs:
                x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_skipped_are_noted(frozen):
    model = pair(lambda: Skipping(layers=3))[1]
    for parameter in model.h.parameters():
        parameter.requires_grad_(not frozen)
    for parameter in mhc_compile.parameters(model):
        parameter.requires_grad_()
    found = mhc_compile.check(model, ids(), active=(True, False, True))
    assert found, str(found)
    (note,) = found.notes
    assert note == "these sites did not run in this call: 'h.1.attn', 'h.1.mlp'"
    assert "33 groups of 4 sites" in str(found)
    assert model.h[0].attn.qkv.weight.requires_grad is not frozen


def test_a_backward_that_is_still_to_come():
    model = pair(Counting)[1]
    checks.perturb(model)
    expected = torch.autograd.grad(model(ids())["logits"][0].sum(), list(model.parameters()))
    loss = model(ids())["logits"][0].sum()
    assert mhc_compile.check(model, ids(), skip_compiled=True)
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(found) == len(expected) and all(g.isfinite().all() for g in found)


def test_without_the_compiled_call():
    found = mhc_compile.check(pair()[1], ids(), skip_compiled=True)
    assert [s.claim for s in found.steps] == list(CLAIMS[:-1])
    assert found and found.notes == ["the compiled call was left out"]


class Autocast(GPT):
    def forward(self, ids: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(ids).float()


def test_a_model_that_sets_autocast_itself():
    found = mhc_compile.check(pair(Autocast, dtype=torch.float32)[1], ids(), skip_compiled=True)
    assert found, str(found)
    assert "allowed 8.8e-02" in str(found)


def test_a_forward_around_its_own_bound_method():
    model = pair()[1]
    inner = model.h[0].forward
    model.h[0].forward = lambda x: inner(x)
    found = mhc_compile.check(model, ids(), skip_compiled=True)
    assert found, str(found)


# ---------------------------------------------------------------------------- what is not well


def test_parameters_that_are_not_numbers():
    model = pair()[1]
    model.h[1].mhc.mlp.bias.data.fill_(torch.nan)
    assert "Those of 'h.1.mlp' hold values that are not finite" in failing(
        mhc_compile.check(model, ids())
    )


def test_branches_that_are_scaled_to_nothing():
    model = pair()[1]
    with torch.no_grad():
        for block in model.h:
            for linear in (block.attn.proj, block.mlp[2]):
                linear.weight.zero_()
                linear.bias.zero_()
    assert "All sites are n-stream in the captured graph, but the model scales" in failing(
        mhc_compile.check(model, ids())
    )


def test_a_model_that_computes_plain_residuals(monkeypatch):
    model = pair()[1]

    def plain(module, args, kwargs):
        with swap.plainly(module):
            return module(*args, **kwargs)

    monkeypatch.setattr(swap, "_call_as_root", plain)
    assert "perturbed, the outputs move: They move by 0.0e+00" in failing(
        mhc_compile.check(model, ids())
    )


def test_one_site_that_is_not_n_stream(monkeypatch):
    """Its block no longer declares it, and both guards are told to look away."""
    model = pair()[1]
    owner = model.h[1]
    spec = Spec.from_json(owner.__dict__[SPEC])
    owner.__dict__[SPEC] = replace(spec, sites=spec.sites[:1]).to_json()
    monkeypatch.setattr(guard, "require_alive", lambda *_: None)
    monkeypatch.setattr(detect, "_refuse_undeclared", lambda *args: None)
    monkeypatch.setattr(history, "record", lambda *_: None)
    found = failing(mhc_compile.check(model, ids()))
    assert "has a gradient: 'h.1.mlp: phi_pre'" in found


def test_a_start_that_is_another_function(monkeypatch):
    model = pair()[1]
    halves = lambda n, index, spread: (torch.ones(n) / n, torch.ones(n) / 2)  # noqa: E731
    monkeypatch.setattr(initial, "preserving", halves)
    assert "at the start equal to the plain model: Outputs differ by" in failing(
        mhc_compile.check(model, ids())
    )


def test_frozen_parameters():
    model = pair()[1]
    model.h[1].requires_grad_(False)
    found = failing(mhc_compile.check(model, ids()))
    assert "'h.1.attn', 'h.1.mlp': they stay as they are" in found
    assert "modules_to_save=['mhc']" in found


class DeadEnd(nn.Module):
    """What the last block computes does not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.gpt.h[1](self.gpt.h[0](self.gpt.embed(ids)))
        return x * x.new_tensor([1.0] + 7 * [0.0]).detach() * 0 + self.gpt.embed(ids)


def test_sites_that_do_not_reach_the_output():
    found = failing(mhc_compile.check(pair(DeadEnd)[1], ids()))
    assert found.startswith("perturbed, the outputs move") or "reach the outputs" in found


def test_a_compiler_that_computes_something_else(monkeypatch):
    def wrong(graph, inputs, patches):
        return lambda *args: [out + 1e-3 for out in graph(*args)]

    monkeypatch.setattr(_torch, "compile_inductor", wrong)
    assert "compiled, outputs and gradients are the same: Outputs differ by" in failing(
        mhc_compile.check(pair()[1], ids())
    )


class _Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def test_a_compiler_with_wrong_gradients(monkeypatch):
    def wrong(graph, inputs, patches):
        return lambda *args: [_Halved.apply(out) for out in graph(*args)]

    monkeypatch.setattr(_torch, "compile_inductor", wrong)
    assert "Gradients of the mHC parameters differ by 5.0e-01" in failing(
        mhc_compile.check(pair()[1], ids())
    )


def test_a_compiler_that_fails(monkeypatch):
    def missing(graph, inputs, patches):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(_torch, "compile_inductor", missing)
    assert "RuntimeError: no C++ compiler" in failing(mhc_compile.check(pair()[1], ids()))


class ByFlag(GPT):
    def forward(self, ids: Tensor, cut: bool = False) -> Tensor:
        x = self.h[0](self.embed(ids))
        if cut:
            x = self.embed(ids).sin()
        return self.head(self.h[1](x))


def test_errors_of_the_library_are_problems():
    model = pair(ByFlag)[1]
    assert "ChainBrokenError: " in failing(mhc_compile.check(model, ids(), cut=True))


def test_errors_of_the_caller_are_raised():
    with pytest.raises(NotTransformedError, match=r"call mhc_compile\.transform"):
        mhc_compile.check(GPT(), ids())
    model = pair()[1]
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        mhc_compile.check(model, ids(), labels=ids())
    assert [type(m) for m in model.modules()] == classes
    with pytest.raises(mhc_compile.MhcError, match="returned no tensor of floating point"):
        mhc_compile.check(pair(lambda: Argmax())[1], ids())


class Argmax(GPT):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).argmax(-1)
