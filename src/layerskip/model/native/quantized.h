// Matrix products with weights of 8 or 4 bits, which are read once for all rows of a call.
//
// Inputs are rounded to 8 bits here, GROUP of a row sharing a scale; a weight is an unsigned number w. Of 4 bits:
// scale * w + least, both of an output and a group; of 8: scale * (w - 128), the scale of an output. So a product is
// a sum of integers a group, and those are added up in float32 in the order of the groups.
//
// Exact: a row is quantised alone and its sums are of integers, so its bits do not depend on the rows beside it, on
// the number of threads or on the vector unit.
//
// Weights lie in tiles of TILE outputs, a tile's groups one behind the other: for inputs 4 i .. 4 i + 3 of the group
// the bytes of all outputs, [GROUP / 4, TILE, 4] (of 4 bits: the second half of the group above the first one), and
// then, of 4 bits, TILE scales and TILE least values in half precision. What stands behind the last output and input
// is 0.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "attention.h"
#include "integers.h"
#include "team.h"

constexpr int GROUP = 32;   // inputs that share a scale
constexpr float NOTHING = 1e-30f;  // inputs of this size are 0: so that no quotient is infinite
constexpr int AHEAD = 8;    // groups whose weights are asked for beforehand
#ifdef INTEGER_REGISTERS
constexpr int AT_ONCE = INTEGER_REGISTERS * 3 / 8;  // rows whose sums stand in registers
#define UNROLLED _Pragma("GCC unroll 16")
#else
constexpr int AT_ONCE = 2;
#define UNROLLED
#endif

struct Rows {  // quantised inputs of R rows, for each group those of all rows side by side
    const int8_t *bytes;  // [groups, GROUP / 4, R, 4]
    const float *scales;  // [groups, R]
    const int32_t *sums;  // [groups, R], -128 times the bytes' sum
    const float *totals;  // [groups, R], scale times sum
    int64_t groups;

    template <int R>
    INLINED Rows after(Rows x) {
        return {x.bytes + R * GROUP, x.scales + R, x.sums + R, x.totals + R, x.groups};
    }
};

// Sums of products go on row by row, so that no product waits for the one before it.
template <int R>
INLINED void dotted(Ints *dots, Bytes weights, const int8_t *inputs) {
    UNROLLED
    for (int r = 0; r < R; ++r) dots[r] = dotted(dots[r], weights, loaded<int32_t>(inputs + 4 * r));
}

struct Int4 {
    static constexpr int64_t BYTES = TILE * GROUP / 2 + 4 * TILE;  // of a group of a tile

    template <int R>
    INLINED void add(const uint8_t *weights, const Rows &x, Reals *sums) {
        Ints dots[R];
        UNROLLED
        for (int r = 0; r < R; ++r) dots[r] = every(0);
        UNROLLED
        for (int i = 0; i < GROUP / 8; ++i) {
            const Bytes both = bytes(weights + 4 * TILE * i);
            dotted<R>(dots, low(both), x.bytes + 4 * R * i);
            dotted<R>(dots, high(both), x.bytes + 4 * R * (i + GROUP / 8));
        }
        const Reals scale = halves(weights + TILE * GROUP / 2), least = halves(weights + TILE * GROUP / 2 + 2 * TILE);
        UNROLLED
        for (int r = 0; r < R; ++r) {
            sums[r] = fused(times(scale, every(x.scales[r])), as_reals(dots[r]), sums[r]);
            sums[r] = fused(least, every(x.totals[r]), sums[r]);
        }
    }
    INLINED Reals finished(Reals sum, const float *, int64_t) { return sum; }
};

struct Int8 {
    static constexpr int64_t BYTES = TILE * GROUP;

