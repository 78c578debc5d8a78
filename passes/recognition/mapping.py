"""mapping: from a product of flattened streams with a φ to the coefficients made of it.

    y = matmul(rms_norm(flatten(X)), φ)        a `Mapping`, found by its shape
    H_pre = σ(y[:n] * α[0] + b[:n]); ...       `read` says which nodes are H_pre, H_post, H_res,
                                               of which variant, and where α and b come from

α may be one tensor or a number for each part; so may b, or they may be missing: what a small
operand means is seen from the value that it meets, which is that of y's columns up to a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ...kernels.ops import basic as ops  # noqa: F401  (registers mhc::matmul)
from ...kernels.variants import Variant
from ..graph.modes import is_read_in_another_mode
from ..graph.norms import rms_norm_of, root_mean_square
from ..graph.operators import (
    Kind,
    dtype_of,
    is_float_tensor,
    op_of,
    same_sizes,
    shape_of,
    value_of,
)
from ..graph.writer import Writer
from ..sites.records import Place, Reason, location_of, stack_of
from .coefficients import Met, Refused, Roles, oracle_of, residuals
from .evaluation import Region, evaluate_down, grow, strip_casts, way_up
from .token_rules import Known, Value

__all__ = [
    "Mapping",
    "Reading",
    "is_widened",
    "mapping_of",
    "mappings",
    "place_of",
    "read",
    "require_one_precision",
    "require_one_tag",
]


_SUMS = ("add", "sub")


@dataclass(frozen=True)
class Mapping:
    """A product of flattened streams with a φ that has as many columns as some variant.

    Attributes:
        y: the product, ``[..., columns]``.
        flat: x⃗ ``[..., nC]``, cast to the dtype of the coefficients.
        X: the streams that it shows, ``[..., n, C]``.
        phi: the other factor; ``by_rows`` if it is ``[columns, nC]``, as ``linear`` takes it.
        weight: that the norm multiplies x⃗ with, if any.
        eps: of the norm in front of the product; None if the norm was deferred.
    """

    y: fx.Node
    flat: fx.Node
    X: fx.Node
    phi: fx.Node
    by_rows: bool
    weight: fx.Node | None
    eps: float | None

    @property
    def n(self) -> int:
        return int(shape_of(self.X)[-2])  # type: ignore[call-overload]

    @property
    def width(self) -> int:
        """C."""
        return int(shape_of(self.X)[-1])  # type: ignore[call-overload]

    @property
    def columns(self) -> int:
        return int(shape_of(self.y)[-1])  # type: ignore[call-overload]


def mappings(graph: fx.Graph) -> Iterator[Mapping]:
    """The products that have as many columns as a variant for their number of streams."""
    for node in [n for n in graph.nodes if op_of(n).product]:
        mapping = mapping_of(node)
        if mapping is not None and residuals(mapping.n, mapping.columns - 2 * mapping.n):
            yield mapping


def mapping_of(y: fx.Node) -> Mapping | None:
    """A product with flattened streams on its left, None for any other node."""
    name = op_of(y).name
    if name not in ("matmul", "mm", "linear") or len(y.args) < 2 or y.kwargs:
        return None
    left, phi, *bias = y.args
    if bias not in ([], [None]):
        return None
    if not (is_float_tensor(left) and is_float_tensor(phi) and is_float_tensor(y)):
        return None
    assert isinstance(left, fx.Node) and isinstance(phi, fx.Node)
    if len(shape_of(phi)) != 2 or not all(type(size) is int for size in shape_of(phi)):
        return None
    norm = rms_norm_of(strip_casts(left))
    flat = left if norm is None else norm.x
    X = _streams_of(flat)
    if X is None:
        return None
    weight, eps = (None, None) if norm is None else (norm.weight, norm.eps)
    return Mapping(y, flat, X, phi, name == "linear", weight, eps)


def _streams_of(flat: fx.Node) -> fx.Node | None:
    """X ``[..., n, C]`` of x⃗ = flatten(X), whatever it is cast to in between."""
    view = flat
    while op_of(view).kind is Kind.CAST and is_float_tensor(view.args[0]):
        view = view.args[0]  # type: ignore[assignment]
    if op_of(view).name not in ("flatten", "view", "reshape") or not is_float_tensor(view.args[0]):
        return None
    source: Any = view.args[0]
    tail, width = shape_of(source)[-2:], shape_of(view)[-1]
    if len(tail) < 2 or any(type(size) is not int for size in (*tail, width)):
        return None
    return strip_casts(source) if math.prod(tail) == width and tail[0] > 1 else None  # type: ignore


def is_widened(product: fx.Node) -> bool:
    """Whether `widen` wrote a product: it multiplies mappings with ``mhc::matmul``."""
    return product.target is torch.ops.mhc.matmul.default


def place_of(node: fx.Node) -> Place:
    """The module that computes a node: the path of its parent, and its name there."""
    stack = stack_of(node)
    owner, _, name = (stack[-1][1] if stack else "").rpartition(".")
    return Place(owner, branch_name=name or node.name, location=location_of(node))


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What the nodes behind a mapping are.

    Attributes:
        variant: the description of all coefficients.
        eps: of the norm.
        chosen: from a node to the coefficient that it holds (0, 1, 2 for H_pre, H_post, H_res),
            and whether transposed.
        parameters: α and b, as the graph has them.
    """

    mapping: Mapping
    variant: Variant
    eps: float
    chosen: dict[fx.Node, tuple[int, bool]]
    parameters: Parameters


