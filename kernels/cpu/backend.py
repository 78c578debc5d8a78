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

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..variants import Variant
from . import codegen as codegen_cpp
from . import native

MOST_STREAMS = 16

_PARAMETERS = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "l": ctypes.c_int64,
    "d": ctypes.c_double,
}

# Parameters of the functions in cpp/*.h; p: pointer, i: int, l: int64_t, d: double.
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


def coefficients(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, variant: Variant, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """H_pre [T, n], H_post [T, n], H_res [T, n, n], y = x⃗ φ [T, cols] and 1 / r [T]."""
    return _forward(_Site(X, variant), X, phi, alpha, bias, eps)


def coefficients_pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, *, variant: Variant, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h = H_pre X, H_pre, H_post, H_res, y, 1 / r."""
    site = _Site(X, variant)
    h = X.new_empty(site.T, site.C)
    return h, *_forward(site, X, phi, alpha, bias, eps, h=h)


def seam(
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The end of a site and the start of the next.

    Returns:
        X2 = H_res X + H_postᵀ f, and of the next site, from X2: h, H_pre, H_post, H_res, y, 1 / r.
    """
    site = _Site(X, variant)
    X2, h = torch.empty_like(X), X.new_empty(site.T, site.C)
    before = (H_res, H_post, X, f)
    return X2, h, *_forward(site, X2, phi, alpha, bias, eps, h=h, before=before)


def coefficients_backward(
    dH_pre: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dφ, dα, db of `coefficients`."""
    site = _Site(X, variant)
    dX = torch.empty_like(X)
    of_next = site.K(dH_pre, site.T, site.n), None, None
    return dX, *_backward(site, of_next, dH_post, dH_res, X, phi, alpha, bias, y, inv_r, None, dX)


def coefficients_pre_backward(
    dh: Tensor,
    dH_post: Tensor,
    dH_res: Tensor,
    H_pre: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    partial: Tensor | None,
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dX, dφ, dα, db of `coefficients_pre`; `partial`, if given, is added to dX."""
    site = _Site(X, variant)
    dX = torch.empty_like(X)
    of_pre = None, site.K(H_pre, site.T, site.n), site.S(dh, site.T, site.C)
    return dX, *_backward(site, of_pre, dH_post, dH_res, X, phi, alpha, bias, y, inv_r, partial, dX)


def seam_backward(
    dh: Tensor,
    dH_post_next: Tensor,
    dH_res_next: Tensor,
    H_pre_next: Tensor,
    X2: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    partial: Tensor | None,
    H_res: Tensor,
    H_post: Tensor,
    X: Tensor,
    f: Tensor,
    *,
    variant: Variant,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dφ, dα, db, dH_res, dH_post, dX, df of `seam`; `partial` is a further gradient of X2."""
    site = _Site(X, variant)
    T, n, C = site.T, site.n, site.C
    dH_res, dH_post, dX, df = (torch.empty_like(t) for t in (H_res, H_post, X, f))
    of_pre = None, site.K(H_pre_next, T, n), site.S(dh, T, C)
    before = site.before(H_res, H_post, X, f)
    gradients = dH_res.data_ptr(), dH_post.data_ptr(), df.data_ptr()
    parameters = _backward(
        site,
        of_pre,
        dH_post_next,
        dH_res_next,
        X2,
        phi,
        alpha,
        bias,
        y,
        inv_r,
        partial,
        dX,
        before,
        gradients,
    )
    return *parameters, dH_res, dH_post, dX, df


def pre(H_pre: Tensor, X: Tensor) -> Tensor:
    """h = H_pre X, [T, C]."""
    site = _Site(X)
    h = X.new_empty(site.T, site.C)
    site.call("pre", site.K(H_pre, site.T, site.n), site.X(X), h.data_ptr())
    return h


def pre_backward(dh: Tensor, H_pre: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """dH_pre, dX."""
    site = _Site(X)
    T, n, C = site.T, site.n, site.C
    dH_pre, dX = torch.empty_like(H_pre), torch.empty_like(X)
    inputs = site.S(dh, T, C), site.K(H_pre, T, n), site.X(X)
    site.call("pre_backward", *inputs, dH_pre.data_ptr(), dX.data_ptr())
    return dH_pre, dX


def post_res(H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> Tensor:
    """X2 = H_res X + H_postᵀ f, [T, n, C]."""
    site = _Site(X)
    X2 = torch.empty_like(X)
    site.call("post_res", *site.before(H_res, H_post, X, f), X2.data_ptr())
    return X2


def post_res_backward(
    dX2: Tensor, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dH_res, dH_post, dX, df."""
    site = _Site(X)
    dH_res, dH_post, dX, df = (torch.empty_like(t) for t in (H_res, H_post, X, f))
    results = dH_res, dH_post, dX, df
    inputs = site.X(dX2), *site.before(H_res, H_post, X, f)
    site.call("post_res_backward", *inputs, *(t.data_ptr() for t in results))
    return results


def readout(X: Tensor, kind: str) -> Tensor:
    """The mean or sum of the streams, [T, C]."""
    site = _Site(X)
    x = X.new_empty(site.T, site.C)
    site.call("readout", _readout_factor(kind, site.n), site.X(X), x.data_ptr())
    return x


def readout_backward(dx: Tensor, n: int, kind: str) -> Tensor:
    """dX [T, n, C]."""
    return _expand(dx, n, _readout_factor(kind, n))


def expand(x: Tensor, n: int) -> Tensor:
    """n equal streams, [T, n, C]."""
    return _expand(x, n, 1.0)


def expand_backward(dX: Tensor) -> Tensor:
    """dx [T, C], the sum over streams."""
    return readout(dX, "sum")


def _readout_factor(kind: str, n: int) -> float:
    if kind not in ("mean", "sum"):
        raise ValueError(f"readout kind must be 'mean' or 'sum', got {kind!r}")
    return 1.0 / n if kind == "mean" else 1.0


def _expand(x: Tensor, n: int, factor: float) -> Tensor:
    T, C = x.shape
    X = x.new_empty(T, n, C)
    site = _Site(X)
    site.call("expand", factor, site.S(x, T, C), X.data_ptr())
    return X


# --- calls into the libraries -------------------------------------------------------------------

_Pointer = int | None


class _Site:
    """Sizes, dtypes and libraries of one call; makes pointers of tensors that fit, only of them."""

    def __init__(self, X: Tensor, variant: Variant | None = None) -> None:
        self.T, self.n, self.C = X.shape
        self.dtype, self.compute = X.dtype, compute_dtype(X.dtype)
        self.library = _needed(_site(self.n, X.dtype))
        if variant is not None:
            chain = _needed(_chain(variant, self.n, self.compute))
            self.columns = sum(variant.columns(self.n))
            self.chain_forward = ctypes.cast(chain.chain_forward, ctypes.c_void_p)
            self.chain_backward = ctypes.cast(chain.chain_backward, ctypes.c_void_p)

    def S(self, t: Tensor, *shape: int) -> int:
        """Pointer to a tensor of the stream dtype."""
        return _pointer(t, self.dtype, shape)

    def K(self, t: Tensor, *shape: int) -> int:
        """Pointer to a tensor of the compute dtype."""
        return _pointer(t, self.compute, shape)

    def X(self, X: Tensor) -> int:
        return self.S(X, self.T, self.n, self.C)

    def before(self, H_res: Tensor, H_post: Tensor, X: Tensor, f: Tensor) -> tuple[int, ...]:
        T, n = self.T, self.n
        return self.K(H_res, T, n, n), self.K(H_post, T, n), self.X(X), self.S(f, T, self.C)

    def parameters(self, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[int, int, int]:
        rows = self.n * self.C
        columns = self.columns
        return self.K(phi, rows, columns), self.K(alpha, 3), self.K(bias, columns)

    def workspace(self, elements: int) -> Tensor:
        return torch.empty(elements, dtype=self.compute)

    def call(self, name: str, *arguments: object) -> None:
        getattr(self.library, name)(torch.get_num_threads(), self.T, self.C, *arguments)


def _forward(
    site: _Site,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    eps: float,
    *,
    h: Tensor | None = None,
    before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The coefficients from X, with h = H_pre X into `h`; X is made first from what was before."""
    T, n, columns = site.T, site.n, site.columns
    shapes = ((T, n), (T, n), (T, n, n), (T, columns), (T,))
    H_pre, H_post, H_res, y, inv_r = (torch.empty(shape, dtype=site.compute) for shape in shapes)
    results = H_pre, H_post, H_res, y, inv_r
    workspace = site.workspace(site.library.forward_workspace(site.C, columns))
    site.call(
        "site_forward",
        columns,
        site.chain_forward,
        eps,
        *site.parameters(phi, alpha, bias),
        workspace.data_ptr(),
        *(site.before(*before) if before else (None,) * 4),
        site.X(X),
        None if h is None else h.data_ptr(),
        *(t.data_ptr() for t in results),
    )
    return results


def _backward(
    site: _Site,
    of_pre: tuple[_Pointer, _Pointer, _Pointer],
    dH_post: Tensor,
    dH_res: Tensor,
    X: Tensor,
    phi: Tensor,
    alpha: Tensor,
    bias: Tensor,
    y: Tensor,
    inv_r: Tensor,
    partial: Tensor | None,
    dX: Tensor,
    before: tuple[_Pointer, ...] = (None,) * 4,
    before_gradients: tuple[_Pointer, ...] = (None,) * 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """dφ, dα, db; writes dX, which with `before` is the gradient of the X in there.

    Args:
        of_pre: dH_pre, or H_pre and dh to get it from.
        before: what the post_res of a seam read.
        before_gradients: of H_res, H_post and f in there.
    """
    T, n, columns = site.T, site.n, site.columns
    dH_pre, H_pre, dh = of_pre
    results = torch.empty_like(phi), torch.empty_like(alpha), torch.empty_like(bias)
    size = site.library.backward_workspace(
        torch.get_num_threads(), T, site.C, columns, before[0] is not None
    )
    workspace = site.workspace(size)
    site.call(
        "site_backward",
        columns,
        site.chain_backward,
        dH_pre,
        site.K(dH_post, T, n),
        site.K(dH_res, T, n, n),
        H_pre,
        dh,
        site.X(X),
        *site.parameters(phi, alpha, bias),
        site.K(y, T, columns),
        site.K(inv_r, T),
        None if partial is None else site.X(partial),
        workspace.data_ptr(),
        *before,
        dX.data_ptr(),
        *(t.data_ptr() for t in results),
        *before_gradients,
    )
    return results


def _pointer(t: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    if t.dtype != dtype or t.shape != shape or not t.is_contiguous() or t.device.type != "cpu":
        raise ValueError(
            f"the C++ kernels need a contiguous CPU tensor {list(shape)} of {dtype} here, got "
            f"{list(t.shape)} of {t.dtype}, strides {t.stride()}, on {t.device}"
        )
    return t.data_ptr()


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
