// Weights in bfloat16, where the vector unit multiplies pairs of them (AVX512-BF16).
//
// In a group of a tile stand for inputs 2 i and 2 i + 1 the pairs of all outputs, [GROUP / 2, TILE, 2]. A sum is one
// chain of products of pairs in float32; several tiles at once keep the unit busy.
#pragma once
#include <cstring>

#include "products.h"

#if defined(__AVX512BF16__) && INTEGER_REGISTERS + 0 == 32
#define BFLOAT_PRODUCTS

struct Pairs {  // inputs [groups, GROUP / 2, R, 2]
    uint32_t *pairs;

    static Pairs room(int64_t count) {
        static thread_local Buffer<uint32_t> pairs;
        return {pairs.sized(count * GROUP / 2)};
    }
    Pairs behind(int64_t count) const { return {pairs + count * GROUP / 2}; }
    void put(const bf16 *x, int64_t live, int64_t r, int64_t count) const {
        uint32_t group[GROUP / 2] = {};
        std::memcpy(group, x, std::min<int64_t>(GROUP, live) * sizeof(bf16));
        for (int i = 0; i < GROUP / 2; ++i) pairs[i * count + r] = group[i];
    }
};

struct Bfloat {
    typedef Pairs Rows;
    static constexpr int AT_ONCE = 12;
    static constexpr int64_t BYTES = TILE * GROUP * sizeof(bf16);
    static constexpr int tiles(int rows) { return rows <= 6 ? 4 : 2; }
    static constexpr int ahead(int) { return FETCHES ? 0 : 1; }
    static constexpr bool next(int rows) { return !FETCHES || rows > 6; }

    template <int R, int N, typename Ask>
    INLINED void add(const uint8_t *weights, int64_t apart, const Pairs &x, Reals (*sums)[R], const Ask &ask) {
        for (int i = 0; i < GROUP / 2; ++i)
            UNROLLED
            for (int n = 0; n < N; ++n) {
                const uint8_t *line = weights + n * apart + 4 * TILE * i;
                ask(line);
                const auto pairs = (__m512bh)_mm512_loadu_si512(line);
                UNROLLED
                for (int r = 0; r < R; ++r)
                    sums[n][r] = _mm512_dpbf16_ps(sums[n][r], pairs, (__m512bh)_mm512_set1_epi32(int(x.pairs[R * i + r])));
            }
    }
    INLINED Reals finished(Reals sum, const float *, int64_t) { return sum; }
};
#endif
