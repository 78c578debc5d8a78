// One token of the operators that work channel by channel. X is [N, C], h and f are [C].
#pragma once

#include "vec.h"

constexpr int N = STREAMS;

// h = H_pre X
static void pre_row(const K *H_pre, const Stream *X, Stream *h, int64_t C) {
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        V sum_of = H_pre[0] * load(X + c, width);
        for (int i = 1; i < N; ++i) sum_of = fma(H_pre[i], load(X + i * C + c, width), sum_of);
        store(h + c, sum_of, width);
    });
}

// dH_pre[i] = ⟨dh, X[i]⟩
static void pre_dots_row(const Stream *dh, const Stream *X, K *dH_pre, int64_t C) {
    V dot[N] = {};
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        const V d = load(dh + c, width);
        for (int i = 0; i < N; ++i) dot[i] = fma(d, load(X + i * C + c, width), dot[i]);
    });
    for (int i = 0; i < N; ++i) dH_pre[i] = sum(dot[i]);
}

// dH_pre as above, and dX[i] = H_pre[i] dh
static void pre_backward_row(const Stream *dh, const K *H_pre, const Stream *X, K *dH_pre,
                             Stream *dX, int64_t C) {
    V dot[N] = {};
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        const V d = load(dh + c, width);
        for (int i = 0; i < N; ++i) {
            dot[i] = fma(d, load(X + i * C + c, width), dot[i]);
            store(dX + i * C + c, H_pre[i] * d, width);
        }
    });
    for (int i = 0; i < N; ++i) dH_pre[i] = sum(dot[i]);
}

// X2[i] = Σ_j H_res[i, j] X[j] + H_post[i] f
static void post_res_row(const K *H_res, const K *H_post, const Stream *X, const Stream *f,
                         Stream *X2, int64_t C) {
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        V x[N];
        for (int j = 0; j < N; ++j) x[j] = load(X + j * C + c, width);
        const V branch = load(f + c, width);
        for (int i = 0; i < N; ++i) {
            V new_stream = H_post[i] * branch;
            for (int j = 0; j < N; ++j) new_stream = fma(H_res[i * N + j], x[j], new_stream);
            store(X2 + i * C + c, new_stream, width);
        }
    });
}

// Rows of dH_res whose dot products fit into registers together.
constexpr int DOT_ROWS = N * (N + 1) <= REGISTERS * 2 / 3  ? N
                         : 2 * (N + 1) <= REGISTERS * 2 / 3 ? 2
                                                            : 1;

// Channels that are read from L1 again for each of these groups of rows.
constexpr int64_t DOT_CHANNELS = 256;

// From the gradient of X2, of the stream type or of K:
//   dX[j] = Σ_i H_res[i, j] dX2[i]      df = Σ_i H_post[i] dX2[i]
//   dH_res[i, j] = ⟨dX2[i], X[j]⟩       dH_post[i] = ⟨dX2[i], f⟩
template <class Gradient>
static void post_res_backward_row(const Gradient *dX2, const K *H_res, const K *H_post,
                                  const Stream *X, const Stream *f, K *dH_res, K *dH_post,
                                  Stream *dX, Stream *df, int64_t C) {
    V dot[N][N + 1];  // with X, with f
    for (int i = 0; i < N; ++i)
        for (int j = 0; j <= N; ++j) dot[i][j] = V{};
    for (int64_t begin = 0; begin < C; begin += DOT_CHANNELS) {
        const int64_t end = smaller(begin + DOT_CHANNELS, C);
        for (int i0 = 0; i0 < N; i0 += DOT_ROWS) {
            V acc[DOT_ROWS][N + 1];
            for (int r = 0; r < DOT_ROWS; ++r)
                for (int j = 0; j <= N; ++j) acc[r][j] = i0 + r < N ? dot[i0 + r][j] : V{};
            over_channels(begin, end, [&](int64_t c, auto width) LAMBDA {
                V d[DOT_ROWS];
                for (int r = 0; r < DOT_ROWS; ++r)
                    d[r] = load(dX2 + (i0 + r < N ? i0 + r : 0) * C + c, width);
                for (int j = 0; j <= N; ++j) {
                    const V x = j < N ? load(X + j * C + c, width) : load(f + c, width);
                    for (int r = 0; r < DOT_ROWS; ++r) acc[r][j] = fma(d[r], x, acc[r][j]);
                }
            });
            for (int r = 0; r < DOT_ROWS && i0 + r < N; ++r)
                for (int j = 0; j <= N; ++j) dot[i0 + r][j] = acc[r][j];
        }
        over_channels(begin, end, [&](int64_t c, auto width) LAMBDA {
            V d[N];
            for (int i = 0; i < N; ++i) d[i] = load(dX2 + i * C + c, width);
            for (int j = 0; j <= N; ++j) {
                V total{};
                for (int i = 0; i < N; ++i)
                    total = fma(j < N ? H_res[i * N + j] : H_post[i], d[i], total);
                store(j < N ? dX + j * C + c : df + c, total, width);
            }
        });
    }
    for (int i = 0; i < N; ++i) {
        for (int j = 0; j < N; ++j) dH_res[i * N + j] = sum(dot[i][j]);
        dH_post[i] = sum(dot[i][N]);
    }
}

// x = factor · Σ_i X[i]
static void readout_row(const Stream *X, K factor, Stream *x, int64_t C) {
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        V total = load(X + c, width);
        for (int i = 1; i < N; ++i) total += load(X + i * C + c, width);
        store(x + c, factor * total, width);
    });
}

// X[i] = factor · x
static void expand_row(const Stream *x, K factor, Stream *X, int64_t C) {
    over_channels(0, C, [&](int64_t c, auto width) LAMBDA {
        const V value = factor * load(x + c, width);
        for (int i = 0; i < N; ++i) store(X + i * C + c, value, width);
    });
}
