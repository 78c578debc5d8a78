"""The variants of mHC, each one value of one description.

The reference and whatever generates kernels read these descriptions; nothing else distinguishes
one variant from another. With x̃ = x⃗ / r the normalised state of a token, every variant computes

    H̃      = α ⊙ inner(x̃ φ) + b                       columns pre | post | res
    H_pre   = pre.scale  · pre.function(H̃_pre)   + pre.offset          [n]
    H_post  = post.scale · post.function(H̃_post) + post.offset         [n]
    H_res   = residual(H̃_res)                                          [n, n], [out, in]

Sources: mHC arXiv:2512.24880, Hyper-Connections arXiv:2409.19606, mHC-lite arXiv:2601.05732,
KromHC arXiv:2601.21579, and the `deepseek_v4` model of Hugging Face transformers.
"""

import functools
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from .residuals import RESIDUALS, Residual


@dataclass(frozen=True)
class Gate:
    """`scale · function(x) + offset`, element by element."""

    function: Literal["sigmoid", "linear"]
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Variant:
    """How the coefficients of a site come from its numbers H̃.

    Args:
        name: a member of `VARIANTS`.
        pre, post: the gates of H_pre and H_post.
        residual: the name of the way that H_res is made from H̃_res; the folder residuals/ has a
            file for each, which says what it reads of the following.
        iterations: of `sinkhorn`, 1 or more; 0 for the others.
        eps: of `sinkhorn`: 0 for the paper's form, above 0 for DeepSeek-V4's.
        rank: of `low_rank`, 1 or more.
        inner: `tanh` in front of α and b (Hyper-Connections), else `linear`.
        transposed: whether the columns of φ for res are ordered [in, out] and not [out, in].
    """

    name: str
    pre: Gate = Gate("sigmoid")
    post: Gate = Gate("sigmoid", scale=2.0)
    residual: str = "sinkhorn"
    iterations: int = 0
    eps: float = 0.0
    inner: Literal["linear", "tanh"] = "linear"
    transposed: bool = False
    rank: int = 1

    @property
    def text(self) -> str:
        """One line, as operators carry it in a graph; `parse_variant` reads it.

        The name, and what differs from the description of that name: `mhc(iterations=20)`.
        """
        usual, own = _flat(_named(self.name)), _flat(self)
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in own.items() if v != usual[k])})"

    @functools.cached_property
    def res(self) -> Residual:
        """How H_res is made, with the numbers that it reads of this description.

        Raises:
            ValueError: for an unknown residual.
        """
        if self.residual not in RESIDUALS:
            known = ", ".join(RESIDUALS)
            raise ValueError(f"unknown residual {self.residual!r}; known are {known}")
        kind = RESIDUALS[self.residual]
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})

    def columns(self, n: int) -> tuple[int, int, int]:
        """Columns of φ, and elements of b, for pre, post and res with n streams."""
        return n, n, self.res.columns(n)

    def check(self, n: int) -> None:
        """Raise ValueError if this variant cannot have n streams; the message says what can."""
        _check_positive("the number of streams n", n)
        if obstacle := self.res.obstacle(n):
            raise ValueError(f"variant {self.name!r} {obstacle}")


def _check_positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a positive integer, got {value!r}")


_EPS_V4 = 1e-6

_DESCRIPTIONS = (
    Variant("mhc"),
    # V4 normalises comb = H_resᵀ by softmax over rows, columns, 19 × (rows, columns). Seen as
    # H_res that is columns, rows, 19 × (columns, rows): the order of the paper. Its weights fit
    # unchanged: φ = fnᵀ, α = scale, b = base, because `transposed` keeps its order of columns.
    Variant("deepseek_v4", pre=Gate("sigmoid", offset=_EPS_V4), eps=_EPS_V4, transposed=True),
    # As arXiv:2512.24880 restates it (eq. 5), but on the whole state x⃗ like the others, where
    # the original projects each stream by itself. `replace(…, inner="linear")` is its linear form.
    Variant("hc", pre=Gate("linear"), post=Gate("linear"), residual="free", inner="tanh"),
    Variant("mhc_lite", residual="permutations"),
    Variant("kromhc", residual="kronecker"),
    Variant("identity", residual="identity"),
    Variant("low_rank", residual="low_rank"),
)

VARIANTS = tuple(variant.name for variant in _DESCRIPTIONS)
"""The names that `get_variant` knows, the paper's first."""


def get_variant(name: str, *, sinkhorn_iters: int = 20) -> Variant:
    """The description called `name`, with its number of Sinkhorn iterations set.

    Args:
        name: a member of `VARIANTS`.
        sinkhorn_iters: pairs of column and row normalisations, 1 or more (the paper uses 20);
            variants without Sinkhorn do not use it.

    Raises:
        ValueError: for an unknown name or a number of iterations that is not a positive integer.
    """
    _check_positive("sinkhorn_iters", sinkhorn_iters)
    variant = _named(name)
    reads = {field.name for field in fields(variant.res)}
    return replace(variant, iterations=sinkhorn_iters if "iterations" in reads else 0)


@functools.cache
def parse_variant(text: str) -> Variant:
    """The description that `Variant.text` wrote.

    Raises:
        ValueError: if `text` does not have that form.
    """
    match = re.fullmatch(r"(\w+)\((.*)\)", text)
    if match is None:
        raise ValueError(f"a variant is written like 'mhc(iterations=20)', got {text!r}")
    variant = _named(match[1])
    for change in filter(None, match[2].split(", ")):
        name, _, value = change.partition("=")
        variant = _changed(variant, name, value)
    return variant


def _named(name: str) -> Variant:
    for variant in _DESCRIPTIONS:
        if variant.name == name:
            return variant
    raise ValueError(f"unknown variant {name!r}; known are {', '.join(VARIANTS)}")


def _flat(variant: Variant) -> dict[str, Any]:
    """Every field but the name, those of the gates as `pre.scale`."""
    flat: dict[str, Any] = {}
    for field in fields(variant):
        value = getattr(variant, field.name)
        if isinstance(value, Gate):
            flat.update({f"{field.name}.{g.name}": getattr(value, g.name) for g in fields(value)})
        elif field.name != "name":
            flat[field.name] = value
    return flat


def _changed(variant: Variant, name: str, value: str) -> Variant:
    known = _flat(variant)
    if name not in known:
        raise ValueError(f"a variant has no field {name!r}; it has {', '.join(known)}")
    kind = type(known[name])
    parsed: Any = value == "True" if kind is bool else kind(value)
    gate, _, field = name.rpartition(".")
    if gate:
        return replace(variant, **{gate: replace(getattr(variant, gate), **{field: parsed})})
    return replace(variant, **{field: parsed})
