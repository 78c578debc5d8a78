"""The tensors of a site's operators, in the groups that they go about in.

Streams X `[T, n, C]`, and f, h `[T, C]`, have one dtype; everything else is float32, or float64 for
float64 streams. T counts tokens, `columns` are those of φ: pre | post | res.
"""

from typing import NamedTuple

from torch import Tensor


class Parameters(NamedTuple):
    """φ, α, b of a site."""

    phi: Tensor  # [nC, columns]
    alpha: Tensor  # [3]
    bias: Tensor  # [columns]


class Mapping(NamedTuple):
    """What the coefficients of a site are computed from."""

    X: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor


class Saved(NamedTuple):
    """What the backward of a mapping reads again: its operands, x⃗ φ, and 1 / r."""

    X: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    y: Tensor  # [T, columns]
    inv_r: Tensor  # [T]


class Closed(NamedTuple):
    """What closes a site, X' = H_res X + H_postᵀ f."""

    H_res: Tensor  # [T, n, n], [out, in]
    H_post: Tensor  # [T, n]
    X: Tensor
    f: Tensor


class Opened(NamedTuple):
    """The gradients of what opened a site: of h, H_post and H_res; H_pre, which h came from."""

    dh: Tensor
    dH_post: Tensor
    dH_res: Tensor
    H_pre: Tensor


WITH_CHANNELS = frozenset({"X", "partial", "f", "dh"})
"""Which of them are streams, or a branch's input or output."""

OF_THE_SITE = frozenset(Parameters._fields)
"""Which of them are the same for all tokens."""

OF_THE_TOKENS = frozenset({"y", "inv_r", "H_pre", "H_post", "H_res", "dH_pre", "dH_post", "dH_res"})
"""Which of them are numbers of each token."""
