"""Folders of `save_pretrained`: a transformed model comes back as it was, whatever was written.

Outputs are compared as floats, with the mHC parameters far from where they started; a model that
lost them, or was given those it starts with, would differ.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import CheckpointError, ExampleInputsError, UnsupportedError
from mhc_compile.persistence import CONFIG_FILE, WEIGHTS_FILE
from tests.test_huggingface import LAYERS, inputs_of, llama, moved, plain_model, tokens

IDS = {"input_ids": tokens()}
CLASSES = {
    "llama": hf.AutoModelForCausalLM,
    "bert": hf.AutoModelForMaskedLM,
    "t5": hf.AutoModelForSeq2SeqLM,
}


def transformed(name: str = "llama", **options: Any) -> Any:
    config = mhc_compile.Config(**options)
    return moved(mhc_compile.transform(plain_model(name), config=config))


def output(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result = model(**(inputs or IDS))
    return result.logits if "logits" in result else result.last_hidden_state


def assert_same(loaded: Any, model: Any, **inputs: Tensor) -> None:
    """The same parameters under the same names, and the same outputs; not those of the start."""
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert [k for k, v in loaded.state_dict().items() if not v.equal(expected[k])] == []
    assert output(loaded, **inputs).equal(output(model, **inputs))
    plain = mhc_compile.revert(copy.deepcopy(model))
    assert not output(plain, **inputs).allclose(output(model, **inputs))


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_gives_the_transformed_model_back(name: str, tmp_path: Path) -> None:
    model = transformed(name)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()
    loaded = mhc_compile.from_pretrained(CLASSES[name], tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    assert_same(loaded, model, **inputs_of(name))


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2, "variant": "hc"},
        {"n": 3, "variant": "deepseek_v4", "sinkhorn_iters": 5, "readout": "sum"},
        {"n": 2, "readout": "head", "exclude": ("model.layers.0.mlp",)},
    ],
)
def test_every_option_comes_back(options: dict[str, Any], tmp_path: Path) -> None:
    model = transformed(**options)
    model.save_pretrained(tmp_path)
    loaded = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path)
    configs = {m.config for m in loaded.modules() if hasattr(m, "phi")}
    assert configs == {mhc_compile.Config(**options)}
    assert_same(loaded, model)


def test_a_trained_model_comes_back_from_several_files(tmp_path: Path) -> None:
    model = transformed().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {k: v.clone() for k, v in model.state_dict().items() if ".mhc." in k}
    for _ in range(2):
        model(**IDS, labels=IDS["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = [k for k, v in before.items() if not v.equal(model.state_dict()[k])]
    assert set(changed) == {k for k in before if "_extra_state" not in k}
    model.eval().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path), model)


def test_a_loaded_model_computes_the_same_when_compiled(tmp_path: Path) -> None:
    model = transformed(n=2)
    model.save_pretrained(tmp_path)
    loaded = mhc_compile.from_pretrained(hf.LlamaForCausalLM, tmp_path)
    for one in (model, loaded):
        one.compile(backend="mhc")
    assert output(loaded).equal(output(model))
    loaded(**IDS).logits.sum().backward()
    assert all(p.grad is not None for p in mhc_compile.parameters(loaded))


def test_a_model_of_low_precision_keeps_every_digit_of_its_mhc_parameters(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = moved(mhc_compile.transform(plain))
    model.save_pretrained(tmp_path)
    loaded = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path)
    assert loaded.dtype is torch.bfloat16
    assert {p.dtype for p in mhc_compile.parameters(loaded)} == {torch.float32}
    assert_same(loaded, model)
    wider = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    assert wider.dtype is torch.float32
    pairs = zip(mhc_compile.parameters(wider), mhc_compile.parameters(model), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_a_base_model_and_one_with_a_head_read_each_others_folders(tmp_path: Path) -> None:
    model = transformed()
    model.save_pretrained(tmp_path / "head")
    model.model.save_pretrained(tmp_path / "base")
    expected = output(model.model)
    for folder in ("head", "base"):
        base = mhc_compile.from_pretrained(hf.AutoModel, tmp_path / folder)
        assert output(base).equal(expected)
        assert "layers.0.mhc.self_attn.phi" in base.state_dict()
    headed = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "base")
    assert output(headed.model).equal(expected)


def test_names_that_transformers_changes_come_back(tmp_path: Path) -> None:
    """Mixtral is saved with `block_sparse_moe` for `mlp`, in our names too."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    # Its grouped products, the default of transformers 5.0, have no fake in float32.
    experts = {"experts_implementation": "batched_mm"}
    config = hf.MixtralConfig(vocab_size=64, **sizes, **heads, **experts)
    plain = hf.MixtralForCausalLM(config).eval()
    model = moved(mhc_compile.transform(plain, n=2))
    for _ in range(2):  # into a folder that has something already
        model.save_pretrained(tmp_path)
    loaded = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path, **experts)
    assert_same(loaded, model)


