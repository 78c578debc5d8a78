"""C++ for CPUs, emitted from the description of a variant.

Two kinds of libraries come from here, both with a plain C interface on raw pointers:

    chain_source(variant, n, dtype)   y, inv_r -> H_pre, H_post, H_res of some tokens, and its exact
                                      backward: everything that one variant does differently
    site_source(n, dtype)             projection, pre, post_res, seam and their backwards, which
                                      call a chain through a function pointer

The chain works on one token per vector lane; its text holds the numbers of the variant and n, and
the fixed parts (vectors, exp, Sinkhorn's normalisations, the kernels of a site) lie in *.h; what
makes H_res lies in residuals/.
"""

import json

import torch

from ..residuals.residual import check_integer, cpp_number
from ..variants import Gate, Variant

STREAM_DTYPES = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "FLOAT64",
}
"""Streams that the C++ takes, and what its headers call them."""


def site_source(n: int, dtype: torch.dtype) -> str:
    """C++ of everything about a site of n streams that does not depend on the variant."""
    check_integer("n", n)
    return (
        f"// A site with {n} streams. Written by kernels/cpu/codegen.py.\n"
        f"#define STREAM_{STREAM_DTYPES[dtype]}\n"
        f"#define STREAMS {n}\n"
        f'#include "site.h"\n'
        f'#include "site_backward.h"\n'
    )


def chain_source(variant: Variant, n: int, dtype: torch.dtype) -> str:
    """C++ of H̃ -> coefficients and its backward for one variant and n.

    Args:
        variant: its numbers are written into the text; its name appears in a comment only.
        n: streams.
        dtype: float32 or float64, the compute dtype.

    Raises:
        ValueError: if the variant cannot have n streams.
    """
    variant.check(n)
    columns = variant.columns(n)
    residual = variant.res.cpp(n)
    return _CHAIN.format(
        title=json.dumps(variant.name),
        n=n,
        stream=STREAM_DTYPES[dtype],
        columns=sum(columns),
        inner="tanh(z)" if variant.inner == "tanh" else "z",
        inner_backward="du * (K(1) - u * u)" if variant.inner == "tanh" else "du",
        pre=_gate(variant.pre),
        pre_backward=_gate_backward(variant.pre),
        post=_gate(variant.post),
        post_backward=_gate_backward(variant.post),
        helpers="".join(residual.helpers),
        residual=residual.forward,
        residual_backward=residual.backward,
    )


def _gate(gate: Gate) -> str:
    text = "sigmoid(x)" if gate.function == "sigmoid" else "x"
    text = text if gate.scale == 1 else f"{cpp_number(gate.scale)} * {text}"
    return text if gate.offset == 0 else f"{text} + {cpp_number(gate.offset)}"


def _gate_backward(gate: Gate) -> str:
    scaled = "dH" if gate.scale == 1 else f"{cpp_number(gate.scale)} * dH"
    if gate.function == "linear":
        return f"return {scaled};"
    return f"const V s = sigmoid(x);\n    return {scaled} * s * (K(1) - s);"


