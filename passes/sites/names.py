"""Names of sites: the module that owns an add, and the branch's name within it.

    model.layers.0 + self_attn     the add stands in the forward of model.layers.0, and the first
                                   real computation of its branch in its child self_attn

Which module it is, is told by identities (``nn_module_stack``), never by the text of a path.
"""

from __future__ import annotations

from torch import fx

from ..context import Context
from ..graph.dataflow import DataFlow
from ..graph.operators import Kind, op_name, op_of
from .records import Place, Reason, ResidualAdd, identity_of, location_of, stack_of

__all__ = ["Names", "is_constant"]


class Names:
    """Whose the adds of a graph are.

    Args:
        ablated: whether constants may stand for the results of branches.
    """

    def __init__(self, context: Context, flow: DataFlow, ablated: bool) -> None:
        self.context, self.flow, self.ablated = context, flow, ablated

    def of_adds(
        self, found: dict[fx.Node, ResidualAdd], rejected: dict[fx.Node, Reason]
    ) -> dict[fx.Node, Place]:
        """The place of every add; a repeat in the same owner gets ``_1``, ``_2``."""
        seen: dict[tuple[str, str], int] = {}
        taken: dict[str, set[str]] = {}
        places: dict[fx.Node, Place] = {}
        for node in self.flow.order:
            if (add := found.get(node)) is not None:
                key, path = self.owner_of(node)
                branch = self._branch_name(key, path, self.flow.region(add.x, add.branch))
                owner_id = identity_of(key)
                number = seen.get((owner_id, branch), 0)
                seen[owner_id, branch] = number + 1
                name = branch if number == 0 else f"{branch}_{number}"
                while name in taken.setdefault(owner_id, set()):
                    name += "_"
                taken[owner_id].add(name)
                places[node] = Place(path, key, name, location_of(node))
            elif node in rejected:
                key, path = self.owner_of(node)
                places[node] = Place(path, key, node.name, location_of(node))
        return places

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a node is a learned weight."""
        return node.name in self.context.trainable

    def owner_of(self, node: fx.Node) -> tuple[str, str]:
        """(stack key, path) of the innermost module call that can own parameters."""
        known = self.context.owners
        for key, _ in reversed(stack_of(node)):
            if paths := known.get(identity_of(key)):
                return key, paths[0]
        return "", ""

    def child_within(self, node: fx.Node, owner_key: str) -> str:
        """Name of the module called directly by the owner's forward, "" if there is none."""
        calls = stack_of(node)
        keys = ["", *(key for key, _ in calls)]  # "": the root of the capture
        if owner_key not in keys or keys.index(owner_key) == len(calls):
            return ""
        position = keys.index(owner_key)
        key, text = calls[position]
        name = self._held_as(identity_of(owner_key), identity_of(key))
        if name is None:  # not registered with its owner: as the code calls it
            prefix = f"{calls[position - 1][1]}." if position else ""
            name = text[len(prefix) :] if text.startswith(prefix) else text.rsplit(".", 1)[-1]
        return name.replace(".", "_").replace("[", "_").replace("]", "").replace("'", "")

    def _held_as(self, owner: str, child: str) -> str | None:
        """The path of a module within another one, however the code reaches it."""
        known = self.context.owners
        above = [f"{path}." if path else "" for path in known.get(owner, ("",))]
        return next(
            (
                path[len(prefix) :]
                for path in known.get(child, ())
                for prefix in above
                if path.startswith(prefix)
            ),
            None,
        )

    def _branch_name(self, key: str, owner: str, region: set[fx.Node]) -> str:
        ordered = sorted(region, key=self.flow.index.__getitem__)
        mixing = [n for n in ordered if op_of(n).kind is Kind.MIXING]
        for node in mixing:
            child = self.child_within(node, key)
            if child:
                return child
        for node in filter(is_constant, ordered) if self.ablated and not mixing else ():
            return self.child_within(node, key) or "branch"
        for node in mixing:
            for source in node.all_input_nodes:
                if self.is_weight(source):
                    return _last_name(source)
        return op_name(mixing[0]) if mixing else "branch"


def is_constant(node: fx.Node) -> bool:
    """Whether a node creates a tensor out of nothing but sizes."""
    return op_of(node).creates


def _last_name(placeholder: fx.Node) -> str:
    """``l_self_parameters_w_`` and ``l_self_modules_a_parameters_weight_`` -> w, weight."""
    name = str(placeholder.target).rstrip("_")
    return name.rsplit("parameters_", 1)[-1] or name
