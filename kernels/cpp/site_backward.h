// Backwards that give gradients to φ, α and b: of the coefficients, with pre, and of a seam.
//
// Tokens are taken in chunks whose X stays in the cache. Within a chunk, first by tokens: the
// gradients of H_pre and through the chain to dy, the gradient of x⃗ φ. Then by channels: dX, and
// dφ, which every thread sums over the tokens of its own channels. So dφ needs no partial sums, and
// its order of summation does not depend on the number of threads.
#pragma once

#include "site.h"

typedef void ChainBackward(int64_t tokens, int64_t width, const K *dH_pre, const K *dH_post,
                           const K *dH_res, const K *y, const K *inv_r, const K *alpha,
                           const K *bias, int64_t stride, K *dy, K *dx_factor, K *dbias, K *dalpha);

// Channels of one stream that are worked on together, and tokens.
constexpr int UNIT = 128;
constexpr int GROUP = 16;

// Tokens whose sums of dφ are made apart and added in order. Never a function of the threads.
static int64_t chunk_of(int64_t width) {
    constexpr int64_t BYTES = 4 << 20;
    const int64_t tokens = BYTES / (width * int64_t(sizeof(Stream))) / GROUP * GROUP;
    return tokens < GROUP ? GROUP : smaller(tokens, 256);
}

// Where the parts of the workspace lie.
struct Workspace {
    K *phi_T;   // [units, columns, UNIT]: φ by columns
    K *dH_pre;  // the rest for the tokens of a chunk: [chunk, N]
    K *dy;      // [chunk, stride]
    K *factor;  // [chunk], of X in its gradient through r
    K *dbias;   // [chunk, columns]
    K *dalpha;  // [chunk, 3]
    K *dX2;     // [chunk, N C], of a seam only
    int64_t size;
};

static Workspace layout(K *start, int64_t C, int columns, bool seam) {
    const int64_t chunk = chunk_of(N * C), units = N * ((C + UNIT - 1) / UNIT);
    int64_t size = 0;
    const auto part = [&](int64_t count) {
        K *place = start + size;
        size += round_up(count, 64 / int64_t(sizeof(K)));
        return place;
    };
    Workspace w;
    w.phi_T = part(units * columns * UNIT);
    w.dH_pre = part(chunk * N);
    w.dy = part(chunk * round_up(columns, CW));
    w.factor = part(chunk);
    w.dbias = part(chunk * columns);
    w.dalpha = part(chunk * 3);
    w.dX2 = part(seam ? chunk * N * C : 0);
    w.size = size;
    return w;
}

extern "C" int64_t backward_workspace(int64_t C, int columns, int seam) {
    return layout(nullptr, C, columns, seam != 0).size;
}

// Channels [begin, end) of stream i, whose first element in x⃗ is `first`.
struct Unit {
    int64_t index, i, begin, end, first;

    Unit(int64_t index, int64_t C) : index(index) {
        const int64_t per_stream = (C + UNIT - 1) / UNIT;
        i = index / per_stream;
        begin = index % per_stream * UNIT;
        end = smaller(begin + UNIT, C);
        first = i * C + begin;
    }
};

static void transpose(const K *phi, int columns, const Unit &unit, K *phi_T) {
    for (int j = 0; j < columns; ++j)
        for (int64_t c = 0; c < UNIT; ++c)
            phi_T[j * UNIT + c] =
                c < unit.end - unit.begin ? phi[(unit.first + c) * columns + j] : 0;
}

// What dX is made of besides dy φᵀ, for a group of tokens of one unit.
struct Terms {
    const K *X;             // [GROUP, UNIT]
    const K *factor;        // [tokens]
    const K *H_pre;         // [tokens], of this stream, N apart; null without pre
    const Stream *dh;       // [tokens, C] at the unit's channels
    const Stream *partial;  // [tokens, N C] at the unit's channels, or null
    int64_t C;
};