_CHAIN = """\
// From the numbers H̃ of a token to its coefficients: variant {title}, n = {n}.
// Written by kernels/cpu/codegen.py. Every lane of a vector is a token.
#define STREAM_{stream}
#include "lanes.h"

namespace {{

constexpr int N = {n};
constexpr int COLUMNS = {columns};  // pre | post | res

constexpr int group(int column) {{ return column < N ? 0 : column < 2 * N ? 1 : 2; }}
{helpers}
INLINE V gate_pre(V x) {{ return {pre}; }}

INLINE V gate_post(V x) {{ return {post}; }}

// From x and the gradient of the gate to that of x.
INLINE V gate_pre_backward([[maybe_unused]] V x, V dH) {{
    {pre_backward}
}}

INLINE V gate_post_backward([[maybe_unused]] V x, V dH) {{
    {post_backward}
}}

INLINE V inner(V z) {{ return {inner}; }}

// From u = inner(z) and its gradient to that of z.
INLINE V inner_backward([[maybe_unused]] V u, V du) {{ return {inner_backward}; }}

// From x = H̃ to the coefficients.
void forward(const V (&x)[COLUMNS], V (&H_pre)[N], V (&H_post)[N], V (&H_res)[N][N]) {{
    for (int i = 0; i < N; ++i) H_pre[i] = gate_pre(x[i]);
    for (int i = 0; i < N; ++i) H_post[i] = gate_post(x[N + i]);
{residual}
}}

// dx, the gradient of x = H̃; what it needs is computed again. dH_res is used as workspace.
void backward(const V (&x)[COLUMNS], const V (&dH_pre)[N], const V (&dH_post)[N],
              [[maybe_unused]] V (&dH_res)[N][N], V (&dx)[COLUMNS]) {{
    for (int i = 0; i < N; ++i) dx[i] = gate_pre_backward(x[i], dH_pre[i]);
    for (int i = 0; i < N; ++i) dx[N + i] = gate_post_backward(x[N + i], dH_post[i]);
{residual_backward}
}}

// z = y / r, u = inner(z), x = H̃ = α u + b of the tokens of one vector.
INLINE void numbers(const K *y, const K *inv_r, const K *alpha, const K *bias, int tokens,
                    V (&z)[COLUMNS], V (&u)[COLUMNS], V (&x)[COLUMNS]) {{
    const V scale = gather(inv_r, 1, tokens);
    for (int k = 0; k < COLUMNS; ++k) {{
        z[k] = gather(y + k, COLUMNS, tokens) * scale;
        u[k] = inner(z[k]);
        x[k] = fma(alpha[group(k)], u[k], splat<V>(bias[k]));
    }}
}}

}}  // namespace

// y [tokens, COLUMNS], inv_r [tokens] -> H_pre, H_post [tokens, N], H_res [tokens, N, N]
extern "C" void chain_forward(int64_t tokens, const K *y, const K *inv_r, const K *alpha,
                              const K *bias, K *H_pre, K *H_post, K *H_res) {{
    for (int64_t t = 0; t < tokens; t += W) {{
        const int lanes = int(smaller(W, tokens - t));
        V z[COLUMNS], u[COLUMNS], x[COLUMNS], pre[N], post[N], res[N][N];
        numbers(y + t * COLUMNS, inv_r + t, alpha, bias, lanes, z, u, x);
        forward(x, pre, post, res);
        for (int i = 0; i < N; ++i) {{
            scatter(H_pre + t * N + i, N, lanes, pre[i]);
            scatter(H_post + t * N + i, N, lanes, post[i]);
            for (int j = 0; j < N; ++j)
                scatter(H_res + (t * N + i) * N + j, N * N, lanes, res[i][j]);
        }}
    }}
}}

// Gradients of the coefficients -> what the state, φ, α and b need of them, token by token:
// dy [tokens, stride]   gradient of x⃗ φ
// dx_factor [tokens]    the gradient of x⃗ through r is this factor times x⃗ (width numbers)
// dbias [tokens, COLUMNS], dalpha [tokens, 3]: the terms of the sums over tokens
extern "C" void chain_backward(int64_t tokens, int64_t width, const K *dH_pre, const K *dH_post,
                               const K *dH_res, const K *y, const K *inv_r, const K *alpha,
                               const K *bias, int64_t stride, K *dy, K *dx_factor, K *dbias,
                               K *dalpha) {{
    for (int64_t t = 0; t < tokens; t += W) {{
        const int lanes = int(smaller(W, tokens - t));
        V z[COLUMNS], u[COLUMNS], x[COLUMNS], dx[COLUMNS], dpre[N], dpost[N], dres[N][N];
        numbers(y + t * COLUMNS, inv_r + t, alpha, bias, lanes, z, u, x);
        for (int i = 0; i < N; ++i) {{
            dpre[i] = gather(dH_pre + t * N + i, N, lanes);
            dpost[i] = gather(dH_post + t * N + i, N, lanes);
            for (int j = 0; j < N; ++j)
                dres[i][j] = gather(dH_res + (t * N + i) * N + j, N * N, lanes);
        }}
        backward(x, dpre, dpost, dres, dx);

        const V scale = gather(inv_r + t, 1, lanes);
        V through_r{{}}, dalpha_of[3] = {{}};
        for (int k = 0; k < COLUMNS; ++k) {{
            const V dz = inner_backward(u[k], dx[k] * alpha[group(k)]);
            through_r = fma(dz, z[k], through_r);
            dalpha_of[group(k)] = fma(dx[k], u[k], dalpha_of[group(k)]);
            scatter(dy + t * stride + k, stride, lanes, dz * scale);
            scatter(dbias + t * COLUMNS + k, COLUMNS, lanes, dx[k]);
        }}
        // d(1 / r) / dx⃗ = -x⃗ / (r³ width), and z = y / r
        scatter(dx_factor + t, 1, lanes, -through_r * scale * scale / K(width));
        for (int g = 0; g < 3; ++g) scatter(dalpha + t * 3 + g, 3, lanes, dalpha_of[g]);
    }}
}}
"""
