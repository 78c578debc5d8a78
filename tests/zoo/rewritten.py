"""One captured call of a transformed model, behind any selection of the passes.

Capturing a model takes seconds, the passes a fraction of that. So a model is captured once, and its
graph is rewritten as often as a test asks: eagerly, or partitioned by AOTAutograd with the passes
on the forward and backward graphs as under Inductor, without compiling anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx.passes import _tensorify_python_scalars

import mhc_compile
from mhc_compile import Config, _torch
from mhc_compile.backend import eager, mhc
from mhc_compile.capture import copy_graph
from mhc_compile.model import swap
from mhc_compile.model.declare import Spec
from mhc_compile.passes.runner import HistoryEntry
from mhc_compile.passes.sites.declared import declaration_nodes
from tests.checks import Run, connections, loss_of, perturb, tensors

_FLOATS = torch._dynamo.config.patch(specialize_float=True)
"""Else a dynamic graph reads floats from tensors, which only Dynamo's tracing knows."""

# Not in torch 2.12 and older.
_STAY_FLOATS = patch.object(
    _tensorify_python_scalars, "_is_tensorify_enabled", lambda: False, create=True
)
"""Else AOTAutograd may ask Dynamo to start anew, which is over.

Not by the variable TENSORIFY_PYTHON_SCALARS, which is read once in a process: who asks first while
it is set decides for all that come later.
"""


@dataclass
class Rewritten:
    """A runnable graph, its history, and (once it ran) what its backward graph is given.

    Attributes:
        tensors: what the forward graph keeps for the backward graph, as fake tensors.
        graphs: the partitioned graphs, by kind.
    """

    function: Callable[..., Any]
    tensors: list[Tensor] = field(default_factory=list)
    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    history: Sequence[HistoryEntry] = ()

    @property
    def kept(self) -> list[str]:
        """What is kept for backward besides the inputs of the graph."""
        return [f"{tuple(t.shape)} {t.dtype}" for t in self.tensors]

    @property
    def kept_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def operators(self, graph: str) -> list[str]:
        """The `mhc::` operators of the final version of a graph, in order."""
        return [e for e in self.history if e.graph == graph][-1].operators

    def notes(self, name: str, graph: str = "captured") -> list[str]:
        """What a pass said about a graph."""
        (entry,) = (e for e in self.history if (e.name, e.graph) == (name, graph))
        return list(entry.notes)


class Captured:
    """The graph of a transformed model's calls: what a backend is given.

    Attributes:
        calls: the inputs of the graph, for each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.calls: list[tuple[Any, ...]] = []
        self._graphs: list[fx.GraphModule] = []

    @classmethod
    def perturbed(
        cls, model: nn.Module, *inputs: Mapping[str, Any], config: Config | None = None
    ) -> Captured:
        """Transform a model, perturb it and call it; all calls must fit one graph."""
        mhc_compile.transform(model, example_inputs=inputs[0], config=config)
        perturb(model)
        found = cls(model)
        dynamic = True if len(inputs) > 1 else None
        compiled = torch.compile(model, backend=found.backend, fullgraph=True, dynamic=dynamic)
        with _FLOATS:
            for each in inputs:
                compiled(**each)
        torch._dynamo.reset()
        assert {site.name for site in found.sites} == connections(model).keys()
        return found

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """In the place of the backend of plain calls, which it uses."""
        self._graphs.append(copy_graph(gm))
        run = eager(gm, example_inputs)

        def call(*arguments: Any) -> Any:
            self.calls.append(arguments)
            return run(*arguments)

        return call

    @property
    def number(self) -> int:
        """How many graphs Dynamo made."""
        return len(self._graphs)

    @property
    def graph(self) -> fx.GraphModule:
        (graph,) = self._graphs
        return graph

    @property
    def example_inputs(self) -> list[Any]:
        """The first call's inputs; of a graph for several sizes, fake ones with symbolic sizes."""
        if len(self.calls) == 1:
            return list(self.calls[0])
        return [n.meta["example_value"] for n in self.graph.graph.find_nodes(op="placeholder")]

    @property
    def sites(self) -> Sequence[Any]:
        """The sites of the rewritten graph that was made last."""
        return mhc_compile.graphs(self.model)[-1].sites

    def eagerly(self, **changes: Any) -> Rewritten:
        """The graph behind the passes, for a configuration with some options changed."""
        return self._rewritten(eager, changes)

    def partitioned(self, **changes: Any) -> Rewritten:
        """The same, as forward and backward graphs that went through their own passes."""
        saved: list[Tensor] = []
        graphs: dict[str, fx.GraphModule] = {}
        instead = partial(partition, saved=saved, graphs=graphs)
        with patch.object(_torch, "compile_inductor", instead):
            return replace(self._rewritten(mhc, changes), tensors=saved, graphs=graphs)

    def _rewritten(self, lower: Callable[..., Any], changes: Mapping[str, Any]) -> Rewritten:
        gm = copy_graph(self.graph)
        for node in declaration_nodes(gm.graph):
            parameters, text = node.args
            spec = Spec.from_json(text)
            spec = replace(spec, config=replace(spec.config, **changes))
            node.args = (parameters, spec.to_json())
        # As in the call that was captured: whose graph it is decides what its adds belong to.
        whose = patch.object(swap, "calling_root", lambda: self.model)
        with _STAY_FLOATS, whose:
            function = lower(gm, self.example_inputs)
        return Rewritten(function, history=mhc_compile.graphs(self.model)[-1].history)

    def run(self, rewritten: Rewritten, call: int = 0) -> Run:
        """Outputs and gradients of all that is learned, from a fixed random state."""
        names = [n.name for n in self.graph.graph.find_nodes(op="placeholder")]
        given = zip(names, self.calls[call], strict=True)
        learned = {k: v for k, v in given if isinstance(v, Tensor) and v.requires_grad}
        torch.manual_seed(0)
        outputs = tensors(rewritten.function(*self.calls[call]))
        gradients: Any = ()
        if torch.is_grad_enabled():
            leaves = list(learned.values())
            gradients = torch.autograd.grad(loss_of(outputs), leaves, materialize_grads=True)
        found = dict(zip(learned, gradients, strict=True)) if gradients else {}
        return Run([o.detach() for o in outputs], found, {})


