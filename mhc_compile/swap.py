"""The class of a transformed module: the module's own class, plus what declares its sites.

A module that owns sites, or contains one that does, gets a subclass of its class, as PyTorch's
own ``parametrize`` and ``fully_shard`` do. The subclass keeps name, module, signature and pickle;
its ``forward`` does one of three things:

    while Dynamo traces       mention the sites (``mhc::declare``), run the original forward
    outermost, called plainly compile the call with the eager backend of this library and run it
    anything else             raise: the original forward would run plain residuals
"""

from __future__ import annotations

import contextvars
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from . import _torch, adapters
from .connection import StreamParameters
from .declare import Spec, declare
from .passes.errors import CheckpointError, MhcError, NotCapturedError, UnsupportedError

__all__ = ["is_swapped", "original_class", "restore", "swap"]

SPEC = "_mhc_spec"
CALL = "_mhc_call"
OWN_ATTRIBUTES = (SPEC, CALL, adapters.COMPILED)

_root: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("mhc_root", default=None)


def is_swapped(module: nn.Module) -> bool:
    """Whether a module is part of a transformed model."""
    return hasattr(type(module), "_mhc_original")


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was transformed."""
    return getattr(type(module), "_mhc_original", type(module))


def swap(module: nn.Module, spec: str) -> None:
    """Give a module its declaring class; ``restore`` takes it away again."""
    module.__dict__[SPEC] = spec
    module.__class__ = _swapped_class(type(module))
    adapters.prepare(module)


def restore(module: nn.Module) -> None:
    """Give a module its original class and drop what ``swap`` left on it."""
    adapters.undo(module)
    module.__class__ = original_class(module)
    for name in OWN_ATTRIBUTES:
        module.__dict__.pop(name, None)
    if "mhc" in module._modules:
        del module._modules["mhc"]


def _swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    # A GraphModule has a class of its own, whose forward `recompile` replaces.
    if issubclass(original, fx.GraphModule):
        return _make_class(original)
    return _shared_class(original)  # type: ignore[arg-type]


@functools.cache
def _shared_class(original: type[nn.Module]) -> type[nn.Module]:
    return _make_class(original)


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_mhc_original": original,
        "forward": _declaring_forward(original.forward),
        "compile": _compile,
        "load_state_dict": _load_state_dict,
        "__prepare_scriptable__": _refuse_export,
        "__reduce_ex__": _reduce,
    }
    if issubclass(original, fx.GraphModule):
        namespace |= {"recompile": _recompile, "__deepcopy__": _deepcopy_graph_module}
    namespace |= adapters.overrides(original)
    metaclass: Any = type(original)
    return metaclass(original.__name__, (original,), namespace)


def _declaring_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _torch.is_exporting() or torch.jit.is_tracing():
            _refuse_export()
        if torch.compiler.is_compiling():
            declare(self.mhc.tensors() if "mhc" in self._modules else [], self._mhc_spec)  # type: ignore[operator,union-attr]
            return original(self, *args, **kwargs)
        return _call_as_root(self, args, kwargs)

    return forward


def _call_as_root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Capture and run a call made from outside every capture."""
    if _torch.is_symbolically_traced():
        _refuse_export()
    outer = _root.get()
    if outer is not None:
        raise NotCapturedError(_why_not_captured(module, outer))
    adapters.before_call(module, kwargs)
    token = _root.set(module)
    try:
        with _torch.dynamo_settings(), _own_errors():
            return _compiled_call(module)(*args, **kwargs)
    except MhcError:
        # Dynamo gives up for good on code in which it met a graph break: start again.
        module.__dict__.pop(CALL, None)
        raise
    finally:
        _root.reset(token)


def _compiled_call(module: nn.Module) -> Callable[..., Any]:
    call = module.__dict__.get(CALL)
    if call is None:
        from .backend import eager

        bound = types.MethodType(type(module).forward, module)
        call = module.__dict__[CALL] = _torch.compile_dynamo(bound, eager)
    return call


@contextmanager
def _own_errors() -> Iterator[None]:
    """Errors of this library as they were raised, not inside Dynamo's BackendCompilerFailed."""
    try:
        yield
    except _torch.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MhcError):
            raise error.inner_exception from None
        raise


