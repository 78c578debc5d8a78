"""The small GPT of the overhead benchmark: plain, and with the hyper-connections of others.

6 layers (12 sites), C 512, 8 heads, 1024 tokens. `GPT` is an ordinary pre-norm model; `V4GPT` and
`LucidrainsGPT` have the same branches with their connections written by hand, as their users do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HEADS, VOCAB = 6, 512, 8, 1024


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], HEADS, -1)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class GPT(nn.Module):
    """`[B, S]` of int64 to the mean cross-entropy of the next token."""

    def __init__(self, block: Callable[[int], nn.Module] = lambda i: Block()) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.zeros(1024, WIDTH))
        self.blocks = nn.ModuleList(block(i) for i in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.expand(self.embed(ids) + self.position[: ids.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(self.readout(x)))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def expand(self, x: Tensor) -> Tensor:
        return x

    def readout(self, x: Tensor) -> Tensor:
        return x


class V4Block(nn.Module):
    """A block with `DeepseekV4HyperConnection` twice, as transformers' decoder layer has it."""

    def __init__(self, n: int) -> None:
        super().__init__()
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
        from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

        config = DeepseekV4Config(hidden_size=WIDTH, hc_mult=n)
        self.attention, self.mlp = Attention(), MLP()
        self.attention_hc = v4.DeepseekV4HyperConnection(config)
        self.mlp_hc = v4.DeepseekV4HyperConnection(config)

    def forward(self, X: Tensor) -> Tensor:
        for connection, branch in ((self.attention_hc, self.attention), (self.mlp_hc, self.mlp)):
            post, comb, h = connection(X)
            mixed = torch.matmul(comb.to(X.dtype).transpose(-1, -2), X)
            X = post.to(X.dtype).unsqueeze(-1) * branch(h).unsqueeze(-2) + mixed
        return X


class V4GPT(GPT):
    """Streams `[B, S, n, C]`, read out by their mean."""

    def __init__(self, n: int) -> None:
        super().__init__(lambda i: V4Block(n))
        self.n = n
        _perturb(self, "_hc.")

    def expand(self, x: Tensor) -> Tensor:
        return x.unsqueeze(2).expand(-1, -1, self.n, -1).contiguous()

    def readout(self, X: Tensor) -> Tensor:
        return X.mean(2)


class LucidrainsBlock(nn.Module):
    """A block with `mHC` of the package hyper-connections twice."""

    def __init__(self, n: int, layer: int) -> None:
        super().__init__()
        from hyper_connections.manifold_constrained_hyper_connections import mHC

        self.attention_hc = mHC(n, dim=WIDTH, layer_index=2 * layer, branch=Attention())
        self.mlp_hc = mHC(n, dim=WIDTH, layer_index=2 * layer + 1, branch=MLP())

    def forward(self, X: Tensor) -> Tensor:
        return self.mlp_hc(self.attention_hc(X))


class LucidrainsGPT(GPT):
    """Streams folded into the batch, summed at the end."""

    def __init__(self, n: int) -> None:
        super().__init__(lambda i: LucidrainsBlock(n, i))
        self.n = n

    def expand(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.n, 0)

    def readout(self, X: Tensor) -> Tensor:
        return X.unflatten(0, (-1, self.n)).sum(1)


def llama() -> nn.Module:
    """Hugging Face's Llama of the same size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        use_cache=False,
    )
    return _LossOnly(LlamaForCausalLM(config))


class _LossOnly(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids, labels=ids).loss


def _perturb(model: nn.Module, part: str) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter, std=0.02)
