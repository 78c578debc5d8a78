// x⃗ φ and the squared norm of x⃗: [tokens, nC] × [nC, columns], a matrix product of few columns.
#pragma once

#include "ahead.h"

// Rows of x⃗ φ whose sums are held in registers together, and vectors of columns of each.
constexpr int ROWS = REGISTERS == 32 ? 8 : 4;
constexpr int VECTORS = 3;

// Elements of x⃗ summed up in registers before they are added to what came before: a sum of sums,
// more exact than one long sum. Part of the result's definition: never a function of the machine.
constexpr int DEPTH = 256;

// Steps of a product between two calls of Lines::ask.
constexpr int PACE = 8;

// out[r, :] += Σ_s A[r · A_ROW + s · A_STEP] · B[s, :]  for `depth` steps; `columns` of the sums
// are stored. B has whole vectors of columns.
template <int ROWS_, int VECTORS_, int A_ROW, int A_STEP>
static void multiply(const K *A, const K *B, int64_t B_stride, int64_t depth, K *out,
                     int64_t out_stride, int columns, Lines lines) {
    VC acc[ROWS_][VECTORS_];
    UNROLL
    for (int r = 0; r < ROWS_; ++r)
        for (int v = 0; v < VECTORS_; ++v) acc[r][v] = VC{};
    for (int64_t s = 0; s < depth; ++s) {
        if (s % PACE == 0) lines.ask();
        VC b[VECTORS_];
        for (int v = 0; v < VECTORS_; ++v) b[v] = load_as<VC>(B + s * B_stride + v * CW);
        for (int r = 0; r < ROWS_; ++r)
            for (int v = 0; v < VECTORS_; ++v)
                acc[r][v] = fma(A[r * A_ROW + s * A_STEP], b[v], acc[r][v]);
    }
    const bool whole = columns >= VECTORS_ * CW;
    UNROLL
    for (int r = 0; r < ROWS_; ++r) {
        UNROLL
        for (int v = 0; v < VECTORS_; ++v) {
            K *place = out + r * out_stride + v * CW;
            if (whole || v + 1 < VECTORS_) {
                const VC total = load_as<VC>(place) + acc[r][v];
                __builtin_memcpy(place, &total, sizeof total);
            } else {
                K lanes[CW];  // a copy: acc itself is to stay in registers
                __builtin_memcpy(lanes, &acc[r][v], sizeof lanes);
                for (int l = 0; l < columns - v * CW; ++l) place[l] += lanes[l];
            }
        }
    }
}

// Calls of Lines::ask by a product of this size.
static int64_t asks_of(int64_t rows, int64_t depth, int columns) {
    const int64_t parts_of_columns = (columns + VECTORS * CW - 1) / (VECTORS * CW);
    return (rows + ROWS - 1) / ROWS * parts_of_columns * ((depth + PACE - 1) / PACE);
}

// The same for any number of rows and columns. Every element of `out` is summed in one order,
// whichever rows and columns are computed beside it. `next` gives the lines of some calls of ask.
template <int A_ROW, int A_STEP, class Next>
static void multiply_all(const K *A, int64_t rows, const K *B, int64_t B_stride, int64_t depth,
                         K *out, int64_t out_stride, int columns, Next next) {
    for (int column = 0; column < columns; column += VECTORS * CW) {
        const int rest = columns - column;
        const int vectors = int(smaller((rest + CW - 1) / CW, VECTORS));
        int64_t r = 0;
        const auto some = [&](auto count, int64_t r) LAMBDA {
            constexpr int R = decltype(count)::value;
            const auto product = vectors == 3   ? multiply<R, 3, A_ROW, A_STEP>
                                 : vectors == 2 ? multiply<R, 2, A_ROW, A_STEP>
                                                : multiply<R, 1, A_ROW, A_STEP>;
            product(A + r * A_ROW, B + column, B_stride, depth, out + r * out_stride + column,
                    out_stride, rest, next((depth + PACE - 1) / PACE));
        };
        for (; r + ROWS <= rows; r += ROWS) some(Count<ROWS>{}, r);
        for (; r < rows; ++r) some(Count<1>{}, r);
    }
}

// `depth` elements of x⃗ as K, zeros behind them up to a whole vector.
static void load_part(const Stream *x, int64_t depth, K *part) {
    over_channels(0, depth, [&](int64_t c, auto width) LAMBDA {
        store(part + c, load(x + c, width), Full{});
    });
}

// The same, and returns the sum of squares.
static K load_and_square(const Stream *x, int64_t depth, K *part) {
    V squares{};
    over_channels(0, depth, [&](int64_t c, auto width) LAMBDA {
        const V v = load(x + c, width);
        squares = fma(v, v, squares);
        store(part + c, v, Full{});
    });
    return sum(squares);
}

// φ with rows of whole vectors: φ itself where its number of columns allows.
struct Phi {
    const K *rows;
    int64_t stride;
    int columns;
};

// y [tokens, columns] and inv_r [tokens] of X [tokens, width].
static void project(const Stream *X, int64_t tokens, int64_t width, Phi phi, K eps, K *y,
                    K *inv_r, Ahead &ahead) {
    alignas(64) K part[ROWS * DEPTH];
    const auto next = [&](int64_t calls) { return ahead.next(calls); };
    for (int64_t k = 0; k < tokens * phi.columns; ++k) y[k] = 0;
    for (int64_t t = 0; t < tokens; ++t) inv_r[t] = 0;  // holds the squared norm until the end
    for (int64_t k = 0; k < width; k += DEPTH) {
        const int64_t depth = smaller(DEPTH, width - k);
        for (int64_t t = 0; t < tokens; t += ROWS) {
            const int64_t rows = smaller(ROWS, tokens - t);
            for (int64_t r = 0; r < rows; ++r)
                inv_r[t + r] += load_and_square(X + (t + r) * width + k, depth, part + r * DEPTH);
            multiply_all<DEPTH, 1>(part, rows, phi.rows + k * phi.stride, phi.stride, depth,
                                   y + t * phi.columns, phi.columns, phi.columns, next);
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        const K mean = inv_r[t] / K(width) + eps;
        inv_r[t] = K(1) / (sizeof(K) == 8 ? K(sqrt(mean)) : K(sqrtf(mean)));
    }
}
