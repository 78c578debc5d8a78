"""What one way to make H_res says of itself, so that everything else can iterate over all of them.

A file in this folder is one way: what it reads of a variant, how many numbers H̃_res it takes, the
mathematics, its gradient, its text in Triton and in C++, and where it starts. `RESIDUALS` in
`__init__.py` lists them; nothing outside this folder asks which residual it has before it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

DIAGONAL, OFF_DIAGONAL = 3.0, -3.0
"""b_res = 6I - 3 of Sinkhorn-Knopp: H_res = cI + (1 - c)J/n, c = 0.990 for n = 4 (the paper's)."""


class Text(NamedTuple):
    """Generated text: of the bodies of forward and backward, and of functions in front of them."""

    forward: str
    backward: str
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """What Triton is generated for: n streams with so many columns, pre | post | res."""

    n: int
    columns: int
    tanh: bool = False

    @property
    def N(self) -> int:
        return padded(self.n)

    @property
    def first(self) -> int:
        """The first column of H̃_res."""
        return 2 * self.n

    @property
    def inner_gradient(self) -> str:
        return " * (1.0 - x * x)" if self.tanh else ""

    def if_padded(self, text: str) -> str:
        return "" if self.n == self.N else text


@dataclass(frozen=True)
class Residual:
    """One way to make H_res from its numbers H̃_res.

    The fields of a subclass are what it reads of a `Variant`, under the same names. Where there are
    no numbers (`columns` is 0) H_res is I, and `forward` and `backward` are not called.
    """

    name: ClassVar[str]
    """As `Variant.residual` has it."""
    starts_static: ClassVar[bool] = False
    """Whether its φ was published as zero at the start."""

    def title(self) -> str:
        """How a person reads it, half a line."""
        raise NotImplementedError

    def columns(self, n: int) -> int:
        """How many numbers H̃_res has for n streams."""
        raise NotImplementedError

    def obstacle(self, n: int) -> str | None:
        """Why it cannot have n streams, and what can, as what follows "variant ...": or None."""
        return None

    def forward(self, x: Tensor, n: int) -> Tensor:
        """H_res `[..., n, n]`, `[out, in]`, from H̃_res `[..., columns]`.

        It is called on proxies too and writes graphs: see the Note of `reference`.
        """
        raise NotImplementedError

    def backward(self, grad: Tensor, x: Tensor, n: int) -> Tensor:
        """d H̃_res `[T, columns]` from dH_res `[T, n, n]` and H̃_res."""
        raise NotImplementedError

    def near_identity(self, n: int) -> Tensor:
        """b_res `[columns]`, float64, of an H_res near I, with rows and columns of sum 1."""
        raise NotImplementedError

    def triton(self, chain: Chain) -> Text:
        """Both bodies in Triton, float32.

        They find `k` (numbers of streams, padded to N), `token`, `inside` and `inv` (1 / r), all
        [BT], and `size` (elements of y). Forward stores y and H_res; backward stores dy and sums
        over tokens, and adds Σ d(y / r) · y to `along`.

        Raises:
            ValueError: for numbers that no kernel can be made for.
        """
        raise NotImplementedError

    def cpp(self, n: int) -> Text:
        """Both bodies in C++, a token per lane of a vector.

        forward: x = H̃ `[COLUMNS]` to H_res `[N][N]`; backward: dH_res, which may be overwritten, to
        dx. The numbers of H_res begin at 2 * N. `lanes.h` has the functions of vectors.
        """
        raise NotImplementedError


def padded(n: int) -> int:
    """The next power of two, from n on."""
    return 1 << (n - 1).bit_length()


def cpp_number(value: float) -> str:
    """A constant of the compute type."""
    if not math.isfinite(value):
        raise ValueError(f"a variant holds finite numbers only, got {value!r}")
    return f"K({float(value)!r})"


def check_integer(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, got {value!r}")


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64, device="cpu")


def softmax_backward(grad: Tensor, weights: Tensor) -> Tensor:
    return weights * (grad - (grad * weights).sum(-1, keepdim=True))


# --- Triton where H̃_res is a few named tensors [BT], not one matrix -------------------------------


def _numbers(chain: Chain, names: list[str], x: str) -> list[str]:
    """`h_<name>` of each column, from x."""
    lines = ["", "    # H̃_res, number by number"]
    for name, column in zip(names, range(2 * chain.n, chain.columns), strict=True):
        lines += [f"    x = {x.format(at=f'token * {chain.columns} + {column}')}"]
        lines += [f"    h_{name} = tl.load(alpha + 2) * x + tl.load(bias + {column})"]
    return lines


def _numbers_backward(chain: Chain, names: list[str]) -> list[str]:
    """From `d_<name>` of each column on."""
    lines = ["    # y is read again (volatile): registers are few in between."]
    for name, column in zip(names, range(2 * chain.n, chain.columns), strict=True):
        at = f"token * {chain.columns} + {column}"
        lines += [f"    y_res = tl.load(y + {at}, inside, other=0.0, volatile=True)"]
        lines += ["    x = inner(y_res * inv)"]
        lines += [f"    tl.store(sums + {column}, tl.sum(d_{name}))"]
        lines += [f"    tl.store(sums + {chain.columns + column}, tl.sum(d_{name} * x))"]
        lines += [f"    d = tl.load(alpha + 2) * d_{name}{chain.inner_gradient}"]
        lines += [f"    tl.store(dy + {at}, d * inv, inside)"]
        lines += ["    along += d * y_res"]
    return lines


def triton_of_numbers(
    chain: Chain, names: list[str], make: list[str], store: list[str], unmake: list[str]
) -> Text:
    """`make` what store and unmake need from h_<name>; `unmake` dH_res into d_<name>."""
    forward = _numbers(chain, names, "mapped(y_parts, y, {at}, inside, size, inv, SPLITS)")
    again = _numbers(chain, names, "inner(tl.load(y + {at}, inside, other=0.0) * inv)")
    backward = [*again, *make, *unmake, *_numbers_backward(chain, names)]
    return Text("\n".join([*forward, *make, *store]), "\n".join(backward))


def triton_sum(terms: Iterable[str]) -> str:
    """Left to right, a few terms a line."""
    terms = list(terms)
    if len(terms) <= _TERMS:
        return " + ".join(terms)
    lines = [" + ".join(terms[i : i + _TERMS]) for i in range(0, len(terms), _TERMS)]
    return "(\n        " + "\n        + ".join(lines) + "\n    )"


_TERMS = 6