def _compile(self: nn.Module, *args: Any, **kwargs: Any) -> None:
    """``nn.Module.compile`` for a transformed module: the same arguments, backend "mhc"."""
    backend = kwargs.get("backend", "inductor")
    if isinstance(backend, str) and backend != "mhc":
        raise UnsupportedError(
            f"{type(self).__name__} is transformed: backend {backend!r} would run it with plain "
            "residuals. Use model.compile(backend='mhc'), which runs Inductor underneath."
        )
    if backend == "mhc":
        from .backend import check_options

        check_options(kwargs.get("options"), Spec.from_json(self.__dict__[SPEC]).config)
    nn.Module.compile(self, *args, **{**_torch.own_cache(), **kwargs})
    compiled = self._compiled_call_impl
    assert compiled is not None

    @functools.wraps(compiled)
    def call(*call_args: Any, **call_kwargs: Any) -> Any:
        adapters.before_call(self, call_kwargs)
        try:
            with _torch.dynamo_settings(), _own_errors():
                return compiled(*call_args, **call_kwargs)
        except MhcError:
            self.compile(*args, **kwargs)  # as in _call_as_root
            raise

    self._compiled_call_impl = call


def _refuse_export(*_: Any) -> None:
    raise UnsupportedError(
        "torch.export, torch.jit and torch.fx cannot take a transformed model: its n-stream graph "
        "is made at the call. Export the plain model and transform the result: "
        "mhc_compile.transform(torch.export.export(mhc_compile.revert(model), args).module()), "
        "with mhc_compile.save before it where the mHC weights matter."
    )


def _why_not_captured(module: nn.Module, root: nn.Module) -> str:
    name = type(module).__name__
    if _torch.is_forced_eager():
        cause = (
            'torch.compiler.set_stance("force_eager") is in force, and the n-stream graph only '
            "exists as a captured graph. Leave that stance around this model."
        )
    elif module is root:
        cause = (
            "Dynamo did not capture the call: it is disabled (torch.compiler.disable, "
            f"TORCHDYNAMO_DISABLE=1) or reached its limit of {_torch.RECOMPILE_LIMIT} graphs. "
            "For the limit, pad inputs to few shapes or call torch.compiler.reset()."
        )
    else:
        cause = (
            f"{type(root).__name__} has a graph break around the call of {name} (code that "
            "Dynamo cannot trace: a print, .item(), a data-dependent branch, an unsupported "
            "library call). TORCH_LOGS=graph_breaks shows where; remove the break."
        )
    return f"{name} is part of a transformed model and ran outside every captured graph. {cause}"


def _load_state_dict(
    self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """``nn.Module.load_state_dict`` that loads nothing where mHC parameters do not fit."""
    problems = [
        problem
        for path, module in self.named_modules()
        if isinstance(module, StreamParameters)
        and (problem := module.why_not(state_dict, f"{path}."))
    ]
    if problems:
        raise CheckpointError(f"{type(self).__name__}: {'; '.join(problems)}")
    return original_class(self).load_state_dict(self, state_dict, *args, **kwargs)


# --- copies -------------------------------------------------------------------------------------


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle and deepcopy as an instance of the original class that is swapped on arrival."""
    original = original_class(self)
    if issubclass(original, fx.GraphModule):
        raise UnsupportedError(
            "a transformed torch.fx.GraphModule cannot be pickled: save its mHC weights with "
            "mhc_compile.save and the plain module after mhc_compile.revert"
        )
    state = self.__getstate__()
    if isinstance(state, dict):
        left_out = (*OWN_ATTRIBUTES, "_compiled_call_impl")
        state = {k: v for k, v in state.items() if k not in left_out}
    return _rebuild, (original, self.__dict__[SPEC]), state


def _rebuild(original: type[nn.Module], spec: str) -> nn.Module:
    module = original.__new__(original)
    module.__dict__[SPEC] = spec
    module.__class__ = _swapped_class(original)
    return module


def _deepcopy_graph_module(self: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """fx rebuilds a GraphModule from its graph and would lose the class."""
    spec = self.__dict__[SPEC]
    swapped, call = type(self), self.__dict__.pop(CALL, None)
    self.__class__ = original_class(self)  # type: ignore[assignment]
    try:
        copied = self.__deepcopy__(memo)
    finally:
        self.__class__ = swapped
        if call is not None:
            self.__dict__[CALL] = call
    if "mhc" in self._modules and "mhc" not in copied._modules:
        import copy

        copied._modules["mhc"] = copy.deepcopy(self._modules["mhc"], memo)
    swap(copied, spec)
    return copied


def _recompile(self: fx.GraphModule) -> Any:
    """``GraphModule.recompile`` writes ``forward`` on the class: it must be the original one."""
    spec = self.__dict__[SPEC]
    self.__class__ = original_class(self)  # type: ignore[assignment]
    try:
        return self.recompile()
    finally:
        self.__dict__.pop(CALL, None)
        swap(self, spec)
