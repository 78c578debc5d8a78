"""H_res = I: the streams are not mixed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .residual import Chain, Residual, Text


@dataclass(frozen=True)
class Identity(Residual):
    name = "identity"

    def title(self) -> str:
        return "I"

    def columns(self, n: int) -> int:
        return 0

    def near_identity(self, n: int) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device="cpu")

    def triton(self, chain: Chain) -> Text:
        n = chain.n
        real = chain.if_padded(f" & ((k[:, None] < {n}) & (k[None, :] < {n}))[:, :, None]")
        store = f"""
    # H_res = I
    at = token[None, None, :] * {n * n} + (k[:, None] * {n} + k[None, :])[:, :, None]
    here = inside[None, None, :]{real}
    tl.store(H_res + at, tl.where(k[:, None] == k[None, :], 1.0, 0.0)[:, :, None], here)"""
        return Text(store, "")

    def cpp(self, n: int) -> Text:
        return Text(
            "    for (int i = 0; i < N; ++i)\n"
            "        for (int j = 0; j < N; ++j) H_res[i][j] = splat<V>(i == j ? 1 : 0);",
            "    // No number stands behind H_res.",
        )
