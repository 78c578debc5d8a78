"""H_res mixes all permutation matrices, with weights softmax(H̃_res): mHC-lite (arXiv:2601.05732).

In the order of `itertools.permutations(range(n))`, where permutation p has the ones H[i, p[i]].
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .residual import (
    DIAGONAL,
    OFF_DIAGONAL,
    Chain,
    Residual,
    Text,
    softmax_backward,
    triton_of_numbers,
    triton_sum,
)

MOST_STREAMS = 4
"""n! columns are 24 for n = 4 and already 120 for n = 5."""


@dataclass(frozen=True)
class Permutations(Residual):
    name = "permutations"

    def title(self) -> str:
        return "softmax over all permutations"

    def columns(self, n: int) -> int:
        return math.factorial(n)

    def obstacle(self, n: int) -> str | None:
        if n <= MOST_STREAMS:
            return None
        return (
            f"mixes all n! permutations of the streams, too many for n={n}: use n <= "
            f"{MOST_STREAMS}, or another variant ('mhc' for any n, 'kromhc' for powers of two)"
        )

    def forward(self, x: Tensor, n: int) -> Tensor:
        return mixed_permutations(x.softmax(-1), n)

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        """Every weight gets ⟨dH_res, P_p⟩."""
        places = [[i * n + p[i] for i in range(n)] for p in itertools.permutations(range(n))]
        dweights = grad.flatten(-2)[..., torch.tensor(places, device=grad.device)].sum(-1)
        return softmax_backward(dweights, x.softmax(-1))

    def near_identity(self, n: int) -> Tensor:
        logits = torch.zeros(math.factorial(n), dtype=torch.float64, device="cpu")
        # The identity comes first. Its weight against the others', for the c of Sinkhorn-Knopp.
        logits[0] = math.log1p(math.factorial(n - 1) * math.expm1(DIAGONAL - OFF_DIAGONAL))
        return logits

    def triton(self, chain: Chain) -> Text:
        """Softmax over the permutations; H_res[i, j] adds the weights of those with p[i] = j."""
        n = chain.n
        names = ["".join(map(str, p)) for p in itertools.permutations(range(n))]
        make = [f"    top = h_{names[0]}"]
        make += [f"    top = tl.maximum(top, h_{name})" for name in names[1:]]
        make += [f"    w_{name} = tl.exp(h_{name} - top)" for name in names]
        make += [f"    total = {triton_sum(f'w_{name}' for name in names)}"]
        make += [f"    w_{name} = w_{name} / total" for name in names]
        store, unmake = [], []
        for i, j in itertools.product(range(n), range(n)):
            at = f"token * {n * n} + {i * n + j}"
            value = triton_sum(f"w_{name}" for name in names if name[i] == str(j))
            store += [f"    tl.store(H_res + {at}, {value}, inside)"]
            unmake += [f"    dH_{i}{j} = tl.load(dH_res + {at}, inside, other=0.0)"]
        for name in names:
            unmake += [f"    d_{name} = {triton_sum(f'dH_{i}{j}' for i, j in enumerate(name))}"]
        unmake += [f"    mean = {triton_sum(f'w_{name} * d_{name}' for name in names)}"]
        unmake += [f"    d_{name} = w_{name} * (d_{name} - mean)" for name in names]
        return triton_of_numbers(chain, names, make, store, unmake)

    def cpp(self, n: int) -> Text:
        permutations = itertools.permutations(range(n))
        rows = ", ".join("{" + ", ".join(map(str, p)) + "}" for p in permutations)
        table = _CPP_TABLE.format(count=math.factorial(n), rows=rows)
        return Text(_CPP_FORWARD, _CPP_BACKWARD, (table,))


def mixed_permutations(weights: Tensor, n: int) -> Tensor:
    """Σ_p weights[p] · P_p, P_p[i, p[i]] = 1, over all permutations: `[..., n!]` -> `[..., n, n]`.

    In the order of `itertools.permutations` the first (n - 1)! have p[0] = 0, the next p[0] = 1,
    and so on: sums of these blocks are row 0. Within block k the other rows permute the columns
    without k, so column j of the smaller problem is column j where j < k, and j + 1 elsewhere.
    """
    if n == 1:
        return weights.unsqueeze(-1)
    blocks = weights.unflatten(-1, (n, -1))
    rest = mixed_permutations(blocks, n - 1).transpose(-3, -2)  # [..., row, k, j]
    below, above = rest.tril(-1).sum(-2), rest.triu().sum(-2)  # j < k and j >= k
    zeros = torch.zeros_like(below[..., :1])
    rows = torch.cat((below, zeros), -1) + torch.cat((zeros, above), -1)
    return torch.cat((blocks.sum(-1).unsqueeze(-2), rows), -2)


_CPP_TABLE = """
// Permutation p has its ones at [i, PERMUTATIONS[p][i]].
constexpr int COUNT = {count};
constexpr int PERMUTATIONS[COUNT][N] = {{{rows}}};
"""

_CPP_FORWARD = """\
    V weight[COUNT];
    for (int p = 0; p < COUNT; ++p) weight[p] = x[2 * N + p];
    softmax(weight);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) H_res[i][j] = V{};
    for (int p = 0; p < COUNT; ++p)
        for (int i = 0; i < N; ++i) H_res[i][PERMUTATIONS[p][i]] += weight[p];"""

_CPP_BACKWARD = """\
    V weight[COUNT], dweight[COUNT];
    for (int p = 0; p < COUNT; ++p) {
        weight[p] = x[2 * N + p];
        dweight[p] = V{};
        for (int i = 0; i < N; ++i) dweight[p] += dH_res[i][PERMUTATIONS[p][i]];
    }
    softmax(weight);
    softmax_backward(weight, dweight);
    for (int p = 0; p < COUNT; ++p) dx[2 * N + p] = dweight[p];"""
