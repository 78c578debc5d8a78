"""A model whose example inputs are not known yet: it is transformed at its first call.

Until then its parameters are not complete, and whatever lists them raises: an optimizer built too
early would silently miss the new ones.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .config import Config
from .passes.errors import ExampleInputsError

__all__ = ["is_pending", "postpone", "withdraw"]

M = TypeVar("M", bound=nn.Module)
CONFIG = "_mhc_pending_config"


def is_pending(module: nn.Module) -> bool:
    """Whether a module waits for its first call."""
    return CONFIG in module.__dict__


def postpone(model: M, config: Config) -> M:
    """Transform a model at its first call, with that call's inputs."""
    original = type(model)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        from .transform import transform

        chosen = self.__dict__[CONFIG]
        withdraw(self)
        try:
            transform(self, example_inputs=(args, kwargs), config=chosen)
        except BaseException:
            postpone(self, chosen)
            raise
        return self(*args, **kwargs)

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise ExampleInputsError(
            f"{original.__name__} gets its mHC parameters at its first call, because transform "
            "had no example inputs; its parameters and state are not complete yet. Pass "
            "example_inputs to mhc_compile.transform, or call the model once."
        )

    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__call__": __call__,
        **dict.fromkeys(
            ("parameters", "named_parameters", "state_dict", "load_state_dict", "compile"), refuse
        ),
    }
    model.__dict__[CONFIG] = config
    metaclass: Any = type(original)
    model.__class__ = metaclass(original.__name__, (original,), namespace)
    return model


def withdraw(model: M) -> M:
    """Take a postponed transform back."""
    del model.__dict__[CONFIG]
    model.__class__ = type(model).__mro__[1]
    return model
