"""``mhc::declare``: how a traced module tells the backend which sites it owns.

The parameters of a site stand on the module that owns it; while Dynamo traces that module's
forward, the operator mentions them, and so they arrive in the captured graph as ordinary,
guarded inputs beside one node that the backend reads and erases. The operator has no result and
must never run: if it does, somebody else compiled the model and its residuals would be plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import custom_op

from .. import _torch
from ..config import Config
from ..errors import NotCapturedError
from ..passes.sites.declared import DeclaredSite, read_spec, spec_text

__all__ = ["DeclaredSite", "Spec", "declare"]


@custom_op("mhc::declare", mutates_args=())
def declare(parameters: Sequence[Tensor], spec: str) -> None:
    """Mention the mHC parameters of one module call in the graph being traced."""
    raise NotCapturedError(
        "A model transformed by mhc_compile was compiled with a backend that does not know it, "
        "and would have run with plain residuals. Use torch.compile(model, backend='mhc') or "
        "model.compile(backend='mhc'), or call the model without compiling it. To leave mHC, call "
        "mhc_compile.revert(model)."
    )


@declare.register_fake
def _(parameters: Sequence[Tensor], spec: str) -> None:
    return None


_torch.register_effectful(torch.ops.mhc.declare.default)


@dataclass(frozen=True)
class Spec:
    """What a module declares: the configuration, its sites, the chains it is the home of."""

    config: Config
    sites: tuple[DeclaredSite, ...]
    homes: tuple[int, ...]

    def to_json(self) -> str:
        return spec_text(self.config.to_json(), self.sites, self.homes)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        config, sites, homes = read_spec(text)
        return cls(Config.from_json(config), sites, homes)
