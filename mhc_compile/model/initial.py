"""Initial values of the mHC parameters.

`preserve` makes a transformed model compute what the plain one computes. With the same x in every
stream at the start, and

    H_pre = 1/n + a_l,    H_post = 1 + d_l,    H_res 1 = 1,  1ᵀ H_res = 1ᵀ,

site l keeps the mean of its streams at x_l = x_{l-1} + F(x_{l-1}), while the differences between
streams are sums of d_k F_k, k <= l. H_pre reads x_l exactly if a_l is orthogonal to 1 and to what
H_res makes of every earlier d_k. So a and d are taken from two orthogonal subspaces whose vectors
are eigenvectors of the initial H_res. The differences are there for the sake of H_res: equal
streams would leave it next to no gradient.

All vectors are float64; the parameters round them.
"""

import math

import torch
from torch import Tensor

from ..config import Config
from ..kernels.variants import Gate

SPREAD_LINEAR = 0.5
"""d of chains that are linear between their sites, where any d preserves."""

PAPER_PHI_STD = 0.02
"""Standard deviation of φ for `paper`, which says "small random": DeepSeek-V4's range."""


def directions(n: int) -> tuple[Tensor, Tensor]:
    """Orthogonal vectors over n >= 2 streams, orthogonal to 1, for H_pre and for H_post.

    Returns:
        (read [(n - 1) // 2, n], write [n // 2, n]), largest entry 1. Hadamard vectors where n is
        a power of two (eigenvectors of a Kronecker product of 2 by 2 matrices as well), otherwise
        rows of the cosine transform. No two streams agree on all of `write`.
    """
    reads = (n - 1) // 2
    if n & (n - 1) == 0:
        rows = _hadamard(n)
    else:
        # Highest frequency first: the lowest, which tells all streams apart, is for `write`.
        rows = _cosines(n).flip(0)
    return rows[:reads], rows[reads:]


def _hadamard(n: int) -> Tensor:
    """The n - 1 Hadamard vectors without the constant one, [n - 1, n], entries ±1."""
    bits = n.bit_length() - 1
    signs = [
        [(-1.0) ** (k & int(f"{j:0{bits}b}"[::-1], 2)).bit_count() for j in range(n)]
        for k in range(1, n)
    ]
    return torch.tensor(signs, dtype=torch.float64, device="cpu")


def _cosines(n: int) -> Tensor:
    """Rows 1 to n - 1 of the cosine transform (DCT-II), [n - 1, n], scaled to a maximum of 1."""
    rows = [[math.cos(math.pi * k * (2 * j + 1) / (2 * n)) for j in range(n)] for k in range(1, n)]
    cosines = torch.tensor(rows, dtype=torch.float64, device="cpu")
    return cosines / cosines.abs().amax(dim=-1, keepdim=True)


def _turn(vectors: Tensor, index: int) -> Tensor:
    """The vector of site `index`: one after the other, then all again with the other sign.

    Zeros [n] where there are none (`read` for n = 2).
    """
    count, n = vectors.shape
    if count == 0:
        return torch.zeros(n, dtype=torch.float64, device="cpu")
    return vectors[index % count] * (-1.0) ** (index // count)


def preserving(n: int, index: int, spread: float) -> tuple[Tensor, Tensor]:
    """H_pre [n] and H_post [n] of a site at the start, for `preserve`.

    Args:
        n: streams, 2 or more.
        index: position of the site in its chain, from 0.
        spread: largest entry of d, 0 <= spread < 1.
    """
    read, write = directions(n)
    a = min(0.1, 0.4 / n)  # keeps 1/n - a positive for every n
    return 1 / n + a * _turn(read, index), 1 + spread * _turn(write, index)


def bias(config: Config, *, index: int, linear: bool) -> Tensor:
    """b [columns] of the site at position `index` of its chain, float64.

    Args:
        config: n, variant, init and spread are read.
        index: position of the site in its chain, from 0.
        linear: whether the operations between the sites of the chain are linear; only then may
            streams differ from the start.
    """
    n, variant = config.n, config.variant_object
    if config.init == "preserve":
        pre, post = preserving(n, index, SPREAD_LINEAR if linear else config.spread)
        gates = [_invert(variant.pre, pre), _invert(variant.post, post)]
    else:
        home = torch.nn.functional.one_hot(torch.tensor(index % n, device="cpu"), n).double()
        ones = torch.ones(n, dtype=torch.float64, device="cpu")
        # Published as logits ±3; for linear gates (arXiv:2409.19606) as the values 0 and 1.
        pre_logits = 6 * home - 3 if variant.pre.function == "sigmoid" else home
        gates = [pre_logits, _invert(variant.post, ones)]
    return torch.cat([*gates, variant.res.near_identity(n)])


def head_bias(n: int) -> Tensor:
    """b [n] of a learned readout whose weights σ(b) are 1/n, float64."""
    return torch.full((n,), 1 / n, dtype=torch.float64, device="cpu").logit()


def phi_std(config: Config) -> float:
    """Standard deviation that φ is drawn with; 0 where it starts at zero and nothing is drawn."""
    static = config.init == "preserve" or config.variant_object.res.starts_static
    return 0.0 if static else PAPER_PHI_STD


def _invert(gate: Gate, value: Tensor) -> Tensor:
    """The logits for which a gate has this value."""
    value = (value - gate.offset) / gate.scale
    return value.logit() if gate.function == "sigmoid" else value
