"""Backward hooks of modules, in captured graphs.

Dynamo ends a graph at a module with a full backward hook. So while this library captures, what
``nn.Module.__call__`` makes of such hooks (``torch.utils.hooks.BackwardHook``) is replaced by two
operators that are identities in the forward and call the user's hooks in the backward:

    args = hook_enter(args);  out = module.forward(args);  out = hook_leave(out)

    backward of hook_leave    the pre-hooks, on the gradients of the outputs
    backward of hook_enter    the hooks, on the gradients of both

Note [One pair of gradients]
    The two backwards are far apart, and one module may be called many times. What the first one
    saw therefore waits under a number, and the number travels to the second as the gradient of a
    scalar, ``link``, that the two operators share.

Note [Hooks on streams]
    A block has n streams where the plain model has one state. All that is done to that state is
    done to every stream, so its gradient is the sum of theirs: that is what a hook is shown. A
    gradient that it returns would be that of which stream? That raises.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.library import custom_op

from .. import _torch
from ..errors import UnsupportedError
from ..passes.sites.records import location_of
from .hooks import described

__all__ = ["number_calls", "traced_backward_hooks"]

_lock = threading.Lock()
_capturing = 0


@contextmanager
def traced_backward_hooks() -> Iterator[None]:
    """Let Dynamo trace modules with backward hooks; in every thread, while one is inside."""
    global _capturing
    with _lock:
        _capturing += 1
        _torch.set_backward_hook(_backward_hook)
    try:
        yield
    finally:
        with _lock:
            _capturing -= 1
            if not _capturing:
                _torch.set_backward_hook(_torch.BackwardHook)


def _backward_hook(module: nn.Module, hooks: list[Any], pre_hooks: list[Any]) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _TracedHooks(module, _torch.backward_hooks_of(module))
    return _torch.BackwardHook(module, hooks, pre_hooks)


class _TracedHooks:
    """What ``BackwardHook`` is to one call of a module, as Dynamo traces it."""

    def __init__(self, module: nn.Module, hooks: tuple[str, str]) -> None:
        self.module, (self.hooks, self.pre_hooks) = id(module), hooks
        self.inputs = 0
        self.link: list[Tensor] = []

    def setup_input_hook(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.inputs = len(args)
        which = _differentiable(args)
        if not which:
            return args
        tensors = [args[i] for i in which]
        axes = [0] * len(which)
        results = hook_enter(tensors, self.module, self.hooks, which, len(args), axes, 0)
        self.link = [results[-1]]
        return _replaced(args, which, results)

    def setup_output_hook(self, result: Any) -> Any:
        outputs = result if isinstance(result, tuple) else (result,)
        which = _differentiable(outputs)
        if not which:
            return result
        hooks = "" if self.link else self.hooks  # no input has a gradient: called at once
        results = hook_leave(
            [outputs[i] for i in which],
            self.link,
            self.module,
            hooks,
            self.pre_hooks,
            which,
            len(outputs),
            self.inputs,
            [0] * len(which),
            0,
        )
        if not isinstance(result, tuple):
            return results[0]
        replaced = _replaced(outputs, which, results)
        return replaced if type(result) is tuple else type(result)(*replaced)


def _differentiable(values: Sequence[Any]) -> list[int]:
    if not torch.is_grad_enabled():
        return []
    return [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]


def _replaced(values: Sequence[Any], which: list[int], new: Sequence[Tensor]) -> tuple[Any, ...]:
    result = list(values)
    for position, index in enumerate(which):
        result[index] = new[position]
    return tuple(result)


# --- the operators ------------------------------------------------------------------------------
#
# module, hooks, pre_hooks   identity of the module, and the keys of its hooks when it was called,
#                            as text: custom_op mistakes an empty list for no argument
# which, count               positions of the tensors among the arguments, and how many there are
# axes                       0, or of a tensor of streams [..., n, C]: the channel axis of one
#                            stream, from the right
# call                       tells apart the calls of one graph

_UNSAFE = (torch.Tag.cudagraph_unsafe,)  # a replayed graph would call no hook


@custom_op("mhc::hook_enter", mutates_args=(), tags=_UNSAFE)
def hook_enter(
    tensors: Sequence[Tensor],
    module: int,
    hooks: str,
    which: Sequence[int],
    count: int,
    axes: Sequence[int],
    call: int,
) -> list[Tensor]:
    """The tensors ``which`` of the ``count`` arguments of a call, and a link for ``hook_leave``."""
    return [*(t.clone() for t in tensors), torch.zeros((), dtype=torch.float64)]


@hook_enter.register_fake
def _(tensors, module, hooks, which, count, axes, call):
    return [*(torch.empty_like(t) for t in tensors), torch.zeros((), dtype=torch.float64)]


@custom_op("mhc::hook_leave", mutates_args=(), tags=_UNSAFE)
def hook_leave(
    tensors: Sequence[Tensor],
    link: Sequence[Tensor],
    module: int,
    hooks: str,
    pre_hooks: str,
    which: Sequence[int],
    count: int,
    inputs: int,
    axes: Sequence[int],
    call: int,
) -> list[Tensor]:
    """The tensors ``which`` of the ``count`` outputs of a call that had ``inputs`` arguments."""
    return [t.clone() for t in tensors]


@hook_leave.register_fake
def _(tensors, link, module, hooks, pre_hooks, which, count, inputs, axes, call):
    return [torch.empty_like(t) for t in tensors]


@custom_op("mhc::hook_inputs", mutates_args=(), tags=_UNSAFE)
def hook_inputs(
    gradients: Sequence[Tensor],
    link: Tensor,
    module: int,
    hooks: str,
    which: Sequence[int],
    count: int,
    axes: Sequence[int],
    call: int,
) -> list[Tensor]:
    """The gradients of a call's inputs, when its full backward hooks have seen them."""
    outputs = _waiting.pop(int(link.item()), None)
    if outputs is None:  # the gradient came around the module's outputs
        return [g.clone() for g in gradients]
    seen = _Gradients(gradients, which, count, axes)
    found, functions = _hooks_of(module, hooks, _torch.backward_hooks)
    for function in functions:
        seen.replace(found, function, function(found, seen.values, outputs))
    return seen.result()


