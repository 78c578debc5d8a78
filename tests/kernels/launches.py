"""The launches of every operator of a site, recorded with the constants that launchers choose.

recorded(get_variant("mhc"), n=4, C=2560, dtype=torch.bfloat16)    -> Recorded, each once
"""

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mhc_compile.kernels.gpu import backend as gpu
from mhc_compile.kernels.gpu import readout
from mhc_compile.kernels.gpu.launch import Launch, recording
from mhc_compile.kernels.operands import Closed, Mapping, Opened, Parameters, Saved
from mhc_compile.kernels.variants import Variant

TOKENS = 3000


class Site:
    """The operands of all operators, as fake tensors of a GPU."""

    def __init__(self, variant: Variant, T: int, n: int, C: int, dtype: torch.dtype) -> None:
        columns = sum(variant.columns(n))
        self.n, self.settings = n, {"variant": variant, "eps": 1e-6}
        self.X, self.f = _cuda(dtype, T, n, C), _cuda(dtype, T, C)
        shapes = (T, n), (T, n), (T, n, n)
        self.H_pre, self.H_post, self.H_res = (_cuda(torch.float32, *shape) for shape in shapes)
        shapes = (n * C, columns), (3,), (columns,)
        self.weights = Parameters(*(_cuda(torch.float32, *shape) for shape in shapes))
        self.saved = _cuda(torch.float32, T, columns), _cuda(torch.float32, T)

    @property
    def closed(self) -> Closed:
        return Closed(self.H_res, self.H_post, self.X, self.f)

    @property
    def mapping(self) -> Mapping:
        return Mapping(self.X, *self.weights)

    @property
    def opened(self) -> Opened:
        return Opened(self.f, self.H_post, self.H_res, self.H_pre)

    @property
    def kept(self) -> Saved:
        return Saved(self.X, *self.weights, *self.saved)


def _cuda(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


CALLS: dict[str, Callable[[Site], Any]] = {
    "post_res": lambda s: gpu.post_res(*s.closed),
    "post_res_backward": lambda s: gpu.post_res_backward(s.X, *s.closed),
    "pre": lambda s: gpu.pre(s.H_pre, s.X),
    "pre_backward": lambda s: gpu.pre_backward(s.f, s.H_pre, s.X),
    "coefficients": lambda s: gpu.coefficients(s.mapping, **s.settings),
    "coefficients_backward": lambda s: gpu.coefficients_backward(
        (s.H_pre, s.H_post, s.H_res), s.kept, **s.settings
    ),
    "coefficients_pre": lambda s: gpu.coefficients_pre(s.mapping, **s.settings),
    "coefficients_pre_backward": lambda s: [
        gpu.coefficients_pre_backward(s.opened, s.kept, partial, **s.settings)
        for partial in (None, s.X)
    ],
    "seam": lambda s: gpu.seam(s.closed, s.weights, **s.settings),
    "seam_backward": lambda s: [
        gpu.seam_backward(s.opened, s.kept, partial, s.closed, **s.settings)
        for partial in (None, s.X)
    ],
    "expand": lambda s: readout.expand(s.f, s.n),
    "expand_backward": lambda s: readout.expand_backward(s.X),
    "readout": lambda s: readout.readout(s.X, "mean"),
    "readout_backward": lambda s: readout.readout_backward(s.f, s.n, "mean"),
}


@dataclass(frozen=True)
class Recorded:
    """A launch, and what tells it from others.

    Args:
        name: of the kernel, which of its pointers are None, and which streams have a dtype of
            their own.
        constants: all compile-time constants and options.
        source: hash of the types of its arguments, its source, and that of all it calls.
        streams: whether it reads or writes streams of C channels.
    """

    launch: Launch
    name: str
    constants: str
    source: str
    streams: bool

    @property
    def code(self) -> tuple[str, str, str]:
        """Launches in which this is equal compile to the same code."""
        return self.name, self.constants, self.source


def recorded(
    variant: Variant, n: int, C: int, dtype: torch.dtype, T: int = TOKENS
) -> list[Recorded]:
    """The launches of all calls; those that compile to the same code, once."""
    with FakeTensorMode(), recording() as launches:
        site = Site(variant, T, n, C, dtype)
        for call in CALLS.values():
            call(site)
    found: dict[Any, Recorded] = {}
    for launch in launches:
        new = _described(launch, C, dtype)
        found.setdefault(new.code, new)
    return list(found.values())


def _described(launch: Launch, C: int, dtype: torch.dtype) -> Recorded:
    function = launch.kernel.fn
    module = function.__module__.rpartition(".")
    name = function.__name__.strip("_")
    if module[0] != "mhc_compile_generated":
        name = f"{module[2]}.{name}"
    args = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    absent = [key for key, value in args.items() if value is None]
    streams = {
        key: value.dtype
        for key, value in args.items()
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == C
    }
    other = [f"{_short(x)} {key}" for key, x in streams.items() if x != dtype]
    name += f" without {', '.join(absent)}" if absent else ""
    name += f" with {', '.join(other)}" if other else ""
    constants = (f"{key}={value}" for key, value in launch.constants.items())
    types = tuple(x.dtype if isinstance(x, Tensor) else type(x) for x in launch.args)
    return Recorded(
        launch, name, " ".join(constants), source_hash(launch.kernel, types), bool(streams)
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def source_hash(kernel: Any, types: tuple[Any, ...]) -> str:
    """Of a kernel and all that it names of this package, without comments and docstrings."""
    texts: dict[str, str] = {}
    _collect(kernel, texts)
    text = "\n".join([*map(str, types), *(texts[name] for name in sorted(texts))])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _collect(kernel: Any, texts: dict[str, str]) -> None:
    function = kernel.fn
    words = list(_words(inspect.getsource(function)))
    texts[function.__name__] = " ".join(words)
    for name in set(words) - texts.keys():
        value = function.__globals__.get(name)
        if isinstance(value, triton.JITFunction) and "mhc_compile" in value.fn.__module__:
            _collect(value, texts)
        elif isinstance(value, triton.language.constexpr):
            texts[name] = repr(value.value)


def _words(source: str) -> Iterator[str]:
    """The same for every version of Python, as long as there are no f-strings."""
    before = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(source)).readline):
        statement = before in (tokenize.NEWLINE, tokenize.INDENT)
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            yield tokenize.tok_name[token.type]
        elif not (statement and token.type == tokenize.STRING):
            yield token.string
        before = token.type
