"""Bytes that kernels ask for, counted in Triton's interpreter.

Every plain load and store passes through two functions of the interpreter's builder; elements
that a mask leaves out are not counted. The kernels counted here use nothing else (no atomics, no
gathers). To be called inside the interpreter's process (see `interpreter`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.interpreter import InterpreterBuilder


def requested_bytes(function: Callable, *args: Any, **kwargs: Any) -> dict[int, int]:
    """Bytes of all loads and stores of a call, by the size of their elements."""
    with _counting() as counted:
        function(*args, **kwargs)
    return dict(counted)


@contextmanager
def _counting() -> Iterator[Counter]:
    counted: Counter = Counter()
    plain = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    # Arguments differ between versions of Triton, but for the first ones.
    def load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _add(counted, pointers, mask)
        return plain[0](self, pointers, mask, *args, **kwargs)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        _add(counted, pointers, mask)
        return plain[1](self, pointers, value, mask, *args, **kwargs)

    InterpreterBuilder.create_masked_load = load
    InterpreterBuilder.create_masked_store = store
    try:
        yield counted
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = plain


def _add(counted: Counter, pointers: Any, mask: Any) -> None:
    itemsize = pointers.dtype.scalar.element_ty.primitive_bitwidth // 8
    counted[itemsize] += int(mask.data.sum()) * itemsize
