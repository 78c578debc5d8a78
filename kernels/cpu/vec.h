// Vectors of the compute type K (float, or double for double streams), and the stream type.
//
// GCC's and Clang's vector extensions, so that one source serves AVX2, AVX-512 and NEON. Nothing
// here is contracted or reassociated by the compiler (-ffp-contract=off): what is fused is written
// as fma(), so a function gives the same bits wherever it is inlined.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(STREAM_FLOAT64)
using K = double;
using Stream = double;
#elif defined(STREAM_BFLOAT16)
struct Stream {
    uint16_t bits;
};
using K = float;
#else
using K = float;
using Stream = float;
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Vector registers decide how much of a product is kept in them.
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// Columns of φ are multiples of 8 more often than of 16: their vectors are never wider than 32.
constexpr int COLUMN_BYTES = VECTOR_BYTES < 32 ? VECTOR_BYTES : 32;

constexpr int W = VECTOR_BYTES / sizeof(K);
constexpr int CW = COLUMN_BYTES / sizeof(K);

typedef K V __attribute__((vector_size(VECTOR_BYTES)));
typedef K VC __attribute__((vector_size(COLUMN_BYTES)));

#define INLINE static inline __attribute__((always_inline, unused))

// Before a loop of few rounds: what it keeps in an array is then kept in registers.
#define UNROLL _Pragma("GCC unroll 32")

// --- arithmetic ---------------------------------------------------------------------------------

template <class Vector>
INLINE Vector splat(K value) {
    return value - Vector{};  // x - 0 is x for every x, -0 included
}

#ifndef __has_builtin
#define __has_builtin(x) 0
#endif

INLINE K fma_scalar(K a, K b, K c) {
    return sizeof(K) == 8 ? K(__builtin_fma(a, b, c)) : K(__builtin_fmaf(a, b, c));
}

// a · b + c with one rounding.
template <class Vector>
INLINE Vector fma(Vector a, Vector b, Vector c) {
#if __has_builtin(__builtin_elementwise_fma)
    return __builtin_elementwise_fma(a, b, c);
#else
    // GCC has no such operation on vectors, only those of each instruction set, which need not be
    // declared by <immintrin.h> (0.4 s of every build).
#if defined(__AVX512F__) && __has_builtin(__builtin_ia32_vfmaddps512_mask)
    constexpr int CURRENT_ROUNDING = 4;
    if constexpr (sizeof(Vector) == 64 && sizeof(K) == 4)
        return Vector(__builtin_ia32_vfmaddps512_mask(a, b, c, -1, CURRENT_ROUNDING));
    if constexpr (sizeof(Vector) == 64 && sizeof(K) == 8)
        return Vector(__builtin_ia32_vfmaddpd512_mask(a, b, c, -1, CURRENT_ROUNDING));
#endif
#if defined(__FMA__) && __has_builtin(__builtin_ia32_vfmaddps256)
    if constexpr (sizeof(Vector) == 32 && sizeof(K) == 4)
        return Vector(__builtin_ia32_vfmaddps256(a, b, c));
    if constexpr (sizeof(Vector) == 32 && sizeof(K) == 8)
        return Vector(__builtin_ia32_vfmaddpd256(a, b, c));
#endif
    Vector r;  // one vector instruction after GCC's own vectoriser
    for (unsigned l = 0; l < sizeof(Vector) / sizeof(K); ++l) r[l] = fma_scalar(a[l], b[l], c[l]);
    return r;
#endif
}

template <class Vector>
INLINE Vector fma(K a, Vector b, Vector c) {
    return fma(splat<Vector>(a), b, c);
}

// Keeps a value in a register: GCC else reads it again from memory for each of its uses.
template <class Vector>
INLINE void keep([[maybe_unused]] Vector &v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__SSE2__)
    __asm__("" : "+x"(v));
#endif
}

// total + lost += term with hardly any rounding: `lost` is what total has lost so far (two-sum).
template <class Number>
INLINE void add_exactly(Number &total, Number &lost, Number term) {
    const Number sum = total + term, added = sum - total;
    lost += (total - (sum - added)) + (term - added);
    total = sum;
}

