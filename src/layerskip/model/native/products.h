// Matrix products whose weights are read once for all rows of a call, whatever format W they are in.
//
// Weights lie in tiles of TILE outputs, a tile's groups of GROUP inputs one behind the other. What stands behind the
// last output and input is 0. A format says how long a group of a tile is (BYTES), what it makes of inputs (Rows), how
// many rows (AT_ONCE) and how many tiles (`tiles`) it takes at once, how many before other rows take them (STEP), how many groups ahead weights are asked for (`ahead`, by
// rows), whether the next tiles' are too (`next`), how a group is added to the sums of R rows (`add`), and what is done with a
// sum at last (`finished`).
//
// Exact: a row is prepared alone, and each of its sums goes over the groups in order, so its bits do not depend on the
// rows beside it, on the number of threads or on where a tile is.
#pragma once
#include <algorithm>

#include "attention.h"
#include "integers.h"
#include "team.h"

constexpr bool FETCHES = ZEN;  // whether the machine brings in time what few rows need, and asking costs it
#define UNROLLED _Pragma("GCC unroll 32")

static int64_t groups_of(int64_t width) { return (width + GROUP - 1) / GROUP; }

// Inputs of a call: rows in parts of about as many each, which the kernel takes at once. Of a part stand for each
// group those of all its rows side by side.
template <typename W>
struct Inputs {
    int64_t rows, width, groups, parts;
    typename W::Rows all;

    // In memory of the thread that asks for it, until it asks again; `widest` of those that share it.
    static Inputs of(int64_t rows, int64_t width, int64_t widest) {
        return {rows, width, groups_of(width), (rows + W::AT_ONCE - 1) / W::AT_ONCE,
                W::Rows::room(rows * groups_of(widest))};
    }
    int64_t first(int64_t part) const { return part * rows / parts; }
    typename W::Rows part(int64_t i) const { return all.behind(first(i) * groups); }

    // Take groups [from, to) of row r, which begins at x.
    template <typename T>
    void take(const T *x, int64_t r, int64_t from, int64_t to) const {
        const int64_t i = ((r + 1) * parts - 1) / rows, before = first(i), count = first(i + 1) - before;
        const typename W::Rows own = part(i);
        for (int64_t g = from; g < to; ++g) own.behind(g * count).put(x + g * GROUP, width - g * GROUP, r - before, count);
    }
    // Call for this thread's share: (row, first group, last group). It is groups of all rows, not rows: those of a part stand
    // side by side, and two threads that write to one cache line wait for each other.
    template <typename Each>
    void shared(Each each) const {
        const Share share = own_share(groups);
        if (share.first < share.stop)
            for (int64_t r = 0; r < rows; ++r) each(r, share.first, share.stop);
    }
    // By a team: take rows [rows, width].
    template <typename T>
    void fill(const T *x) const {
        shared([&](int64_t r, int64_t from, int64_t to) { take(x + r * width, r, from, to); });
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

// Add to outputs [first, first + TILE) of a row what is to be added, and round once.
template <typename T>
INLINED void ended(const Product &p, const float *found, int64_t row, int64_t first, T *y) {
    const int64_t at = row * p.out + first, live = p.out - first;
    const T *bias = static_cast<const T *>(p.bias), *onto = static_cast<const T *>(p.onto);
    for (int64_t i = 0; i < std::min<int64_t>(TILE, live); i += LANES) {
        Floats own = wide(found + i);
        if (bias) own += wide(bias + first + i, live - i);
        if (onto) own += wide(onto + at + i, live - i);
        rounded_to(y + at + i, own, live - i);
    }
}

// Asks for weights behind the line at hand: so many groups on into the first cache, so many bytes on into the second one.
// Between products, not before a group of them: what many requests at once keep waiting are those products' own loads.
template <int AHEAD, bool NEXT>
struct Asking {
    int64_t group, next;  // bytes
    // A call that only asks is dropped by GCC before it is inlined, unless it has to be.
    __attribute__((always_inline)) void operator()(const uint8_t *line) const {
        if constexpr (AHEAD > 0) __builtin_prefetch(line + AHEAD * group, 0, 3);
        if constexpr (NEXT) __builtin_prefetch(line + next, 0, 2);
    }
};

// N tiles from `tile` on, of R rows from `first_row` on.
template <typename W, typename T, int R, int N>
APART void some_tiles(const Product &p, typename W::Rows x, int64_t groups, int64_t first_row, int64_t tile, T *y) {
    constexpr int PARTS = W::PARTS;
    typename W::Sum sums[N][R][PARTS];
    UNROLLED
    for (int n = 0; n < N; ++n)
        UNROLLED
        for (int r = 0; r < R; ++r)
            UNROLLED
            for (int i = 0; i < PARTS; ++i) sums[n][r][i] = typename W::Sum{};
    const int64_t apart = groups * W::BYTES;
    const Asking<W::ahead(R), W::next(R)> ask = {W::BYTES, N * apart};
    const uint8_t *weights = p.weights + tile * apart;
    for (int64_t g = 0; g < groups; ++g, weights += W::BYTES, x = x.behind(R))
        W::template add<R, N>(weights, apart, x, sums, ask);
    float found[N][R][TILE];
    UNROLLED
    for (int n = 0; n < N; ++n)
        UNROLLED
        for (int r = 0; r < R; ++r)
            UNROLLED
            for (int i = 0, at = 0; i < PARTS; ++i, at += TILE / PARTS)
                kept(found[n][r] + at, W::finished(sums[n][r][i], p.scales, (tile + n) * TILE + at));
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) ended(p, found[n][r], first_row + r, (tile + n) * TILE, y);
}

// `count` rows, tiles [tile, stop).
template <typename W, typename T, int R>
static void some_rows(const Product &p, typename W::Rows x, int64_t groups, int64_t count, int64_t first_row,
                      int64_t tile, int64_t stop, T *y) {
    if constexpr (R > 1)
        if (count < R) return some_rows<W, T, R - 1>(p, x, groups, count, first_row, tile, stop, y);
    constexpr int N = W::tiles(R);
    for (; tile + N <= stop; tile += N) some_tiles<W, T, R, N>(p, x, groups, first_row, tile, y);
    if constexpr (N > 1)
        for (; tile < stop; ++tile) some_tiles<W, T, R, 1>(p, x, groups, first_row, tile, y);
}

// By a team, when the inputs are taken. Where there are several parts of rows, all take a few tiles before the next ones.
template <typename W, typename T>
APART void multiplied(const Product &p, const Inputs<W> &in, T *y) {
    const Share share = own_share((p.out + TILE - 1) / TILE);
    const int64_t step = in.parts == 1 ? share.stop - share.first : W::STEP;
    for (int64_t tile = share.first; tile < share.stop; tile += step)
        for (int64_t i = 0; i < in.parts; ++i)
            some_rows<W, T, W::AT_ONCE>(p, in.part(i), in.groups, in.first(i + 1) - in.first(i), in.first(i), tile,
                                        std::min(tile + step, share.stop), y);
    together();
}

template <typename W, typename T>
static void multiply(const Product &p, const T *x, T *y) {
    const auto in = Inputs<W>::of(p.rows, p.in, p.in);
    Team team;
#pragma omp parallel
    {
        const Member member(team);
        in.fill(x);
        multiplied<W>(p, in, y);
    }
}