def partition(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    patches: dict[str, Any],
    saved: list[Tensor],
    graphs: dict[str, fx.GraphModule] | None = None,
) -> Callable[..., Any]:
    """In the place of Inductor: partition, run the passes, execute the graphs node by node."""

    def compiler(kind: str, graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graph.graph.eliminate_dead_code()
        patches["post_grad_custom_pre_pass"](graph.graph, kind == "inference")
        graph.graph.lint()
        graph.recompile()
        if graphs is not None:
            graphs[kind] = graph
        if kind == "backward":
            kept = graph.graph.find_nodes(op="placeholder")
            free = ("primals", "tangents")
            values = [n.meta["val"] for n in kept if not n.name.startswith(free)]
            saved.extend(v for v in values if isinstance(v, Tensor))
        return make_boxed_func(LaidOut(graph).run)

    return aot_autograd(
        fw_compiler=partial(compiler, "forward"),
        bw_compiler=partial(compiler, "backward"),
        inference_compiler=partial(compiler, "inference"),
        partition_fn=min_cut_rematerialization_partition,
    )(gm, list(inputs))


class LaidOut(fx.Interpreter):
    """Runs a partitioned graph with every result in the strides that its fake tensor has.

    A graph is traced with fake tensors, and its views fit their strides. Inductor lays its results
    out so. Some of PyTorch's own CPU kernels do not (the backwards of dropout and of a layer norm
    whose gradient is permuted): their results are copied. An operator of this library has to keep
    what its fake promises, and a view has the strides of what it views.
    """

    def run(self, *args: Any) -> Any:
        places = zip(self.module.graph.find_nodes(op="placeholder"), args, strict=True)
        known = [(node.meta.get("val"), value) for node, value in places]
        self.sizes = {v.node.expr: n for v, n in known if isinstance(v, torch.SymInt)}
        return super().run(*args, enable_io_processing=False)

    def run_node(self, node: fx.Node) -> Any:
        result, promised = super().run_node(node), node.meta.get("val")
        if node.op != "call_function" or node.target is operator.getitem:
            return result
        if isinstance(result, (tuple, list)):
            pairs = zip(result, promised, strict=True)
            return [self._laid_out(node, *pair) for pair in pairs]
        return self._laid_out(node, result, promised)

    def _laid_out(self, node: fx.Node, result: Any, promised: Any) -> Any:
        if not isinstance(result, Tensor) or not result.numel():
            return result
        strides = tuple(self._number(stride) for stride in promised.stride())
        each = zip(result.shape, result.stride(), strides, strict=True)
        if all(a == b for size, a, b in each if size > 1):
            return result
        is_own = getattr(node.target, "namespace", None) == "mhc"
        assert not (is_own or getattr(node.target, "is_view", False)), (
            f"{node.target} made {list(result.shape)} with strides {result.stride()}, and its fake "
            f"has {strides}"
        )
        return torch.empty_strided(result.shape, strides, dtype=result.dtype).copy_(result)

    def _number(self, stride: Any) -> int:
        """A stride with the sizes of this call."""
        symbolic = isinstance(stride, torch.SymInt)
        return int(stride.node.expr.xreplace(self.sizes) if symbolic else stride)
