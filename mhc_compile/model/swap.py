"""The class of a transformed module: the module's own class, plus what declares its sites.

A module that owns sites, or contains one that does, gets a subclass of its class, as PyTorch's
own ``parametrize`` and ``fully_shard`` do. The subclass keeps name, module, signature and pickle;
its ``forward`` does one of three things:

    while Dynamo traces       mention the sites (``mhc::declare``), run the original forward
    outermost, called plainly compile the call with the eager backend of this library and run it
    anything else             raise: the original forward would run plain residuals

Note [Replaced forwards]
    ``module.forward = f`` and ``Class.forward = f`` are common (accelerate, kernels that patch
    themselves in), before and after a model was transformed. The class's own forward is therefore
    looked up at every call, and one that stands on the instance is *adopted*: it declares the sites
    as the class's would. Dynamo guards neither; so a plain call compares them first, and captures
    anew where one has changed.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .. import _torch
from ..errors import MhcError, NotCapturedError, UnsupportedError
from . import adapters, callbacks, children
from .backward_hooks import traced_backward_hooks
from .connection import refuse_other_state
from .declare import Spec, declare
from .hooks import errors_name_hooks

__all__ = ["calling_root", "find", "is_swapped", "original_class", "plainly", "restore", "swap"]

SPEC = "_mhc_spec"
CALL = "_mhc_call"
FORWARD = "_mhc_forward"
"""Under which an adopted forward keeps the one that the user put on the instance."""

OWN_ATTRIBUTES = (SPEC, CALL, FORWARD, adapters.COMPILED)


@dataclass(frozen=True)
class _Call:
    """A plain call that is being captured or run; what Dynamo had met before."""

    root: nn.Module
    exceptions: Mapping[str, int]


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("mhc_call", default=None)

# By identity, as the captured graphs know modules. Nothing is read from it but which module it is.
_swapped: weakref.WeakValueDictionary[str, nn.Module] = weakref.WeakValueDictionary()


def calling_root() -> nn.Module | None:
    """The module whose plain call is being captured or run, if there is one."""
    call = _call.get()
    return call.root if call is not None else None


def find(identity: str) -> nn.Module | None:
    """The module of a transformed model with this identity (see ``sites.identity_of``)."""
    return _swapped.get(identity)


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
    _swapped[str(id(module))] = module
    adapters.prepare(module)
    _adopt_forward(module)


def restore(module: nn.Module) -> None:
    """Give a module its original class and drop what ``swap`` left on it."""
    adapters.undo(module)
    if (own := _users_forward(module)) is not None:
        module.__dict__["forward"] = own
    module.__class__ = _without_swap(type(module))
    _swapped.pop(str(id(module)), None)
    for name in OWN_ATTRIBUTES:
        module.__dict__.pop(name, None)
    if "mhc" in module._modules:
        del module._modules["mhc"]


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Let a transformed model run with its plain residuals: nothing of this library takes part."""
    kept = [(m, m.__class__, dict(m.__dict__), dict(m._modules)) for m in _swapped_in(model)]
    try:
        for module, cls, _, _ in kept:
            if (own := _users_forward(module)) is not None:
                module.__dict__["forward"] = own
            module.__dict__.pop(_torch.COMPILED_CALL, None)
            module.__class__ = _without_swap(cls)
            module._modules.pop("mhc", None)  # for a forward that goes through its children
        yield
    finally:
        for module, cls, attributes, children in kept:
            module.__class__ = cls
            for name in ("forward", _torch.COMPILED_CALL):
                if name in attributes:
                    module.__dict__[name] = attributes[name]
            added = {k: m for k, m in module._modules.items() if k not in children}
            module._modules.clear()
            module._modules.update({**children, **added})


def _swapped_in(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if is_swapped(m)]


def _without_swap(cls: type) -> type:
    """A class as it would be had its module never been transformed.

    What made a class of its own since then (``parametrize``, ``fully_shard``) keeps it.
    """
    if "_mhc_original" in cls.__dict__:
        return cls._mhc_original  # type: ignore[attr-defined]
    if not hasattr(cls, "_mhc_original"):
        return cls
    bases = tuple(_without_swap(base) for base in cls.__bases__)
    own = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, own)


def _swapped_class(original: type[nn.Module]) -> type[nn.Module]:
    # A GraphModule has a class of its own, whose forward `recompile` replaces.
    if issubclass(original, fx.GraphModule):
        return _make_class(original)
    return class_of(original, _classes, _make_class)