// dX[t] = factor X + H_pre dh + partial + dy φᵀ for ROWS_ tokens and VECTORS_ vectors of channels.
template <int ROWS_, int VECTORS_, class Gradient, class Width>
INLINE void dX_part(const Terms &terms, int64_t t, int64_t c, const K *dy, int64_t dy_stride,
                    const K *phi_T, int columns, Gradient *dX, Width width) {
    V acc[ROWS_][VECTORS_];
    for (int r = 0; r < ROWS_; ++r)
        for (int v = 0; v < VECTORS_; ++v) {
            const int64_t at = c + v * W;
            V value = terms.factor[t + r] * load_as<V>(terms.X + (t + r) * UNIT + at);
            if (terms.H_pre != nullptr)
                value = fma(terms.H_pre[(t + r) * N],
                            load(terms.dh + (t + r) * terms.C + at, width), value);
            if (terms.partial != nullptr)
                value += load(terms.partial + (t + r) * N * terms.C + at, width);
            acc[r][v] = value;
        }
    for (int j = 0; j < columns; ++j) {
        V b[VECTORS_];
        for (int v = 0; v < VECTORS_; ++v) b[v] = load_as<V>(phi_T + j * UNIT + c + v * W);
        for (int r = 0; r < ROWS_; ++r)
            for (int v = 0; v < VECTORS_; ++v)
                acc[r][v] = fma(dy[(t + r) * dy_stride + j], b[v], acc[r][v]);
    }
    for (int r = 0; r < ROWS_; ++r)
        for (int v = 0; v < VECTORS_; ++v)
            store(dX + (t + r) * N * terms.C + c + v * W, acc[r][v], width);
}

template <class Gradient>
static void dX_of_unit(const Terms &terms, int64_t tokens, int64_t channels, const K *dy,
                       int64_t dy_stride, const K *phi_T, int columns, Gradient *dX) {
    constexpr int TOKENS = 4, VECTORS_ = REGISTERS == 32 ? 4 : 2;
    const auto rows = [&](auto count, int64_t t) LAMBDA {
        constexpr int R = decltype(count)::value;
        int64_t c = 0;
        for (; c + VECTORS_ * W <= channels; c += VECTORS_ * W)
            dX_part<R, VECTORS_>(terms, t, c, dy, dy_stride, phi_T, columns, dX, Full{});
        over_channels(c, channels, [&](int64_t c, auto width) LAMBDA {
            dX_part<R, 1>(terms, t, c, dy, dy_stride, phi_T, columns, dX, width);
        });
    };
    int64_t t = 0;
    for (; t + TOKENS <= tokens; t += TOKENS) rows(Count<TOKENS>{}, t);
    for (; t < tokens; ++t) rows(Count<1>{}, t);
}

struct Backward {
    int64_t C;
    int columns;
    int64_t dy_stride;
    const K *H_pre;         // null without pre
    const Stream *dh, *X, *partial;
    K *dphi;
    Workspace w;
};

// dX and dφ of one unit for `tokens` tokens from `begin`; `dX` is that of the first of them.
template <class Gradient>
static void unit_backward(const Backward &b, const Unit &unit, int64_t begin, int64_t tokens,
                          Gradient *dX) {
    alignas(64) K X[GROUP * UNIT];
    const int64_t C = b.C, width = N * C, channels = unit.end - unit.begin;
    for (int64_t g = 0; g < tokens; g += GROUP) {
        const int64_t group = smaller(GROUP, tokens - g), t = begin + g;
        for (int64_t r = 0; r < group; ++r)
            load_part(b.X + (t + r) * width + unit.first, channels, X + r * UNIT);
        const Terms terms{X,
                          b.w.factor + g,
                          b.H_pre == nullptr ? nullptr : b.H_pre + t * N + unit.i,
                          b.dh + t * C + unit.begin,
                          b.partial == nullptr ? nullptr : b.partial + t * width + unit.first,
                          C};
        const K *dy = b.w.dy + g * b.dy_stride;
        dX_of_unit(terms, group, channels, dy, b.dy_stride,
                   b.w.phi_T + unit.index * b.columns * UNIT, b.columns,
                   dX + g * width + unit.first);
        multiply_all<1, UNIT>(X, channels, dy, b.dy_stride, group,
                              b.dphi + unit.first * b.columns, b.columns, b.columns);
    }
}

