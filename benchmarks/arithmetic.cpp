// How many products of the vector unit a second some threads do together, when nothing but the first cache is read.
#include <algorithm>
#include <chrono>
#include <cstdint>
#if defined(__AVX512VNNI__) || defined(__AVX512BF16__)
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
            for (int i = 0; i < CHAINS; ++i) inputs[i] = 0x01020304 + i, sums[i] = zero;
#pragma omp barrier
            const auto began = std::chrono::steady_clock::now();
            for (int turn = 0; turn < TURNS; ++turn) {
#pragma GCC unroll 16
                for (int i = 0; i < CHAINS; ++i) sums[i] = each(sums[i], inputs[i]);
                asm volatile("" ::: "memory");  // inputs are read again
            }
            most = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
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
    return rate(threads, _mm512_setzero_si512(), [=](__m512i sum, int32_t four) {
        return _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32(four));
    });
#endif
    return 0 * threads;
}
extern "C" double pairs(int threads) {
#ifdef __AVX512BF16__
    const __m512bh weights = (__m512bh)_mm512_set1_epi16(0x3f80);
    return rate(threads, _mm512_setzero_ps(), [=](__m512 sum, int32_t two) {
        return _mm512_dpbf16_ps(sum, weights, (__m512bh)_mm512_set1_epi32(two));
    });
#endif
    return 0 * threads;
}
