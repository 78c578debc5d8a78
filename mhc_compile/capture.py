"""Capture: the graphs that Dynamo sees when a model is called, without computing anything.

The model runs under fake tensors: real parameters stay where they are, inputs are shapes, and the
"compiled" graph returns the fake outputs that the trace already holds. A model of any size, on
any device (``meta`` included), costs one trace.
"""

from __future__ import annotations

import inspect
import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import _torch
from ._torch import pytree
from .errors import CaptureError, ExampleInputsError, GraphBreakError, MhcError
from .model import adapters
from .model.backward_hooks import traced_backward_hooks
from .passes.sites.records import identity_of

__all__ = ["CapturedGraph", "as_call", "capture", "infer_inputs", "merge", "relabelled"]

GRAPH_NUMBER = "mhc_graph"
"""``meta`` key: from which of several captured graphs a node of a merged graph comes."""


@dataclass
class CapturedGraph:
    """One graph as Dynamo gave it.

    Attributes:
        gm: a copy that may be changed.
        inputs: the values of its placeholders in one run: real parameters, fake activations.
        outputs: what it returned.
        broken_at: where and why the capture ended early, ``None`` if it did not.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    outputs: list[Any]
    broken_at: str | None


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_inputs`` as positional and keyword arguments.

    Args:
        example_inputs: a tuple (positional), a mapping (keyword) or a pair of both.

    Raises:
        ExampleInputsError: it is something else.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        pair = len(example_inputs) == 2 and isinstance(example_inputs[1], dict)
        if pair and isinstance(example_inputs[0], (tuple, list)):
            return tuple(example_inputs[0]), dict(example_inputs[1])
        return tuple(example_inputs), {}
    raise ExampleInputsError(
        "example_inputs must be a tuple of positional arguments, a dict of keyword arguments or "
        f"a pair (tuple, dict); got {type(example_inputs).__name__}. For one tensor x write (x,)."
    )


def infer_inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Example inputs from what the model offers; None where it offers nothing."""
    known = adapters.example_inputs(model)
    if known is None:
        try:
            offered = getattr(model, "dummy_inputs", None)
        except Exception:  # a property that fails for some models of its library offers nothing
            offered = None
        known = dict(offered) if isinstance(offered, Mapping) else None
    return None if known is None else ((), known)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[CapturedGraph]:
    """Trace one call of a model.

    Returns:
        The captured graphs in the order of execution; one unless there are graph breaks.

    Raises:
        ExampleInputsError: the arguments do not fit the model's forward, or it fails on them.
        GraphBreakError: the forward decides by the values of tensors or of Python's random.
        CaptureError: nothing was captured.
    """
    _check_arguments(model, args, kwargs)
    adapters.before_call(model, kwargs)
    graphs: list[CapturedGraph] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        output = next(n for n in gm.graph.nodes if n.op == "output")
        outputs = [
            _in_mode(mode, value)
            for value in fx.map_arg(output.args[0], lambda n: n.meta["example_value"])
        ]
        copied, broken_at = copy_graph(gm), _torch.break_reason(gm)
        ran = False

        def run(*inputs: Any) -> list[Any]:
            _torch.check_lookups(copied.graph)
            # Behind a graph break one graph may run for several modules of one class.
            nonlocal ran
            results = pytree.tree_map_only(Tensor, Tensor.clone, outputs) if ran else outputs
            ran = True
            graphs.append(CapturedGraph(copied, list(inputs), results, broken_at))
            return results

        return run

    mode = _fake_mode(args, kwargs)
    breaks, drawn = _torch.graph_breaks(), pickle.dumps(_random_state())
    with _unchanged(model), _tracing(), torch.enable_grad(), mode:
        args, kwargs = pytree.tree_map_only(Tensor, _fake(mode, model), (args, dict(kwargs)))
        call = _torch.compile_dynamo(model, record, dynamic=False)
        try:
            call(*args, **kwargs)
            if _torch.graph_breaks() > breaks and pickle.dumps(_random_state()) != drawn:
                raise GraphBreakError(_by_chance(model, graphs))
        except MhcError:
            raise
        except (_torch.DataDependentOutputException, _torch.DynamicOutputShapeException) as error:
            raise GraphBreakError(_data_dependent(model, error, graphs)) from error
        except Exception as error:
            raise ExampleInputsError(
                f"The forward of {type(model).__name__} failed on the example inputs"
                f"{_at(error)}: {_torch.first_paragraph(error)}"
            ) from error
    if not graphs:
        raise CaptureError(
            f"Dynamo captured nothing of {type(model).__name__}: its forward runs no tensor "
            "operations, or Dynamo is disabled (torch.compiler.disable, TORCHDYNAMO_DISABLE=1, "
            "torch.compiler.set_stance)."
        )
    return graphs


