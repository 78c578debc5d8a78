"""Replacing several operators of a graph by one, where that is legal.

A fused operator stands where the last of its members stood. It then has all its inputs, and what
stood between its members and reads one of them moves behind it. Were such a node also an input of
another member, the graph would need a cycle: that fusion is refused, with the reason.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.operators import same_shape, value_of
from ..graph.writer import Writer

__all__ = ["Fusion", "Sum", "Value", "item", "items", "sum_of"]

Value = tuple[fx.Node, int | None]
"""A result: the node that computes it, and which one if the node has several."""

_ADD = torch.ops.aten.add.Tensor


@dataclass(frozen=True)
class Sum:
    """Additions that sum two terms and others, in whatever order they stand.

    Attributes:
        terms: the two that a fused operator computes itself.
        additions: those that lead from the two to the sum, in order; the last one is the sum.
    """

    terms: tuple[fx.Node, fx.Node]
    additions: tuple[fx.Node, ...]

    @property
    def root(self) -> fx.Node:
        """The sum of all terms."""
        return self.additions[-1]

    def others(self, write: Writer) -> fx.Node | None:
        """The sum of the other terms, None if there are none; what is left of the additions."""
        left: dict[fx.Node, fx.Node | None] = dict.fromkeys(self.terms)
        for addition in self.additions:
            operands = [left.get(a, a) for a in addition.all_input_nodes]
            present = [o for o in operands if o is not None]
            if len(present) == 2:
                left[addition] = write.call(_ADD, *present)
            else:
                left[addition] = present[0] if present else None
        return left[self.root]


def sum_of(a: fx.Node, b: fx.Node) -> Sum | None:
    """The sum in which both values end, each read by nothing but additions; None without one."""
    ways = [_additions_above(node) for node in (a, b)]
    if not all(ways) or ways[0][-1] is not ways[1][-1]:
        return None
    return Sum((a, b), tuple(sorted({*ways[0], *ways[1]})))


def _additions_above(node: fx.Node) -> list[fx.Node]:
    way: list[fx.Node] = []
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _is_addition(node):
            break
        way.append(node)
    return way


def _is_addition(node: fx.Node) -> bool:
    """Whether a node adds two different tensors of its own shape and dtype."""
    if node.target is not _ADD or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    dtypes = {getattr(value_of(n), "dtype", None) for n in (node, *node.all_input_nodes)}
    return len(dtypes) == 1 and all(same_shape(n, node) for n in node.all_input_nodes)


@dataclass(frozen=True)
class Fusion:
    """One operator in the place of several.

    Attributes:
        target: the new operator, which returns several values.
        members: what it replaces; it takes the place of the first in the user's code.
        arguments: of the new operator; a `Sum` stands for the sum of its other terms.
        outputs: which of the members' results it returns, in order.
    """

    target: Any
    members: list[fx.Node]
    arguments: tuple[Any, ...]
    outputs: list[Value]

    @property
    def name(self) -> str:
        """The bare name of the new operator."""
        return self.target.overloadpacket.__name__

    def obstacle(self) -> str | None:
        """Why the members cannot be replaced; None if they can."""
        returned, members = set(self.outputs), set(self.members)
        for node, index, value in self._values():
            reader = next((u for u in value.users if u not in members), None)
            if reader is not None and (node, index) not in returned:
                return f"{reader} reads {value}, which would not be computed any more"
            if node.target is _ADD and _is_viewed_out_of_order(node):
                return f"{value} is viewed, and lies in another order than operators return"
            if value in self.arguments:
                return f"{value} is a result of one of them and an argument of another"
        between = self._between()
        needed = {i for m in self.members for i in m.all_input_nodes}
        if (cyclic := next((n for n in between if n in needed), None)) is not None:
            return f"{cyclic} depends on one of them, and another on {cyclic}"
        if (fixed := next((n for n in between if n.is_impure()), None)) is not None:
            return f"{fixed} depends on one of them and has to keep its place"
        return None

    def apply(self) -> None:
        """Replace the members; there must be no obstacle."""
        write, between = Writer(max(self.members), self.members[0]), self._between()
        results = self._insert(write)
        for node in between:
            write.move(node)
        self._erase(results)

    def _values(self) -> Iterator[tuple[fx.Node, int | None, fx.Node]]:
        """Every result of the members that has a node: member, index, node."""
        for member in self.members:
            yield from self._values_of(member)

    @staticmethod
    def _values_of(member: fx.Node) -> Iterator[tuple[fx.Node, int | None, fx.Node]]:
        if isinstance(value_of(member), (tuple, list)):
            for user in member.users:
                index: Any = user.args[1]
                yield member, index, user
        else:
            yield member, None, member

    def _between(self) -> list[fx.Node]:
        """What stands between the members and depends on one of them."""
        dependent = {value for _, _, value in self._values()} | set(self.members)
        own, last = set(dependent), max(self.members)
        node, found = min(self.members), []
        while node is not last:
            if node not in own and not dependent.isdisjoint(node.all_input_nodes):
                dependent.add(node)
                found.append(node)
            node = node.next
        return found

    def _insert(self, write: Writer) -> dict[Value, fx.Node]:
        """The new operator and a node for every result that is read."""
        arguments = [a.others(write) if isinstance(a, Sum) else a for a in self.arguments]
        made = write.call(self.target, *arguments, name=self.name)
        members = set(self.members)
        read = {
            (node, index)
            for node, index, value in self._values()
            if not members.issuperset(value.users)
        }
        return {
            output: write.call(operator.getitem, made, i)
            for i, output in enumerate(self.outputs)
            if output in read
        }

    def _erase(self, results: dict[Value, fx.Node]) -> None:
        members = set(self.members)
        for node, index, value in list(self._values()):
            if (node, index) in results:
                value.replace_all_uses_with(
                    results[node, index], delete_user_cb=lambda user: user not in members
                )
        for member in sorted(self.members, reverse=True):
            for _, index, value in list(self._values_of(member)):
                if index is not None:
                    member.graph.erase_node(value)
            member.graph.erase_node(member)


def _is_viewed_out_of_order(total: fx.Node) -> bool:
    """Whether views fit strides of a sum that the contiguous result of an operator has not."""
    value: Any = value_of(total)
    viewed = any(getattr(user.target, "is_view", False) for user in total.users)
    return viewed and not value.is_contiguous()


def items(node: fx.Node, index: int) -> list[fx.Node]:
    """The nodes that take one result of an operator with several."""
    return [u for u in node.users if u.target is operator.getitem and u.args[1] == index]


def item(node: fx.Node, index: int) -> fx.Node | None:
    """The node that takes one result of an operator with several, if it is used."""
    return next(iter(items(node, index)), None)
