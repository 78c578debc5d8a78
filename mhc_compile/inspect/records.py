"""What ``explain`` finds, as values that a report renders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..passes.sites.records import Reason

__all__ = ["Add", "Adds"]


@dataclass(frozen=True)
class Add:
    """One add of two tensors.

    Attributes:
        name: owner and branch (``model.layers.0.self_attn``); the node's name if rejected.
        owner: path of the module whose forward contains the add.
        chain: number of its chain, -1 for a rejected add.
        reason: in words for a site, a ``Reason`` for a rejected add.
        location: ``file:line``.
        width: C, the size of the channel axis; 0 for a rejected add.
        node: name of the add in the captured graph.
        detail: what differs, for a hyper-connection of the model's own that is not one of ours.
    """

    name: str
    owner: str
    chain: int
    reason: str | Reason
    location: str
    width: int
    node: str
    detail: str = ""


@dataclass(frozen=True)
class Adds:
    """Every add of a model that looks residual, taken or not.

    Attributes:
        model: the model's class name.
        n: number of streams.
        sites: the accepted adds, in the order of the forward.
        rejected: the others.
        chains: the accepted adds of each chain.
        own: whether the sites are hyper-connections that the model was written with.
    """

    model: str
    n: int
    sites: Sequence[Add]
    rejected: Sequence[Add]
    chains: Sequence[Sequence[Add]] = field(repr=False)
    own: bool = False
