// Integer dot products of the vector unit: some outputs at once, four inputs each, summed in 32 bits.
//
// Exact: whatever the machine has, the sums are those of the integers, so all forms give the same bits. Inputs are in
// [-127, 127]. A weight of 8 bits counts w - 128, in [-128, 127]. Where bytes are multiplied unsigned (OFFSET), a sum begins
// at -128 times the sum of the inputs. A group of weights of 4 bits has sums of its own (GroupSums).
//
// Tests compile with LAYERSKIP_AVX2 or LAYERSKIP_PLAIN to have one of the simpler forms here on a machine with more.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__) && !defined(LAYERSKIP_PLAIN)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && !defined(LAYERSKIP_PLAIN)
#include <arm_neon.h>
#endif

#include "numbers.h"
#include "vectors.h"

constexpr int TILE = 16;   // outputs whose weights stand side by side, on every machine
constexpr int GROUP = 32;  // inputs whose weights do

#if defined(__AVX512VNNI__) && !defined(LAYERSKIP_PLAIN) && !defined(LAYERSKIP_AVX2)

constexpr int REGISTER_OUTPUTS = 16, REGISTER_ROWS = 12;  // outputs of a register; rows whose sums stand in registers
typedef __m512i Ints;
typedef __m512 Reals;
INLINED Ints every(int32_t x) { return _mm512_set1_epi32(x); }
INLINED Reals every(float x) { return _mm512_set1_ps(x); }
INLINED Reals as_reals(Ints x) { return _mm512_cvtepi32_ps(x); }
INLINED Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_ps(a, b, c); }
INLINED Reals times(Reals a, Reals b) { return _mm512_mul_ps(a, b); }
INLINED Reals reals(const float *from) { return _mm512_loadu_ps(from); }
INLINED Reals halves(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

typedef __m512i Bytes;  // of some outputs and four inputs, unsigned
INLINED Bytes bytes(const uint8_t *from) { return _mm512_loadu_si512(from); }
INLINED Bytes low(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINED Bytes high(Bytes x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
// sum + weights times four inputs, signed bytes. (GCC would load them in an operation of its own.)
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*(const int8_t(*)[4])four));
    return sum;
}
#define DOTS_OF_BYTES

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(LAYERSKIP_PLAIN)

