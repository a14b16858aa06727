// Weights of 8 or 4 bits.
//
// Inputs are rounded to 8 bits here, GROUP of a row sharing a scale; a weight is an unsigned number w. Of 4 bits:
// scale * w + least, both of an output and a group; of 8: scale * (w - 128), the scale of an output. So a product is
// a sum of integers a group, and those are added up in float32 in the order of the groups.
//
// Exact: a row is quantised alone and its sums are of integers, so its bits do not depend on the rows beside it or on
// the number of threads; on machines that fuse a product with a sum, nor on the vector unit.
//
// In a group of a tile stand for inputs 4 i .. 4 i + 3 the bytes of all outputs, [GROUP / 4, TILE, 4] (of 4 bits: the
// second half of the group above the first one), and then, of 4 bits, TILE scales and TILE least values in half
// precision.
#pragma once
#include <cmath>

#include "products.h"

constexpr float NOTHING = 1e-30f;  // inputs of this size are 0: so that no quotient is infinite

// Round a group of at most GROUP values to 8 bits, four of them every `stride` bytes. A value that is no number makes
// the scale one too, and so results.
template <typename T>
static void quantised(const T *x, int64_t live, int64_t stride, int8_t *bytes, float &scale, int32_t &sum,
                      float &total) {
    constexpr float whole = 12582912.f;  // 1.5 * 2^23: floats there are integers
    constexpr int N = GROUP / LANES;
    typedef Vector<int32_t, LANES>::type Wholes;
    typedef Vector<int32_t, LANES / 4>::type Fours;  // bytes
    Floats values[N];
    // Bits without their sign order as numbers do, and those that are none are above all.
    Wholes most = {}, all = {};
    for (int i = 0; i < N; ++i) {
        values[i] = live >= GROUP ? wide(x + i * LANES) : wide(x + i * LANES, std::max<int64_t>(0, live - i * LANES));
        const Wholes bits = (Wholes)values[i] & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const int32_t top = over_lanes<LANES>(most, [](auto a, auto b) { return a > b ? a : b; });
    const float largest = loaded<float>(&top);
    float inverse = 127.f / largest;
    scale = largest / 127.f;
    if (__builtin_expect(!(largest > NOTHING && largest < INFINITY), false)) {
        scale = largest <= NOTHING ? 0.f : NAN, inverse = 0.f;
        if (!(largest <= NOTHING)) std::fill(values, values + N, Floats{});
    }
    for (int i = 0; i < N; ++i) {
        const Wholes near = (Wholes)plus(Floats{} + whole, values[i], inverse) - 0x4b400000;
        const auto fours = (Fours)__builtin_convertvector(near, Vector<int8_t, LANES>::type);
        for (int k = 0; k < LANES / 4; ++k) kept(bytes + (i * LANES / 4 + k) * stride, int32_t(fours[k]));
        all += near;
    }
    const int32_t one = over_lanes<LANES>(all, [](auto a, auto b) { return a + b; });
    sum = -128 * one;
    total = scale * float(one);
}

struct Quantised {  // inputs
    int8_t *bytes;    // [groups, GROUP / 4, R, 4]
    float *scales;    // [groups, R]
    int32_t *sums;    // [groups, R], -128 times the bytes' sum
    float *totals;    // [groups, R], scale times sum

    static Quantised room(int64_t count) {
        static thread_local Buffer<int8_t> bytes;
        static thread_local Buffer<float> scales, totals;
        static thread_local Buffer<int32_t> sums;
        return {bytes.sized(count * GROUP), scales.sized(count), sums.sized(count), totals.sized(count)};
    }
    Quantised behind(int64_t count) const {
        return {bytes + count * GROUP, scales + count, sums + count, totals + count};
    }
    template <typename T>
    void put(const T *x, int64_t live, int64_t r, int64_t count) const {
        quantised(x, live, 4 * count, bytes + 4 * r, scales[r], sums[r], totals[r]);
    }
};

// Sums of products go on row by row, so that no product waits for the one before it.
template <int R, typename Sum, typename Some>
INLINED void dotted(Sum *dots, const Some &weights, const int8_t *inputs) {
    UNROLLED
    for (int r = 0; r < R; ++r) dots[r] = dotted(dots[r], weights, inputs + 4 * r);
}

// The same place, but the compiler does not know that: what one part of a tile loads is not kept in memory for the next one.
INLINED const int8_t *anew(const int8_t *from) {
    asm volatile("" : "+r"(from));
    return from;
}

struct FewBits {
    typedef Quantised Rows;
    typedef Reals Sum;
    static constexpr int AT_ONCE = REGISTER_ROWS, STEP = 1;
    static constexpr int WIDTH = REGISTER_OUTPUTS, PARTS = TILE / WIDTH;
    static constexpr int tiles(int) { return 1; }
    // As timed on Zen 3 (two parts), Zen 4 and Emerald Rapids.
    static constexpr int ahead(int rows) { return FETCHES ? (PARTS > 1 ? 4 : rows > 4 ? 8 : 0) : rows > 4 ? 1 : 16; }
    static constexpr bool next(int rows) { return !FETCHES && rows > 4; }
};

struct Int4 : FewBits {
    static constexpr int64_t BYTES = TILE * GROUP / 2 + 4 * TILE;

    template <int R, int N, typename Ask>
    INLINED void add(const uint8_t *weights, int64_t, const Quantised &x, Reals (*sums)[R][PARTS], const Ask &ask) {
        UNROLLED
        for (int p = 0; p < PARTS; ++p) {
            const int8_t *inputs = anew(x.bytes);
            GroupSums dots[R];
            UNROLLED
            for (int r = 0; r < R; ++r) dots[r] = no_sums();
            UNROLLED
            for (int i = 0; i < GROUP / 8; ++i) {
                if (p == 0) ask(weights + 4 * TILE * i);
                const Bytes both = bytes(weights + 4 * (TILE * i + WIDTH * p));
                dotted<R>(dots, low(both), inputs + 4 * R * i);
                dotted<R>(dots, high(both), inputs + 4 * R * (i + GROUP / 8));
            }
            const uint8_t *behind = weights + TILE * GROUP / 2 + 2 * WIDTH * p;
            if (p == 0) ask(behind);
            const Reals scale = halves(behind), least = halves(behind + 2 * TILE);
            UNROLLED
            for (int r = 0; r < R; ++r) {
                Reals &sum = sums[0][r][p];
                sum = fused(times(scale, every(x.scales[r])), as_reals(dots[r]), sum);
                sum = fused(least, every(x.totals[r]), sum);
            }
        }
    }
    INLINED Reals finished(Reals sum, const float *, int64_t) { return sum; }
};

struct Int8 : FewBits {
    static constexpr int64_t BYTES = TILE * GROUP;

    template <int R, int N, typename Ask>
    INLINED void add(const uint8_t *weights, int64_t, const Quantised &x, Reals (*sums)[R][PARTS], const Ask &ask) {
        UNROLLED
        for (int p = 0; p < PARTS; ++p) {
            const int8_t *inputs = anew(x.bytes);
            Ints dots[R];
            UNROLLED
            for (int r = 0; r < R; ++r) dots[r] = every(OFFSET ? x.sums[r] : 0);
            UNROLLED
            for (int i = 0; i < GROUP / 4; ++i) {
                if (p == 0) ask(weights + 4 * TILE * i);
                dotted<R>(dots, weights_of(bytes(weights + 4 * (TILE * i + WIDTH * p))), inputs + 4 * R * i);
            }
            UNROLLED
            for (int r = 0; r < R; ++r)
                sums[0][r][p] = fused(every(x.scales[r]), as_reals(dots[r]), sums[0][r][p]);
        }
    }
    INLINED Reals finished(Reals sum, const float *scales, int64_t out) { return times(sum, reals(scales + out)); }
};