@contextmanager
def _tracing() -> Iterator[None]:
    with _torch.dynamo_settings(), traced_backward_hooks():
        yield


def first_break(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Where and why Dynamo cannot trace a call as one graph, in words ("" if it can)."""
    mode = _fake_mode(args, kwargs)
    with _unchanged(model), _tracing(), torch.enable_grad(), mode:
        args, kwargs = pytree.tree_map_only(Tensor, _fake(mode, model), (args, dict(kwargs)))
        # Not the module itself: its code is passed over where an earlier compilation broke.
        whole = _torch.compile_dynamo(model.forward, lambda gm, _: gm.forward, fullgraph=True)
        try:
            whole(*args, **kwargs)
        except Exception as error:
            return _torch.break_in_words(error)
    return ""


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be edited: Dynamo's own placeholders must stay as they are."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copied)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    graph.output(result).meta = dict(output.meta)
    new = fx.GraphModule(gm, graph)
    new.meta = dict(gm.meta)
    return new


def relabelled(gm: fx.GraphModule, identities: Mapping[str, str]) -> fx.GraphModule:
    """A copy of a captured graph, with its bodies, in which modules go by other identities."""
    new = copy_graph(gm)
    _torch.copy_break_reason(gm, new)
    for name, body in new.named_children():
        if isinstance(body, fx.GraphModule):
            setattr(new, name, relabelled(body, identities))
    for node in new.graph.nodes:
        if stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                _relabelled_key(key, identities): value for key, value in stack.items()
            }
    return new


def _relabelled_key(key: Any, identities: Mapping[str, str]) -> Any:
    known = identity_of(str(key))
    return identities[known] + str(key)[len(known) :] if known in identities else key


def merge(graphs: list[CapturedGraph]) -> tuple[fx.GraphModule, list[Any]]:
    """All captured graphs of one call as one, joined where a tensor leaves one for another.

    Detection on it sees the chains that a graph break would cut.

    Returns:
        The graph and the values of its placeholders.
    """
    if len(graphs) == 1:
        return graphs[0].gm, graphs[0].inputs
    graph, root = fx.Graph(), nn.Module()
    known: dict[int, fx.Node] = {}
    inputs: list[Any] = []
    last: fx.Node | None = None
    results: list[Any] = []
    for number, part in enumerate(graphs):
        copied: dict[fx.Node, Any] = {}
        values = iter(part.inputs)
        for node in part.gm.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], lambda n, c=copied: c[n])  # type: ignore[misc]
                continue
            value = next(values) if node.op == "placeholder" else None
            if node.op == "placeholder" and id(value) in known:
                copied[node] = known[id(value)]
                continue
            with graph.inserting_after(last) if node.op == "placeholder" else _here():
                new = graph.node_copy(node, lambda n, c=copied: c[n])  # type: ignore[misc]
            if node.op == "placeholder" and number:  # one name may come from several graphs
                new.target = new.name
            new.meta[GRAPH_NUMBER] = number
            copied[node] = new
            if node.op == "placeholder":
                last = new
                inputs.append(value)
                if isinstance(value, Tensor):
                    known[id(value)] = new
            elif node.op == "get_attr":
                new.target = f"graph{number}_{node.target}".replace(".", "_")
                setattr(root, new.target, _attribute(part.gm, str(node.target)))
        for result, value in zip(results, part.outputs, strict=True):
            if isinstance(value, Tensor) and isinstance(result, fx.Node):
                known[id(value)] = result
    graph.output(tuple(results))
    return fx.GraphModule(root, graph), inputs


@contextmanager
def _here() -> Iterator[None]:
    yield


def _attribute(gm: fx.GraphModule, path: str) -> Any:
    value: Any = gm
    for name in path.split("."):
        value = getattr(value, name)
    return value


# --- arguments ---------------------------------------------------------------------------------


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        signature = inspect.signature(model.forward)
        raise ExampleInputsError(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}"
        ) from None
    except ValueError:  # no signature to check against
        return


def _fake_mode(args: Any, kwargs: Any) -> Any:
    """The mode that fake inputs already have, or a new one."""
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, _torch.FakeTensor):
            return leaf.fake_mode
    return _torch.FakeTensorMode(allow_non_fake_inputs=True)


def _in_mode(mode: Any, value: Any) -> Any:
    """A value as this mode has it: Dynamo makes another for a graph without fake inputs."""
    if not isinstance(value, _torch.FakeTensor) or value.fake_mode is mode:
        return value
    with mode:
        new = torch.empty_strided(
            value.shape,
            value.stride(),
            dtype=value.dtype,
            device=value.device,
            requires_grad=value.requires_grad,
        )
        return new.view_as(new)  # no leaf


def _fake(mode: Any, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Turn example inputs into fake tensors on the model's device."""
    first = next((t for t in (*model.parameters(), *model.buffers())), None)
    device = torch.device("cpu") if first is None else first.device

    def convert(tensor: Tensor) -> Tensor:
        if isinstance(tensor, _torch.FakeTensor):
            return tensor
        if tensor.is_meta != (device.type == "meta"):
            with mode:
                return torch.empty_strided(
                    tensor.shape,
                    tensor.stride(),
                    dtype=tensor.dtype,
                    device=device,
                    requires_grad=tensor.requires_grad,
                )
        return mode.from_tensor(tensor)

    return convert


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Undo what a forward under fake tensors leaves behind: attributes, caches, random states."""
    before = [(m, {k: (v, _contents(v)) for k, v in m.__dict__.items()}) for m in model.modules()]
    rng, drawn = torch.get_rng_state(), _random_state()
    for module in model.modules():
        adapters.prepare(module)
    try:
        yield
    finally:
        torch.set_rng_state(rng)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        for module, attributes in before:
            _restore(module.__dict__, {name: value for name, (value, _) in attributes.items()})
            for value, contents in attributes.values():
                if isinstance(value, dict):
                    _restore(value, contents)
                elif isinstance(value, list):
                    value[:] = contents


def _contents(value: Any) -> Any:
    """A shallow copy of what can be changed in place."""
    return value.copy() if isinstance(value, (dict, list)) else None


def _restore(now: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key, _MISSING) is not value:
            now[key] = value


_MISSING = object()


def _random_state() -> tuple[Any, Any]:
    """The states of Python's and NumPy's random generators."""
    return random.getstate(), np.random.get_state(legacy=False)


# --- messages ------------------------------------------------------------------------------------


def _at(error: BaseException) -> str:
    frame = _torch.user_frame(error)
    return f" at {frame}" if frame else ""


def _data_dependent(model: nn.Module, error: BaseException, graphs: list[CapturedGraph]) -> str:
    broken = next((g.broken_at for g in graphs if g.broken_at), None)
    where = _torch.user_frame(error) or broken or "an unknown place"
    return (
        f"The forward of {type(model).__name__} depends on the value of a tensor at {where}, so "
        f"no graph holds its residual stream whole. {_INSTEAD}; replace 'if tensor:' by "
        "torch.where or torch.cond."
    )


def _by_chance(model: nn.Module, graphs: list[CapturedGraph]) -> str:
    where = next((f" at {g.broken_at}" for g in graphs if g.broken_at), "")
    return (
        f"The forward of {type(model).__name__} breaks the graph{where} and draws from Python's "
        f"or NumPy's random, so that no two calls need have the same residual adds. {_INSTEAD}."
    )


_INSTEAD = (
    "Randomly dropped layers are such: write them with tensors instead (x + mask * F(x) with "
    "mask = (torch.rand([]) >= p).to(x.dtype)), or turn them off (layerdrop=0)"
)
