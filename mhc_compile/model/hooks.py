"""What users put on the modules of a model, in words: for errors that it may have caused.

A hook runs between the operations of the model, and Dynamo captures both as one graph. Where that
graph is not the one that was transformed, the hook has to be named: nothing in the model's own
source says that it is there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import _torch
from ..errors import ChainBrokenError, GraphBreakError, NoSitesError, NotCapturedError

__all__ = ["described", "errors_name_hooks", "standing_on"]

SHOWN = 4
_OURS = f"{__name__.partition('.')[0]}."


def described(function: Callable[..., Any]) -> str:
    """``name (file:line)`` of a function, a method, a partial or an object that is called."""
    while isinstance(function, functools.partial):
        function = function.func
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if not hasattr(plain, "__code__"):
        plain = type(function).__call__
        name = type(function).__qualname__
    else:
        name = plain.__qualname__
    code = getattr(plain, "__code__", None)
    return f"'{name}'" + (f" ({code.co_filename}:{code.co_firstlineno})" if code else "")


def standing_on(roots: Sequence[nn.Module], concerned: str = "") -> str:
    """A sentence on the hooks and replaced forwards of some models, "" if there are none.

    Args:
        roots: the outermost modules.
        concerned: a text that names modules in quotes; hooks on and in those come first.
    """
    found = [(p, text) for root in roots for p, m in root.named_modules() for text in _on(m)]
    if not found:
        return ""
    found.sort(key=lambda f: not _is_near(f[0], concerned))
    chosen = found[:SHOWN]
    texts = [f"{text} on '{path or '<root>'}'" for path, text in chosen]
    rest = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return (
        f"What users put there also runs in this graph: {', '.join(texts)}{rest}. A hook may read, "
        "scale or mask what passes a residual stream; one that puts other values in the place of "
        "tokens leaves no stream to carry: register it on the modules of the branches, or before "
        "mhc_compile.transform, and the streams end and begin there."
    )


@contextmanager
def errors_name_hooks(roots: Callable[[], Sequence[nn.Module]]) -> Iterator[None]:
    """Errors of a graph that is not as expected say what users put on the modules of ``roots``."""
    try:
        yield
    except (ChainBrokenError, GraphBreakError, NoSitesError, NotCapturedError) as error:
        if not (named := standing_on(roots(), str(error))):
            raise
        raise type(error)(f"{error} {named}") from error.__cause__


def _is_near(path: str, text: str) -> bool:
    parts = path.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))] if path else []
    return any(f"'{p}'" in text or f"'{p}." in text for p in above)


def _on(module: nn.Module) -> Iterator[str]:
    for kind, hooks in _torch.hooks_on(module).items():
        for hook in hooks:
            if not str(getattr(hook, "__module__", "")).startswith(_OURS):
                yield f"{kind} {described(hook)}"
    own = module.__dict__.get("_mhc_forward", module.__dict__.get("forward"))
    if own is not None and not str(getattr(own, "__module__", "")).startswith(_OURS):
        yield f"forward {described(own)}, which replaces that of its class,"
