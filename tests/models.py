"""One small residual language model, in the plainest spelling, for tests that need some model.

`ids` is int64 `[B, S]`, the result float `[B, S, VOCAB]`. A model of L layers has 2L sites in one
chain: `h.0.attn`, `h.0.mlp`, `h.1.attn`, ...
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mhc_compile

VOCAB, WIDTH = 17, 8


class Attention(nn.Module):
    """Causal self-attention of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(-2, -3)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.proj(y.transpose(-2, -3).flatten(-2))


class Block(nn.Module):
    """The textbook pre-norm block: two residual adds."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width)
        self.ln_2 = nn.LayerNorm(width)
        up, down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.mlp = nn.Sequential(up, nn.GELU(), down, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Tokens and learned positions, blocks, a norm, a tied head."""

    def __init__(self, layers: int = 2, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(16, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, VOCAB, bias=False)
        self.head.weight = self.wte.weight

    def embed(self, ids: Tensor) -> Tensor:
        return self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[-1], device=ids.device)))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.h:
            x = block(x)
        return self.head(self.ln_f(x))


def ids(batch: int = 2, length: int = 5) -> Tensor:
    """Random tokens, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (batch, length), generator=generator)


def pair(
    make: Callable[[], nn.Module] = GPT,
    *,
    example_inputs: object = None,
    dtype: torch.dtype = torch.float64,
    **options: object,
) -> tuple[nn.Module, nn.Module]:
    """A plain model, the same at every call, and a transformed copy of it."""
    torch.manual_seed(0)
    plain = make().to(dtype)
    inputs = (ids(),) if example_inputs is None else example_inputs
    config = mhc_compile.Config(**options)  # type: ignore[arg-type]
    model = mhc_compile.transform(copy.deepcopy(plain), example_inputs=inputs, config=config)
    return plain, model


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
