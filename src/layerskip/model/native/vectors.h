// What the kernels need of the vector unit, in GCC's and clang's vector types; intrinsics only where there are none.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numbers.h"

// Zen's cores have their own ways with memory, and multiply pairs of bfloat16 as fast as floats. Intel's need two
// cycles and more for pairs, in which they do four fused operations on floats: half as many numbers each, so twice as
// many in all.
#if defined(__znver3__) || defined(__znver4__) || defined(__znver5__)
constexpr bool ZEN = true;
#else
constexpr bool ZEN = false;
#endif
#if !defined(__AVX512BF16__)
constexpr bool PAIRS = false;
#elif defined(LAYERSKIP_PAIRS)
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = ZEN;
#endif

// Of a product QUERIES rows times VECTORS vectors are summed at once, in registers.
constexpr int QUERIES = 6;
#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, VECTORS = 4;
#else
constexpr int LANES = 4, VECTORS = 2;
#endif

#define INLINED __attribute__((always_inline)) static inline
template <typename T, int N>
struct Vector { typedef T type __attribute__((vector_size(N * sizeof(T)))); };
typedef Vector<float, LANES>::type Floats;
typedef Vector<uint32_t, LANES>::type Words;

// sum + a b, rounded once where the machine can. Said outright: of a loop with one sum alone GCC makes products and sums for some
// processors, of one with several fused ones, and a query would differ with its company.
INLINED Floats plus(Floats sum, Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}
INLINED Floats plus(Floats sum, Floats a, float b) { return plus(sum, a, b - Floats{}); }

