"""What the passes share: the options of a run, what a model declares, and results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from ..kernels.variants import Variant
from .sites.records import Detection, FusedSite, OpenEnd, OpenSite, Rejected

__all__ = ["Context", "Declaration", "Options", "PassResult"]


@dataclass(frozen=True)
class Options:
    """The part of a configuration that changes graphs.

    Attributes:
        n: number of streams.
        variant: how H_pre, H_post and H_res are parametrised.
        eps: added to the mean square in the mapping's RMSNorm.
        readout: ``mean``, ``sum`` or ``head``.
        stream_dtype: dtype in which streams are kept, ``None`` for the model's own.
        defer_norms: whether the user's own RMSNorms are deferred behind their matmuls.
        include, exclude: ``fnmatch`` patterns over site names.
        disabled: names of passes that are left out.
    """

    n: int
    variant: Variant
    eps: float = 1e-6
    readout: str = "mean"
    stream_dtype: torch.dtype | None = None
    defer_norms: bool = False
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()


@dataclass
class Declaration:
    """One site that a module says it owns, as it arrives in a captured graph.

    Attributes:
        name: the branch's name within its owner (``self_attn``).
        chain: the chain's number in the transformed model.
        first, last: whether it is the first or the last site of its chain.
        parameters: placeholders of phi, alpha, bias (and the head's three at a last site);
            empty for a site that the user excluded.
    """

    name: str
    chain: int
    first: bool
    last: bool
    parameters: list[fx.Node] = field(default_factory=list)


@dataclass
class Context:
    """The state of one run of the pipeline over one captured graph.

    Attributes:
        options: what to build.
        grad_enabled: whether gradients are recorded where the graph is entered.
        trainable: placeholders that are ``nn.Parameter`` (learned weights).
        owners: from the identity of each registered module of the model to its paths, the first
            of them the one to show; empty when unknown. Only these modules can own sites.
        declarations: from the identity of an owner (its ``nn_module_stack`` key without the
            count of calls) to what it declares; ``None`` while a model is examined for the
            first time and every site found is taken.
        homes: chains whose home module (the lowest common ancestor of its owners) was entered
            in this graph.
        broken_at: where and why the capture of this graph ended early, if it did.
        detection: the result of ``detect``.
        open_sites, open_ends: what ``widen`` wrote.
        left_open: those of them of which no operators were made, each with the reason.
        operators: how many ``mhc::`` operators there are of each name and implementation.
        own: the model's own hyper-connections, recognised or not.
    """

    options: Options
    grad_enabled: bool = True
    trainable: frozenset[str] = frozenset()
    owners: Mapping[str, Sequence[str]] = field(default_factory=dict)
    declarations: dict[str, list[Declaration]] | None = None
    homes: frozenset[int] = frozenset()
    broken_at: str | None = None
    detection: Detection | None = None
    open_sites: Sequence[OpenSite] = ()
    open_ends: Sequence[OpenEnd] = ()
    left_open: Mapping[OpenSite, str] = field(default_factory=dict)
    operators: Counter[tuple[str, str]] = field(default_factory=Counter)
    own: list[FusedSite | Rejected] = field(default_factory=list)


@dataclass
class PassResult:
    """A pass's answer: the graph, whether it changed, and what to tell the reader."""

    gm: fx.GraphModule
    changed: bool
    notes: list[str] = field(default_factory=list)