def test_a_checkpoint_of_the_trainer_gives_the_model_back(tmp_path: Path) -> None:
    model = transformed(n=2)
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=0.01,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]
    hf.Trainer(model, arguments, train_dataset=rows).train()
    loaded = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "checkpoint-2")
    assert_same(loaded, model.eval())
    first = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "checkpoint-1")
    assert not output(first).equal(output(model))


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """`resume_from_checkpoint` loads the mHC parameters, and refuses those of another function."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(batch=4)]

    def train(model: Any, steps: int, **resume: Any) -> Any:
        arguments = hf.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            per_device_train_batch_size=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
        )
        hf.Trainer(model, arguments, train_dataset=rows).train(**resume)
        return model.eval()

    whole = train(transformed(n=2), 2)
    first = str(tmp_path / "checkpoint-1")
    fresh = mhc_compile.transform(plain_model("llama"), n=2)
    assert_same(train(fresh, 2, resume_from_checkpoint=first), whole)
    other = mhc_compile.transform(plain_model("llama"), n=2, config=mhc_compile.Config(eps=1e-5))
    with pytest.raises(CheckpointError, match="eps=1e-06, this model has eps=1e-05"):
        train(other, 2, resume_from_checkpoint=first)


def test_nothing_is_said_of_parameters_that_find_their_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = transformed()
    model.save_pretrained(tmp_path)
    hf.logging.set_verbosity_warning()
    try:
        loaded, report = mhc_compile.from_pretrained(
            hf.AutoModelForCausalLM, tmp_path, output_loading_info=True
        )
        assert "mhc" not in caplog.text
        assert not any(report["unexpected_keys"])
        assert_same(loaded, model)
        _, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert any("mhc" in key for key in report["unexpected_keys"])
        assert "mhc" in caplog.text
    finally:
        hf.logging.set_verbosity_error()


def test_a_loaded_model_is_saved_and_loaded_again(tmp_path: Path) -> None:
    model = transformed(n=2)
    model.save_pretrained(tmp_path / "1")
    loaded = mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "1")
    loaded.save_pretrained(tmp_path / "2")
    mhc_compile.save(loaded, tmp_path / "3")
    assert_same(mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "2"), model)
    assert_same(mhc_compile.load(plain_model("llama"), tmp_path / "2"), model)
    assert_same(mhc_compile.load(plain_model("llama"), tmp_path / "3"), model)
    (tmp_path / "1" / WEIGHTS_FILE).write_bytes((tmp_path / "3" / WEIGHTS_FILE).read_bytes())
    assert_same(mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path / "1"), model)


def test_a_reverted_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = mhc_compile.revert(transformed())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG_FILE).exists()
    assert output(hf.AutoModelForCausalLM.from_pretrained(tmp_path)).equal(output(model))


# ------------------------------------------------------------------------------------- refused


def test_a_folder_of_a_plain_model_is_refused(tmp_path: Path) -> None:
    plain_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no mhc_config\.json.*AutoModelForCausalLM\.fr"):
        mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path)
    with pytest.raises(CheckpointError, match=r"has no mhc_config\.json"):
        mhc_compile.from_pretrained(hf.AutoModelForCausalLM, "some/name-on-the-hub")


def test_what_has_no_from_pretrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a class with from_pretrained"):
        mhc_compile.from_pretrained(nn.Linear, tmp_path)


def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    transformed().save_pretrained(tmp_path)
    file = tmp_path / CONFIG_FILE
    described = json.loads(file.read_text())
    described["config"]["sinkhorn_iters"] = 3
    file.write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="sinkhorn_iters=20, this model has sinkhorn_iters=3"):
        mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    transformed().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"Only in the model: model\.layers\.2\.mlp"):
        mhc_compile.from_pretrained(hf.AutoModelForCausalLM, tmp_path)


def test_a_push_that_would_lack_the_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"then model\.push_to_hub"):
        transformed().save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def test_a_model_that_waits_is_not_saved(tmp_path: Path) -> None:
    class Silent(hf.LlamaForCausalLM):
        main_input_name = "something"
        dummy_inputs = None

    with pytest.warns(UserWarning, match="Silent does not say what its forward takes"):
        model = mhc_compile.transform(Silent(llama().config))
    with pytest.raises(ExampleInputsError, match="at its first call"):
        model.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.safetensors"))


# ---------------------------------------------------------------------------- inferred inputs


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_on_the_meta_device_is_transformed_at_once(name: str, tmp_path: Path) -> None:
    """Its KV cache would be made of real tensors, which no meta tensor can join."""
    if name == "t5" and hf.__version__.startswith("5.0."):
        pytest.skip("transformers 5.0 puts a constant on the meta device, which Dynamo refuses")
    model = transformed(name)
    mhc_compile.save(model, tmp_path)
    with torch.device("meta"):
        empty = plain_model(name)
    mhc_compile.load(empty, tmp_path)
    assert all(not p.is_meta for p in mhc_compile.parameters(empty))
    plain = mhc_compile.revert(copy.deepcopy(model))
    empty.load_state_dict(plain.state_dict(), strict=False, assign=True)
    pairs = zip(mhc_compile.parameters(empty), mhc_compile.parameters(model), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_inputs_that_were_guessed_wrong_are_said_so() -> None:
    class Shy(hf.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask=attention_mask)

    torch.manual_seed(0)
    plain = Shy(llama().config).eval()
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=r"Shy does not take what it seems to .*attention_mask"):
        mhc_compile.transform(model, n=2)
    inputs = {**IDS, "attention_mask": torch.ones_like(IDS["input_ids"])}
    torch.testing.assert_close(output(model, **inputs), output(plain, **inputs))
    assert not output(moved(model, inputs), **inputs).allclose(output(plain, **inputs))