template <typename To>
static inline To loaded(const void *from) {
    To x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
template <typename From>
static inline void kept(void *to, From x) { std::memcpy(to, &x, sizeof x); }

#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif
#if defined(__clang__)
#define APART __attribute__((noinline)) static
#else
#define APART __attribute__((noinline, noclone)) static  // compiled once, however many call it
#endif

// Transpose EDGE rows of EDGE words, which begin where `at` says (`stride` in words). Interleave two rows of bfloat16:
// word i holds first[i] in its low half and second[i] in its high one. GCC is slow with vectors that the machine has not.
#ifdef __AVX__
constexpr int EDGE = 8;
template <typename At>
INLINED void transposed(const At &at, uint32_t *to, int64_t stride) {
    typedef Vector<uint32_t, 8>::type Eight;
    typedef Vector<uint64_t, 4>::type Pairs;
    for (int w = 0; w < 8; w += 4) {  // four words of rows i and i + 4 stand in one vector
        Eight rows[4];
        for (int i = 0; i < 4; ++i)
            rows[i] = (Eight)_mm256_insertf128_ps(
                _mm256_castps128_ps256(_mm_loadu_ps(reinterpret_cast<const float *>(at(i)) + w)),
                _mm_loadu_ps(reinterpret_cast<const float *>(at(i + 4)) + w), 1);
        for (int k = 0; k < 2; ++k) {
            const Pairs first = k ? (Pairs)PICKED(rows[0], rows[1], 2, 10, 3, 11, 6, 14, 7, 15)
                                  : (Pairs)PICKED(rows[0], rows[1], 0, 8, 1, 9, 4, 12, 5, 13);
            const Pairs second = k ? (Pairs)PICKED(rows[2], rows[3], 2, 10, 3, 11, 6, 14, 7, 15)
                                   : (Pairs)PICKED(rows[2], rows[3], 0, 8, 1, 9, 4, 12, 5, 13);
            kept(to + (w + 2 * k) * stride, PICKED(first, second, 0, 4, 2, 6));
            kept(to + (w + 2 * k + 1) * stride, PICKED(first, second, 1, 5, 3, 7));
        }
    }
}
INLINED void interleaved(const bf16 *first, const bf16 *second, int64_t size, uint32_t *to) {
    typedef Vector<uint16_t, 16>::type Sixteen;
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        Sixteen a = loaded<Sixteen>(first + i), b = loaded<Sixteen>(second + i);
        kept(to + i, PICKED(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
        kept(to + i + 8, PICKED(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
    for (; i < size; ++i) to[i] = first[i].bits | uint32_t(second[i].bits) << 16;
}
#else
constexpr int EDGE = 4;
template <typename At>
INLINED void transposed(const At &at, uint32_t *to, int64_t stride) {
    typedef Vector<uint32_t, 4>::type Four;
    typedef Vector<uint64_t, 2>::type Pairs;
    Pairs a[4];
    for (int i = 0; i < 4; i += 2) {
        Four one = loaded<Four>(at(i)), two = loaded<Four>(at(i + 1));
        a[i] = (Pairs)PICKED(one, two, 0, 4, 1, 5);
        a[i + 1] = (Pairs)PICKED(one, two, 2, 6, 3, 7);
    }
    for (int k = 0; k < 2; ++k) {
        kept(to + 2 * k * stride, PICKED(a[k], a[k + 2], 0, 2));
        kept(to + (2 * k + 1) * stride, PICKED(a[k], a[k + 2], 1, 3));
    }
}
INLINED void interleaved(const bf16 *first, const bf16 *second, int64_t size, uint32_t *to) {
    for (int64_t i = 0; i < size; ++i) to[i] = first[i].bits | uint32_t(second[i].bits) << 16;
}
#endif

// Join the lanes two by two, always in the same order.
template <int N, typename From, typename Join>
static inline auto over_lanes(From x, Join join) {
    if constexpr (N == 4) {
        x = join(x, PICKED(x, x, 2, 3, 0, 1));
        return join(x, PICKED(x, x, 1, 0, 3, 2))[0];
    } else {
        typename Vector<std::decay_t<decltype(x[0])>, N / 2>::type halves[2];
        std::memcpy(halves, &x, sizeof x);
        return over_lanes<N / 2>(join(halves[0], halves[1]), join);
    }
}

// Numbers in memory as floats, and floats in their dtype; `rounded_to` returns what they became. A NaN stays one.
static inline Floats wide(const float *from) { return loaded<Floats>(from); }
static inline Floats wide(const bf16 *from) {
    const auto bits = loaded<Vector<uint16_t, LANES>::type>(from);
#ifdef __AVX512F__
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);  // GCC converts the halves apart
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}
static inline Floats rounded_to(float *to, Floats x) {
    kept(to, x);
    return x;
}
// Floats with the low half of their bits rounded away.
static inline Words near_bfloat(Floats x) {
    Words bits = loaded<Words>(&x), near = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    return (bits & 0x7fffffff) > 0x7f800000 ? (bits | 0x400000) & 0xffff0000u : near;
}
static inline Floats rounded_to(bf16 *to, Floats x) {
#ifdef __AVX512BF16__
    __m256bh narrow = _mm512_cvtneps_pbh((__m512)x);
    Words whole = (Words)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)narrow), 16);
#else
    Words whole = near_bfloat(x);
    auto narrow = __builtin_convertvector(whole >> 16, Vector<uint16_t, LANES>::type);
#endif
    kept(to, narrow);
    return (Floats)whole;
}
// The first `live` of them; behind these is 0.
template <typename T>
static inline Floats wide(const T *from, int64_t live) {
    if (live >= LANES) return wide(from);
    T some[LANES] = {};
    for (int64_t i = 0; i < live; ++i) some[i] = from[i];
    return wide(some);
}
template <typename T>
static inline void rounded_to(T *to, Floats x, int64_t live) {
    if (live >= LANES) return void(rounded_to(to, x));
    T some[LANES];
    rounded_to(some, x);
    for (int64_t i = 0; i < live; ++i) to[i] = some[i];
}

// Two vectors side by side in words: numbers 0, 2, .. and 1, 3, .. of `to`, the first `live` of them.
static inline void rounded_words(bf16 *to, Floats even, Floats odd, int64_t live) {
    const Words both = near_bfloat(even) >> 16 | near_bfloat(odd);
    std::memcpy(to, &both, std::min<int64_t>(2 * LANES, live) * sizeof(bf16));
}

// Vectors of a product are words of 32 bits, one float or a pair of bfloat16 each; its rows are of numbers of the same
// kind where pairs are multiplied, else of floats.
template <typename T>
constexpr int IN_WORD = 4 / sizeof(T);
template <typename T>
using Factor = std::conditional_t<PAIRS, T, float>;

// sum + a times what of a row stands there
template <typename T>
static inline Floats added(Floats sum, Words a, const Factor<T> *row) {
    if constexpr (IN_WORD<T> == 1) return plus(sum, (Floats)a, loaded<float>(row));
#ifdef __AVX512BF16__
    else if constexpr (PAIRS)
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)_mm512_set1_epi32(loaded<int32_t>(row)));
#endif
    else {
        sum = plus(sum, (Floats)(a << 16), loaded<float>(row));
        return plus(sum, (Floats)(a & 0xffff0000u), loaded<float>(row + 1));
    }
}

struct Sums {  // where the sums of a product go, and whether to those that are there
    float *at;
    int64_t stride;
    bool onto;
};

