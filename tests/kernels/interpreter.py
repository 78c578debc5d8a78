"""A process in which Triton kernels run on CPU tensors, in Triton's interpreter.

Whether `triton.jit` makes a kernel or an interpreted function is decided when Triton and the
module with the kernel are imported, for the whole process. So interpreted kernels get a process
of their own, and this one keeps real kernels, which other tests compile.

    with Interpreter() as interpreter:
        h = interpreter(pre.pre, H_pre, X)

Functions travel by name, tensors by value: dtype, strides and storage stay as they are.
"""

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

_ROOT = Path(__file__).parents[2]


class Interpreter:
    """Calls of module-level functions inside the process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def __call__(self, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """What `function` returns there; what it raises there is raised here as RuntimeError."""
        process = self._started()
        _send(process.stdin, pickle.dumps((function, args, kwargs)))
        succeeded, result = pickle.loads(_receive(process.stdout))
        if not succeeded:
            raise RuntimeError(f"in the interpreter:\n{result}")
        return result

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=_ROOT,
                env={**os.environ, "TRITON_INTERPRET": "1"},
            )
        return self._process


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(len(message).to_bytes(8) + message)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    header = pipe.read(8)
    if not header:
        raise EOFError("the other process has ended")
    return pipe.read(int.from_bytes(header))


def _serve() -> None:
    """Answer calls until the other end closes; what they print goes to the standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            message = _receive(sys.stdin.buffer)
        except EOFError:
            return
        _send(answers, pickle.dumps(_answer(message)))


def _answer(message: bytes) -> tuple[bool, Any]:
    try:
        function, args, kwargs = pickle.loads(message)
        return True, function(*args, **kwargs)
    except Exception:
        return False, traceback.format_exc()


def _as_on_devices() -> None:
    """Round as devices do, where Triton's interpreter does not.

    It truncates from float32 to bfloat16, multiplies bfloat16 as if its bits were integers, and
    ignores the precision of a product of float32.
    """
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != float32 or dst_type.scalar != bfloat16:
            return plain_cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), dst_type.scalar)

    def dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *args: Any) -> Any:
        if a.dtype.scalar == bfloat16:
            a, b = (plain_cast(self, x, float32) for x in (a, b))
        if precision.name == "TF32x3":
            (a, a_rest), (b, b_rest) = terms(a), terms(b)
            d = plain_dot(self, a_rest, b, d, precision, *args)
            d = plain_dot(self, a, b_rest, d, precision, *args)
        return plain_dot(self, a, b, d, precision, *args)

    def terms(x: Any) -> tuple[Any, Any]:
        """x as two tf32 numbers, float32 whose last 13 bits are 0."""
        high = tf32(x.data)
        return TensorHandle(high, float32), TensorHandle(tf32(x.data - high), float32)

    def tf32(x: Any) -> Any:
        return ((x.view("uint32") + 0x1000) & 0xFFFFE000).view("float32")

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


if __name__ == "__main__":
    torch.set_num_threads(1)
    _as_on_devices()
    _serve()