    template <int R>
    INLINED void add(const uint8_t *weights, const Rows &x, Reals *sums) {
        Ints dots[R];
        UNROLLED
        for (int r = 0; r < R; ++r) dots[r] = every(x.sums[r]);
        UNROLLED
        for (int i = 0; i < GROUP / 4; ++i) dotted<R>(dots, bytes(weights + 4 * TILE * i), x.bytes + 4 * R * i);
        UNROLLED
        for (int r = 0; r < R; ++r) sums[r] = fused(every(x.scales[r]), as_reals(dots[r]), sums[r]);
    }
    INLINED Reals finished(Reals sum, const float *scales, int64_t out) { return times(sum, reals(scales + out)); }
};

// Round a group of at most GROUP values to 8 bits, four of them every `stride` bytes. A value that is no number makes
// the scale one too, and so results.
template <typename T>
static void quantised(const T *x, int64_t live, int64_t stride, int8_t *bytes, float &scale, int32_t &sum,
                      float &total) {
    constexpr float whole = 12582912.f;  // 1.5 * 2^23: floats there are integers
    constexpr int N = GROUP / LANES;
    typedef Vector<int32_t, LANES>::type Wholes;
    float values[GROUP] = {};
    if (live >= GROUP) for (int i = 0; i < GROUP; ++i) values[i] = load(x[i]);
    else for (int i = 0; i < live; ++i) values[i] = load(x[i]);
    // Bits without their sign order as numbers do, and those that are none are above all.
    Wholes most = {}, all = {};
    for (int i = 0; i < N; ++i) {
        const Wholes bits = loaded<Wholes>(values + i * LANES) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const int32_t top = over_lanes<LANES>(most, [](auto a, auto b) { return a > b ? a : b; });
    const bool broken = top >= 0x7f800000;
    if (broken) std::fill(values, values + GROUP, 0.f);
    const float largest = loaded<float>(&top), inverse = !broken && largest > NOTHING ? 127.f / largest : 0.f;
    int8_t found[GROUP];
    for (int i = 0; i < N; ++i) {
        const Wholes near = (Wholes)(loaded<Floats>(values + i * LANES) * inverse + whole) - 0x4b400000;
        kept(found + i * LANES, __builtin_convertvector(near, Vector<int8_t, LANES>::type));
        all += near;
    }
    const int32_t one = over_lanes<LANES>(all, [](auto a, auto b) { return a + b; });
    for (int i = 0; i < GROUP / 4; ++i) std::memcpy(bytes + i * stride, found + 4 * i, 4);
    scale = broken ? NAN : inverse > 0.f ? largest / 127.f : 0.f;
    sum = -128 * one;
    total = scale * float(one);
}

static int64_t groups_of(int64_t width) { return (width + GROUP - 1) / GROUP; }

// Inputs of a call: rows in parts of about as many each, which the kernel takes at once.
struct Inputs {
    int64_t rows, width, groups, parts;
    int8_t *bytes;
    float *scales, *totals;
    int32_t *sums;

    // In memory of the thread that asks for it, until it asks again; `widest` of those that share it.
    static Inputs of(int64_t rows, int64_t width, int64_t widest) {
        static thread_local Buffer<int8_t> bytes;
        static thread_local Buffer<float> scales, totals;
        static thread_local Buffer<int32_t> sums;
        const int64_t count = rows * groups_of(widest);
        return {rows, width, groups_of(width), (rows + AT_ONCE - 1) / AT_ONCE, bytes.sized(count * GROUP),
                scales.sized(count), totals.sized(count), sums.sized(count)};
    }
    int64_t first(int64_t part) const { return part * rows / parts; }
    Rows part(int64_t i) const {
        const int64_t at = first(i) * groups;
        return {bytes + at * GROUP, scales + at, sums + at, totals + at, groups};
    }
    // Round groups [from, to) of row r, which begins at x.
    template <typename T>
    void round(const T *x, int64_t r, int64_t from, int64_t to) const {
        const int64_t i = ((r + 1) * parts - 1) / rows, begin = first(i), count = first(i + 1) - begin;
        for (int64_t g = from; g < to; ++g) {
            const int64_t at = begin * groups + g * count, place = at + r - begin;
            quantised(x + g * GROUP, width - g * GROUP, 4 * count, bytes + at * GROUP + 4 * (r - begin),
                      scales[place], sums[place], totals[place]);
        }
    }
    // Call for this thread's share of all groups: (row, first group, last group).
    template <typename Each>
    void shared(Each each) const {
        const Share share = own_share(rows * groups);
        for (int64_t at = share.first; at < share.stop;) {
            const int64_t r = at / groups, from = at - r * groups, to = std::min(groups, from + share.stop - at);
            each(r, from, to);
            at += to - from;
        }
    }
    // By a team: round rows [rows, width].
    template <typename T>
    void fill(const T *x) const {
        shared([&](int64_t r, int64_t from, int64_t to) { round(x + r * width, r, from, to); });
        together();
    }
};

struct Product {  // y = x w^T + bias + onto, [rows, in] -> [rows, out]
    int64_t rows, in, out;
    const uint8_t *weights;
    const float *scales;  // [tiles * TILE], of 8 bits
    const void *bias;     // [out] in the dtype of x, or null
    const void *onto;     // [rows, out] in the dtype of x, or null
};

// Add what is to be added and round once; a known number of outputs is for the compiler.
template <int N, typename T>
INLINED void ended(float *found, const T *bias, const T *onto, T *y, int live = N) {
    const int count = N ? N : live;
    if (bias) for (int i = 0; i < count; ++i) found[i] += load(bias[i]);
    if (onto) for (int i = 0; i < count; ++i) found[i] += load(onto[i]);
    for (int i = 0; i < count; ++i) store(y[i], found[i]);
}

template <typename W, typename T, int R>
static void some_rows(const Product &p, Rows x, int64_t count, int64_t first_row, int64_t tile, T *y) {
    if constexpr (R > 1)
        if (count < R) return some_rows<W, T, R - 1>(p, x, count, first_row, tile, y);
    Reals sums[R];
    UNROLLED
    for (int r = 0; r < R; ++r) sums[r] = every(0.f);
    const uint8_t *weights = p.weights + tile * x.groups * W::BYTES;
    for (int64_t g = 0; g < x.groups; ++g, weights += W::BYTES, x = Rows::after<R>(x)) {
        if constexpr (R > 4)  // what few rows need comes in time by itself
            for (int64_t line = 0; line < W::BYTES; line += 64) __builtin_prefetch(weights + AHEAD * W::BYTES + line);
        W::template add<R>(weights, x, sums);
    }
    const int64_t first = tile * TILE;
    for (int r = 0; r < R; ++r) {
        float found[TILE];
        kept(found, W::finished(sums[r], p.scales, first));
        const int64_t at = (first_row + r) * p.out + first;
        const T *bias = static_cast<const T *>(p.bias), *onto = static_cast<const T *>(p.onto);
        bias = bias ? bias + first : nullptr, onto = onto ? onto + at : nullptr;
        if (p.out - first >= TILE) ended<TILE>(found, bias, onto, y + at);
        else ended<0>(found, bias, onto, y + at, int(p.out - first));
    }
}

// By a team, when the inputs are filled.
template <typename W, typename T>
static void multiplied(const Product &p, const Inputs &in, T *y) {
    const Share share = own_share((p.out + TILE - 1) / TILE);
    for (int64_t tile = share.first; tile < share.stop; ++tile)
        for (int64_t i = 0; i < in.parts; ++i)
            some_rows<W, T, AT_ONCE>(p, in.part(i), in.first(i + 1) - in.first(i), in.first(i), tile, y);
    together();
}

template <typename W, typename T>
static void multiply(const Product &p, const T *x, T *y) {
    const Inputs in = Inputs::of(p.rows, p.in, p.in);
#pragma omp parallel
    {
        in.fill(x);
        multiplied<W>(p, in, y);
    }
}
