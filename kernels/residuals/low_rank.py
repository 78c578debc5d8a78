"""H_res = I + U Vᵀ with U and V of rank r, unconstrained: for experiments.

The numbers are U [n, r], then V [n, r]. Nothing keeps rows or columns at sum 1.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .residual import Chain, Residual, Text, triton_of_numbers, triton_sum


@dataclass(frozen=True)
class LowRank(Residual):
    name = "low_rank"
    rank: int = 1

    def title(self) -> str:
        return f"I + U Vᵀ of rank {int(self.rank)}"

    def columns(self, n: int) -> int:
        return 2 * n * self.rank

    def obstacle(self, n: int) -> str | None:
        return None if self.rank >= 1 else f"needs a rank of 1 or more, got {self.rank}"

    def forward(self, x: Tensor, n: int) -> Tensor:
        U, V = self._factors(x, n)
        identity = torch.diag_embed(torch.ones_like(U.select(-1, 0)))
        return identity + torch.ops.mhc.matmul.default(U, V.transpose(-1, -2))

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        U, V = self._factors(x, n)
        return torch.stack((grad @ V, grad.mT @ U), -3).flatten(-3)

    def near_identity(self, n: int) -> Tensor:
        """I, by U = 0. V is not 0, or no gradient would ever reach U."""
        U = torch.zeros(n, self.rank, dtype=torch.float64, device="cpu")
        V = torch.zeros_like(U)
        for stream in range(n):
            V[stream, stream % self.rank] = 1  # columns of V differ: they learn different things
        return torch.cat((U.flatten(), V.flatten()))

    def _factors(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        both = x.unflatten(-1, (2, n, self.rank))
        return both.select(-3, 0), both.select(-3, 1)

    def triton(self, chain: Chain) -> Text:
        n, ranks = chain.n, range(self.rank)
        names = [f"{side}{i}_{k}" for side in "UV" for i, k in product(range(n), ranks)]
        store, unmake = [], []
        for i in range(n):
            for j in range(n):
                at = f"token * {n * n} + {i * n + j}"
                terms = ["1.0"] * (i == j) + [f"h_U{i}_{k} * h_V{j}_{k}" for k in ranks]
                store += [f"    tl.store(H_res + {at}, {triton_sum(terms)}, inside)"]
                unmake += [f"    dH_{j} = tl.load(dH_res + {at}, inside, other=0.0)"]
            for k in ranks:
                terms = [f"dH_{j} * h_V{j}_{k}" for j in range(n)]
                unmake += [f"    d_U{i}_{k} = {triton_sum(terms)}"]
            for j, k in product(range(n), ranks):
                before = f"d_V{j}_{k} + " if i else ""
                unmake += [f"    d_V{j}_{k} = {before}dH_{j} * h_U{i}_{k}"]
        return triton_of_numbers(chain, names, [], store, unmake)

    def cpp(self, n: int) -> Text:
        return Text(_CPP_FORWARD, _CPP_BACKWARD, (_CPP_PLACES.format(rank=int(self.rank)),))


_CPP_PLACES = """
// H_res = I + U Vᵀ
constexpr int RANK = {rank};

constexpr int place_U(int i, int k) {{ return 2 * N + i * RANK + k; }}
constexpr int place_V(int j, int k) {{ return 2 * N + N * RANK + j * RANK + k; }}
"""

_CPP_FORWARD = """\
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) {
            H_res[i][j] = splat<V>(i == j ? 1 : 0);
            for (int k = 0; k < RANK; ++k)
                H_res[i][j] = fma(x[place_U(i, k)], x[place_V(j, k)], H_res[i][j]);
        }"""

_CPP_BACKWARD = """\
    for (int i = 0; i < N; ++i)
        for (int k = 0; k < RANK; ++k) {
            V dU{}, dV{};
            for (int j = 0; j < N; ++j) {
                dU = fma(dH_res[i][j], x[place_V(j, k)], dU);
                dV = fma(dH_res[j][i], x[place_U(j, k)], dV);
            }
            dx[place_U(i, k)] = dU;
            dx[place_V(i, k)] = dV;
        }"""
