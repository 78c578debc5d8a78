"""The operators of a site on CPU tensors, by C++ that is built on first use (see native.py).

All functions take contiguous CPU tensors and allocate only their results and a workspace. With T
tokens, n streams of C channels, streams X, f, h and their gradients are of one dtype S (float32,
bfloat16, float64); everything else is of the compute dtype K: float64 for float64 streams, else
float32. The meaning is that of reference.py.

Results do not depend on the number of threads, and those of `coefficients_pre` and `seam` are bit
by bit those of the separate functions.

Note: One gradient, rounded once
    The gradient of a state that several functions read is summed up in K by
    `coefficients_pre_backward` and `seam_backward`, and rounded once, or not at all where it stays
    inside.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..operands import WITH_CHANNELS, Closed, Mapping, Opened, Parameters, Saved
from ..results import Coefficients, Gradients, Pair, Seven, Six, Triple
from ..variants import Variant
from . import codegen as codegen_cpp
from . import native

LANGUAGE = "C++"

MOST_STREAMS = 16

_PARAMETERS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "d": ctypes.c_double,
}

# Parameters of the functions in *.h; p: pointer, i: int, l: int64_t, d: double.
_SIGNATURES = {
    "pre": "ill" + "ppp",
    "pre_backward": "ill" + "ppppp",
    "post_res": "ill" + "ppppp",
    "post_res_backward": "ill" + "ppppppppp",
    "readout": "illd" + "pp",
    "expand": "illd" + "pp",
    "forward_workspace": "li",
    "backward_workspace": "illii",
    "site_forward": "illipd" + "p" * 15,
    "site_backward": "illip" + "p" * 24,
}


def supports(dtype: torch.dtype, n: int, variant: Variant | None = None) -> bool:
    """Whether the functions here can be called for these streams; builds what they need."""
    if dtype not in codegen_cpp.STREAM_DTYPES or not 2 <= n <= MOST_STREAMS:
        return False
    return _site(n, dtype) is not None and (
        variant is None or _chain(variant, n, compute_dtype(dtype)) is not None
    )


def source(variant: Variant, n: int, dtype: torch.dtype) -> str | None:
    """The text of the coefficients, for streams of a dtype."""
    return codegen_cpp.chain_source(variant, n, compute_dtype(dtype))


def coefficients(mapping: Mapping, *, variant: Variant, eps: float) -> Coefficients:
    """H_pre [T, n], H_post [T, n], H_res [T, n, n], y = x⃗ φ [T, cols] and 1 / r [T]."""
    return _forward(_Site(mapping.X, variant), mapping, eps)


def coefficients_pre(mapping: Mapping, *, variant: Variant, eps: float) -> Six:
    """h = H_pre X, H_pre, H_post, H_res, y, 1 / r."""
    site = _Site(mapping.X, variant)
    h = mapping.X.new_empty(site.T, site.C)
    return (h, *_forward(site, mapping, eps, h))


def seam(closed: Closed, parameters: Parameters, *, variant: Variant, eps: float) -> Seven:
    """The end of a site and the start of the next.

    Returns:
        X2 = H_res X + H_postᵀ f, and of the next site, from X2: h, H_pre, H_post, H_res, y, 1 / r.
    """
    X = closed.X
    site = _Site(X, variant)
    X2, h = torch.empty_like(X), X.new_empty(site.T, site.C)
    return (X2, h, *_forward(site, Mapping(X2, *parameters), eps, h, closed))


def coefficients_backward(dH: Triple, saved: Saved, *, variant: Variant, eps: float) -> Gradients:
    """dX, dφ, dα, db of `coefficients`."""
    dX = torch.empty_like(saved.X)
    return dX, *_backward(_Site(saved.X, variant), (*dH, None, None), saved, None, dX)


def coefficients_pre_backward(
    opened: Opened, saved: Saved, partial: Tensor | None, *, variant: Variant, eps: float
) -> Gradients:
    """dX, dφ, dα, db of `coefficients_pre`; `partial`, if given, is added to dX."""
    dh, dH_post, dH_res, H_pre = opened
    dX = torch.empty_like(saved.X)
    grads = None, dH_post, dH_res, H_pre, dh
    return dX, *_backward(_Site(saved.X, variant), grads, saved, partial, dX)


def seam_backward(
    opened: Opened,
    saved: Saved,
    partial: Tensor | None,
    closed: Closed,
    *,
    variant: Variant,
    eps: float,
) -> Seven:
    """dφ, dα, db, dH_res, dH_post, dX, df of `seam`; `partial` is a further gradient of X2."""
    dh, dH_post, dH_res, H_pre = opened
    dH_res_closed, dH_post_closed, dX, df = of_closed = _like(closed)
    grads = None, dH_post, dH_res, H_pre, dh
    behind = dH_res_closed.data_ptr(), dH_post_closed.data_ptr(), df.data_ptr()
    site = _Site(saved.X, variant)
    return (*_backward(site, grads, saved, partial, dX, closed, behind), *of_closed)


def pre(H_pre: Tensor, X: Tensor) -> Tensor:
    """h = H_pre X, [T, C]."""
    site = _Site(X)
    h = X.new_empty(site.T, site.C)
    site.call("pre", *site.pointers(("H_pre", "X"), (H_pre, X)), h.data_ptr())
    return h


def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> Pair:
    """dH_pre, dX."""
    site = _Site(X)
    inputs = site.pointers(("dh", "H_pre", "X"), (dh, H_pre, X))
    dH_pre, dX = torch.empty_like(H_pre), torch.empty_like(X)
    site.call("pre_backward", *inputs, dH_pre.data_ptr(), dX.data_ptr())
    return dH_pre, dX


def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X2 = H_res X + H_postᵀ f, [T, n, C]."""
    site = _Site(X)
    inputs = site.pointers(Closed._fields, (H_res, H_post, X, f))
    X2 = torch.empty_like(X)
    site.call("post_res", *inputs, X2.data_ptr())
    return X2


