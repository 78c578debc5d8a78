// Arithmetic of the coefficient chain: one token per lane of a vector.
#pragma once

#include "vec.h"

// --- tokens to lanes and back -------------------------------------------------------------------

INLINE V gather(const K *p, int64_t stride, int tokens) {
    K lanes[W] = {};
    if (tokens == W)
        for (int l = 0; l < W; ++l) lanes[l] = p[l * stride];
    else
        for (int l = 0; l < tokens; ++l) lanes[l] = p[l * stride];
    return load(lanes, Full{});
}

INLINE void scatter(K *p, int64_t stride, int tokens, V v) {
    K lanes[W];
    store(lanes, v, Full{});
    if (tokens == W)
        for (int l = 0; l < W; ++l) p[l * stride] = lanes[l];
    else
        for (int l = 0; l < tokens; ++l) p[l * stride] = lanes[l];
}

// --- functions ----------------------------------------------------------------------------------

INLINE V power_of_two(V whole) {
#if defined(STREAM_FLOAT64)
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
    return V((__builtin_convertvector(whole, Int) + 1023) << 52);
#else
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    return V((__builtin_convertvector(whole, Int) + 127) << 23);
#endif
}

// exp within about one unit in the last place; inf and 0 beyond the range, NaN for NaN.
static V exp(V x) {
    constexpr bool DOUBLE = sizeof(K) == 8;
    constexpr K LOW = DOUBLE ? -746 : -104, HIGH = DOUBLE ? 710 : 89;
    constexpr K LOG2_E = 1.4426950408889634;
    // ln 2 in two parts: products of the first with whole numbers of this size are exact.
    constexpr K LN_2 = DOUBLE ? 6.93147180369123816490e-01 : 6.93359375e-01;
    constexpr K LN_2_REST = DOUBLE ? 1.90821492927058770002e-10 : -2.12194440054690583e-4;
    constexpr K ROUND = DOUBLE ? 6755399441055744.0 : 12582912.0;  // 1.5 · 2^52 or 1.5 · 2^23
    constexpr int DEGREE = DOUBLE ? 13 : 7;

    x = x < LOW ? splat<V>(LOW) : x;
    x = x > HIGH ? splat<V>(HIGH) : x;
    const V whole = (x * LOG2_E + ROUND) - ROUND;
    V r = fma(-LN_2, whole, x);
    r = fma(-LN_2_REST, whole, r);

    K factor = 1;  // Taylor's series, |r| <= ln 2 / 2
    K coefficient[DEGREE + 1];
    for (int k = 0; k <= DEGREE; ++k, factor /= k) coefficient[k] = factor;
    V p = splat<V>(coefficient[DEGREE]);
    for (int k = DEGREE - 1; k >= 0; --k) p = fma(p, r, splat<V>(coefficient[k]));

    // In two steps: 2^whole itself may be out of range where the product is not.
    const V half = (whole * K(0.5) + ROUND) - ROUND;
    return p * power_of_two(half) * power_of_two(whole - half);
}

static __attribute__((unused)) V log(V x) {
    for (int l = 0; l < W; ++l) x[l] = sizeof(K) == 8 ? K(::log(x[l])) : K(::logf(x[l]));
    return x;
}

static __attribute__((unused)) V tanh(V x) {
    for (int l = 0; l < W; ++l) x[l] = sizeof(K) == 8 ? K(::tanh(x[l])) : K(::tanhf(x[l]));
    return x;
}

INLINE V sigmoid(V x) { return K(1) / (K(1) + exp(-x)); }

// x becomes its softmax over COUNT elements.
template <int COUNT>
INLINE void softmax(V (&x)[COUNT]) {
    V top = x[0], total{};
    for (int k = 1; k < COUNT; ++k) top = larger(top, x[k]);
    for (int k = 0; k < COUNT; ++k) total += x[k] = exp(x[k] - top);
    for (int k = 0; k < COUNT; ++k) x[k] /= total;
}

// d becomes the gradient of the softmax's argument; p is the softmax.
template <int COUNT>
INLINE void softmax_backward(const V (&p)[COUNT], V (&d)[COUNT]) {
    V inner{};
    for (int k = 0; k < COUNT; ++k) inner = fma(p[k], d[k], inner);
    for (int k = 0; k < COUNT; ++k) d[k] = p[k] * (d[k] - inner);
}

// --- Sinkhorn-Knopp -----------------------------------------------------------------------------

enum Axis { COLUMNS_TO_ONE, ROWS_TO_ONE };

// M divided by its sums (plus eps) over one axis, one factor 1 / sum per column or row.
template <Axis AXIS, int N>
INLINE void normalise(V (&M)[N][N], V (&factor)[N], K eps) {
    for (int a = 0; a < N; ++a) {
        V total = AXIS == ROWS_TO_ONE ? M[a][0] : M[0][a];
        for (int b = 1; b < N; ++b) total += AXIS == ROWS_TO_ONE ? M[a][b] : M[b][a];
        factor[a] = K(1) / (total + eps);
    }
    for (int i = 0; i < N; ++i)
        for (int j = 0; j < N; ++j) M[i][j] *= factor[AXIS == ROWS_TO_ONE ? i : j];
}

// M' = M / s, s = sum(M) + eps:  dM = (dM' - sum(dM' · M')) / s.  d is dM' and becomes dM.
template <Axis AXIS, int N>
INLINE void normalise_backward(const V (&M)[N][N], const V (&factor)[N], V (&d)[N][N]) {
    for (int a = 0; a < N; ++a) {
        V inner{};
        for (int b = 0; b < N; ++b)
            inner = AXIS == ROWS_TO_ONE ? fma(d[a][b], M[a][b], inner)
                                        : fma(d[b][a], M[b][a], inner);
        for (int b = 0; b < N; ++b) {
            V &element = AXIS == ROWS_TO_ONE ? d[a][b] : d[b][a];
            element = (element - inner) * factor[a];
        }
    }
}

// M, a softmax over each column: the logarithm of it where LOGARITHM.
template <bool LOGARITHM, int N>
INLINE void softmax_of_columns(V (&M)[N][N]) {
    for (int j = 0; j < N; ++j) {
        V top = M[0][j], total{}, e[N];
        for (int i = 1; i < N; ++i) top = larger(top, M[i][j]);
        for (int i = 0; i < N; ++i) total += e[i] = exp(M[i][j] - top);
        const V subtract = LOGARITHM ? log(total) : V{};
        for (int i = 0; i < N; ++i) M[i][j] = LOGARITHM ? M[i][j] - top - subtract : e[i] / total;
    }
}

template <int N>
INLINE void softmax_of_columns_backward(const V (&p)[N][N], V (&d)[N][N]) {
    for (int j = 0; j < N; ++j) {
        V inner{};
        for (int i = 0; i < N; ++i) inner += d[i][j];
        for (int i = 0; i < N; ++i) d[i][j] = fma(-p[i][j], inner, d[i][j]);
    }
}