constexpr int REGISTER_OUTPUTS = 8, REGISTER_ROWS = 10;
typedef __m256i Ints;
typedef __m256 Reals;
INLINED Ints every(int32_t x) { return _mm256_set1_epi32(x); }
INLINED Reals every(float x) { return _mm256_set1_ps(x); }
INLINED Reals as_reals(Ints x) { return _mm256_cvtepi32_ps(x); }
INLINED Reals fused(Reals a, Reals b, Reals c) { return _mm256_fmadd_ps(a, b, c); }
INLINED Reals times(Reals a, Reals b) { return _mm256_mul_ps(a, b); }
INLINED Reals reals(const float *from) { return _mm256_loadu_ps(from); }
INLINED Reals halves(const uint8_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

typedef __m256i Bytes;
INLINED Bytes bytes(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINED Bytes low(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINED Bytes high(Bytes x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }

#if defined(__AVXVNNI__) && !defined(LAYERSKIP_AVX2)
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    return _mm256_dpbusd_avx_epi32(sum, weights, _mm256_set1_epi32(loaded<int32_t>(four)));
}
#define DOTS_OF_BYTES
#else
// sum + x. Said outright: GCC sums integers up in any order, for which it keeps many more than there are registers.
INLINED __m256i plus_words(__m256i sum, __m256i x) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
INLINED __m256i plus_halves(__m256i sum, __m256i x) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
// Products of two neighbours are summed in 16 bits: |w| times the input with the sign of w, so 2 x 128 x 127 at most.
struct Weights { Bytes magnitude, centred; };
constexpr bool OFFSET = false;
INLINED Weights weights_of(Bytes x) {
    const Bytes centred = _mm256_xor_si256(x, _mm256_set1_epi8(-128));
    return {_mm256_abs_epi8(centred), centred};
}
INLINED Ints widened(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
INLINED Ints dotted(Ints sum, const Weights &weights, const int8_t *four) {
    const __m256i inputs = _mm256_set1_epi32(loaded<int32_t>(four));
    return plus_words(sum, widened(_mm256_maddubs_epi16(weights.magnitude, _mm256_sign_epi8(inputs, weights.centred))));
}
// Of 4 bits 16 bits hold a whole group.
static_assert(GROUP / 4 * 2 * 15 * 127 <= INT16_MAX);
struct GroupSums { __m256i pairs; };
INLINED GroupSums no_sums() { return {_mm256_setzero_si256()}; }
INLINED GroupSums dotted(GroupSums sum, Bytes weights, const int8_t *four) {
    const __m256i inputs = _mm256_set1_epi32(loaded<int32_t>(four));
    return {plus_halves(sum.pairs, _mm256_maddubs_epi16(weights, inputs))};
}
INLINED Reals as_reals(GroupSums x) { return as_reals(widened(x.pairs)); }
#endif

#elif defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD) && !defined(LAYERSKIP_PLAIN)

constexpr int REGISTER_OUTPUTS = 4, REGISTER_ROWS = 12;
typedef int32x4_t Ints;
typedef float32x4_t Reals;
INLINED Ints every(int32_t x) { return vdupq_n_s32(x); }
INLINED Reals every(float x) { return vdupq_n_f32(x); }
INLINED Reals as_reals(Ints x) { return vcvtq_f32_s32(x); }
INLINED Reals fused(Reals a, Reals b, Reals c) { return vfmaq_f32(c, a, b); }
INLINED Reals times(Reals a, Reals b) { return vmulq_f32(a, b); }
INLINED Reals reals(const float *from) { return vld1q_f32(from); }
INLINED Reals halves(const uint8_t *from) { return vcvt_f32_f16(loaded<float16x4_t>(from)); }

typedef uint8x16_t Bytes;
INLINED Bytes bytes(const uint8_t *from) { return vld1q_u8(from); }
INLINED Bytes low(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
INLINED Bytes high(Bytes x) { return vshrq_n_u8(x, 4); }
typedef int8x16_t Weights;
typedef Ints GroupSums;
constexpr bool OFFSET = false;
INLINED Weights weights_of(Bytes x) { return vreinterpretq_s8_u8(veorq_u8(x, vdupq_n_u8(128))); }
INLINED GroupSums no_sums() { return every(0); }
INLINED Ints dotted(Ints sum, Weights weights, const int8_t *four) {
    return vdotq_s32(sum, weights, vreinterpretq_s8_s32(vdupq_n_s32(loaded<int32_t>(four))));
}
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) { return dotted(sum, vreinterpretq_s8_u8(weights), four); }

#else

constexpr int REGISTER_OUTPUTS = 16, REGISTER_ROWS = 2;
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

struct Bytes { uint8_t at[4 * TILE]; };
INLINED Bytes bytes(const uint8_t *from) { return loaded<Bytes>(from); }
INLINED Bytes low(Bytes x) { for (auto &one : x.at) one &= 15; return x; }
INLINED Bytes high(Bytes x) { for (auto &one : x.at) one >>= 4; return x; }
INLINED Ints dotted(Ints sum, Bytes weights, const int8_t *four) {
    EACH for (int k = 0; k < 4; ++k) sum.at[i] += int32_t(weights.at[4 * i + k]) * four[k];
    return sum;
}
#undef EACH
#define DOTS_OF_BYTES

#endif

#ifdef DOTS_OF_BYTES  // weights of any size are multiplied as they are
typedef Bytes Weights;
typedef Ints GroupSums;
constexpr bool OFFSET = true;
INLINED Weights weights_of(Bytes x) { return x; }
INLINED GroupSums no_sums() { return every(0); }
#endif
