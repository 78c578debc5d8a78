"""C++ for CPUs, emitted from the description of a variant.

Two kinds of libraries come from here, both with a plain C interface on raw pointers:

    chain_source(variant, n, dtype)   y, inv_r -> H_pre, H_post, H_res of some tokens, and its exact
                                      backward: everything that one variant does differently
    site_source(n, dtype)             projection, pre, post_res, seam and their backwards, which
                                      call a chain through a function pointer

The chain works on one token per vector lane; its text holds the numbers of the variant and n, and
the fixed parts (vectors, exp, Sinkhorn's normalisations, the kernels of a site) lie in cpp/*.h.
"""

import itertools
import json
import math

import torch

from ..variants import Gate, Variant

STREAM_DTYPES = {
    torch.float32: "FLOAT32",
    torch.bfloat16: "BFLOAT16",
    torch.float64: "FLOAT64",
}
"""Streams that the C++ takes, and what its headers call them."""


def site_source(n: int, dtype: torch.dtype) -> str:
    """C++ of everything about a site of n streams that does not depend on the variant."""
    _check_number("n", n)
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
    residual = _RESIDUALS[variant.residual](variant, n)
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
        **residual,
    )


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an int, got {value!r}")


def _number(value: float) -> str:
    """A constant of the compute type."""
    if not math.isfinite(value):
        raise ValueError(f"a variant holds finite numbers only, got {value!r}")
    return f"K({float(value)!r})"


def _gate(gate: Gate) -> str:
    text = "sigmoid(x)" if gate.function == "sigmoid" else "x"
    text = text if gate.scale == 1 else f"{_number(gate.scale)} * {text}"
    return text if gate.offset == 0 else f"{text} + {_number(gate.offset)}"


def _gate_backward(gate: Gate) -> str:
    scaled = "dH" if gate.scale == 1 else f"{_number(gate.scale)} * dH"
    if gate.function == "linear":
        return f"return {scaled};"
    return f"const V s = sigmoid(x);\n    return {scaled} * s * (K(1) - s);"


def _sinkhorn(variant: Variant, n: int) -> dict[str, str]:
    _check_number("iterations", variant.iterations)
    place = "j * N + i" if variant.transposed else "i * N + j"
    order = "[in, out]" if variant.transposed else "[out, in]"
    if variant.eps:
        start = _START_WITH_EPS
        start_backward = _START_WITH_EPS_BACKWARD
    else:
        start = _START_IN_LOGARITHMS
        start_backward = _START_IN_LOGARITHMS_BACKWARD
    return {
        "helpers": _SINKHORN.format(
            iterations=variant.iterations, eps=_number(variant.eps), start=start
        ),
        "residual": (
            f"    // H̃_res is {order}.\n"
            f"    for (int i = 0; i < N; ++i)\n"
            f"        for (int j = 0; j < N; ++j) H_res[i][j] = x[2 * N + {place}];\n"
            f"    V columns[N][N];\n"
            f"    start(H_res, columns);\n"
            f"    V factor[N];\n"
            f"    for (int k = 0; k < NORMALISATIONS; ++k) normalisation(k, H_res, factor);"
        ),
        "residual_backward": _SINKHORN_BACKWARD.format(place=place, start_backward=start_backward),
    }


def _free(variant: Variant, n: int) -> dict[str, str]:
    place = "j * N + i" if variant.transposed else "i * N + j"
    loops = "    for (int i = 0; i < N; ++i)\n        for (int j = 0; j < N; ++j) "
    return {
        "helpers": "",
        "residual": f"{loops}H_res[i][j] = x[2 * N + {place}];",
        "residual_backward": f"{loops}dx[2 * N + {place}] = dH_res[i][j];",
    }


def _identity(variant: Variant, n: int) -> dict[str, str]:
    return {
        "helpers": "",
        "residual": (
            "    for (int i = 0; i < N; ++i)\n"
            "        for (int j = 0; j < N; ++j) H_res[i][j] = splat<V>(i == j ? 1 : 0);"
        ),
        "residual_backward": "    // No number stands behind H_res.",
    }


def _permutations(variant: Variant, n: int) -> dict[str, str]:
    rows = ", ".join("{" + ", ".join(map(str, p)) + "}" for p in itertools.permutations(range(n)))
    return {
        "helpers": _PERMUTATIONS.format(count=math.factorial(n), rows=rows),
        "residual": _PERMUTATIONS_FORWARD,
        "residual_backward": _PERMUTATIONS_BACKWARD,
    }


def _kronecker(variant: Variant, n: int) -> dict[str, str]:
    return {
        "helpers": _KRONECKER.format(factors=n.bit_length() - 1),
        "residual": _KRONECKER_FORWARD,
        "residual_backward": _KRONECKER_BACKWARD,
    }


_RESIDUALS = {
    "sinkhorn": _sinkhorn,
    "free": _free,
    "identity": _identity,
    "permutations": _permutations,
    "kronecker": _kronecker,
}

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

_SINKHORN = """
// Sinkhorn-Knopp, {iterations} times columns, then rows; rows are the last index.
constexpr int ITERATIONS = {iterations};
constexpr K EPS = {eps};  // added to every sum
{start}
constexpr bool of_columns(int k) {{ return (FIRST == COLUMNS_TO_ONE) == (k % 2 == 0); }}

// The k-th of them; `factor` is what columns or rows were multiplied by.
INLINE void normalisation(int k, V (&M)[N][N], V (&factor)[N]) {{
    if (of_columns(k))
        normalise<COLUMNS_TO_ONE>(M, factor, EPS);
    else
        normalise<ROWS_TO_ONE>(M, factor, EPS);
}}

// A matrix behind each normalisation and the factors of the normalisation.
struct Step {{
    V M[N][N], factor[N];
}};
"""