// The two together; where the total is infinite, what it has lost is not a number.
template <class Number>
INLINE Number rounded(Number total, Number lost) {
    return lost == lost ? total + lost : total;
}

INLINE V larger(V a, V b) { return a > b ? a : b; }

template <class Half, class Vector>
INLINE Half halves(Vector v) {
    Half part[2];
    __builtin_memcpy(part, &v, sizeof part);
    return part[0] + part[1];
}

// The sum of all lanes, halves first.
INLINE K sum(V v) {
    typedef K V16 __attribute__((vector_size(16)));
    typedef K V32 __attribute__((vector_size(32)));
    V16 rest;
    if constexpr (VECTOR_BYTES == 64)
        rest = halves<V16>(halves<V32>(v));
    else if constexpr (VECTOR_BYTES == 32)
        rest = halves<V16>(v);
    else
        __builtin_memcpy(&rest, &v, sizeof rest);
    constexpr int LAST = 16 / sizeof(K) - 1, MIDDLE = (LAST + 1) / 2;
    if (LAST == 1) return rest[0] + rest[1];
    return (rest[0] + rest[MIDDLE]) + (rest[1] + rest[LAST]);
}

// --- memory -------------------------------------------------------------------------------------

// How much of a vector is meant: all of it, or its first elements with zeros behind them.
struct Full {};
struct Some {
    int count;
};

template <class Vector>
INLINE Vector load_as(const void *p) {
    Vector v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

INLINE V load(const K *p, Full) { return load_as<V>(p); }

INLINE V load(const K *p, Some some) {
    V v{};
    for (int l = 0; l < some.count; ++l) v[l] = p[l];
    return v;
}

INLINE void store(K *p, V v, Full) { __builtin_memcpy(p, &v, sizeof v); }

INLINE void store(K *p, V v, Some some) {
    for (int l = 0; l < some.count; ++l) p[l] = v[l];
}

#if defined(STREAM_BFLOAT16)
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfBits __attribute__((vector_size(VECTOR_BYTES / 2)));

INLINE V widen(HalfBits h) { return V(__builtin_convertvector(h, Bits) << 16); }

// Round to nearest, ties to even; a NaN stays one.
INLINE HalfBits narrow(V v) {
    const Bits bits = Bits(v);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits nan = Bits(v != v);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), HalfBits);
}

INLINE V load(const Stream *p, Full) { return widen(load_as<HalfBits>(p)); }

INLINE V load(const Stream *p, Some some) {
    HalfBits h{};
    for (int l = 0; l < some.count; ++l) h[l] = p[l].bits;
    return widen(h);
}

INLINE void store(Stream *p, V v, Full) {
    const HalfBits h = narrow(v);
    __builtin_memcpy(p, &h, sizeof h);
}

INLINE void store(Stream *p, V v, Some some) {
    const HalfBits h = narrow(v);
    for (int l = 0; l < some.count; ++l) p[l].bits = h[l];
}
#endif

// body(c, Full{}) for the whole vectors of channels in [begin, end), body(c, Some{…}) for the rest.
template <class Body>
INLINE void over_channels(int64_t begin, int64_t end, Body body) {
    int64_t c = begin;
    for (; c + W <= end; c += W) body(c, Full{});
    if (c < end) body(c, Some{int(end - c)});
}

#define LAMBDA __attribute__((always_inline))

// A number that is known to the compiler, as an argument.
template <int VALUE>
struct Count {
    static constexpr int value = VALUE;
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Elements on the heap, aligned for vectors: their number may be too large for a thread's stack.
template <class Element>
class Array {
  public:
    explicit Array(int64_t count) {
        const int64_t bytes = round_up(count * int64_t(sizeof(Element)) + 1, VECTOR_BYTES);
        elements = static_cast<Element *>(aligned_alloc(VECTOR_BYTES, size_t(bytes)));
        if (elements == nullptr) abort();
    }
    ~Array() { free(elements); }
    Array(const Array &) = delete;
    Element &operator[](int64_t k) { return elements[k]; }

  private:
    Element *elements;
};
