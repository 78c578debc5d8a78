"""A model whose example inputs are not known yet: it is transformed at its first call.

Until then its parameters are not complete, and whatever lists them raises: an optimizer built too
early would silently miss the new ones.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from torch import nn

from .. import _torch
from ..errors import ExampleInputsError
from .swap import class_of

__all__ = ["is_pending", "postpone", "refuse_pending", "then", "withdraw"]

M = TypeVar("M", bound=nn.Module)
Action = Callable[[nn.Module], Any]
FirstCall = Callable[[nn.Module, Any, Action | None], Any]
FIRST_CALL = "_mhc_pending_first_call"
THEN = "_mhc_pending_then"


def is_pending(module: nn.Module) -> bool:
    """Whether a module waits for its first call."""
    return FIRST_CALL in module.__dict__


def refuse_pending(model: nn.Module) -> None:
    """Raise ExampleInputsError if the model's mHC parameters do not exist yet."""
    for module in model.modules():
        if is_pending(module):
            _refuse(module)


def postpone(model: M, first_call: FirstCall) -> M:
    """Transform a model at its first call, with that call's inputs.

    Args:
        first_call: is given the model, plain again, its ``(args, kwargs)`` and what is to be done
            once it is transformed; leaves a plain model if it raises. Pickle takes it along.
    """
    model.__dict__[FIRST_CALL] = first_call
    model.__class__ = _pending_class(type(model))
    return model


def then(model: nn.Module, action: Action) -> None:
    """Have a model that waits do something once it is transformed, before it is called.

    Pickle and deepcopy take the action along. If it raises, the model goes on waiting.
    """
    model.__dict__[THEN] = action


def withdraw(model: M) -> M:
    """Take a postponed transform back."""
    del model.__dict__[FIRST_CALL]
    model.__dict__.pop(THEN, None)
    model.__class__ = _original(model)
    return model


def _original(module: nn.Module) -> Any:
    return type(module).__mro__[1]


_classes: weakref.WeakValueDictionary[int, type] = weakref.WeakValueDictionary()


def _pending_class(original: Any) -> Any:
    return class_of(original, _classes, _make_class)


def _make_class(original: Any) -> Any:
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "forward": _first_forward(original),
        "named_modules": _named_modules,
        **dict.fromkeys(("state_dict", "_load_from_state_dict", "compile"), _refuse),
    }
    metaclass: Any = type(original)
    return metaclass(original.__name__, (original,), namespace)


def _first_forward(original: type[nn.Module]) -> Any:
    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first_call, action = self.__dict__[FIRST_CALL], self.__dict__.get(THEN)
        withdraw(self)
        try:
            first_call(self, (args, kwargs), action)
        except BaseException:
            postpone(self, first_call)
            if action is not None:
                then(self, action)
            raise
        return self.forward(*args, **kwargs)

    return forward


def _named_modules(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules may be listed, parameters not, whether of this module or of one around it."""
    if _torch.is_listing_parameters():
        _refuse(self)
    return _original(self).named_modules(self, *args, **kwargs)


def _refuse(self: nn.Module, *_: Any, **__: Any) -> NoReturn:
    raise ExampleInputsError(
        f"{type(self).__name__} gets its mHC parameters at its first call, because transform had "
        "no example inputs; its parameters and state are not complete yet. Pass example_inputs to "
        "mhc_compile.transform, or call the model once."
    )


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle and deepcopy as an instance of the original class."""
    return _rebuild, (_original(self),), self.__getstate__()


def _rebuild(original: Any) -> Any:
    module = original.__new__(original)
    module.__class__ = _pending_class(original)
    return module
