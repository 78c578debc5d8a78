"""PEFT around a transformed model, and a transformed model around PEFT.

`modules_to_save=["mhc"]` trains the mHC parameters beside the adapters and saves them with these.
PEFT then keeps each container twice: as it was, and a copy for each adapter.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import ChainBrokenError, CheckpointError
from mhc_compile.model.declare import Spec
from mhc_compile.model.swap import SPEC
from tests.checks import assert_moves
from tests.test_huggingface import LAYERS, moved, plain_model, relative, tokens

hf.logging.set_verbosity_error()
EVERY = ["mhc"]
INPUTS = {"input_ids": tokens()}


def lora(**options: Any) -> peft.LoraConfig:
    """Adapters whose first values are not those that change nothing."""
    given = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{**given, **options})


def transformed(**options: Any) -> Any:
    config = mhc_compile.Config(**{"n": 2, **options})
    return mhc_compile.transform(plain_model("llama"), config=config)


def adapted(model: Any = None, **options: Any) -> Any:
    """A model with LoRA and its mHC parameters among what is trained, moved."""
    wrapped = peft.get_peft_model(
        transformed() if model is None else model, lora(modules_to_save=EVERY, **options)
    )
    moved_active(wrapped)
    return wrapped.eval()


def moved_active(wrapped: nn.Module) -> None:
    with torch.no_grad():
        for parameter in active(wrapped).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)


def active(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    """The mHC parameters that are trained, by their names in the model itself."""
    found = {n: p for n, p in wrapped.named_parameters() if ".mhc." in n and p.requires_grad}
    prefix = "base_model.model."
    return {
        n.replace(".modules_to_save.default", "").removeprefix(prefix): p for n, p in found.items()
    }


def output(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_adapters_and_mhc_parameters_are_trained_and_nothing_else(compiled: bool) -> None:
    base = transformed()
    start = output(base)
    wrapped = adapted(base)
    assert relative(output(wrapped), start) > 1e-2
    if compiled:
        expected = output(wrapped)
        base.compile(backend="mhc")
        assert relative(output(wrapped), expected) < 1e-5
    wrapped.train()
    wrapped(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    learning = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in learning if "mhc" not in n} == {
        n for n, p in wrapped.named_parameters() if "lora_" in n
    }
    # H_res of the first site reads copies of one stream: its part of φ and b need not learn.
    assert {n for n, p in active(wrapped).items() if p.grad is not None and p.grad.any()} == {
        f"model.layers.{i}.mhc.{branch}.{leaf}"
        for i in range(LAYERS)
        for branch in ("self_attn", "mlp")
        for leaf in ("phi", "alpha", "bias")
    }


def test_an_adapter_is_saved_and_loaded_with_its_mhc_parameters(tmp_path: Path) -> None:
    wrapped = adapted()
    wrapped.save_pretrained(tmp_path)
    base = transformed()
    start = output(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert output(loaded).equal(output(wrapped))
    assert relative(output(loaded), start) > 1e-2
    merged = loaded.merge_and_unload()
    assert merged is base
    assert relative(output(merged), output(wrapped)) < 1e-5
    names = {name for name, _ in merged.named_parameters() if "mhc" in name}
    assert names == {name for name, _ in transformed().named_parameters() if "mhc" in name}


def test_an_adapter_of_another_function_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"variant='mhc', this model has .*variant='hc'"):
        peft.PeftModel.from_pretrained(transformed(variant="hc"), tmp_path)


def test_save_of_this_library_and_of_peft_share_a_folder(tmp_path: Path) -> None:
    """Then the folder says how its base is to be transformed."""
    wrapped = adapted(transformed(n=3, readout="head"))
    wrapped.save_pretrained(tmp_path)
    mhc_compile.save(wrapped, tmp_path)
    base = mhc_compile.load(plain_model("llama"), tmp_path)
    for name, parameter in active(wrapped).items():
        assert base.get_parameter(name).equal(parameter)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert output(loaded).equal(output(wrapped))


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_each_adapter_has_mhc_parameters_of_its_own(compiled: bool) -> None:
    base = moved(transformed())
    start = output(base)
    wrapped = adapted(base)
    first = output(wrapped)
    wrapped.add_adapter("second", lora(modules_to_save=EVERY))
    if compiled:
        base.compile(backend="mhc")
    wrapped.set_adapter("second")
    second = output(wrapped)
    assert min(relative(first, start), relative(second, start), relative(first, second)) > 1e-2
    for _ in range(2):
        wrapped.set_adapter("default")
        assert relative(output(wrapped), first) < 1e-5
        with wrapped.disable_adapter():
            assert relative(output(wrapped), start) < 1e-5
        wrapped.set_adapter("second")
        assert relative(output(wrapped), second) < 1e-5


def test_mhc_parameters_are_frozen_like_all_others_where_they_are_not_named() -> None:
    base = moved(transformed())
    start = output(base)
    wrapped = peft.get_peft_model(base, lora(init_lora_weights=True))
    assert not any(p.requires_grad for p in mhc_compile.parameters(wrapped))
    assert output(wrapped).equal(start)


def test_a_model_with_adapters_is_transformed_and_saved(tmp_path: Path) -> None:
    """PEFT first: its folder then holds the mHC parameters in a file of their own."""
    wrapped = peft.get_peft_model(plain_model("llama"), lora()).eval()
    start = output(wrapped)
    base = copy.deepcopy(wrapped.get_base_model())
    mhc_compile.transform(wrapped, n=2, example_inputs=INPUTS)
    assert relative(output(wrapped), start) < 1e-5
    moved(wrapped)
    assert relative(output(wrapped), start) > 1e-2
    assert all(p.requires_grad for p in mhc_compile.parameters(wrapped))
    wrapped.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain_model("llama"), tmp_path).eval()
    mhc_compile.load(loaded, tmp_path, example_inputs=INPUTS)
    assert output(loaded).equal(output(wrapped))
    assert not any("mhc" in key for key in base.state_dict())


class Owner(nn.Module):
    """Branches that are linear layers, whose names PEFT would find among the connections."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x.relu())


