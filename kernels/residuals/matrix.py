"""Residuals whose numbers H̃_res are a matrix: `[out, in]`, or `[in, out]` if transposed."""

from dataclasses import dataclass

from torch import Tensor

from .residual import Chain, Residual, Text

TRITON_GRADIENT = "    d = tl.load(dH_res + at_H, here, other=0.0)"


@dataclass(frozen=True)
class Matrix(Residual):
    transposed: bool = False

    def columns(self, n: int) -> int:
        return n * n

    def matrix(self, x: Tensor, n: int) -> Tensor:
        """The numbers `[..., n * n]` as `[..., out, in]`."""
        matrix = x.unflatten(-1, (n, n))
        return matrix.transpose(-1, -2) if self.transposed else matrix

    def numbers(self, matrix: Tensor) -> Tensor:
        """The numbers `[..., n * n]` of a matrix `[..., out, in]`."""
        return (matrix.mT if self.transposed else matrix).flatten(-2)

    @property
    def cpp_place(self) -> str:
        """In C++, where the numbers have element [i][j]."""
        return "j * N + i" if self.transposed else "i * N + j"

    def triton_matrix(
        self, chain: Chain, make: str, unmake: str, helpers: tuple[str, ...] = ()
    ) -> Text:
        """`make` turns h into H; `unmake` makes d, the gradient of h, from h and dH_res."""
        n, first = chain.n, chain.first
        out_in, in_out = f"k[:, None] * {n} + k[None, :]", f"k[None, :] * {n} + k[:, None]"
        load = f"""
    # H̃_res: [out, in, token]
    entry = {in_out + "  # as φ has them: [in, out]" if self.transposed else out_in}
    real = (k[:, None] < {n}) & (k[None, :] < {n})
    here = inside[None, None, :]{chain.if_padded(" & real[:, :, None]")}
    at = token[None, None, :] * {chain.columns} + {first} + entry[:, :, None]
    at_H = token[None, None, :] * {n * n} + ({out_in})[:, :, None]
    bias_res = tl.load(bias + {first} + entry, real, other=0.0)[:, :, None]"""
        forward = f"""{load}
    x = mapped(y_parts, y, at, here, size, inv[None, None, :], SPLITS)
    h = tl.load(alpha + 2) * x + bias_res
{make}
    tl.store(H_res + at_H, H, here)"""
        backward = f"""{load}
    x = inner(tl.load(y + at, here, other=0.0) * inv[None, None, :])
    h = tl.load(alpha + 2) * x + bias_res
{unmake}
    # y is read again (volatile): registers are few in between.
    y_res = tl.load(y + at, here, other=0.0, volatile=True)
    x = inner(y_res * inv[None, None, :])
    tl.store(sums + {first} + entry, tl.sum(d, 2), real)
    tl.store(sums + {chain.columns + first} + entry, tl.sum(d * x, 2), real)
    d = tl.load(alpha + 2) * d{chain.inner_gradient}
    tl.store(dy + at, d * inv[None, None, :], here)
    along += tl.sum(tl.sum(d * y_res, 0), 0)"""
        return Text(forward, backward, helpers)
