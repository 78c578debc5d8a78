"""Every private torch name that the project uses, in one place.

They are the same in all versions of ``versions.TORCH`` unless a comment says otherwise;
tests/test_torch.py looks up each of them and calls each function.
"""

from __future__ import annotations

import functools
import inspect
import re
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._inductor import custom_graph_pass, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._library.effects import EffectType
from torch._logging import trace_structured
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.modules import module as nn_module
from torch.utils import _pytree as pytree
from torch.utils.hooks import BackwardHook
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "COMPILED_CALL",
    "BackendCompilerFailed",
    "BackwardHook",
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "InferenceAwareGraphPass",
    "WeakTensorKeyDictionary",
    "at_end_of_backward",
    "backward_hooks",
    "backward_hooks_of",
    "backward_pre_hooks",
    "break_around",
    "break_in_words",
    "break_reason",
    "call_graph_pass",
    "calling_module",
    "check_lookups",
    "compile_dynamo",
    "compile_inductor",
    "copy_break_reason",
    "dynamo_settings",
    "exceptions_met",
    "first_paragraph",
    "forget_graphs",
    "graph_breaks",
    "graph_passes",
    "hooks_for_all_modules",
    "hooks_on",
    "inductor_options",
    "inductor_setting",
    "innermost_module",
    "is_backward",
    "is_cut_for_ddp",
    "is_exporting",
    "is_functorch_active",
    "is_inductor_option",
    "is_known_to_ddp",
    "is_listing_parameters",
    "is_symbolically_traced",
    "own_cache",
    "partition_eagerly",
    "pytree",
    "register_effectful",
    "require_constant_floats",
    "set_backward_hook",
    "stance",
    "trace_artifact",
    "unwrapped",
    "user_frame",
    "uuid_of",
]


class _InferenceAwareGraphPass(custom_graph_pass.CustomGraphPass):
    """Stands in where Inductor has none: in torch 2.11 no pass is told."""


InferenceAwareGraphPass: Any = getattr(
    custom_graph_pass, "CustomInferenceAwareGraphPass", _InferenceAwareGraphPass
)
"""A pass for Inductor that is told whether its graph is an inference graph."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute under which ``module.compile`` keeps what ``module.__call__`` then runs."""

RECOMPILE_LIMIT = 256
"""Graphs of one root; train/eval, grad modes, autocast and shapes need about 25 (Dynamo: 8)."""


def register_effectful(operator: torch._ops.OpOverload) -> None:
    """Keep calls of an operator without result in every graph, and in order."""
    torch.library._register_effectful_op(operator, EffectType.ORDERED)