@hook_inputs.register_fake
def _(gradients, link, module, hooks, which, count, axes, call):
    return [torch.empty_like(g) for g in gradients]


@custom_op("mhc::hook_outputs", mutates_args=(), tags=_UNSAFE)
def hook_outputs(
    gradients: Sequence[Tensor],
    module: int,
    hooks: str,
    pre_hooks: str,
    which: Sequence[int],
    count: int,
    inputs: int,
    axes: Sequence[int],
    call: int,
) -> list[Tensor]:
    """The gradients of a call's outputs behind its pre-hooks, and the number they wait under."""
    seen = _Gradients(gradients, which, count, axes)
    found, functions = _hooks_of(module, pre_hooks, _torch.backward_pre_hooks)
    for function in functions:
        seen.replace(found, function, function(found, seen.values))
    found, functions = _hooks_of(module, hooks, _torch.backward_hooks)
    for function in functions:  # only where no input has a gradient
        returned = function(found, (None,) * inputs, seen.values)
        if returned is not None and any(r is not None for r in returned):
            raise RuntimeError(
                "Backward hook for Modules where no input requires gradient should always return "
                "None or None for all gradients."
            )
    number = next(_numbers)
    if not hooks:
        _waiting[number] = seen.values
        _torch.at_end_of_backward(lambda: _waiting.pop(number, None))
    return [*seen.result(), torch.tensor(float(number), dtype=torch.float64)]


@hook_outputs.register_fake
def _(gradients, module, hooks, pre_hooks, which, count, inputs, axes, call):
    return [*(torch.empty_like(g) for g in gradients), torch.zeros((), dtype=torch.float64)]


def _keep_enter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # The backward reads no tensor of the forward, and where there is no gradient none is made.
    ctx.set_materialize_grads(False)
    ctx.constants = inputs[1:]