// With dh also the backward of pre (dH_pre is then ⟨dh, X⟩, not an argument); with f also that of
// the post_res that made X, and `dX` is the gradient of X_before.
extern "C" void site_backward(int threads, int64_t T, int64_t C, int columns, ChainBackward *chain,
                              const K *dH_pre, const K *dH_post, const K *dH_res, const K *H_pre,
                              const Stream *dh, const Stream *X, const K *phi, const K *alpha,
                              const K *bias, const K *y, const K *inv_r, const Stream *partial,
                              K *workspace, const K *H_res_before, const K *H_post_before,
                              const Stream *X_before, const Stream *f, Stream *dX, K *dphi,
                              K *dalpha, K *dbias, K *dH_res_before, K *dH_post_before,
                              Stream *df) {
    const int64_t width = N * C, chunk = chunk_of(width);
    const int64_t units = N * ((C + UNIT - 1) / UNIT), stride = round_up(columns, CW);
    const Workspace w = layout(workspace, C, columns, f != nullptr);
    const Backward b{C, columns, stride, dh == nullptr ? nullptr : H_pre, dh, X, partial, dphi, w};
    Array<double> sums(columns + 3);  // of dbias and dalpha
    for (int k = 0; k < columns + 3; ++k) sums[k] = 0;
    for (int64_t k = 0; k < chunk * stride; ++k) w.dy[k] = 0;  // its padding stays 0

    threads = threads_for(T * width, threads);
    PRAGMA(omp parallel num_threads(threads))
    {
        PRAGMA(omp for schedule(static))
        for (int64_t u = 0; u < units; ++u) {
            const Unit unit(u, C);
            transpose(phi, columns, unit, w.phi_T + u * columns * UNIT);
            const int64_t last = unit.first + unit.end - unit.begin;
            for (int64_t k = unit.first * columns; k < last * columns; ++k) dphi[k] = 0;
        }
        for (int64_t begin = 0; begin < T; begin += chunk) {
            const int64_t tokens = smaller(chunk, T - begin);
            PRAGMA(omp for schedule(static))
            for (int64_t g = 0; g < tokens; g += W) {
                const int64_t t = begin + g, count = smaller(W, tokens - g);
                const K *d = dH_pre + t * N;
                if (dh != nullptr) {
                    for (int64_t l = 0; l < count; ++l)
                        pre_dots_row(dh + (t + l) * C, X + (t + l) * width, w.dH_pre + (g + l) * N,
                                     C);
                    d = w.dH_pre + g * N;
                }
                chain(count, width, d, dH_post + t * N, dH_res + t * N * N, y + t * columns,
                      inv_r + t, alpha, bias, stride, w.dy + g * stride, w.factor + g,
                      w.dbias + g * columns, w.dalpha + g * 3);
            }
            PRAGMA(omp master)
            for (int64_t g = 0; g < tokens; ++g) {
                for (int k = 0; k < columns; ++k) sums[k] += w.dbias[g * columns + k];
                for (int k = 0; k < 3; ++k) sums[columns + k] += w.dalpha[g * 3 + k];
            }
            PRAGMA(omp for schedule(static))
            for (int64_t u = 0; u < units; ++u) {
                const Unit unit(u, C);
                if (f == nullptr)
                    unit_backward(b, unit, begin, tokens, dX + begin * width);
                else
                    unit_backward(b, unit, begin, tokens, w.dX2);
            }
            if (f != nullptr) {
                PRAGMA(omp for schedule(static))
                for (int64_t g = 0; g < tokens; ++g) {
                    const int64_t t = begin + g;
                    post_res_backward_row(w.dX2 + g * width, H_res_before + t * N * N,
                                          H_post_before + t * N, X_before + t * width, f + t * C,
                                          dH_res_before + t * N * N, dH_post_before + t * N,
                                          dX + t * width, df + t * C, C);
                }
            }
        }
    }
    for (int k = 0; k < columns; ++k) dbias[k] = K(sums[k]);
    for (int k = 0; k < 3; ++k) dalpha[k] = K(sums[columns + k]);
}
