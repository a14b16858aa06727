// Prints a number for each kind of product that all of its bits go into; test_vector_units.py compiles it for several processors.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "attention.h"
#include "bfloat.h"
#include "quantized.h"

static uint64_t state = 1;
static uint32_t draw() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
static float real() { return float(int32_t(draw() % 2001) - 1000) / 256.f; }

template <typename W>
static uint64_t bits_of() {
    state = 1;
    uint64_t all = 0;
    for (int64_t rows : {1, 2, 3, 4, 5, 7, 9, 13, 33})
        for (int64_t in : {1, 31, 32, 70, 576})
            for (int64_t out : {1, 16, 33, 96}) {
                const int64_t tiles = (out + TILE - 1) / TILE, groups = groups_of(in);
                std::vector<uint8_t> weights(tiles * groups * W::BYTES);
                for (auto &one : weights) one = uint8_t(draw());
                if constexpr (W::BYTES == TILE * GROUP * 2)  // bfloat16 of moderate size
                    for (size_t i = 1; i < weights.size(); i += 2) weights[i] = 0x3e | (draw() & 1) << 7;
                if constexpr (W::BYTES == TILE * GROUP / 2 + 4 * TILE)  // halves of moderate size
                    for (int64_t g = 0; g < tiles * groups; ++g)
                        for (int i = 1; i < 4 * TILE; i += 2) weights[(g + 1) * W::BYTES - 4 * TILE + i] = 0x2c;
                std::vector<float> scales(tiles * TILE);
                for (auto &one : scales) one = real();
                std::vector<bf16> x(rows * in), bias(out), onto(rows * out), y(rows * out);
                for (auto *some : {&x, &bias, &onto})
                    for (auto &one : *some) store(one, real());
                // The largest sums there are: inputs of one sign and of both, the first tile's weights all ones and all zeros.
                for (int64_t r = 0; r < std::min<int64_t>(rows, 3); ++r)
                    for (int64_t i = 0; i < in; ++i) store(x[r * in + i], r == 0 || (r == 1 && i % 2) ? 127.f : -127.f);
                if (W::BYTES <= TILE * GROUP)
                    for (int64_t i = 0; i < TILE * GROUP / 2; ++i) weights[i] = i % 8 < 4 ? 0xff : 0x00;
                multiply<W>(Product{rows, in, out, weights.data(), scales.data(), bias.data(), onto.data()}, x.data(), y.data());
                for (auto one : y) all = all * 0x100000001b3u + one.bits;
            }
    return all;
}

int main() {
    std::printf("int8 %016llx\nint4 %016llx\n", (unsigned long long)bits_of<Int8>(), (unsigned long long)bits_of<Int4>());
#ifdef BFLOAT_PRODUCTS
    if (!PAIRS) std::printf("bfloat16 %016llx\n", (unsigned long long)bits_of<Bfloat>());
#endif
}
