// How many multiplications of weights a second some threads do together, when nothing but the first cache is read: as the
// kernels do them, in the fewest operations that the vector unit has for them.
#include <algorithm>
#include <chrono>
#include <cstdint>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
constexpr int CHAINS = 16;
#else
constexpr int CHAINS = 10;  // of 16 registers
#endif
constexpr int TURNS = 100'000, TIMES = 5;

// Independent sums, so that no product waits for the one before it; one operand comes from memory, as inputs do.
template <typename Sum, typename Each>
static double rate(int threads, Sum zero, Each each) {
    double found[TIMES];
    for (double &time : found) {
        double most = 0;
#pragma omp parallel num_threads(threads) reduction(max : most)
        {
            alignas(64) int32_t inputs[CHAINS];
            Sum sums[CHAINS];
            // Unrolled, all three: a sum whose number the compiler does not know would stand in memory.
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; ++i) inputs[i] = 0x01020304 + i, sums[i] = zero;
#pragma omp barrier
            const auto began = std::chrono::steady_clock::now();
            for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 16
                for (int i = 0; i < CHAINS; ++i) sums[i] = each(sums[i], inputs[i]);
                asm volatile("" ::: "memory");  // inputs are read again
            }
            most = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; ++i) asm volatile("" : : "v"(sums[i]));
        }
        time = double(threads) * CHAINS * TURNS / most;
    }
    std::sort(found, found + TIMES);
    return found[TIMES / 2];
}

// Multiplications a second; 0 where it is not known.
#ifdef __AVX512VNNI__
static double dots(int threads) {
    const __m512i weights = _mm512_set1_epi8(3);
    // GCC would load what is the same for all in an operation of its own.
    return 64 * rate(threads, _mm512_setzero_si512(), [=](__m512i sum, const int32_t &four) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(four));
        return sum;
    });
}
extern "C" double int8(int threads) { return dots(threads); }
extern "C" double int4(int threads) { return dots(threads); }
#elif defined(__AVX2__) && !defined(__AVXVNNI__)
extern "C" double int8(int threads) {
    const __m256i size = _mm256_set1_epi8(3), sign = _mm256_set1_epi8(-3), ones = _mm256_set1_epi16(1);
    return 32 * rate(threads, _mm256_setzero_si256(), [=](__m256i sum, int32_t four) {
        const __m256i inputs = _mm256_sign_epi8(_mm256_set1_epi32(four), sign);
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, inputs), ones));
    });
}
extern "C" double int4(int threads) {  // what is done once a group is left out
    const __m256i weights = _mm256_set1_epi8(3);
    return 32 * rate(threads, _mm256_setzero_si256(), [=](__m256i sum, int32_t four) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, _mm256_set1_epi32(four)));
    });
}
#else
extern "C" double int8(int) { return 0; }
extern "C" double int4(int) { return 0; }
#endif

// By instructions for pairs, or by fused operations on floats, whichever is faster.
extern "C" double bfloat16(int threads) {
    double most = 0 * threads;
#ifdef __AVX512F__
    const __m512 one = _mm512_set1_ps(1.f);
    most = 16 * rate(threads, _mm512_setzero_ps(), [=](__m512 sum, int32_t x) {
        return _mm512_fmadd_ps(one, _mm512_castsi512_ps(_mm512_set1_epi32(x)), sum);
    });
#elif defined(__AVX2__) && defined(__FMA__)
    const __m256 one = _mm256_set1_ps(1.f);
    most = 8 * rate(threads, _mm256_setzero_ps(), [=](__m256 sum, int32_t x) {
        return _mm256_fmadd_ps(one, _mm256_castsi256_ps(_mm256_set1_epi32(x)), sum);
    });
#endif
#ifdef __AVX512BF16__
    const __m512bh weights = (__m512bh)_mm512_set1_epi16(0x3f80);
    most = std::max(most, 32 * rate(threads, _mm512_setzero_ps(), [=](__m512 sum, int32_t two) {
        return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(two));
    }));
#endif
    return most;
}
