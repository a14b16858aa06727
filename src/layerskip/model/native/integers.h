// Integer dot products of the vector unit: TILE outputs at once, four inputs each, summed in 32 bits.
//
// Exact: whatever the machine has, the sums are those of the integers, so all three forms give the same bits.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && !defined(LAYERSKIP_PLAIN)
#include <immintrin.h>
#endif

#include "numbers.h"
#include "vectors.h"

constexpr int TILE = 16;  // outputs whose weights stand side by side, on every machine

#if defined(__AVX512VNNI__) && !defined(LAYERSKIP_PLAIN) && !defined(LAYERSKIP_AVX2)

#define INTEGER_REGISTERS 32
typedef __m512i Ints;
typedef __m512 Reals;
INLINED Ints every(int32_t x) { return _mm512_set1_epi32(x); }
INLINED Reals every(float x) { return _mm512_set1_ps(x); }
INLINED Reals as_reals(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINED Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
INLINED Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
INLINED Reals reals(const float *from) { return _mm512_loadu_ps(from); }
INLINED Reals halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINED void kept(float *to, Reals x) { _mm512_storeu_ps(to, x); }

typedef __m512i Bytes;  // of TILE outputs and four inputs, unsigned
INLINED Bytes bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINED Bytes low(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINED Bytes high(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// sum + weights [TILE, 4] times four inputs, signed bytes. (GCC would load them in an operation of its own.)
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*(const int8_t(*)[4])four));
    return sum;
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(LAYERSKIP_PLAIN)

#define INTEGER_REGISTERS 8  // two are one of ours
struct Ints { __m256i a, b; };
struct Reals { __m256 a, b; };
INLINED Ints every(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINED Reals every(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINED Reals as_reals(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINED Reals fused(Reals x, Reals y, Reals z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINED Reals times(Reals x, Reals y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINED Reals reals(const float *from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
INLINED Reals halves(const uint8_t *from) {
    auto at = (const __m128i *)from;
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
}
INLINED void kept(float *to, Reals x) {
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}

struct Bytes { __m256i a, b; };
INLINED Bytes bytes(const uint8_t *from) {
    return {_mm256_loadu_si256((const __m256i *)from), _mm256_loadu_si256((const __m256i *)(from + 32))};
}
INLINED Bytes low(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINED Bytes high(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), mask)};
}
// Pairs are summed in 16 bits, which a product of unsigned bytes could pass: so the even and the odd ones apart.
INLINED __m256i dotted(__m256i sum, __m256i weights, __m256i inputs) {
    const __m256i even = _mm256_set1_epi16(255), ones = _mm256_set1_epi16(1);
    __m256i first = _mm256_maddubs_epi16(_mm256_and_si256(weights, even), inputs);
    __m256i second = _mm256_maddubs_epi16(_mm256_andnot_si256(even, weights), inputs);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(first, ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(second, ones));
}
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    const __m256i inputs = _mm256_set1_epi32(loaded<int32_t>(four));
    return {dotted(sum.a, weights.a, inputs), dotted(sum.b, weights.b, inputs)};
}

#else

struct Ints { int32_t at[TILE]; };
struct Reals { float at[TILE]; };
#define EACH for (int i = 0; i < TILE; ++i)
INLINED Ints every(int32_t x) { Ints y; EACH y.at[i] = x; return y; }
INLINED Reals every(float x) { Reals y; EACH y.at[i] = x; return y; }
INLINED Reals as_reals(Ints x) { Reals y; EACH y.at[i] = float(x.at[i]); return y; }
INLINED Reals fused(Reals a, Reals b, Reals c) { EACH c.at[i] = std::fma(a.at[i], b.at[i], c.at[i]); return c; }
INLINED Reals times(Reals a, Reals b) { EACH a.at[i] *= b.at[i]; return a; }
INLINED Reals reals(const float *from) { Reals y; EACH y.at[i] = from[i]; return y; }
INLINED Reals halves(const uint8_t *from) {
    Reals y;
    EACH y.at[i] = half(uint16_t(from[2 * i] | from[2 * i + 1] << 8));
    return y;
}
INLINED void kept(float *to, Reals x) { EACH to[i] = x.at[i]; }

struct Bytes { uint8_t at[4 * TILE]; };
INLINED Bytes bytes(const uint8_t *from) { return loaded<Bytes>(from); }
INLINED Bytes low(Bytes x) { for (auto &one : x.at) one &= 15; return x; }
INLINED Bytes high(Bytes x) { for (auto &one : x.at) one >>= 4; return x; }
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    EACH for (int k = 0; k < 4; ++k) sum.at[i] += int32_t(weights.at[4 * i + k]) * four[k];
    return sum;
}
#undef EACH

#endif