def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> Gradients:
    """dH_res, dH_post, dX, df."""
    site = _Site(X)
    inputs = site.pointers(("X", *Closed._fields), (dX2, H_res, H_post, X, f))
    results = _like((H_res, H_post, X, f))
    site.call("post_res_backward", *inputs, *map(Tensor.data_ptr, results))
    return results


def readout(X: Tensor, kind: str) -> Tensor:
    """The mean or sum of the streams, [T, C]."""
    site = _Site(X)
    x = X.new_empty(site.T, site.C)
    factor = _readout_factor(kind, site.n)
    site.call("readout", factor, *site.pointers(("X",), (X,)), x.data_ptr())
    return x


def readout_backward(dx: Tensor, n: int, kind: str) -> Tensor:
    """dX [T, n, C]."""
    return _expand(dx, n, _readout_factor(kind, n))


def expand(x: Tensor, n: int) -> Tensor:
    """n equal streams, [T, n, C]."""
    return _expand(x, n, 1.0)


def _readout_factor(kind: str, n: int) -> float:
    if kind not in ("mean", "sum"):
        raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")
    return 1.0 / n if kind == "mean" else 1.0


def _expand(x: Tensor, n: int, factor: float) -> Tensor:
    T, C = x.shape
    X = x.new_empty(T, n, C)
    site = _Site(X)
    site.call("expand", factor, *site.pointers(("f",), (x,)), X.data_ptr())
    return X


# --- calls into the libraries -------------------------------------------------------------------

_Pointer = int | None

_BACKWARD = ("dH_pre", "dH_post", "dH_res", "H_pre", "dh", *Saved._fields, "partial")


class _Libraries(NamedTuple):
    """What is the same in every call for streams of a dtype and a variant."""

    site: ctypes.CDLL
    compute: torch.dtype
    columns: int
    forward: ctypes.c_void_p | None
    backward: ctypes.c_void_p | None


class _Site:
    """Sizes, dtypes and libraries of one call; makes pointers of tensors that fit, only of them."""

    def __init__(self, X: Tensor, variant: Variant | None = None) -> None:
        self.T, self.n, self.C = T, n, C = X.shape
        self.dtype = X.dtype
        self.library, self.compute, self.columns, self.forward, self.backward = _libraries(
            n, X.dtype, variant
        )
        streams, branch, row, matrix = (T, n, C), (T, C), (T, n), (T, n, n)
        columns = self.columns
        self.shapes: dict[str, tuple[int, ...]] = {
            "X": streams, "partial": streams, "f": branch, "dh": branch,
            "H_pre": row, "H_post": row, "H_res": matrix,
            "dH_pre": row, "dH_post": row, "dH_res": matrix,
            "phi": (n * C, columns), "alpha": (3,), "bias": (columns,),
            "y": (T, columns), "inv_r": (T,),
        }  # fmt: skip

    def pointers(self, names: Sequence[str], tensors: Sequence[Tensor | None]) -> list[_Pointer]:
        """To tensors of the shapes and dtypes of their names; None of None."""
        found: list[_Pointer] = []
        for name, t in zip(names, tensors, strict=True):
            if t is None:
                found.append(None)
                continue
            dtype = self.dtype if name in WITH_CHANNELS else self.compute
            fits = t.dtype is dtype and t.shape == self.shapes[name] and t.is_contiguous()
            if not fits or t.device.type != "cpu":
                raise ValueError(
                    f"the C++ kernels need a contiguous CPU tensor {list(self.shapes[name])} of "
                    f"{dtype} here, got {list(t.shape)} of {t.dtype}, strides {t.stride()}, on "
                    f"{t.device}"
                )
            found.append(t.data_ptr())
        return found

    def call(self, name: str, *arguments: object) -> None:
        getattr(self.library, name)(torch.get_num_threads(), self.T, self.C, *arguments)


