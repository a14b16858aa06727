// Weights in bfloat16, where the vector unit has 32 registers of 16 floats.
//
// In a group of a tile stand for inputs 2 i and 2 i + 1 the pairs of all outputs, [GROUP / 2, TILE, 2]. A sum is one
// chain of products in float32, of pairs or of one input after the other; several tiles at once keep the unit busy.
#pragma once
#include <cstring>

#include "products.h"

#if INTEGER_REGISTERS + 0 == 32
#define BFLOAT_PRODUCTS

struct Paired {  // inputs [groups, GROUP / 2, R, 2]
    Factor<bf16> *values;

    static Paired room(int64_t count) {
        static thread_local Buffer<Factor<bf16>> values;
        return {values.sized(count * GROUP)};
    }
    Paired behind(int64_t count) const { return {values + count * GROUP}; }
    void put(const bf16 *x, int64_t live, int64_t r, int64_t count) const {
        Factor<bf16> own[GROUP] = {};
        if (live >= GROUP) for (int i = 0; i < GROUP; ++i) ::put(own[i], x[i]);
        else for (int i = 0; i < live; ++i) ::put(own[i], x[i]);
        for (int i = 0; i < GROUP; i += 2) std::memcpy(values + i * count + 2 * r, own + i, 2 * sizeof *own);
    }
};

struct Bfloat {
    typedef Paired Rows;
    static constexpr int AT_ONCE = PAIRS ? 12 : 24;
    static constexpr int64_t BYTES = TILE * GROUP * sizeof(bf16);
    static constexpr int tiles(int rows) { return rows <= 6 ? 4 : PAIRS || rows <= 8 ? 2 : 1; }
    static constexpr int ahead(int) { return FETCHES ? 0 : 1; }
    static constexpr bool next(int rows) { return !FETCHES || rows > 6; }

    template <int R, int N, typename Ask>
    INLINED void add(const uint8_t *weights, int64_t apart, const Paired &x, Reals (*sums)[R], const Ask &ask) {
        for (int i = 0; i < GROUP / 2; ++i)
            UNROLLED
            for (int n = 0; n < N; ++n) {
                const uint8_t *line = weights + n * apart + 4 * TILE * i;
                ask(line);
                const Words pairs = loaded<Words>(line);
                UNROLLED
                for (int r = 0; r < R; ++r)
                    sums[n][r] = (Reals)added<bf16>((Floats)sums[n][r], pairs, x.values + 2 * (R * i + r));
            }
    }
    INLINED Reals finished(Reals sum, const float *, int64_t) { return sum; }
};
#endif