// Q rows times N vectors: rows [Q, stride] of numbers and vectors [words, width] of words, elements [first, stop) of
// them. Of a pair that is half outside, the element outside counts as 0 whatever it is. (GCC keeps the sums in
// registers only where it is told to unroll.)
template <typename T, int Q, int N>
static void multiplied(const Factor<T> *rows, int64_t stride, const uint32_t *vectors, int64_t width, int64_t first,
                       int64_t stop, const Sums &to) {
    Floats sum[Q][N];
    float *at[Q];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
        at[q] = to.at + q * to.stride;
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) sum[q][v] = to.onto ? loaded<Floats>(at[q] + v * LANES) : Floats{};
    }
    auto step = [&](int64_t w, uint32_t mask) __attribute__((always_inline)) {
        // Of few registers: one number of each pair for all rows, then the other one, so that one load of a row serves
        // all vectors.
        if constexpr (LANES < 16 && !PAIRS && IN_WORD<T> == 2) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                Floats half[N];
#pragma GCC unroll 8
                for (int v = 0; v < N; ++v) {
                    const Words both = loaded<Words>(vectors + w * width + v * LANES) & mask;
                    half[v] = (Floats)(k == 0 ? both << 16 : both & 0xffff0000u);
                }
#pragma GCC unroll 8
                for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
                    for (int v = 0; v < N; ++v) sum[q][v] = plus(sum[q][v], half[v], rows[q * stride + 2 * w + k]);
            }
            return;
        }
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
            Words vector = loaded<Words>(vectors + w * width + v * LANES) & mask;
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q)
                sum[q][v] = added<T>(sum[q][v], vector, rows + q * stride + w * IN_WORD<T>);
        }
    };
    constexpr int64_t in = IN_WORD<T>;
    if (first % in) step(first / in, 0xffff0000u);
    for (int64_t w = (first + in - 1) / in; w < stop / in; ++w) step(w, 0xffffffffu);
    if (stop % in) step(stop / in, 0x0000ffffu);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) kept(at[q] + v * LANES, sum[q][v]);
}

// Q rows of weights times N words of each slot's values: rows [Q, stride], values `apart` words from one slot to the
// next, slots [first, stop) of them. Sums of words that hold two numbers are of the first ones, LANES of them, and then
// of the second ones.
template <typename T, int Q, int N>
static void weighted(const float *rows, int64_t stride, const uint32_t *values, int64_t apart, int64_t first,
                     int64_t stop, const Sums &to) {
    constexpr int EACH = IN_WORD<T>;
    Floats sum[Q][N * EACH];
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < N * EACH; ++v)
            sum[q][v] = to.onto ? loaded<Floats>(to.at + q * to.stride + v * LANES) : Floats{};
    for (int64_t j = first; j < stop; ++j)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v) {
            const Words both = loaded<Words>(values + j * apart + v * LANES);
            const Floats numbers[2] = {(Floats)(EACH == 1 ? both : both << 16), (Floats)(both & 0xffff0000u)};
#pragma GCC unroll 8
            for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
                for (int k = 0; k < EACH; ++k) sum[q][v * EACH + k] = plus(sum[q][v * EACH + k], numbers[k], rows[q * stride + j]);
        }
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < N * EACH; ++v) kept(to.at + q * to.stride + v * LANES, sum[q][v]);
}

// Up to QUERIES rows times the first lanes of vectors, any multiple of LANES.
template <typename T, int Q = QUERIES>
static void product(int count, const Factor<T> *rows, int64_t stride, const uint32_t *vectors, int64_t width,
                    int64_t lanes, int64_t first, int64_t stop, const Sums &to) {
    if constexpr (Q > 1)
        if (count < Q) return product<T, Q - 1>(count, rows, stride, vectors, width, lanes, first, stop, to);
    int64_t at = 0;
    for (; at + VECTORS * LANES <= lanes; at += VECTORS * LANES)
        multiplied<T, Q, VECTORS>(rows, stride, vectors + at, width, first, stop, {to.at + at, to.stride, to.onto});
    for (; at < lanes; at += LANES)
        multiplied<T, Q, 1>(rows, stride, vectors + at, width, first, stop, {to.at + at, to.stride, to.onto});
}

// The same of weights and values; `words` of a slot, any multiple of LANES.
template <typename T, int Q = QUERIES>
static void weighted_sum(int count, const float *rows, int64_t stride, const uint32_t *values, int64_t apart,
                         int64_t words, int64_t first, int64_t stop, const Sums &to) {
    if constexpr (Q > 1)
        if (count < Q) return weighted_sum<T, Q - 1>(count, rows, stride, values, apart, words, first, stop, to);
    constexpr int EACH = IN_WORD<T>, N = VECTORS / EACH;
    int64_t at = 0;
    for (; at + N * LANES <= words; at += N * LANES)
        weighted<T, Q, N>(rows, stride, values + at, apart, first, stop, {to.at + EACH * at, to.stride, to.onto});
    for (; at < words; at += LANES)
        weighted<T, Q, 1>(rows, stride, values + at, apart, first, stop, {to.at + EACH * at, to.stride, to.onto});
}