def compile_dynamo(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Callable[..., Any]:
    """``torch.compile`` with a cache of its own: instances share neither limit nor graphs.

    Nor does it matter where others broke: Dynamo no longer looks at code of which it once found
    that it cannot be captured.
    """
    if isinstance(function, types.MethodType):
        function = _with_own_code(function)
    return torch.compile(
        function, backend=backend, dynamic=dynamic, fullgraph=fullgraph, **own_cache()
    )


def _with_own_code(method: types.MethodType) -> types.MethodType:
    """The same method with a code object that no other has: Dynamo's caches belong to code."""
    plain: Any = method.__func__
    own = types.FunctionType(
        plain.__code__.replace(),
        plain.__globals__,
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    return types.MethodType(functools.update_wrapper(own, plain), method.__self__)


def own_cache() -> dict[str, Any]:
    """Arguments of ``torch.compile`` for a cache of its own.

    They are public in 2.13; where they do not exist yet, ``dynamo_settings`` raises the global
    limit around the call, and ``compile_dynamo`` gives methods code of their own.
    """
    known = inspect.signature(torch.compile).parameters
    wanted = {"recompile_limit": RECOMPILE_LIMIT, "isolate_recompiles": True}
    return {k: v for k, v in wanted.items() if k in known}


def forget_graphs() -> None:
    """What ``nn.Module.compile`` captured before must not be met by what it captures anew.

    Before torch 2.13 it has no cache of its own, and all graphs of the process are forgotten.
    """
    if "isolate_recompiles" not in own_cache():
        torch._dynamo.reset()


@contextmanager
def dynamo_settings() -> Iterator[None]:
    """Dynamo's configuration around one of our calls.

    ``optimize_ddp`` would cut the graph at DistributedDataParallel's buckets, in the middle of
    the streams, before a backend sees it; Inductor's ``freezing`` would make constants of the
    parameters that ``declare`` hands to the backend. Guards on empty dictionaries of hooks, which
    Dynamo leaves out by default, let a hook count that was registered after the first call.
    ``nn.LSTM`` and its kin are captured; by default Dynamo breaks the graph at each.
    """
    dynamo = torch._dynamo.config.patch(
        optimize_ddp=False,
        skip_nnmodule_hook_guards=False,
        allow_rnn=True,
        recompile_limit=RECOMPILE_LIMIT,
        accumulated_recompile_limit=4 * RECOMPILE_LIMIT,
    )
    with dynamo, torch._inductor.config.patch(freezing=False):
        yield


def set_backward_hook(make: Callable[..., Any]) -> None:
    """What ``nn.Module.__call__`` makes of full backward hooks (torch: ``BackwardHook``)."""
    nn_module.BackwardHook = make  # type: ignore[misc,assignment]


def at_end_of_backward(function: Callable[[], Any]) -> None:
    """Call a function when the backward that is running has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def hooks_on(module: torch.nn.Module) -> dict[str, list[Callable[..., Any]]]:
    """The hooks of a module by their kind, in the words of those who register them."""
    return {
        "forward pre-hook": list(module._forward_pre_hooks.values()),
        "forward hook": list(module._forward_hooks.values()),
        "backward pre-hook": list(module._backward_pre_hooks.values()),
        _backward_kind(module): list(module._backward_hooks.values()),
    }


def _backward_kind(module: torch.nn.Module) -> str:
    # None until one is registered, of either kind.
    old = module._is_full_backward_hook is False
    return "old backward hook (register_full_backward_hook is captured)" if old else "backward hook"


def hooks_for_all_modules() -> tuple[int, ...]:
    """The keys of the hooks that are registered for all modules, in order."""
    kinds = (
        nn_module._global_forward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_backward_pre_hooks,
        nn_module._global_backward_hooks,
    )
    return tuple(key for hooks in kinds for key in hooks)


def backward_hooks(module: torch.nn.Module) -> dict[int, Callable[..., Any]]:
    """The full backward hooks of a module, those for all modules first."""
    everywhere = nn_module._global_backward_hooks if nn_module._global_is_full_backward_hook else {}
    own = module._backward_hooks if module._is_full_backward_hook else {}
    return {**everywhere, **own}


def backward_pre_hooks(module: torch.nn.Module) -> dict[int, Callable[..., Any]]:
    """The full backward pre-hooks of a module, those for all modules first."""
    return {**nn_module._global_backward_pre_hooks, **module._backward_pre_hooks}


def backward_hooks_of(module: torch.nn.Module) -> tuple[str, str]:
    """The keys of the full backward hooks and pre-hooks of a module (traced by Dynamo)."""
    hooks: list[int] = []
    if nn_module._global_is_full_backward_hook is True:
        hooks += list(nn_module._global_backward_hooks)
    if module._is_full_backward_hook is True:
        hooks += list(module._backward_hooks)
    pre_hooks = [*nn_module._global_backward_pre_hooks, *module._backward_pre_hooks]
    return " ".join([str(key) for key in hooks]), " ".join([str(key) for key in pre_hooks])


def first_paragraph(error: BaseException) -> str:
    """The readable part of a Dynamo error: the first paragraph of its message."""
    return str(error).strip().split("\n\n")[0]


def break_in_words(error: BaseException) -> str:
    """``file:line (what, why)`` of an error that Dynamo raised at a graph break."""
    what, *lines = str(error).strip().splitlines() or [type(error).__name__]
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    why = next((s.split(":", 1)[1] for s in lines if s.strip().startswith("Explanation:")), "")
    where = ":".join(frames[-1]) if frames else "an unknown place"
    return f"{where} ({what.strip().rstrip('.')}{'; ' if why else ''}{why.strip().rstrip('.')})"


_RECURRENT = (
    ": torch._dynamo.config.allow_rnn = True lets it through; model.compile(backend='mhc') and "
    "calls without torch.compile set it"
)


def graph_breaks() -> int:
    """How many times Dynamo has broken a graph since it was last reset."""
    counters = torch._dynamo.utils.counters
    return sum(sum(counters.get(kind, {}).values()) for kind in ("graph_break", "unimplemented"))


def exceptions_met() -> dict[str, int]:
    """The exceptions at which Dynamo has given up tracing, as it words them, with their number."""
    met: dict[str, int] = {}
    for text, count in torch._dynamo.utils.counters.get("unimplemented", {}).items():
        if found := re.search(r"raised exception (.*)", text):
            met[found[1]] = met.get(found[1], 0) + count
    return met


def break_around() -> str | None:
    """Where Dynamo gave up on a function that runs by itself now, around what is captured."""
    running = {(f.f_code.co_filename, f.f_code.co_name) for f, _ in traceback.walk_stack(None)}
    for reason in reversed(torch._dynamo.utils.graph_break_reasons):
        first = reason.user_stack[0] if reason.user_stack else None
        if first is not None and (first.filename, first.name) in running:
            return _in_words(reason)
    return None


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing.

    ``torch.compiler.is_exporting`` is true in torch 2.11 whenever Dynamo traces.
    """
    return torch.compiler._is_exporting_flag


def stance() -> str:
    """What ``torch.compiler.set_stance`` has set."""
    return torch._dynamo.eval_frame._stance.stance


def is_symbolically_traced() -> bool:
    """Whether ``torch.fx.symbolic_trace`` or ``make_fx`` is tracing the code that runs."""
    return bool(torch.fx._symbolic_trace.is_fx_symbolic_tracing())


def break_reason(gm: fx.GraphModule) -> str | None:
    """Where and why Dynamo ended a captured graph early; None for a graph that is whole."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return None if reason is None or not reason.graph_break else _in_words(reason)


def copy_break_reason(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """Let a copy of a captured graph say the same as it does on why it ended early."""
    if hasattr(gm, "compile_subgraph_reason"):
        new.compile_subgraph_reason = gm.compile_subgraph_reason


def _in_words(reason: Any) -> str:
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}" if frame is not None else "an unknown place"
    why = str(reason.reason).splitlines()[0]
    return f"{where} ({why}{_RECURRENT if 'wrap RNN' in why else ''})"


def require_constant_floats(gm: fx.GraphModule) -> None:
    """Let Dynamo capture a graph again if floats that modules hold are inputs of it.

    With ``dynamic=True`` every float is one, the epsilon of a norm too; only AOTAutograd finds out
    which have to be constants, and starts anew. Our passes read what comes before: to them an
    epsilon that is an input is no epsilon. Floats that are arguments stay inputs.

    Raises:
        TensorifyScalarRestartAnalysis: there are some; Dynamo catches it.
    """
    floats = [_float_of_module(node) for node in gm.graph.find_nodes(op="placeholder")]
    new = {name for name in floats if name and not TensorifyState.should_specialize(name)}
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def _float_of_module(node: fx.Node) -> str | None:
    """The symbol of a float that is an input as a tensor, and that a module holds.

    A buffer of one float64 has a symbol too. It is no constant: the forward may write into it.
    """
    symbol = getattr(node.meta.get("example_value"), "item_memo", None)
    given = node.meta.get("grapharg")
    source = getattr(given, "source", None)
    is_number = getattr(given, "pass_arg_as_tensor", False)
    if not isinstance(symbol, torch.SymFloat) or not is_number or source is None:
        return None
    # As a number that a guard has made of it would not tell.
    name = getattr(symbol.node._expr, "name", None)
    return name if source.guard_source.is_unspecialized_nn_module() else None


def check_lookups(graph: fx.Graph) -> None:
    """Raise what embeddings raise for indices that are not integers.

    Fake tensors of torch 2.11 let them pass; in later ones the trace itself has raised.
    """
    for node in graph.find_nodes(op="call_function", target=torch.nn.functional.embedding):
        indices = node.args[0] if node.args else node.kwargs["input"]
        dtype = indices.meta["example_value"].dtype
        with unset_fake_temporarily(), torch.device("cpu"):
            torch.nn.functional.embedding(torch.empty(0, dtype=dtype), torch.empty(1, 1))


def is_cut_for_ddp(gm: fx.GraphModule) -> bool:
    """Whether a graph is a piece that Dynamo cut out for a gradient bucket of DDP."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and "DDPOptimizer" in str(reason.reason)


def is_known_to_ddp(parameter: torch.Tensor) -> bool:
    """False inside the forward of a DDP module that was made before the parameter was."""
    active = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
    if active is None or not parameter.requires_grad:
        return True
    return any(known is parameter for known in active._module_parameters)


def calling_module() -> torch.nn.Module | None:
    """The module whose call is being compiled, found on the Python stack.

    That is the innermost ``torch.compile(module)`` or ``module.compile()``; for a compiled
    ``module.__call__`` it is the outermost module that is being called.
    """
    outermost: torch.nn.Module | None = None
    frame: types.FrameType | None = inspect.currentframe()
    while frame is not None:
        module, name = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(module, torch._dynamo.OptimizedModule):
            return module._orig_mod
        if isinstance(module, torch.nn.Module) and name in _MODULE_CALLS:
            compiled = module.__dict__.get(COMPILED_CALL)
            if name == "_wrapped_call_impl" and compiled is not None:
                return module
            outermost = module
        frame = frame.f_back
    return outermost


_MODULE_CALLS = ("_call_impl", "_wrapped_call_impl")


def innermost_module() -> torch.nn.Module | None:
    """The module whose ``forward`` holds the code that is being captured.

    Modules that Dynamo inlines have no frame of their own; so it is the innermost on the stack.
    """
    frame: types.FrameType | None = inspect.currentframe()
    while frame is not None:
        module, name = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(module, torch._dynamo.OptimizedModule):
            return module._orig_mod
        if isinstance(module, torch.nn.Module) and name in _MODULE_CALLS:
            return module
        frame = frame.f_back
    return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside of torch's wrappers for compilation and for data parallelism."""
    wrappers = torch.nn.parallel.DistributedDataParallel, torch.nn.parallel.DataParallel
    while isinstance(model, (torch._dynamo.OptimizedModule, *wrappers)):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def is_functorch_active() -> bool:
    """Whether the code that runs is under a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_listing_parameters() -> bool:
    """Whether the caller is asked for its modules by ``nn.Module.named_parameters``."""
    frame: types.FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not torch.nn.Module.named_parameters.__code__:
        frame = frame.f_back
    return frame is not None


def user_frame(error: BaseException) -> str:
    """``file:line`` of the last frame of a traceback outside torch and this package."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = (torch.__path__[0], __file__.rsplit("/", 1)[0])
    for frame in reversed(frames):
        if not frame.filename.startswith((*inside, "<")):
            return f"{frame.filename}:{frame.lineno}"
    return ""


def is_inductor_option(name: str) -> bool:
    """Whether a name is one of Inductor's configuration entries."""
    return name.replace("-", "_") in torch._inductor.config._config  # type: ignore[attr-defined]


def inductor_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options for a ``torch.compile`` mode."""
    return {} if mode in (None, "default") else dict(list_mode_options(mode))


def inductor_setting(name: str) -> Any:
    """The current value of one of Inductor's configuration entries."""
    return getattr(torch._inductor.config, name)


def graph_passes(setting: Any) -> tuple[Any, ...]:
    """The passes in the value of one of Inductor's entries for custom passes."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, (list, tuple)) else (setting,)


def call_graph_pass(graph_pass: Any, graph: fx.Graph, is_inference: bool) -> None:
    """Call a custom pass as Inductor does."""
    if isinstance(graph_pass, InferenceAwareGraphPass):
        graph_pass(graph, is_inference)
    else:
        graph_pass(graph)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace (``TORCH_TRACE``), of which tlparse makes pages."""
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


def uuid_of(graph_pass: Any) -> Any:
    """What a custom pass puts into the keys of caches, None if that makes caching impossible."""
    known = isinstance(graph_pass, custom_graph_pass.CustomGraphPass)
    return (graph_pass.uuid() or None) if known else None


def is_backward(graph: fx.Graph) -> bool:
    """Whether a graph is a backward one, by the name that AOTAutograd gives to its inputs."""
    placeholders = graph.find_nodes(op="placeholder")
    return any(str(node.target).startswith("tangents_") for node in placeholders)


def compile_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a torch-level graph with AOTAutograd and Inductor."""
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def partition_eagerly(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Run a graph eagerly behind AOTAutograd's partitioner, which obeys recompute tags."""

    def compiler(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    run = aot_autograd(fw_compiler=compiler, partition_fn=default_partition)
    return run(gm, list(example_inputs))
