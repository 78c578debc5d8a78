"""The passes on whole models: exact alone and together, the operators they make, what is kept.

AOTAutograd partitions the graphs and the passes run on them as under Inductor; nothing is compiled.
"""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mhc_compile.passes.graph.operators import op_name, value_of
from tests.checks import Run, gradient_error, output_error
from tests.zoo.models import BY_NAME
from tests.zoo.rewritten import Captured, Rewritten

# Sites of each chain in the order of the forward; what keeps the sites of a chain apart.
EXPECTED = {
    "nanogpt": ([6], None),
    "llama": ([6], None),
    "gptj": ([3], None),
    "opt": ([6], None),  # [B * S, C] around the MLP
    "t5": ([6, 9], None),
    "bert": ([6], ("native_layer_norm", "native_layer_norm_backward")),
    "resnet": ([3, 2], ("permute and relu", "permute and threshold_backward")),
}
OPEN = ("defer_norm", "fuse_coefficients")
"""Without these a graph has the open form that `widen` writes: what all else must equal."""


@pytest.mark.parametrize("name", EXPECTED)
def test_passes_alone_and_together_on(name: str) -> None:
    entry = BY_NAME[name]
    captured = Captured.perturbed(entry.make(torch.float64), entry.example(torch.float64))
    truth = captured.run(captured.eagerly(disabled=OPEN))
    for disabled in ((), ("defer_norm",), ("fuse_coefficients",)):
        assert_equal(captured.run(captured.eagerly(disabled=disabled)), truth)

    fused = captured.partitioned()
    separate = captured.partitioned(disabled=("fuse_seams",))
    results = [captured.run(rewritten) for rewritten in (fused, separate)]
    for result in results:
        assert_equal(result, truth)
    assert all(a.equal(b) for a, b in zip(*(r.outputs for r in results), strict=True))
    assert sorted(fused.kept) == sorted(separate.kept)
    assert_operators(fused, name)
    assert not additions_of_streams(fused.graphs["backward"], {s.width for s in captured.sites})

    if name != "t5":  # the largest; five models are enough
        sizes = [fused.kept_bytes]
        for disabled in (("fuse_coefficients",), OPEN):
            rewritten = captured.partitioned(disabled=disabled)
            assert_equal(captured.run(rewritten), truth)
            sizes.append(rewritten.kept_bytes)
        assert sizes == sorted(sizes)


def assert_equal(actual: Run, truth: Run) -> None:
    assert output_error(actual.outputs, truth.outputs) < 1e-12
    assert gradient_error(actual.gradients, truth.gradients) < 1e-11


def additions_of_streams(gm: fx.GraphModule, widths: set[int]) -> list[str]:
    """Additions of gradients of X, which ends in n streams of C channels."""
    adds = [node for node in gm.graph.nodes if op_name(node) == "add"]
    ends = {(4, width) for width in widths}
    return [node.name for node in adds if tuple(value_of(node).shape[-2:]) in ends]


def assert_operators(rewritten: Rewritten, name: str) -> None:
    """Those of the forward graph, in the backward graph their mirror image; why pairs are apart."""
    chains, between = EXPECTED[name]
    forward: list[str] = []
    for sites in chains:
        alone = ["coefficients_pre", "post_res"] * sites
        fused = ["coefficients_pre", *["seam"] * (sites - 1), "post_res"]
        forward += ["expand", *(alone if between else fused), "readout"]
    mirror = {name: f"{name}_backward" for name in forward} | {"expand": "readout"}
    assert rewritten.operators("forward") == forward
    assert rewritten.operators("backward") == [mirror[o] for o in reversed(forward)]
    for kind, names in zip(("forward", "backward"), between or (None, None), strict=True):
        apart = [note for note in rewritten.notes("fuse_seams", kind) if "stay" in note]
        assert len(apart) == (sum(chains) - len(chains) if between else 0)
        assert all(note.endswith(f"stay apart: {names} between them") for note in apart)