def _like(tensors: Sequence[Tensor]) -> Gradients:
    return tuple(map(torch.empty_like, tensors))  # type: ignore[return-value]


def _forward(
    site: _Site, mapping: Mapping, eps: float, h: Tensor | None = None, closed: Closed | None = None
) -> Coefficients:
    """The coefficients from X, with h = H_pre X into `h`; X is made first of what was closed."""
    columns, K = site.columns, site.compute
    X, *parameters = site.pointers(Mapping._fields, mapping)
    before = (None,) * 4 if closed is None else site.pointers(Closed._fields, closed)
    names = "H_pre", "H_post", "H_res", "y", "inv_r"
    results = [torch.empty(site.shapes[name], dtype=K) for name in names]
    workspace = torch.empty(site.library.forward_workspace(site.C, columns), dtype=K)
    site.call(
        "site_forward",
        columns,
        site.forward,
        eps,
        *parameters,
        workspace.data_ptr(),
        *before,
        X,
        None if h is None else h.data_ptr(),
        *map(Tensor.data_ptr, results),
    )
    return tuple(results)  # type: ignore[return-value]


def _backward(
    site: _Site,
    grads: Sequence[Tensor | None],
    saved: Saved,
    partial: Tensor | None,
    dX: Tensor,
    closed: Closed | None = None,
    behind: tuple[_Pointer, ...] = (None,) * 3,
) -> Triple:
    """dφ, dα, db; writes dX, which with `closed` is the gradient of the X in there.

    Args:
        grads: dH_pre, dH_post, dH_res, H_pre, dh, the first or the last two None: dH_pre, or what
            to get it from.
        closed: what the post_res of a seam read.
        behind: where the gradients of H_res, H_post and f in there go.
    """
    inputs = site.pointers(_BACKWARD, (*grads, *saved, partial))
    before = (None,) * 4 if closed is None else site.pointers(Closed._fields, closed)
    results = tuple(map(torch.empty_like, saved[1:4]))
    size = site.library.backward_workspace(
        torch.get_num_threads(), site.T, site.C, site.columns, closed is not None
    )
    workspace = torch.empty(size, dtype=site.compute)
    site.call(
        "site_backward",
        site.columns,
        site.backward,
        *inputs,
        workspace.data_ptr(),
        *before,
        dX.data_ptr(),
        *map(Tensor.data_ptr, results),
        *behind,
    )
    return results  # type: ignore[return-value]


@functools.cache
def _libraries(n: int, dtype: torch.dtype, variant: Variant | None) -> _Libraries:
    compute = compute_dtype(dtype)
    site = _needed(_site(n, dtype))
    if variant is None:
        return _Libraries(site, compute, 0, None, None)
    chain = _needed(_chain(variant, n, compute))
    forward, backward = (
        ctypes.cast(function, ctypes.c_void_p)
        for function in (chain.chain_forward, chain.chain_backward)
    )
    return _Libraries(site, compute, sum(variant.columns(n)), forward, backward)


def _needed(library: ctypes.CDLL | None) -> ctypes.CDLL:
    if library is None:
        raise RuntimeError("the C++ kernels could not be built; see cpu.supports")
    return library


@functools.cache
def _site(n: int, dtype: torch.dtype) -> ctypes.CDLL | None:
    library = native.load(codegen_cpp.site_source(n, dtype))
    if library is not None:
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_PARAMETERS[letter] for letter in signature]
            function.restype = ctypes.c_int64 if name.endswith("_workspace") else None
    return library


@functools.cache
def _chain(variant: Variant, n: int, compute: torch.dtype) -> ctypes.CDLL | None:
    return native.load(codegen_cpp.chain_source(variant, n, compute))
