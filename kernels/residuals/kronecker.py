"""H_res = U_1 ⊗ … ⊗ U_k for n = 2^k: KromHC (arXiv:2601.21579).

The two numbers of factor i weigh the identity and the exchange, by softmax.
"""

import itertools
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
)


@dataclass(frozen=True)
class Kronecker(Residual):
    name = "kronecker"

    def title(self) -> str:
        return "Kronecker product of 2 by 2 matrices"

    def columns(self, n: int) -> int:
        return 2 * _factors(n)

    def obstacle(self, n: int) -> str | None:
        if not n & (n - 1):
            return None
        return (
            f"is a product of 2 by 2 matrices and needs a power of two, got n={n}: use "
            f"n={1 << _factors(n)} or n={2 << _factors(n)}, or variant 'mhc'"
        )

    def forward(self, x: Tensor, n: int) -> Tensor:
        return kronecker(x.unflatten(-1, (_factors(n), 2)).softmax(-1), _factors(n))

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        """H_res is linear in the two weights of each factor."""
        weights = x.unflatten(-1, (_factors(n), 2)).softmax(-1)
        dweights = torch.empty_like(weights)
        for i, j in itertools.product(range(_factors(n)), range(2)):
            one = weights.clone()
            one[..., i, :] = 0
            one[..., i, j] = 1
            dweights[..., i, j] = (grad * kronecker(one, _factors(n))).sum((-2, -1))
        return softmax_backward(dweights, weights).flatten(-2)

    def near_identity(self, n: int) -> Tensor:
        """c^k, with the c of Sinkhorn-Knopp, for vectors that k factors change the sign of."""
        logits = [DIAGONAL, OFF_DIAGONAL] * _factors(n)
        return torch.tensor(logits, dtype=torch.float64, device="cpu")

    def triton(self, chain: Chain) -> Text:
        """Bit i of (out xor in), highest first, picks p or q of factor i."""
        n, factors = chain.n, _factors(chain.n)
        names = [f"{i}{x}" for i in range(factors) for x in "pq"]
        entry = f"(k[:, None] * {n} + k[None, :])"
        make = ["    swapped = k[:, None] ^ k[None, :]"]
        make += [f"    at = token[None, None, :] * {n * n} + {entry}[:, :, None]"]
        for i in range(factors):
            bit = factors - 1 - i
            make += [f"    p_{i} = tl.sigmoid(h_{i}p - h_{i}q)"]
            make += [f"    q_{i} = tl.sigmoid(h_{i}q - h_{i}p)"]
            make += [f"    same_{i} = ((swapped >> {bit}) % 2 == 0)[:, :, None]"]
            make += [f"    U_{i} = tl.where(same_{i}, p_{i}[None, None, :], q_{i}[None, None, :])"]
        whole = " * ".join(f"U_{i}" for i in range(factors)) or "1.0"
        store = [f"    tl.store(H_res + at, {whole}, inside[None, None, :])"]
        unmake = ["    dH = tl.load(dH_res + at, inside[None, None, :], other=0.0)"]
        for i in range(factors):
            others = [f"U_{j}" for j in range(factors) if j != i]
            unmake += [f"    d = {' * '.join(['dH', *others])}"]
            unmake += [f"    d = tl.sum(tl.sum(tl.where(same_{i}, d, -d), 0), 0)"]
            unmake += [f"    d_{i}p = p_{i} * q_{i} * d", f"    d_{i}q = -d_{i}p"]
        return triton_of_numbers(chain, names, make, store, unmake)

    def cpp(self, n: int) -> Text:
        return Text(_CPP_FORWARD, _CPP_BACKWARD, (_CPP_FACTORS.format(factors=_factors(n)),))


def _factors(n: int) -> int:
    return n.bit_length() - 1


def kronecker(weights: Tensor, factors: int) -> Tensor:
    """U_1 ⊗ … ⊗ U_k with U = [[p, q], [q, p]]: `[..., k, 2]` of (p, q) -> `[..., 2^k, 2^k]`."""
    U = torch.stack((weights, weights.flip(-1)), -2)
    H = U.select(-3, 0)
    for i in range(1, factors):
        product = H.unsqueeze(-1).unsqueeze(-3) * U.select(-3, i).unsqueeze(-2).unsqueeze(-4)
        H = product.flatten(-2).flatten(-3, -2)
    return H


_CPP_FACTORS = """
// U_1 ⊗ … ⊗ U_k with U = [[p, q], [q, p]]: the element [i, j] depends on d = i xor j only, where
// factor f gives its q if its bit of d is set, else its p. The first factor has the highest bit.
constexpr int FACTORS = {factors};

INLINE int exchanged(int d, int f) {{ return (d >> (FACTORS - 1 - f)) & 1; }}

// softmax of the two numbers of every factor
INLINE void factors(const V (&x)[COLUMNS], V (&U)[FACTORS][2]) {{
    for (int f = 0; f < FACTORS; ++f) {{
        U[f][0] = x[2 * N + 2 * f];
        U[f][1] = x[2 * N + 2 * f + 1];
        softmax(U[f]);
    }}
}}

// The product over all factors but one (-1: over all).
INLINE V product(const V (&U)[FACTORS][2], int d, int without) {{
    V result = splat<V>(1);
    for (int f = 0; f < FACTORS; ++f)
        if (f != without) result *= U[f][exchanged(d, f)];
    return result;
}}
"""

_CPP_FORWARD = """\
    V U[FACTORS][2];
    factors(x, U);
    for (int d = 0; d < N; ++d) {
        const V element = product(U, d, -1);
        for (int i = 0; i < N; ++i) H_res[i][i ^ d] = element;
    }"""

_CPP_BACKWARD = """\
    V U[FACTORS][2], dU[FACTORS][2] = {};
    factors(x, U);
    for (int d = 0; d < N; ++d) {
        V total{};
        for (int i = 0; i < N; ++i) total += dH_res[i][i ^ d];
        for (int f = 0; f < FACTORS; ++f)
            dU[f][exchanged(d, f)] = fma(total, product(U, d, f), dU[f][exchanged(d, f)]);
    }
    for (int f = 0; f < FACTORS; ++f) {
        softmax_backward(U[f], dU[f]);
        dx[2 * N + 2 * f] = dU[f][0];
        dx[2 * N + 2 * f + 1] = dU[f][1];
    }"""