def read(mapping: Mapping) -> Reading | None:
    """What is computed from a mapping; None where no coefficients are.

    Raises:
        Refused: there are some, but not those of a variant, or not exactly.
    """
    return _Reader(mapping).read()


@dataclass
class Parameters:
    """The operands of a region that are α and b.

    Attributes:
        alpha, bias: each as one tensor, if the graph has it so.
        alphas: a number for each part (0, 1, 2 for pre, post, res): a node, or a constant.
        biases: a tensor for each part, and whether it is transposed.
    """

    alpha: fx.Node | None = None
    bias: fx.Node | None = None
    alphas: dict[int, fx.Node | float] = field(default_factory=dict)
    biases: dict[int, tuple[fx.Node, bool]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """All of them that stand in the graph."""
        found = [
            self.alpha,
            self.bias,
            *self.alphas.values(),
            *(b for b, _ in self.biases.values()),
        ]
        return [n for n in found if isinstance(n, fx.Node)]

    def scales(self) -> tuple[float | None, ...]:
        """The factor of each part, None where the graph has a node for it."""
        if self.alpha is not None:
            return (None, None, None)
        known = (self.alphas.get(part, 1.0) for part in range(3))
        return tuple(None if isinstance(a, fx.Node) else a for a in known)

    def biased(self) -> tuple[bool, ...]:
        """Whether something is added to each part."""
        return tuple(self.bias is not None or part in self.biases for part in range(3))

    def write_alpha(self, write: Writer, like: fx.Node, dtype: torch.dtype) -> fx.Node:
        """α as three numbers."""
        if self.alpha is not None and same_sizes(shape_of(self.alpha), (3,)):
            return write.cast(self.alpha, dtype)
        if self.alpha is not None:  # a variant without res has two
            alpha = write.cast(self.alpha, dtype)
            return write.call(torch.cat, [alpha, write.call("new_ones", alpha, (1,))])
        parts = []
        for part in range(3):
            number = self.alphas.get(part, 1.0)
            if isinstance(number, fx.Node):
                parts.append(write.call("reshape", write.cast(number, dtype), ()))
            else:
                parts.append(write.call("new_full", like, (), number))
        return write.call(torch.stack, parts)

    def write_bias(
        self, write: Writer, like: fx.Node, dtype: torch.dtype, sizes: tuple[int, ...]
    ) -> fx.Node:
        """b as one row of as many numbers as the parts have together."""
        if self.bias is not None:
            return write.cast(self.bias, dtype)
        parts = []
        for part, size in enumerate(sizes):
            if part in self.biases:
                bias, flipped = self.biases[part]
                bias = write.cast(bias, dtype)
                bias = write.call("transpose", bias, -1, -2) if flipped else bias
                parts.append(write.call("reshape", bias, (size,)))
            elif size:
                parts.append(write.call("new_zeros", like, (size,)))
        return write.call(torch.cat, parts)


class _Reader:
    """The region behind one projection."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping
        self.eps = mapping.eps
        self.lead = len(shape_of(mapping.y)) - 1
        self.parameters = Parameters()
        self.oracle = oracle_of(mapping.n, mapping.columns)
        self.dtype = dtype_of(mapping.y)

    def read(self) -> Reading | None:
        y = self.oracle.y if self.eps is None else self.oracle.mapped
        region = grow({self.mapping.y: Value(y, self.lead)}, self._bind)
        if not any(self._is_small(region.known[member]) for member in region.members):
            if is_read_in_another_mode(self.mapping.y):
                raise Refused("it is read in another mode than its own", Reason.OWN_MODE)
            return None  # some other product of the user's with as many columns
        if self.eps is None:
            raise Refused("it is not divided by the rms of the flattened streams", Reason.OWN_NORM)
        self._require_dtypes()
        if region.written:
            raise Refused("some of its values are written in place", Reason.OWN_PLACE)
        oracle = self.oracle.assuming(self.parameters.scales(), self.parameters.biased())
        roles = Roles(region, oracle, shape_of(self.mapping.y)[:-1], self.dtype)
        try:
            variant = roles.variant()
        except Refused:
            if any(map(is_read_in_another_mode, [self.mapping.y, *region.members])):
                raise Refused("a part is read in another mode", Reason.OWN_MODE) from None
            raise
        self._require_uniform(region, roles)
        return Reading(self.mapping, variant, self.eps, roles.chosen, self.parameters)

    def _is_small(self, value: Any) -> bool:
        """Whether a value has the shape of coefficients."""
        n = self.mapping.n
        return isinstance(value, Value) and value.tail in ((n,), (n, n))

    def _require_dtypes(self) -> None:
        if op_of(strip_casts(self.mapping.flat)).kind is Kind.CAST:
            raise Refused(
                f"its {dtype_of(self.mapping.X)} streams are rounded in front of it",
                Reason.OWN_PRECISION,
            )
        exact = torch.float64 if dtype_of(self.mapping.X) is torch.float64 else self.dtype
        given = {dtype_of(n) for n in (self.mapping.y, self.mapping.flat, self.mapping.phi)}
        if given != {exact} or exact not in (torch.float32, torch.float64):
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in given))
            raise Refused(
                f"computed in {names} from {dtype_of(self.mapping.X)} streams",
                Reason.OWN_PRECISION,
            )

    def _require_uniform(self, region: Region, roles: Roles) -> None:
        used = {n for role in roles.chosen for n in region.above(role)} | {self.mapping.y}
        require_one_precision(sorted(used - set(roles.chosen)), self.dtype)
        require_one_tag(used)

    def _bind(self, operand: fx.Node, known: Known, reader: fx.Node) -> None:
        """Give α, b, and the rms of x⃗ their values."""
        if self.mapping.eps is None and self._bind_rms(operand, known):
            return
        met = self._met(operand, known, reader)
        way = way_up(operand)
        whole = self._whole(way[-1], operand)
        if whole is not None:
            known[way[-1]] = Value(whole.unsqueeze(0), 0)
            evaluate_down(way, known)
        elif met is not None:
            self._bind_part(operand, known, met, op_of(reader).name)
        if met is not None and met.factor is not None and op_of(reader).name in _SUMS:
            self.parameters.alphas.setdefault(met.part, met.factor)

    def _met(self, operand: fx.Node, known: Known, reader: fx.Node) -> Met | None:
        """The columns that an operand meets in its reader, if it does."""
        others = [known.get(n) for n in reader.all_input_nodes if n is not operand]
        shape = shape_of(operand)
        if len(others) != 1 or not isinstance(others[0], Value) or others[0].lead != self.lead:
            return None
        if len(shape) > len(others[0].tail) or not all(type(size) is int for size in shape):
            return None
        return self.oracle.part_of(others[0].data)

    def _bind_rms(self, operand: fx.Node, known: Known) -> bool:
        rms = root_mean_square(operand)
        if rms is None or strip_casts(rms[0]) is not strip_casts(self.mapping.flat):
            return False
        self.eps = rms[1]
        inv_r = self.oracle.inv_r
        known[operand] = Value(inv_r if rms[2] else 1 / inv_r, self.lead)
        return True

    def _whole(self, source: fx.Node, operand: fx.Node) -> Tensor | None:
        """The value of α or b as one tensor; α is read number by number."""
        shape, found = shape_of(source), self.parameters
        if same_sizes(shape, (self.mapping.columns,)) and found.bias in (None, source):
            found.bias = source
            return self.oracle.bias
        most = 3 if self.mapping.columns > 2 * self.mapping.n else 2
        numbers = (3,) if most == 3 else (2, 3)
        single = all(same_sizes((size,), (1,)) for size in shape_of(operand))
        if (
            any(same_sizes(shape, (k,)) for k in numbers)
            and single
            and found.alpha in (None, source)
        ):
            found.alpha = source
            return self.oracle.alpha[: int(shape[0])]  # type: ignore[call-overload]
        return None

    def _bind_part(self, operand: fx.Node, known: Known, met: Met, name: str) -> None:
        """Give an operand the value of a part of α or b."""
        shape: Any = shape_of(operand)
        found, size = self.parameters, math.prod(shape)
        data: Tensor | None = None
        if size == 1 and name == "mul" and met.part not in found.alphas:
            found.alphas[met.part] = operand
            data = self.oracle.alpha[met.part]
        flat = met.flipped and len(shape) < 2  # its order is not that of b
        fits = size == self.oracle.sizes[met.part] and met.factor is not None and not flat
        if fits and name in _SUMS and met.part not in found.biases:
            found.biases[met.part] = operand, met.flipped
            data = self.oracle.bias_of(met)
        if data is not None:
            known[operand] = Value(data.reshape(shape).unsqueeze(0), 0)


def require_one_precision(nodes: Iterable[fx.Node], dtype: torch.dtype) -> None:
    """Refuse nodes that are rounded to another dtype."""
    for node in nodes:
        values = value_of(node)
        for value in values if isinstance(values, (tuple, list)) else [values]:
            if isinstance(value, Tensor) and value.dtype != dtype:
                raise Refused(
                    f"a value is rounded to {value.dtype}, not {dtype}", Reason.OWN_PRECISION
                )


def require_one_tag(nodes: Iterable[fx.Node]) -> None:
    """Refuse nodes of which only some are recomputed."""
    tags = {(n.meta.get("ac_graph_id"), n.meta.get("recompute")) for n in nodes}
    if len(tags) > 1:
        raise Refused("its nodes belong to different checkpointed regions", Reason.OWN_PLACE)