_START_IN_LOGARITHMS = """
// The first columns and rows are normalised in the log domain, which logits of any size survive;
// after them every sum lies between 1 / N and N.
constexpr Axis FIRST = COLUMNS_TO_ONE;
constexpr int NORMALISATIONS = 2 * ITERATIONS - 2;  // behind the start

// `columns` becomes the matrix with columns of sum 1, M that with rows of sum 1 behind it.
INLINE void start(V (&M)[N][N], V (&columns)[N][N]) {
    softmax_of_columns<true>(M);
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) columns[i][j] = exp(M[i][j]);
        softmax(M[i]);
    }
}
"""

_START_WITH_EPS = """
// DeepSeek-V4's order: softmax over each column, plus eps, in place of exp and the first columns.
constexpr Axis FIRST = ROWS_TO_ONE;
constexpr int NORMALISATIONS = 2 * ITERATIONS - 1;  // behind the start

INLINE void start(V (&M)[N][N], V (&columns)[N][N]) {
    softmax_of_columns<false>(M);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) {
            columns[i][j] = M[i][j];
            M[i][j] += EPS;
        }
}
"""

_START_IN_LOGARITHMS_BACKWARD = """\
    for (int i = 0; i < N; ++i) softmax_backward(first[i], dH_res[i]);"""

_START_WITH_EPS_BACKWARD = """\
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) dH_res[i][j] *= columns[i][j];"""

_SINKHORN_BACKWARD = """\
    // Replay, keeping every step; then backwards through the steps.
    Array<Step> steps(NORMALISATIONS);
    V first[N][N], columns[N][N], M[N][N];
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) first[i][j] = x[2 * N + {place}];
    start(first, columns);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) M[i][j] = first[i][j];
    for (int k = 0; k < NORMALISATIONS; ++k) {{
        normalisation(k, M, steps[k].factor);
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) steps[k].M[i][j] = M[i][j];
    }}
    for (int k = NORMALISATIONS - 1; k >= 0; --k) {{
        if (of_columns(k))
            normalise_backward<COLUMNS_TO_ONE>(steps[k].M, steps[k].factor, dH_res);
        else
            normalise_backward<ROWS_TO_ONE>(steps[k].M, steps[k].factor, dH_res);
    }}
{start_backward}
    softmax_of_columns_backward(columns, dH_res);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) dx[2 * N + {place}] = dH_res[i][j];"""

_PERMUTATIONS = """
// Permutation p has its ones at [i, PERMUTATIONS[p][i]].
constexpr int COUNT = {count};
constexpr int PERMUTATIONS[COUNT][N] = {{{rows}}};
"""

_PERMUTATIONS_FORWARD = """\
    V weight[COUNT];
    for (int p = 0; p < COUNT; ++p) weight[p] = x[2 * N + p];
    softmax(weight);
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) H_res[i][j] = V{};
    for (int p = 0; p < COUNT; ++p)
        for (int i = 0; i < N; ++i) H_res[i][PERMUTATIONS[p][i]] += weight[p];"""

_PERMUTATIONS_BACKWARD = """\
    V weight[COUNT], dweight[COUNT];
    for (int p = 0; p < COUNT; ++p) {
        weight[p] = x[2 * N + p];
        dweight[p] = V{};
        for (int i = 0; i < N; ++i) dweight[p] += dH_res[i][PERMUTATIONS[p][i]];
    }
    softmax(weight);
    softmax_backward(weight, dweight);
    for (int p = 0; p < COUNT; ++p) dx[2 * N + p] = dweight[p];"""

_KRONECKER = """
// U_1 ⊗ … ⊗ U_k with U = [[p, q], [q, p]]: the element [i, j] depends on d = i xor j only, where
// factor f gives its q if its bit of d is set, else its p. The first factor has the highest bit.
constexpr int FACTORS = {factors};

INLINE int exchanged(int d, int f) {{ return (d >> (FACTORS - 1 - f)) & 1; }}

// softmax of the two numbers of every factor
INLINE void factors(const V (&x)[COLUMNS], V (&U)[FACTORS][2]) {{
    for (int f = 0; f < FACTORS; ++f) {{
        U[f][0] = x[2 * N + 2 * f];
        U[f][1] = x[2 * N + 2 * f + 1];
        softmax(U[f]);
    }}
}}

// The product over all factors but one (-1: over all).
INLINE V product(const V (&U)[FACTORS][2], int d, int without) {{
    V result = splat<V>(1);
    for (int f = 0; f < FACTORS; ++f)
        if (f != without) result *= U[f][exchanged(d, f)];
    return result;
}}
"""

_KRONECKER_FORWARD = """\
    V U[FACTORS][2];
    factors(x, U);
    for (int d = 0; d < N; ++d) {
        const V element = product(U, d, -1);
        for (int i = 0; i < N; ++i) H_res[i][i ^ d] = element;
    }"""

_KRONECKER_BACKWARD = """\
    V U[FACTORS][2], dU[FACTORS][2] = {};
    factors(x, U);
    for (int d = 0; d < N; ++d) {
        V total{};
        for (int i = 0; i < N; ++i) total += dH_res[i][i ^ d];
        for (int f = 0; f < FACTORS; ++f)
            dU[f][exchanged(d, f)] = fma(total, product(U, d, f), dU[f][exchanged(d, f)]);
    }
    for (int f = 0; f < FACTORS; ++f) {
        softmax_backward(U[f], dU[f]);
        dx[2 * N + 2 * f] = dU[f][0];
        dx[2 * N + 2 * f + 1] = dU[f][1];
    }"""
