"""The passes in their phases, each with what must hold in front of it and behind it.

EXAMINE      what the sites of a graph are; the graph keeps its meaning and its residuals
REWRITE      n streams, and operators for them, behind EXAMINE
OWN          the same operators for a model that has hyper-connections of its own: nothing is
             added to it
REPORT       who computes the operators; the last phase of both
PARTITIONED  on the forward, the backward and the inference graphs that AOTAutograd makes of it
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .context import Context
from .fusion.fuse_coefficients import every_site_is_fused, fuse_coefficients
from .fusion.fuse_seams import fuse_seams, no_seam_is_left
from .fusion.hoist_views import hoist_views, no_view_is_left
from .fusion.report_kernels import every_operator_is_reported, report_kernels
from .graph.operators import branch_input, op_of
from .open_form.defer_norm import defer_norm, no_mapping_is_normalised
from .open_form.widen import every_site_is_open, widen
from .recognition.recognize import every_connection_is_read, recognize
from .runner import Pass, Tier
from .sites.canonicalize import adds_have_one_spelling, canonicalize
from .sites.declared import collect, declaration_nodes
from .sites.detect import detect, every_add_has_one_reason

__all__ = ["EVERY", "EXAMINE", "OWN", "PARTITIONED", "REPORT", "REWRITE"]


def _no_bodies(gm: fx.GraphModule, context: Context) -> Sequence[str]:
    left = [n.name for n in gm.graph.nodes if op_of(n).body and n.args]
    return [f"bodies are called as a whole: {left}"] if left else []


def _nothing_is_declared(gm: fx.GraphModule, context: Context) -> Sequence[str]:
    return [f"{node.name} is left" for node in declaration_nodes(gm.graph)]


def _sites_are_of_this_graph(gm: fx.GraphModule, context: Context) -> Sequence[str]:
    if context.detection is None:
        return ["nothing was detected"]
    nodes = set(gm.graph.nodes)
    return [
        f"{s.node.name} is in another graph" for s in context.detection.sites if s.node not in nodes
    ]


def _no_marker(gm: fx.GraphModule, context: Context) -> Sequence[str]:
    return [f"{n.name} is left" for n in gm.graph.nodes if n.target is branch_input]


CANONICALIZE = Pass(
    "canonicalize", canonicalize, ensures=adds_have_one_spelling, tier=Tier.REQUIRED
)
COLLECT = Pass("collect", collect, _no_bodies, _nothing_is_declared, Tier.REQUIRED)
DETECT = Pass("detect", detect, _nothing_is_declared, every_add_has_one_reason, Tier.REQUIRED)
WIDEN = Pass("widen", widen, _sites_are_of_this_graph, every_site_is_open, Tier.REQUIRED)
RECOGNIZE = Pass("recognize", recognize, _no_marker, every_connection_is_read)
DEFER_NORM = Pass("defer_norm", defer_norm, ensures=no_mapping_is_normalised)
FUSE_COEFFICIENTS = Pass("fuse_coefficients", fuse_coefficients, _no_marker, every_site_is_fused)
HOIST_VIEWS = Pass("hoist_views", hoist_views, ensures=no_view_is_left)
REPORT_KERNELS = Pass("report_kernels", report_kernels, _no_marker, every_operator_is_reported)
FUSE_SEAMS = Pass("fuse_seams", fuse_seams, ensures=no_seam_is_left)

EXAMINE = (CANONICALIZE, COLLECT, DETECT)
REWRITE = (WIDEN, RECOGNIZE, DEFER_NORM, FUSE_COEFFICIENTS, HOIST_VIEWS)
OWN = (CANONICALIZE, RECOGNIZE, DEFER_NORM, FUSE_COEFFICIENTS, HOIST_VIEWS)
REPORT = (REPORT_KERNELS,)
PARTITIONED = (FUSE_SEAMS,)

EVERY = (*EXAMINE, *REWRITE, *REPORT, *PARTITIONED)
