"""The `mhc::` operators of whole models, in forward and in backward, and why pairs stay apart.

AOTAutograd partitions the graphs and the passes run on them as under Inductor; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import mhc_compile
from mhc_compile import Config, _torch
from tests.zoo.checks import gradient_error, perturb, run
from tests.zoo.models import ZOO


@pytest.fixture
def saved(monkeypatch: Any) -> Iterator[list[list[str]]]:
    """Takes Inductor's place; what each backward graph takes from its forward graph."""
    found: list[list[str]] = []

    def compiler(kind: str, gm: Any, inputs: Any, *, graph_pass: Any) -> Any:
        gm.graph.eliminate_dead_code()
        graph_pass(gm.graph, kind == "inference")
        gm.graph.lint()
        gm.recompile()
        if kind == "backward":
            values = (n.meta["val"] for n in gm.graph.find_nodes(op="placeholder"))
            tensors = (v for v in values if isinstance(v, torch.Tensor))
            found.append(sorted(f"{tuple(v.shape)} {v.dtype}" for v in tensors))
        return make_boxed_func(gm.forward)

    def compile_without_inductor(gm: Any, inputs: Any, patches: dict[str, Any]) -> Any:
        each = partial(compiler, graph_pass=patches["post_grad_custom_pre_pass"])
        return aot_autograd(
            fw_compiler=partial(each, "forward"),
            bw_compiler=partial(each, "backward"),
            inference_compiler=partial(each, "inference"),
            partition_fn=min_cut_rematerialization_partition,
        )(gm, inputs)

    monkeypatch.setattr(_torch, "compile_inductor", compile_without_inductor)
    yield found
    torch._dynamo.reset()


# Sites of each chain in the order of the forward; what keeps the sites of a chain apart.
EXPECTED = {
    "llama": ([6], None),
    "gptj": ([3], None),
    "t5": ([6, 9], None),
    "bert": ([6], ("native_layer_norm", "native_layer_norm_backward")),
    "resnet": ([3, 2], ("permute and relu", "permute and threshold_backward")),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_operators_of(name: str, saved: list[list[str]]) -> None:
    chains, between = EXPECTED[name]
    (entry,) = (m for m in ZOO if m.name == name)
    inputs = entry.example(torch.float64)
    models = [entry.make(torch.float64) for _ in range(2)]
    for model, disabled in zip(models, ((), ("fuse_seams",)), strict=True):
        config = Config(disabled=disabled)
        mhc_compile.transform(model, example_inputs=inputs, config=config)
        perturb(model)
        model.compile(backend="mhc")
    fused, separate = (run(model, inputs) for model in models)
    assert all(a.equal(b) for a, b in zip(fused.outputs, separate.outputs, strict=True))
    assert gradient_error(fused.gradients, separate.gradients) < 1e-12
    assert saved[0] == saved[1]

    (graph,) = mhc_compile.graphs(models[0])
    entries = {e.graph: e for e in graph.history if e.name == "fuse_seams"}
    forward: list[str] = []
    for sites in chains:
        alone = ["coefficients_pre", "post_res"] * sites
        forward += alone if between else ["coefficients_pre", *["seam"] * (sites - 1), "post_res"]
    mirror = {"post_res": "post_res_backward", "seam": "seam_backward"}
    mirror["coefficients_pre"] = "coefficients_pre_backward"
    assert entries["forward"].operators == forward
    assert entries["backward"].operators == [mirror[o] for o in reversed(forward)]
    for kind, names in zip(("forward", "backward"), between or (None, None), strict=True):
        apart = [note for note in entries[kind].notes if "stay" in note]
        assert len(apart) == (sum(chains) - len(chains) if between else 0)
        assert all(note.endswith(f"stay apart: {names} between them") for note in apart)