# By the identity of the original class, which lives as long as the one made of it.
_classes: weakref.WeakValueDictionary[int, type] = weakref.WeakValueDictionary()


def class_of(original: type, known: Any, make: Callable[[Any], type]) -> Any:
    """The class that is made of another one: one for all modules, as long as there are some."""
    made = known.get(id(original))
    if made is None:
        made = known[id(original)] = make(original)
    return made


def _make_class(original: type[nn.Module]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_mhc_original": original,
        "__init__": _new_as(original, lambda: swapped),
        # From the start: transformers wraps the forward of a subclass when it is made.
        "forward": _declaring_forward(original, lambda: swapped),
        _torch.COMPILED_CALL: _checked_call,
        "_replicate_for_data_parallel": _replicate,
        "compile": _compile,
        "_load_from_state_dict": _load_from_state_dict,
        "__prepare_scriptable__": _refuse_export,
        "__reduce_ex__": _reduce,
    }
    if issubclass(original, fx.GraphModule):
        namespace |= {"recompile": _recompile, "__deepcopy__": _deepcopy_graph_module}
    namespace |= children.overrides(original, lambda: swapped)
    namespace |= adapters.overrides(original)
    metaclass: Any = type(original)
    try:
        swapped: type[nn.Module] = metaclass(original.__name__, (original,), namespace)
    except Exception as error:
        raise UnsupportedError(
            f"{original.__module__}.{original.__qualname__} does not allow a subclass without more "
            f"({type(error).__name__}: {error}), and the class of a transformed module is one. "
            "Give what its __init_subclass__ or metaclass asks for a default."
        ) from error
    return swapped


def _new_as(
    original: type[nn.Module], swapped: Callable[[], type[nn.Module]]
) -> Callable[..., None]:
    """``type(model)(config)`` makes a plain module: what declares sites is on another one."""

    @functools.wraps(original.__init__)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(self) is swapped():
            self.__class__ = original
        original.__init__(self, *args, **kwargs)

    return init


def _declaring_forward(
    original: type[nn.Module], swapped: Callable[[], type[nn.Module]]
) -> Callable[..., Any]:
    """The forward of a swapped class, around that of the original class as it is at the call.

    Traced, it says ``super()``: Dynamo cannot read an attribute of a class that was given to
    ``torch._dynamo.allow_in_graph``, as diffusers does with its blocks.
    """

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, swapped()):  # plain again, but somebody kept this method
            return original.forward(self, *args, **kwargs)
        if _torch.is_exporting() or torch.jit.is_tracing():
            _refuse_export()
        # Not `is_compiling`, which is true in every thread while one of them compiles.
        if torch.compiler.is_dynamo_compiling():
            declare(_declared_tensors(self), self._mhc_spec)
            return super(swapped(), self).forward(*args, **kwargs)  # type: ignore[misc]
        return _call_as_root(self, args, kwargs)

    return _under_the_name_of(original, forward)


