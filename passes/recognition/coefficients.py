"""Which variant of mHC a region of the graph computes, found by comparing values with the oracle.

    mapped  y / r of a projection, on random tokens       (see ``evaluation``)
    a node of n numbers   is H_pre or H_post if it lies on a line over a gate of that part of H̃
    a node of n × n       is H_res, or its transpose, if it equals that of a description

The oracle is ``kernels.reference``: what it computes from the same y, α and b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels import reference
from ...kernels.residuals import RESIDUALS
from ...kernels.variants import VARIANTS, Gate, Variant
from ..graph.operators import (
    Kind,
    dtype_of,
    holds_tensor,
    is_float_tensor,
    op_of,
    same_sizes,
    shape_of,
)
from ..sites.records import Reason
from .evaluation import Region, close, is_view, random
from .token_rules import TOKENS, Value

__all__ = ["Met", "Oracle", "Refused", "Roles", "oracle_of", "residuals"]


class Refused(Exception):
    """Why a group of nodes is left as it is: what differs, in words, and the kind of difference."""

    def __init__(self, what: str, reason: Reason) -> None:
        super().__init__(what)
        self.reason = reason


def residuals(n: int, columns: int) -> list[str]:
    """The residuals that have so many columns for n streams."""
    kinds = ((name, kind()) for name, kind in RESIDUALS.items())
    return [name for name, r in kinds if not r.obstacle(n) and r.columns(n) == columns]


@dataclass(frozen=True)
class Met:
    """A value that shows the columns of one part.

    Attributes:
        part: 0, 1, 2 for pre, post, res.
        flipped: whether it is ``[n, n]`` and transposed.
        factor: what H̃ is multiplied with; None if it is not divided by r yet.
    """

    part: int
    flipped: bool
    factor: float | None


class Oracle:
    """One random mapping of n streams, and the coefficients that any variant makes of it.

    Args:
        n: number of streams.
        columns: of y.
        scales: for each part its factor in place of α, None to draw one.
        biased: for each part whether b is drawn, else it is zero.
    """

    def __init__(
        self,
        n: int,
        columns: int,
        scales: tuple[float | None, ...] = (None, None, None),
        biased: tuple[bool, ...] = (True, True, True),
    ) -> None:
        self.n, self.columns, self.sizes = n, columns, (n, n, columns - 2 * n)
        self.y = 2 * random(TOKENS, columns, seed=1)
        self.inv_r = random(TOKENS, 1, seed=2).abs() + 0.5
        self.mapped = self.y * self.inv_r
        self.alpha, self.bias = random(3, seed=3), random(columns, seed=4)
        for part, columns_of_part in enumerate(self.bias.split(self.sizes)):
            if (scale := scales[part]) is not None:
                self.alpha[part] = scale
            if not biased[part]:
                columns_of_part.zero_()
        self._converge_slowly()
        self._found: dict[Variant, tuple[Tensor, Tensor, Tensor]] = {}

    def _converge_slowly(self) -> None:
        """Give the last token logits of H_res on which Sinkhorn-Knopp converges slowly.

        On random ones 20 iterations and 21 agree to 1e-12. A nearly triangular matrix is far from
        any doubly stochastic one: there they differ by 1e-3.
        """
        n, rest = self.n, self.sizes[2]
        if rest == n * n:
            below = torch.ones(n, n, dtype=torch.float64, device="cpu").tril(-1).flatten()
            drawn = random(3, seed=3)[2]  # y is the same whatever α is assumed to be
            self.y[-1, -rest:] -= 12 * below / (drawn * self.inv_r[-1])
            self.mapped = self.y * self.inv_r

    def assuming(self, scales: tuple[float | None, ...], biased: tuple[bool, ...]) -> Oracle:
        """The same mapping with other α and b."""
        return oracle_of(self.n, self.columns, scales, biased)

    def part_of(self, data: Tensor) -> Met | None:
        """The part whose columns a value shows, up to one factor."""
        for base in (self.mapped, self.mapped.tanh(), self.y):
            for part, columns in enumerate(base.split(self.sizes, dim=-1)):
                for flipped in (False, True):
                    factor = _factor(data, self._shown(columns, flipped))
                    if factor is not None:
                        return Met(part, flipped, None if base is self.y else factor)
        return None

    def bias_of(self, met: Met) -> Tensor:
        """b of a part, in the order of the value that it is added to."""
        return self._shown(self.bias.split(self.sizes)[met.part], met.flipped).flatten()

    def _shown(self, columns: Tensor, flipped: bool) -> Tensor:
        """The columns of a part ``[..., size]``; those of a transposed matrix if flipped."""
        if not flipped or columns.shape[-1] != self.n**2:
            return columns
        return columns.unflatten(-1, (self.n, self.n)).mT.flatten(-2)

    def coefficients(self, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre, H_post, H_res."""
        if variant not in self._found:
            with torch.no_grad():
                self._found[variant] = reference.from_projection(
                    self.mapped, self.alpha, self.bias, variant=variant, n=self.n
                )
        return self._found[variant]


