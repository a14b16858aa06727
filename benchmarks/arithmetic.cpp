// How many multiplications of weights a second some threads do together when nothing but the first cache is read, by the
// operations of the kernels themselves.
#include <algorithm>
#include <chrono>
#include <cstdint>

#include "../src/layerskip/model/native/integers.h"

// As many sums as there are registers for, beside what is multiplied.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int CHAINS = 16;
#else
constexpr int CHAINS = 10;
#endif
constexpr int TURNS = 100'000, TIMES = 5;

// Independent sums, so that no product waits for the one before it; one operand comes from memory, as inputs do.
template <typename Input, typename Sum, typename Each>
static double rate(int threads, Sum zero, Each each) {
    double found[TIMES];
    for (double &time : found) {
        double most = 0;
#pragma omp parallel num_threads(threads) reduction(max : most)
        {
            alignas(64) Input inputs[CHAINS];
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
            static thread_local uint8_t kept_at_last[sizeof(Sum)];
#pragma GCC unroll 16
            for (int i = 0; i < CHAINS; ++i) {
                kept(kept_at_last, sums[i]);
                asm volatile("" : : "r"(kept_at_last) : "memory");
            }
        }
        time = double(threads) * CHAINS * TURNS / most;
    }
    std::sort(found, found + TIMES);
    return found[TIMES / 2];
}

// Multiplications a second; what is done once a group is left out.
extern "C" double int8(int threads) {
    alignas(64) const uint8_t some[4 * TILE] = {3, 130};
    const Weights weights = weights_of(bytes(some));
    return 4 * REGISTER_OUTPUTS * rate<int32_t>(threads, every(0), [=](Ints sum, const int32_t &four) {
        return dotted(sum, weights, reinterpret_cast<const int8_t *>(&four));
    });
}
extern "C" double int4(int threads) {
    alignas(64) const uint8_t some[4 * TILE] = {3, 13};
    const Bytes weights = bytes(some);
    return 4 * REGISTER_OUTPUTS * rate<int32_t>(threads, no_sums(), [=](GroupSums sum, const int32_t &four) {
        return dotted(sum, weights, reinterpret_cast<const int8_t *>(&four));
    });
}
// By instructions for pairs, or by fused operations on floats, whichever is faster.
extern "C" double bfloat16(int threads) {
    const Floats one = Floats{} + 1.f;
    double most = LANES * rate<float>(threads, Floats{}, [=](Floats sum, const float &x) { return plus(sum, one, x); });
#ifdef __AVX512BF16__
    const __m512bh weights = (__m512bh)_mm512_set1_epi16(0x3f80);
    most = std::max(most, 32 * rate<int32_t>(threads, Floats{}, [=](Floats sum, const int32_t &two) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, weights, (__m512bh)_mm512_set1_epi32(two));
    }));
#endif
    return most;
}