def _adopted_forward(own: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same for a forward that stands on the instance; copies of the module read their own.

    Args:
        number: its place among all that were adopted: a later one may call an earlier one.
    """

    @functools.wraps(own, updated=())
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_swapped(self):  # plain again, but somebody kept this method
            kept = self.__dict__.get(FORWARD)
            return (kept[number] if kept else own)(*args, **kwargs)
        if _torch.is_exporting() or torch.jit.is_tracing():
            _refuse_export()
        if torch.compiler.is_dynamo_compiling():
            declare(_declared_tensors(self), self._mhc_spec)
            return self._mhc_forward[number](*args, **kwargs)  # type: ignore[index,operator]
        return _call_as_root(self, args, kwargs)

    return forward


def _under_the_name_of(original: type[nn.Module], forward: Any) -> Any:
    """A forward of ours with code of its own for a class.

    Dynamo keeps what it has learned of sizes, and counts graphs, by file, line and name of code.
    With one code for all, sizes of another model's inputs would make those of this one dynamic.
    """
    name = re.sub(r"\W", "_", f"forward_of_{original.__module__}_{original.__qualname__}")
    forward.__code__ = forward.__code__.replace(co_name=name)
    return forward


def _is_ours(function: Any, code: types.CodeType) -> bool:
    """Whether a function was made where a code was; marks on it are copied by functools.wraps."""
    own: Any = getattr(function, "__code__", None)
    place = (code.co_filename, code.co_firstlineno)
    return own is not None and (own.co_filename, own.co_firstlineno) == place


def _declared_tensors(module: nn.Module) -> list[nn.Parameter]:
    """The mHC parameters of a module; past a ``__getattr__`` of its class (traced by Dynamo)."""
    own = module._modules
    return own["mhc"].tensors() if "mhc" in own else []  # type: ignore[operator,union-attr]


def _adopt_forward(module: nn.Module) -> None:
    """Let a forward that stands on the instance declare."""
    own = module.__dict__.get("forward")
    if own is None or _is_ours(own, _ADOPTED):
        return
    adopted = [*module.__dict__.get(FORWARD, ()), own]
    module.__dict__[FORWARD] = adopted
    forward = _adopted_forward(own, len(adopted) - 1)
    forward = _under_the_name_of(original_class(module), forward)
    module.__dict__["forward"] = types.MethodType(forward, module)


def _users_forward(module: nn.Module) -> Any:
    """The forward that a user put on an instance, adopted or not; None without one."""
    own: Any = module.__dict__.get("forward")
    if not _is_ours(own, _ADOPTED):
        return own
    number = own.__func__.__closure__[own.__code__.co_freevars.index("number")].cell_contents
    return module.__dict__[FORWARD][number]


def _checked_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``nn.Module.__call__`` runs first, in the place of a compiled call.

    ``model.forward = f`` would otherwise take this library out of the call altogether.
    """
    if not torch.compiler.is_dynamo_compiling():
        _adopt_forward(self)
        _require_own_forward(type(self))
    return self._call_impl(*args, **kwargs)


def _require_own_forward(cls: type[nn.Module]) -> None:
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    if not _is_ours(owner.__dict__["forward"], _DECLARING):
        original = cls._mhc_original  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"forward was replaced on the class that transform gave to {original.__name__}, and no "
            f"longer says which sites it has. Replace it on the class that you wrote "
            f"({original.__module__}.{original.__qualname__}.forward = ...), on the instance "
            "(model.forward = ...), or before mhc_compile.transform."
        )


# What such functions are known by.
_DECLARING = _declaring_forward(nn.Module, lambda: nn.Module).__code__
_ADOPTED = _adopted_forward(nn.Module.forward, 0).__code__


