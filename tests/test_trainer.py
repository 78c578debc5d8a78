"""Hugging Face Trainer on a transformed model, on real text, byte by byte."""

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers.utils.generic import find_labels

import mhc_compile
from tests.checks import assert_moves

hf.logging.set_verbosity_error()
LENGTH, STEPS = 32, 20


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Text(Dataset):
    """Windows of Python's language reference as bytes, with a column that no model takes."""

    def __init__(self, count: int = 4 * STEPS) -> None:
        text = "\n".join(pydoc_data.topics.topics[t] for t in ("exceptions", "naming", "class"))
        self.windows = torch.tensor(list(text.encode())[: count * LENGTH]).view(count, LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.windows[index]
        return {"input_ids": window, "labels": window, "source": f"window {index}"}


def make_model(layers: int = 2, dropout: float = 0.1) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH}
    config = hf.LlamaConfig(vocab_size=256, **sizes, **heads, attention_dropout=dropout)
    model = mhc_compile.transform(hf.LlamaForCausalLM(config))
    assert_moves(model, {"input_ids": torch.randint(256, (2, 8)), "use_cache": False})
    return model


def make_trainer(model: nn.Module, folder: Path, **options: Any) -> hf.Trainer:
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return hf.Trainer(
        model,
        hf.TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=Text(),
        eval_dataset=Text(8),
    )


def losses(trainer: hf.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def mhc_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in mhc_compile.parameters(model)]


def test_trainer_trains_and_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    model = make_model()
    before = mhc_parameters(model)
    trainer = make_trainer(model, tmp_path, save_strategy="steps", save_steps=STEPS // 2)
    # Trainer reads the signature of forward: which columns to keep, which of them are labels.
    assert find_labels(type(model)) == ["labels"] == trainer.label_names
    trainer.train()
    assert len(losses(trainer)) == STEPS
    assert sum(losses(trainer)[-5:]) < sum(losses(trainer)[:5]) - 1
    assert not any(p.equal(b) for p, b in zip(mhc_parameters(model), before, strict=True))
    assert trainer.evaluate()["eval_loss"] < losses(trainer)[0]

    again = make_model()
    resumed = make_trainer(again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert losses(resumed)[-STEPS // 2 :] == losses(trainer)[-STEPS // 2 :]
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert again.state_dict()[key].equal(value), key


def test_trainer_after_compile_equals_the_plain_call(tmp_path: Path) -> None:
    """Without dropout, whose random numbers Inductor draws in its own way."""
    called, compiled = (make_model(layers=1, dropout=0.0) for _ in range(2))
    compiled.compile(backend="mhc")
    before = mhc_parameters(compiled)
    trainers = [make_trainer(model, tmp_path) for model in (called, compiled)]
    counters.clear()
    for trainer in trainers:
        trainer.train()
    assert sum(counters["inductor"].values()) > 0
    assert losses(trainers[1]) == pytest.approx(losses(trainers[0]), rel=1e-3)
    assert not any(p.equal(b) for p, b in zip(mhc_parameters(compiled), before, strict=True))
    assert any("mhc." in key for key in compiled.state_dict())
