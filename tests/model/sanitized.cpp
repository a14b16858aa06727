// All compiled regions on buffers of exactly the sizes they are told, of odd sizes and with values at the limits; built with
// the address and undefined-behaviour sanitizers by test_sanitizers.py. Says nothing where nothing is wrong.
#include "kernels.cpp"

#include <cstdio>
#include <cstdlib>
#include <memory>

static uint64_t state = 1;
static uint32_t draw() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33); }
static float real() { return float(draw() % 2001) / 1000.f - 1.f; }

template <typename T>
static std::unique_ptr<T[]> reals(int64_t count) {  // on the heap, with nothing behind
    std::unique_ptr<T[]> x(new T[count]);
    for (int64_t i = 0; i < count; ++i) store(x[i], real());
    return x;
}

template <typename W>
static void product(int64_t rows, int64_t in, int64_t out, bool more, float special) {
    const int64_t groups = (in + GROUP - 1) / GROUP, tiles = (out + TILE - 1) / TILE, bytes = tiles * groups * W::BYTES;
    std::unique_ptr<uint8_t[]> weights(new uint8_t[bytes]);
    for (int64_t i = 0; i < bytes; ++i) weights[i] = uint8_t(draw() & 0x3f);  // as halves: small numbers
    std::unique_ptr<float[]> scales(new float[tiles * TILE]);
    for (int64_t i = 0; i < tiles * TILE; ++i) scales[i] = 0.01f;
    auto x = reals<bf16>(rows * in), bias = reals<bf16>(out), onto = reals<bf16>(rows * out), y = reals<bf16>(rows * out);
    store(x[draw() % (rows * in)], special);
    Product p{rows, in, out, weights.get(), scales.get(), more ? bias.get() : nullptr, more ? onto.get() : nullptr};
    multiply<W>(p, x.get(), y.get());
}

template <typename T>
static void regions(int64_t rows, int64_t width, int64_t size, int64_t heads, int64_t kv, int64_t before) {
    const int64_t slots = (before + width + 1 + SLOTS) / SLOTS * SLOTS, total = heads + 2 * kv;
    auto h = reals<T>(rows * width * size), gain = reals<T>(size), out = reals<T>(rows * width * size);
    norm(h.get(), gain.get(), out.get(), rows * width, size, rows * width, 1e-5f);
    auto two = reals<T>(rows * width * 2 * size);
    swiglu(two.get(), out.get(), rows * width, size, rows * width);
    auto qkv = reals<T>(rows * width * total * size), cos = reals<T>(rows * width * size), sin = reals<T>(rows * width * size);
    auto cache = reals<T>(rows * 2 * kv * slots * size), to = reals<T>(rows * width * heads * size);
    std::unique_ptr<int64_t[]> index(new int64_t[rows]), places(new int64_t[rows * width]);
    for (int64_t b = 0; b < rows; ++b) {
        index[b] = rows - 1 - b;
        for (int64_t t = 0; t < width; ++t) places[b * width + t] = before + t;
    }
    for (int64_t window : {int64_t(0), int64_t(3)}) {
        Shape s{rows, width, heads, kv, size, size, width * total * size, total * size, 2 * kv * slots * size, slots * size,
                window, width, 0.3f};
        rotate_and_store(s, qkv.get(), cos.get(), sin.get(), cache.get(), index.get(), places.get());
        attend(s, qkv.get(), cache.get(), index.get(), places.get(), to.get());
    }
}

int main() {
    for (int64_t rows : {1, 2, 5, 12, 13, 33})
        for (int64_t in : {1, 31, 32, 70})
            for (int64_t out : {1, 16, 33})
                for (float special : {0.f, NAN, INFINITY, 3e38f, 1e-40f}) {
                    product<Int8>(rows, in, out, special == 0.f, special);
                    product<Int4>(rows, in, out, special != 0.f, special);
                }
    for (int64_t width : {1, 2, 7, 20})
        for (int64_t before : {0, 5, 63, 64, 130}) {
            regions<float>(2, width, 8, 4, 2, before);
            regions<bf16>(1, width, 64, 6, 2, before);
            regions<bf16>(2, width, 16, 3, 1, before);
        }
    std::puts("done");
}
