// How many products of the vector unit a second some threads do together, when nothing but the first cache is read.
#include <algorithm>
#include <chrono>
#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int CHAINS = 16, TURNS = 100'000, TIMES = 5;

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

// A second, of 64 products of bytes or 32 of bfloat16 each; 0 where the processor has none.
extern "C" double integers(int threads) {
#ifdef __AVX512VNNI__
    const __m512i weights = _mm512_set1_epi8(3);
    // As the kernels do it: GCC would load what is the same for all in an operation of its own.
    return rate(threads, _mm512_setzero_si512(), [=](__m512i sum, const int32_t &four) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(four));
        return sum;
    });
#endif
    return 0 * threads;
}
// By instructions for pairs, or half as many numbers by fused operations on floats: what is faster.
extern "C" double pairs(int threads) {
    double most = 0;
#ifdef __AVX512F__
    const __m512 one = _mm512_set1_ps(1.f);
    most = rate(threads, _mm512_setzero_ps(), [=](__m512 sum, int32_t x) {
        return _mm512_fmadd_ps(one, _mm512_castsi512_ps(_mm512_set1_epi32(x)), sum);
    }) / 2;
#endif
#ifdef __AVX512BF16__
    const __m512bh weights = (__m512bh)_mm512_set1_epi16(0x3f80);
    most = std::max(most, rate(threads, _mm512_setzero_ps(), [=](__m512 sum, int32_t two) {
        return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(two));
    }));
#endif
    return most;
}
