"""The passes, in order, each with what must hold behind it."""

from __future__ import annotations

from torch import fx

from .context import Context
from .fusion.fuse_coefficients import fuse_coefficients
from .fusion.fuse_seams import fuse_seams
from .fusion.hoist_views import hoist_views
from .fusion.report_kernels import lower
from .graph.operators import branch_input, op_of
from .open_form.defer_norm import defer_norm
from .open_form.widen import widen
from .recognition.recognize import recognize
from .runner import Pass
from .sites.canonicalize import canonicalize
from .sites.detect import detect

__all__ = ["EXAMINE", "OWN", "PARTITIONED", "PIPELINE", "REQUIRED"]


def _bodies_are_inlined(gm: fx.GraphModule, context: Context) -> list[str]:
    left = [n.name for n in gm.graph.nodes if op_of(n).body]
    return [f"checkpointed bodies left: {left}"] if left else []


def _sites_are_consistent(gm: fx.GraphModule, context: Context) -> list[str]:
    found = context.detection
    if found is None:
        return ["no detection"]
    both = {s.node for s in found.sites} & {r.node for r in found.rejected}
    names = [s.name for s in found.sites]
    problems = [f"both accepted and rejected: {n.name}" for n in both]
    if len(set(names)) != len(names):
        problems.append("two sites have one name")
    return problems


def _streams_are_closed(gm: fx.GraphModule, context: Context) -> list[str]:
    """Every output has the shape it had, and no marker is left."""
    return [f"{n.name} is left" for n in gm.graph.nodes if n.target is branch_input]


PIPELINE = (
    Pass("canonicalize", canonicalize, _bodies_are_inlined),
    Pass("detect", detect, _sites_are_consistent),
    Pass("widen", widen, _streams_are_closed),
    Pass("recognize", recognize),
    Pass("defer_norm", defer_norm),
    Pass("fuse_coefficients", fuse_coefficients),
    Pass("hoist_views", hoist_views),
    Pass("lower", lower),
)

# Without these a transformed model would run its plain residuals: they cannot be disabled.
REQUIRED = ("detect", "widen")

# On a model that has hyper-connections of its own: nothing is added to it.
OWN = tuple(step for step in PIPELINE if step.name not in ("detect", "widen"))

# What `transform` and `explain` need: the sites, no rewrite.
EXAMINE = PIPELINE[:2]

# On the forward, the backward and the inference graphs that AOTAutograd makes of it.
PARTITIONED = (Pass("fuse_seams", fuse_seams),)