def _keep_leave(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.linked, ctx.constants = len(inputs[1]), inputs[2:]


def _enter_backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    *own, link = gradients
    module, hooks, which, count, axes, call = ctx.constants
    if link is not None and any(g is not None for g in own):
        given, which, axes = _present(own, which, axes)
        own = _spread(own, hook_inputs(given, link, module, hooks, which, count, axes, call))
    return (own, *[None] * len(ctx.constants))


def _leave_backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    module, hooks, pre_hooks, which, count, inputs, axes, call = ctx.constants
    given, which, axes = _present(gradients, which, axes)
    *new, number = hook_outputs(given, module, hooks, pre_hooks, which, count, inputs, axes, call)
    return (_spread(gradients, new), [number] * ctx.linked, *[None] * len(ctx.constants))


def _present(
    gradients: Sequence[Tensor | None], which: Sequence[int], axes: Sequence[int]
) -> tuple[list[Tensor], list[int], list[int]]:
    """The gradients that there are, and what belongs to them."""
    there = [i for i, g in enumerate(gradients) if g is not None]
    given: Any = [gradients[i] for i in there]
    return given, [which[i] for i in there], [axes[i] for i in there]


def _spread(gradients: Sequence[Tensor | None], new: Sequence[Tensor]) -> list[Tensor | None]:
    remaining = iter(new)
    return [None if g is None else next(remaining) for g in gradients]


hook_enter.register_autograd(_enter_backward, setup_context=_keep_enter)
hook_leave.register_autograd(_leave_backward, setup_context=_keep_leave)


# --- in the backward ----------------------------------------------------------------------------

_numbers = itertools.count(1)
_waiting: dict[int, tuple[Tensor | None, ...]] = {}
_modules: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


class _Gradients:
    """The gradients of one call, as hooks see them and may replace them."""

    def __init__(
        self, given: Sequence[Tensor], which: Sequence[int], count: int, axes: Sequence[int]
    ) -> None:
        self._given, self._which, self._axes = given, which, axes
        self._shown: list[Tensor | None] = [None] * count
        for gradient, index, axis in zip(given, which, axes, strict=True):
            one = gradient if axis == 0 else gradient.sum(-2)
            self._shown[index] = one if axis in (0, -1) else one.movedim(-1, axis)
        self.values: tuple[Tensor | None, ...] = tuple(self._shown)

    def replace(self, module: nn.Module, hook: Callable[..., Any], returned: Any) -> None:
        if returned is None:
            return
        new = returned if isinstance(returned, (tuple, list)) else (returned,)
        if len(new) != len(self.values):
            raise RuntimeError(
                "Backward hook returned an invalid number of gradients, got "
                f"{len(new)}, but expected {len(self.values)}"
            )
        for index, axis in zip(self._which, self._axes, strict=True):
            if axis and new[index] is not self.values[index]:
                raise UnsupportedError(_returns_stream(module, hook))
        self.values = tuple(new)

    def result(self) -> list[Tensor]:
        results = []
        for given, index, axis in zip(self._given, self._which, self._axes, strict=True):
            value = self.values[index]
            if axis or value is self._shown[index]:
                results.append(given.clone())
            elif value is None:
                results.append(torch.zeros_like(given))
            else:  # as a kernel that was compiled for these strides expects it
                results.append(torch.empty_like(given).copy_(value))
        return results


def _hooks_of(
    identity: int, keys: str, of: Callable[[nn.Module], dict[int, Any]]
) -> tuple[Any, list[Callable[..., Any]]]:
    module = _modules[identity]
    standing, wanted = of(module), [int(key) for key in keys.split()]
    if any(key not in standing for key in wanted):
        raise UnsupportedError(
            f"a backward hook of a {type(module).__name__} in a transformed model was removed "
            "between forward and backward. Remove it behind the backward."
        )
    return module, [standing[key] for key in wanted]


def _returns_stream(module: nn.Module, hook: Callable[..., Any]) -> str:
    return (
        f"The backward hook {described(hook)} on a {type(module).__name__} returns another "
        "gradient for a residual stream. A transformed model has several streams there and the "
        "hook is shown the sum of their gradients, so what it returns belongs to none of them. "
        "Let it return None, or register it on the modules of the branches (attention, MLP)."
    )


def number_calls(gm: fx.GraphModule, root: nn.Module | None) -> None:
    """Tell the calls of hooked modules in a captured graph apart, and remember their modules.

    Raises:
        UnsupportedError: a hooked module is not held by ``root``, so its hooks cannot be called.
    """
    packets = (torch.ops.mhc.hook_enter, torch.ops.mhc.hook_leave)
    known = {*packets, *(p.default for p in packets)}
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    calls = [n for g in graphs for n in g.nodes if n.op == "call_function" and n.target in known]
    for number, node in enumerate(calls):
        node.args = (*node.args[:-1], number)
    if calls and root is not None:
        _modules.update({id(m): m for m in root.modules()})
    for node in calls:
        identity = node.args[1 if node.target in (packets[0], packets[0].default) else 2]
        if identity not in _modules:
            raise UnsupportedError(
                f"a module with backward hooks, called at {location_of(node)}, is not registered "
                "with the model that is called. Assign it as an attribute of a module of the model "
                "(or keep it in a ModuleList or ModuleDict)."
            )
