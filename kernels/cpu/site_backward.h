// Backwards that give gradients to φ, α and b: of the coefficients, with pre, and of a seam.
//
// Tokens are taken in chunks whose X stays in the cache. Within a chunk, first by groups of tokens,
// from end to end: the gradients of H_pre, through the chain to dy, the gradient of x⃗ φ, then dX,
// and in a seam the post_res before it. Then by channels: dφ, which every thread sums over the
// tokens of its own channels. So its order of summation does not depend on the number of threads.
//
// Sums over tokens are sums of sums: over the tokens of one or some chunks, and then over those with
// what each addition loses kept beside the total. So their error does not grow with the number of
// tokens.
#pragma once

#include "site.h"

typedef void ChainBackward(int64_t tokens, int64_t width, const K *dH_pre, const K *dH_post,
                           const K *dH_res, const K *y, const K *inv_r, const K *alpha,
                           const K *bias, int64_t stride, K *dy, K *dx_factor, K *dbias, K *dalpha);

// Tokens that a thread takes from end to end, and channels of one stream that are worked on
// together.
constexpr int GROUP = 16;
constexpr int UNIT = 64;

// Tokens of one sum of dφ in registers.
constexpr int DEEP = 64;

// Tokens and vectors of channels of dX in registers.
constexpr int dX_TOKENS = 4;
constexpr int dX_VECTORS = REGISTERS == 32 ? 4 : 2;

// Tokens whose sums of dφ are made together; those of the next are added to them. So many that X
// stays in the cache, but enough for the time to read and write dφ. Never a function of the threads.
static int64_t chunk_of(int64_t width) {
    constexpr int64_t BYTES = 4 << 20, FEWEST = 256, MOST = 512;
    const int64_t tokens = BYTES / (width * int64_t(sizeof(Stream))) / GROUP * GROUP;
    return tokens < FEWEST ? FEWEST : smaller(tokens, MOST);
}

// Chunks whose dφ is a plain sum. With more of them, it is moved to an exact total after each so
// many: seldom enough for the time to read and write that.
constexpr int PLAIN = 8;

static bool has_totals(int64_t T, int64_t width) { return T > PLAIN * chunk_of(width); }

// Where the parts of the workspace lie.
struct Workspace {
    K *phi_T;   // [units, columns, UNIT]: φ by columns
    K *total;   // [N C, columns]: dφ of earlier chunks, where there are many
    K *lost;    // [N C, columns]: what it has lost by rounding
    K *dX2;     // [threads, GROUP, N C], of a seam only
    K *dH_pre;  // the rest for the tokens of a chunk: [chunk, N]
    K *dy;      // [chunk, stride]
    K *factor;  // [chunk], of X in its gradient through r
    K *dbias;   // [chunk, columns]
    K *dalpha;  // [chunk, 3]
    int64_t size;
};

static Workspace layout(K *start, int threads, int64_t T, int64_t C, int columns, bool seam) {
    const int64_t chunk = chunk_of(N * C), units = N * ((C + UNIT - 1) / UNIT);
    int64_t size = 0;
    const auto part = [&](int64_t count) {
        K *place = start + size;
        size += round_up(count, 64 / int64_t(sizeof(K)));
        return place;
    };
    Workspace w;
    w.phi_T = part(units * columns * UNIT);
    w.total = part(has_totals(T, N * C) ? N * C * columns : 0);
    w.lost = part(has_totals(T, N * C) ? N * C * columns : 0);
    w.dX2 = part(seam ? threads * GROUP * N * C : 0);
    w.dH_pre = part(chunk * N);
    w.dy = part(chunk * round_up(columns, CW));
    w.factor = part(chunk);
    w.dbias = part(chunk * columns);
    w.dalpha = part(chunk * 3);
    w.size = size;
    return w;
}

extern "C" int64_t backward_workspace(int threads, int64_t T, int64_t C, int columns,
                                      int seam) {
    return layout(nullptr, threads, T, C, columns, seam != 0).size;
}