@cache
def oracle_of(
    n: int,
    columns: int,
    scales: tuple[float | None, ...] = (None, None, None),
    biased: tuple[bool, ...] = (True, True, True),
) -> Oracle:
    return Oracle(n, columns, scales, biased)


def _factor(data: Tensor, columns: Tensor) -> float | None:
    """c where the data of each token is c times the columns, in their order; None without one."""
    if len(data) != TOKENS or not columns.numel() or data[0].numel() != columns.shape[-1]:
        return None
    ratio = data.reshape(TOKENS, -1) / columns
    factor = ratio[0, 0]
    return factor.item() if close(ratio, factor.expand_as(ratio)) else None


_PRE, _POST, _RES = range(3)
_PARTS = ("H_pre", "H_post", "H_res")


class Roles:
    """Which nodes of a region are H_pre, H_post and H_res, and of which variant.

    A node that something outside the region reads is one of them, or it does not belong to the
    region: then its operands are read from outside. A value that is rounded to another dtype holds
    no coefficient; what it is rounded from may.

    Attributes:
        chosen: from a node to the coefficient that it holds, and whether transposed.
    """

    def __init__(
        self, region: Region, oracle: Oracle, tokens: tuple[object, ...], dtype: torch.dtype
    ) -> None:
        self.region, self.oracle, self.tokens, self.dtype = region, oracle, tokens, dtype
        self.constants = sorted({c for m in region.members for c in _constants(m)})
        self.residuals = residuals(oracle.n, oracle.columns - 2 * oracle.n)
        inside = set(region.members)
        candidates: dict[fx.Node, tuple[int, Any]] = {}
        for node in reversed(region.members):
            if all(user in inside for user in node.users):
                continue
            role = self._role(node)
            if role is None:
                inside.remove(node)
            else:
                candidates[node] = role
        self.chosen: dict[fx.Node, tuple[int, bool]] = {}
        self.descriptions = [self._choose(part, candidates) for part in range(3)]

    def variant(self) -> Variant:
        """The one description of all three, named after the known variant that is nearest."""
        if not self.oracle.sizes[_RES] and self.descriptions[_RES] is None:
            # X stands for I X
            self.descriptions[_RES] = "linear", Variant("mhc", residual="identity")
        missing = [p for p, d in zip(_PARTS, self.descriptions, strict=True) if d is None]
        if missing:
            raise Refused(
                f"nothing in it is {' or '.join(missing)} of a known variant",
                Reason.OWN_COEFFICIENTS,
            )
        inner = {d[0] for d in self.descriptions}
        if not self.oracle.sizes[_RES]:
            inner = {d[0] for d in self.descriptions[:_RES]}
        if len(inner) > 1:
            raise Refused(
                "tanh stands in front of some of its coefficients only", Reason.OWN_COEFFICIENTS
            )
        (_, pre), (_, post), (_, residual) = self.descriptions
        found = replace(residual, pre=pre, post=post, inner=inner.pop())
        alike = (replace(found, name=name) for name in VARIANTS)
        return min(alike, key=lambda v: len(v.text) - len(v.name))

    def _role(self, node: fx.Node) -> tuple[int, Any] | None:
        value, n = self.region.known[node], self.oracle.n
        if not isinstance(value, Value) or dtype_of(node) != self.dtype:
            return None
        if not same_sizes(shape_of(node)[: value.lead], self.tokens):
            return None
        if value.tail == (n,):
            return self._gate(value.data)
        if value.tail == (n, n):
            descriptions = list(self._descriptions(node))
            for flipped in (False, True):
                for description in descriptions:
                    if self._is_residual(value.data, description, flipped):
                        return _RES, (description.inner, description)
        return None

    def _gate(self, data: Tensor) -> tuple[int, Any] | None:
        """The part and the gate: the line through the points (function(H̃), data)."""
        for inner in ("linear", "tanh"):
            for function in ("sigmoid", "linear"):
                base = Variant(
                    "mhc",
                    pre=Gate(function),
                    post=Gate(function),
                    residual=self.residuals[0],
                    iterations=1,
                    inner=inner,
                )
                for part in (_PRE, _POST):
                    x = self.oracle.coefficients(base)[part]
                    centred = x - x.mean()
                    scale = ((centred * data).sum() / centred.square().sum()).item()
                    scale = self._snap(scale)
                    offset = self._snap((data - scale * x).mean().item())
                    if scale and close(scale * x + offset, data):
                        return part, (inner, Gate(function, scale, offset))
        return None

    def _snap(self, number: float) -> float:
        """A number of the graph's own, where it is one up to rounding."""
        nearest = min((0.0, 1.0, *self.constants), key=lambda c: abs(c - number))
        return nearest if abs(nearest - number) < 1e-13 else number

    def _is_residual(self, data: Tensor, description: Variant, flipped: bool) -> bool:
        H_res = self.oracle.coefficients(description)[_RES]
        return close(H_res.mT if flipped else H_res, data)

    def _descriptions(self, node: fx.Node) -> Iterator[Variant]:
        """Every description of H_res that a node could mean."""
        for name in self.residuals:
            reads = {field.name for field in fields(RESIDUALS[name])}
            for inner in ("linear", "tanh"):
                base = Variant("mhc", residual=name, inner=inner)
                settings = set(self._iterations(node)) if "iterations" in reads else {(0, 0.0)}
                for iterations, eps in sorted(settings):
                    for transposed in (False, True)[: 1 + ("transposed" in reads)]:
                        yield replace(base, iterations=iterations, eps=eps, transposed=transposed)

    def _iterations(self, node: fx.Node) -> Iterator[tuple[int, float]]:
        """How often Sinkhorn-Knopp may have normalised what a node holds, and with which eps.

        Only what the node is computed from counts: a model may sum rows and columns once more, to
        see how far it is from doubly stochastic.
        """
        sums = 0
        for above in self.region.above(node):
            name = op_of(above).name
            if name == "sinkhorn_knopp":
                iterations, eps = (*above.args[1:], 0.0)[:2]
                yield iterations, float(eps)  # type: ignore[misc, arg-type]
            sums += name in ("sum", "softmax", "log_softmax", "logsumexp")
        if sums > 1:
            yield from ((sums // 2, eps) for eps in (0.0, *self.constants) if 0 <= eps < 0.1)

    def _choose(self, part: int, candidates: dict[fx.Node, tuple[int, Any]]) -> Any:
        """One description for a part, and the nodes that it describes."""
        found = {node: found for node, (p, found) in candidates.items() if p == part}
        if not found:
            return None
        applied = [node for node in found if self._is_applied(node)]
        if not applied:
            return None
        main = max(applied)
        description = found[main]
        for node in found:
            data = self.region.known[node].data
            if part != _RES and found[node] == description:
                self.chosen[node] = part, False
            elif part == _RES:
                for flipped in (False, True):
                    if self._is_residual(data, description[1], flipped):
                        self.chosen[node] = part, flipped
                        break
        return description

    def _is_applied(self, node: fx.Node) -> bool:
        """Whether something else meets a node, perhaps behind views: streams, or a branch."""
        for user in node.users:
            if any(holds_tensor(n) and n not in self.region.known for n in user.all_input_nodes):
                return True
            shows = is_view(user) or (op_of(user).kind is Kind.CAST and is_float_tensor(user))
            if user in self.region.known and shows and self._is_applied(user):
                return True
        return False


def _constants(node: fx.Node) -> Iterator[float]:
    return (float(a) for a in node.args if type(a) in (int, float))  # type: ignore[arg-type]