def _call_as_root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Capture and run a call made from outside every capture."""
    if _torch.is_symbolically_traced():
        _refuse_export()
    if _torch.is_functorch_active():
        _refuse_functorch(module)
    outer = _call.get()
    if outer is not None:
        with errors_name_hooks(lambda: [outer.root]):
            raise NotCapturedError(_why_not_captured(module, outer))
    adapters.before_call(module, kwargs)
    token = _call.set(_Call(module, _torch.exceptions_met()))
    try:
        with _torch.dynamo_settings(), traced_backward_hooks(), _own_errors():
            return _compiled_call(module)(*args, **kwargs)
    except MhcError:
        # Dynamo gives up for good on code in which it met a graph break: start again.
        module.__dict__.pop(CALL, None)
        raise
    finally:
        _call.reset(token)


class _CompiledCall:
    """The compiled call of one module, and the forwards that it was compiled from.

    A copy of the module, however it was made, has to compile its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forwards = weakref.ref(module), Forwards(module)
        bound = module.__dict__.get("forward") or types.MethodType(type(module).forward, module)
        self.call = _torch.compile_dynamo(bound, callbacks.eager)

    def is_valid_for(self, module: nn.Module) -> bool:
        return self.module() is module and not self.forwards.changed()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class Forwards:
    """What a captured graph was made from that Dynamo does not guard.

    See Note [Replaced forwards]; and hooks that are registered for all modules.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._classes = {c: c.forward for c in {original_class(m) for m in modules}}
        self._parts = [(weakref.ref(m), self._of(m)) for m in modules if is_swapped(m)]
        self._hooks = _torch.hooks_for_all_modules()

    def changed(self) -> bool:
        """Whether one was replaced since; a new one on an instance is adopted."""
        now = [self._of(m) is before for ref, before in self._parts if (m := ref()) is not None]
        return (
            not all(now)
            or bool([c for c, f in self._classes.items() if c.forward is not f])
            or _torch.hooks_for_all_modules() != self._hooks
        )

    @staticmethod
    def _of(module: nn.Module) -> Any:
        if "forward" not in module.__dict__:
            return None
        _adopt_forward(module)
        return _users_forward(module)


def _compiled_call(module: nn.Module) -> Callable[..., Any]:
    compiled = module.__dict__.get(CALL)
    if compiled is None or not compiled.is_valid_for(module):
        compiled = module.__dict__[CALL] = _CompiledCall(module)
    return compiled.call


def _refuse_functorch(module: nn.Module) -> None:
    raise UnsupportedError(
        f"{type(module).__name__} is transformed, and was called under a transform of torch.func "
        "(grad, vjp, jvp, vmap, jacrev, hessian, ...), under which Dynamo captures nothing. For "
        "gradients use torch.autograd.grad on the output of "
        "torch.func.functional_call(model, parameters, args); in place of vmap over samples, give "
        "the model the whole batch, or loop over it."
    )


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
        callbacks.check_options(kwargs.get("options"), Spec.from_json(self.__dict__[SPEC]).config)
    _adopt_forward(self)
    _require_own_forward(type(self))
    nn.Module.compile(self, *args, **{**_torch.own_cache(), **kwargs})
    compiled, forwards = self.__dict__[_torch.COMPILED_CALL], Forwards(self)

    @functools.wraps(compiled)
    def call(*call_args: Any, **call_kwargs: Any) -> Any:
        _require_own_forward(type(self))
        if forwards.changed():
            _torch.forget_graphs()
            self.compile(*args, **kwargs)
            return self.__dict__[_torch.COMPILED_CALL](*call_args, **call_kwargs)
        if _torch.is_functorch_active():
            _refuse_functorch(self)
        adapters.before_call(self, call_kwargs)
        try:
            with _torch.dynamo_settings(), traced_backward_hooks(), _own_errors():
                return compiled(*call_args, **call_kwargs)
        except MhcError:
            self.compile(*args, **kwargs)  # as in _call_as_root
            raise

    self.__dict__[_torch.COMPILED_CALL] = call


def _refuse_export(*_: Any) -> None:
    raise UnsupportedError(
        "torch.export, torch.jit and torch.fx cannot take a transformed model: its n-stream graph "
        "is made at the call. Export the plain model and transform the result: "
        "mhc_compile.transform(torch.export.export(mhc_compile.revert(model), args).module()), "
        "with mhc_compile.save before it where the mHC weights matter."
    )


_OWN_ERRORS: tuple[str, ...] = tuple(e.__name__ for e in MhcError.__subclasses__())


def _why_not_captured(module: nn.Module, call: _Call) -> str:
    name, root = type(module).__name__, call.root
    met = _torch.exceptions_met()
    new = (e for e, count in met.items() if count > call.exceptions.get(e, 0))
    raised = [e for e in new if not e.startswith(_OWN_ERRORS)]  # ours are met by tracing this call
    if raised:
        cause = (
            f"While it was captured, the forward of {type(root).__name__} or of a module in it "
            f"raised {raised[0]}. See whether the plain model does so with the same inputs: "
            "mhc_compile.revert(copy.deepcopy(model)). If it does not, code asks for the exact "
            "class (type(self) is ...), which transform has made a subclass: ask isinstance."
        )
    elif _torch.stance() != "default":
        cause = (
            f'torch.compiler.set_stance("{_torch.stance()}") is in force, and the n-stream graph '
            "only exists as a captured graph. Leave that stance around this model."
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


def _load_from_state_dict(
    self: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any
) -> None:
    """Loads nothing where mHC parameters do not fit, whoever's ``load_state_dict`` was called.

    A module comes before its children, and is handed what all of them will get.
    """
    refuse_other_state(self, state_dict, prefix)
    original_class(self)._load_from_state_dict(self, state_dict, prefix, *rest)


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
        left_out = (*OWN_ATTRIBUTES, _torch.COMPILED_CALL)
        forward = _users_forward(self)  # adopted again at the call
        own = {} if forward is None else {"forward": forward}
        state = {k: v for k, v in state.items() if k not in left_out} | own
    return _rebuild, (original, self.__dict__[SPEC]), state


def _rebuild(original: type[nn.Module], spec: str) -> nn.Module:
    module = original.__new__(original)
    module.__dict__[SPEC] = spec
    module.__class__ = _swapped_class(original)
    _swapped[str(id(module))] = module
    return module


def _replicate(self: nn.Module) -> nn.Module:
    """``DataParallel`` makes its replicas by copying the attributes."""
    replica: nn.Module = original_class(self)._replicate_for_data_parallel(self)
    _swapped[str(id(replica))] = replica
    if (own := _users_forward(self)) is not None:
        replica.__dict__.pop(FORWARD, None)
        replica.__dict__["forward"] = own
    return replica


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
