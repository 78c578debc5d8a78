// The operators of a site, forward, for all tokens. Called from Python through ctypes.
//
// Tokens are spread over threads in blocks; what is computed for a token depends on neither.
#pragma once

#include "projection.h"
#include "rows.h"

#ifdef _OPENMP
#include <omp.h>
INLINE int thread_number() { return omp_get_thread_num(); }
#define PRAGMA(text) _Pragma(#text)
#else
INLINE int thread_number() { return 0; }
#define PRAGMA(text)
#endif

typedef void ChainForward(int64_t tokens, const K *y, const K *inv_r, const K *alpha, const K *bias,
                          K *H_pre, K *H_post, K *H_res);

// Threads worth waking for this many elements.
static int threads_for(int64_t elements, int threads) {
    constexpr int64_t ELEMENTS = 16384;
    return int(smaller(threads, 1 + elements / ELEMENTS));
}

#define FOR_TOKENS(tokens, width, threads)                                 \
    const int used = threads_for((tokens) * (width), threads);             \
    PRAGMA(omp parallel for schedule(static) num_threads(used))            \
    for (int64_t t = 0; t < (tokens); ++t)

extern "C" void pre(int threads, int64_t T, int64_t C, const K *H_pre, const Stream *X, Stream *h) {
    FOR_TOKENS(T, N * C, threads) pre_row(H_pre + t * N, X + t * N * C, h + t * C, C);
}

extern "C" void pre_backward(int threads, int64_t T, int64_t C, const Stream *dh, const K *H_pre,
                             const Stream *X, K *dH_pre, Stream *dX) {
    FOR_TOKENS(T, N * C, threads)
    pre_backward_row(dh + t * C, H_pre + t * N, X + t * N * C, dH_pre + t * N, dX + t * N * C, C);
}

extern "C" void post_res(int threads, int64_t T, int64_t C, const K *H_res, const K *H_post,
                         const Stream *X, const Stream *f, Stream *X2) {
    FOR_TOKENS(T, N * C, threads)
    post_res_row(H_res + t * N * N, H_post + t * N, X + t * N * C, f + t * C, X2 + t * N * C, C);
}

extern "C" void post_res_backward(int threads, int64_t T, int64_t C, const Stream *dX2,
                                  const K *H_res, const K *H_post, const Stream *X, const Stream *f,
                                  K *dH_res, K *dH_post, Stream *dX, Stream *df) {
    FOR_TOKENS(T, N * C, threads)
    post_res_backward_row(dX2 + t * N * C, H_res + t * N * N, H_post + t * N, X + t * N * C,
                          f + t * C, dH_res + t * N * N, dH_post + t * N, dX + t * N * C,
                          df + t * C, C);
}

extern "C" void readout(int threads, int64_t T, int64_t C, double factor, const Stream *X,
                        Stream *x) {
    FOR_TOKENS(T, N * C, threads) readout_row(X + t * N * C, K(factor), x + t * C, C);
}

extern "C" void expand(int threads, int64_t T, int64_t C, double factor, const Stream *x,
                       Stream *X) {
    FOR_TOKENS(T, N * C, threads) expand_row(x + t * C, K(factor), X + t * N * C, C);
}

// --- with coefficients --------------------------------------------------------------------------

// Workspace of the forwards in elements of K: φ with rows of whole vectors.
extern "C" int64_t forward_workspace(int64_t C, int columns) {
    return columns % CW == 0 ? 0 : N * C * round_up(columns, CW);
}

static void pad_rows(const K *phi, int64_t rows, int columns, K *padded) {
    const int64_t stride = round_up(columns, CW);
    PRAGMA(omp for schedule(static))
    for (int64_t k = 0; k < rows; ++k)
        for (int64_t j = 0; j < stride; ++j)
            padded[k * stride + j] = j < columns ? phi[k * columns + j] : 0;
}

// Coefficients from X; with h also H_pre X; with f, X is made first from the site before.
// Blocks of tokens are worked on from end to end, so that their X is read again from the cache.
extern "C" void site_forward(int threads, int64_t T, int64_t C, int columns, ChainForward *chain,
                             double eps, const K *phi, const K *alpha, const K *bias, K *workspace,
                             const K *H_res_before, const K *H_post_before, const Stream *X_before,
                             const Stream *f, Stream *X, Stream *h, K *H_pre, K *H_post, K *H_res,
                             K *y, K *inv_r) {
    constexpr int64_t BLOCK = 32;
    if (T == 0) return;
    const int64_t width = N * C;
    threads = threads_for(T * width, threads);
    const int64_t block = smaller(BLOCK, round_up((T + threads - 1) / threads, ROWS));
    const bool padded = columns % CW != 0;
    const Phi rows{padded ? workspace : phi, round_up(columns, CW), columns};
    PRAGMA(omp parallel num_threads(threads))
    {
        if (padded) pad_rows(phi, width, columns, workspace);
        PRAGMA(omp for schedule(static))
        for (int64_t begin = 0; begin < T; begin += block) {
            const int64_t tokens = smaller(block, T - begin), end = begin + tokens;
            if (f != nullptr)
                for (int64_t t = begin; t < end; ++t)
                    post_res_row(H_res_before + t * N * N, H_post_before + t * N,
                                 X_before + t * width, f + t * C, X + t * width, C);
            // The inputs of the next block, and what is written.
            Ahead ahead(asks_of(tokens, width, columns));
            const int64_t next = smaller(block, T - end);
            if (f == nullptr) {
                ahead.to_read(X + end * width, next * width);
            } else {
                ahead.to_write(X + end * width, next * width);
                ahead.to_read(X_before + end * width, next * width);
                ahead.to_read(f + end * C, next * C);
            }
            if (h != nullptr) ahead.to_write(h + begin * C, tokens * C);
            project(X + begin * width, tokens, width, rows, K(eps), y + begin * columns,
                    inv_r + begin, ahead);
            chain(tokens, y + begin * columns, inv_r + begin, alpha, bias, H_pre + begin * N,
                  H_post + begin * N, H_res + begin * N * N);
            if (h != nullptr)
                for (int64_t t = begin; t < end; ++t)
                    pre_row(H_pre + t * N, X + t * width, h + t * C, C);
        }
    }
}