// The channels of one stream, [begin, end), as the `index`-th unit of x⃗.
struct Unit {
    int64_t index, i, begin, end, first;  // `first` is where it starts in x⃗

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

struct Backward {
    int64_t C;
    int columns;
    int64_t dy_stride;
    const K *H_pre;         // null without pre
    const Stream *dh, *X, *partial;
    const Workspace &w;
};

// What dX is made of besides dy φᵀ, for tokens of one unit.
struct Terms {
    const Stream *X;        // [tokens, N C] at the unit's channels
    const K *factor;        // [tokens]
    const K *H_pre;         // [tokens], of this stream, N apart; null without pre
    const Stream *dh;       // [tokens, C] at the unit's channels
    const Stream *partial;  // [tokens, N C] at the unit's channels, or null
    int64_t C;
};

// dX[t] = dy φᵀ + factor X + H_pre dh + partial for ROWS_ tokens and VECTORS_ vectors of channels.
// The product first: added to the other terms, which are larger, each of its columns would round.
template <int ROWS_, int VECTORS_, class Gradient, class Width>
INLINE void dX_part(const Terms &terms, int64_t t, int64_t c, const K *dy, int64_t dy_stride,
                    const K *phi_T, int columns, Gradient *dX, Lines lines, Width width) {
    V acc[ROWS_][VECTORS_];
    UNROLL
    for (int r = 0; r < ROWS_; ++r)
        for (int v = 0; v < VECTORS_; ++v) acc[r][v] = V{};
    for (int j = 0; j < columns; ++j) {
        lines.ask();
        V b[VECTORS_];
        for (int v = 0; v < VECTORS_; ++v) keep(b[v] = load_as<V>(phi_T + j * UNIT + c + v * W));
        for (int r = 0; r < ROWS_; ++r)
            for (int v = 0; v < VECTORS_; ++v)
                acc[r][v] = fma(dy[(t + r) * dy_stride + j], b[v], acc[r][v]);
    }
    UNROLL
    for (int r = 0; r < ROWS_; ++r) {
        UNROLL
        for (int v = 0; v < VECTORS_; ++v) {
            const int64_t at = c + v * W;
            V value = fma(terms.factor[t + r], load(terms.X + (t + r) * N * terms.C + at, width),
                          acc[r][v]);
            if (terms.H_pre != nullptr)
                value = fma(terms.H_pre[(t + r) * N],
                            load(terms.dh + (t + r) * terms.C + at, width), value);
            if (terms.partial != nullptr)
                value += load(terms.partial + (t + r) * N * terms.C + at, width);
            store(dX + (t + r) * N * terms.C + at, value, width);
        }
    }
}

template <class Gradient>
static void dX_of_unit(const Terms &terms, int64_t tokens, int64_t channels, const K *dy,
                       int64_t dy_stride, const K *phi_T, int columns, Gradient *dX,
                       Ahead &ahead) {
    const auto rows = [&](auto count, int64_t t) LAMBDA {
        constexpr int R = decltype(count)::value;
        int64_t c = 0;
        for (; c + dX_VECTORS * W <= channels; c += dX_VECTORS * W)
            dX_part<R, dX_VECTORS>(terms, t, c, dy, dy_stride, phi_T, columns, dX,
                                   ahead.next(columns), Full{});
        over_channels(c, channels, [&](int64_t c, auto width) LAMBDA {
            dX_part<R, 1>(terms, t, c, dy, dy_stride, phi_T, columns, dX, Lines(), width);
        });
    };
    int64_t t = 0;
    for (; t + dX_TOKENS <= tokens; t += dX_TOKENS) rows(Count<dX_TOKENS>{}, t);
    for (; t < tokens; ++t) rows(Count<1>{}, t);
}

// dX of `tokens` tokens from `t`, the g-th of their chunk; `dX` is that of the first of them.
template <class Gradient>
static void group_backward(const Backward &b, int64_t t, int64_t g, int64_t tokens, Gradient *dX,
                           Ahead &ahead) {
    const int64_t C = b.C, width = N * C, units = N * ((C + UNIT - 1) / UNIT);
    for (int64_t u = 0; u < units; ++u) {
        const Unit unit(u, C);
        const Terms terms{b.X + t * width + unit.first,
                          b.w.factor + g,
                          b.H_pre == nullptr ? nullptr : b.H_pre + t * N + unit.i,
                          b.dh + t * C + unit.begin,
                          b.partial == nullptr ? nullptr : b.partial + t * width + unit.first,
                          C};
        dX_of_unit(terms, tokens, unit.end - unit.begin, b.w.dy + g * b.dy_stride, b.dy_stride,
                   b.w.phi_T + u * b.columns * UNIT, b.columns, dX + unit.first, ahead);
    }
}

// dφ of one unit from `tokens` tokens from `begin`, added to that of the tokens before.
static void dphi_of_unit(const Backward &b, const Unit &unit, int64_t begin, int64_t tokens,
                         K *dphi) {
    alignas(64) K X[DEEP * UNIT];
    const int64_t width = N * b.C, channels = unit.end - unit.begin;
    for (int64_t g = 0; g < tokens; g += DEEP) {
        const int64_t depth = smaller(DEEP, tokens - g);
        const Stream *rows = b.X + (begin + g) * width + unit.first;
        for (int64_t r = 0; r < depth; ++r) load_part(rows + r * width, channels, X + r * UNIT);
        // Each call asks for one row of the next tokens; PACE rows a product are all of them.
        const Stream *next_rows = rows + DEEP * width;
        const auto next = [&](int64_t calls) {
            const Lines lines(reinterpret_cast<const char *>(next_rows),
                              (channels * int64_t(sizeof(Stream)) + LINE - 1) / LINE,
                              width * int64_t(sizeof(Stream)), false);
            next_rows += calls * width;
            return lines;
        };
        multiply_all<1, UNIT>(X, channels, b.w.dy + g * b.dy_stride, b.dy_stride, depth,
                              dphi + unit.first * b.columns, b.columns, b.columns, next);
    }
}

// Moves dφ of one unit to its exact total; the last time that is rounded to dφ.
static void dphi_to_total(const Backward &b, const Unit &unit, K *dphi, bool is_last) {
    const int64_t first = unit.first * b.columns, count = (unit.end - unit.begin) * b.columns;
    over_channels(first, first + count, [&](int64_t k, auto width) LAMBDA {
        V total = load(b.w.total + k, width), lost = load(b.w.lost + k, width);
        add_exactly(total, lost, load(dphi + k, width));
        store(b.w.total + k, total, width);
        store(b.w.lost + k, lost, width);
        store(dphi + k, is_last ? rounded(total, lost) : V{}, width);
    });
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
    const Workspace w = layout(workspace, threads, T, C, columns, f != nullptr);
    const bool totals = has_totals(T, width);
    const Backward b{C, columns, stride, dh == nullptr ? nullptr : H_pre, dh, X, partial, w};
    Array<double> sums(columns + 3), lost(columns + 3);  // of dbias and dalpha
    for (int k = 0; k < columns + 3; ++k) sums[k] = lost[k] = 0;
    for (int64_t k = 0; k < chunk * stride; ++k) w.dy[k] = 0;  // its padding stays 0

    threads = threads_for(T * width, threads);
    PRAGMA(omp parallel num_threads(threads))
    {
        PRAGMA(omp for schedule(static))
        for (int64_t u = 0; u < units; ++u) {
            const Unit unit(u, C);
            transpose(phi, columns, unit, w.phi_T + u * columns * UNIT);
            const int64_t last = unit.first + unit.end - unit.begin;
            for (int64_t k = unit.first * columns; k < last * columns; ++k) {
                dphi[k] = 0;
                if (totals) w.total[k] = w.lost[k] = 0;
            }
        }
        for (int64_t begin = 0; begin < T; begin += chunk) {
            const int64_t tokens = smaller(chunk, T - begin);
            PRAGMA(omp for schedule(static))
            for (int64_t g = 0; g < tokens; g += GROUP) {
                const int64_t t = begin + g, count = smaller(GROUP, tokens - g);
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
                // What is used next, and what is written.
                Ahead ahead(units * ((count + dX_TOKENS - 1) / dX_TOKENS) * columns);
                const int64_t size = count * width, next = t + count;
                if (f != nullptr) {
                    ahead.to_read(X_before + t * width, size);
                    ahead.to_read(f + t * C, size / N);
                    ahead.to_write(df + t * C, size / N);
                }
                ahead.to_write(dX + t * width, size);
                ahead.to_read(X + next * width, size);
                if (dh != nullptr) ahead.to_read(dh + next * C, size / N);
                if (partial != nullptr) ahead.to_read(partial + next * width, size);
                if (f == nullptr) {
                    group_backward(b, t, g, count, dX + t * width, ahead);
                    continue;
                }
                K *dX2 = w.dX2 + thread_number() * GROUP * width;
                group_backward(b, t, g, count, dX2, ahead);
                for (int64_t l = t; l < t + count; ++l)
                    post_res_backward_row(dX2 + (l - t) * width, H_res_before + l * N * N,
                                          H_post_before + l * N, X_before + l * width, f + l * C,
                                          dH_res_before + l * N * N, dH_post_before + l * N,
                                          dX + l * width, df + l * C, C);
            }
            PRAGMA(omp for schedule(static) nowait)
            for (int64_t k = 0; k < columns + 3; ++k) {
                const bool of_bias = k < columns;
                const K *terms = of_bias ? w.dbias + k : w.dalpha + k - columns;
                double of_chunk = 0;
                for (int64_t g = 0; g < tokens; ++g) of_chunk += terms[g * (of_bias ? columns : 3)];
                add_exactly(sums[k], lost[k], of_chunk);
            }
            PRAGMA(omp for schedule(static))
            for (int64_t u = 0; u < units; ++u) {
                dphi_of_unit(b, Unit(u, C), begin, tokens, dphi);
                const bool is_last = begin + tokens == T;
                if (totals && (is_last || begin / chunk % PLAIN == PLAIN - 1))
                    dphi_to_total(b, Unit(u, C), dphi, is_last);
            }
        }
    }
    for (int k = 0; k < columns + 3; ++k)
        (k < columns ? dbias[k] : dalpha[k - columns]) = K(rounded(sums[k], lost[k]));
}