@pytest.mark.parametrize(
    "options", [{"modules_to_save": EVERY}, {"exclude_modules": r"(.*\.)?mhc\..*"}]
)
def test_a_target_may_be_called_like_a_branch(options: dict[str, Any]) -> None:
    x = (torch.randn(2, 3, 8),)
    model = nn.Sequential(Owner(), Owner())
    assert_moves(mhc_compile.transform(model, n=2, example_inputs=x), x)
    expected = model(*x)
    wrapped = peft.get_peft_model(
        model, lora(target_modules=["attn"], init_lora_weights=True, **options)
    )
    assert wrapped(*x).equal(expected)
    adapters = [n for n, _ in wrapped.named_parameters() if "lora_A" in n]
    assert len(adapters) == 2 and not any("mhc" in n for n in adapters)


def test_a_lost_site_is_noticed_behind_copies_as_well() -> None:
    """A copy is known by the weights of the model, not by copies of these."""
    wrapped = adapted()
    layer = wrapped.get_base_model().model.layers[0]
    assert layer.mhc.self_attn.witness.module in set(wrapped.modules())
    layer.mhc.modules_to_save["default"].tensors = list
    with pytest.raises(
        ChainBrokenError, match=r"'self_attn' of module 'model\.layers\.0' are gone"
    ):
        output(wrapped)
    spec = Spec.from_json(layer.__dict__[SPEC])
    layer.__dict__[SPEC] = replace(spec, sites=()).to_json()  # declares nothing
    with pytest.raises(ChainBrokenError, match=r"model\.layers\.0\.(self_attn|mlp)"):
        output(wrapped)


def test_check_looks_at_the_copies_that_are_trained() -> None:
    found = mhc_compile.check(adapted(), **INPUTS)
    assert found, str(found)
    assert len(found.sites) == 2 * LAYERS
    frozen = peft.get_peft_model(transformed(), lora())
    (step,) = mhc_compile.check(frozen, **INPUTS).steps
    assert "modules_to_save=['mhc']" in step.found
