// Weights in bfloat16, where the vector unit fuses products with sums.
//
// In a group of a tile stand for inputs 2 i and 2 i + 1 the pairs of all outputs, [GROUP / 2, TILE, 2]. A sum is one
// chain of products in float32, of pairs or of one input after the other; several tiles at once keep the unit busy.
#pragma once
#include <cstring>

#include "products.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || defined(__aarch64__)
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
    typedef Floats Sum;
    static constexpr int PARTS = TILE / LANES;
    static constexpr int AT_ONCE = PARTS > 1 ? 6 : PAIRS ? 12 : 24;  // as many sums as there are registers for
    static constexpr int64_t BYTES = TILE * GROUP * sizeof(bf16);
    static constexpr int STEP = PARTS > 1 ? 1 : 4;
    static constexpr int tiles(int rows) {
        if (PARTS > 1) return rows == 1 ? 4 : rows == 2 ? 2 : 1;
        return rows <= 6 ? 4 : PAIRS || rows <= 8 ? 2 : 1;
    }
    // Several parts as timed on Zen 3; else Zen 4, and Emerald Rapids.
    static constexpr int ahead(int rows) { return PARTS > 1 ? (rows > 3 ? 2 : 0) : FETCHES ? 0 : 1; }
    static constexpr bool next(int rows) { return PARTS > 1 ? rows > 1 : !FETCHES || rows > 6; }

    template <int R, int N, typename Ask>
    INLINED void add(const uint8_t *weights, int64_t apart, const Paired &x, Floats (*sums)[R][PARTS], const Ask &ask) {
        for (int i = 0; i < GROUP / 2; ++i)
            UNROLLED
            for (int n = 0; n < N; ++n) {
                const uint8_t *line = weights + n * apart + 4 * TILE * i;
                ask(line);
                if constexpr (PARTS == 1) {
                    const Words pairs = loaded<Words>(line);
                    UNROLLED
                    for (int r = 0; r < R; ++r)
                        sums[n][r][0] = added<bf16>(sums[n][r][0], pairs, x.values + 2 * (R * i + r));
                } else {
                    UNROLLED
                    for (int k = 0; k < 2; ++k)  // one of each pair for all rows, then the other one
                        UNROLLED
                        for (int r = 0; r < R; ++r)
                            UNROLLED
                            for (int p = 0; p < PARTS; ++p) {
                                const Words pairs = loaded<Words>(line + 4 * LANES * p);
                                const Words one = k == 0 ? pairs << 16 : pairs & 0xffff0000u;
                                sums[n][r][p] = plus(sums[n][r][p], (Floats)one, x.values[2 * (R * i + r) + k]);
                            }
                }
            }
    }
    INLINED Floats finished(Floats sum, const float *, int64_t) { return sum; }
};
#endif
