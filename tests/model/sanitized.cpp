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
static std::unique_ptr<uint8_t[]> weights_of(int64_t in, int64_t out) {
    const int64_t bytes = (out + TILE - 1) / TILE * groups_of(in) * W::BYTES;
    std::unique_ptr<uint8_t[]> weights(new uint8_t[bytes]);
    for (int64_t i = 0; i < bytes; ++i) weights[i] = uint8_t(draw() & 0x3f);  // as halves: small numbers
    return weights;
}

static std::unique_ptr<float[]> scales_of(int64_t out) {
    const int64_t outs = (out + TILE - 1) / TILE * TILE;
    std::unique_ptr<float[]> scales(new float[outs]);
    std::fill(scales.get(), scales.get() + outs, 0.01f);
    return scales;
}

// Products of these sizes (in, out), without bias.
template <typename W>
struct Four {
    std::unique_ptr<uint8_t[]> weights[4];
    std::unique_ptr<float[]> scales[4];
    Product all[4];

    explicit Four(const int64_t (&sizes)[4][2]) {
        for (int i = 0; i < 4; ++i) {
            weights[i] = weights_of<W>(sizes[i][0], sizes[i][1]), scales[i] = scales_of(sizes[i][1]);
            all[i] = {0, sizes[i][0], sizes[i][1], weights[i].get(), scales[i].get(), nullptr, nullptr};
        }
    }
    const Product &operator[](int i) const { return all[i]; }
};

template <typename W>
static void product(int64_t rows, int64_t in, int64_t out, bool more, float special) {
    auto weights = weights_of<W>(in, out);
    auto scales = scales_of(out);
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
    glu<SILU>(two.get(), out.get(), rows * width, size, rows * width);
    glu<GELU_TANH>(two.get(), out.get(), rows * width, size, rows * width);
    glu<GELU>(two.get(), out.get(), rows * width, size, rows * width);
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
        attention(s, qkv.get(), cos.get(), sin.get(), cache.get(), index.get(), places.get(), places.get(), to.get());
    }
}

// Two layers, the second one with a window and without angles.
template <typename W>
static void slices(int64_t rows, int64_t width, int64_t model, int64_t mlp, int64_t size, int64_t heads, int64_t kv,
                   int64_t before) {
    const int64_t slots = (before + width + 1 + SLOTS) / SLOTS * SLOTS, total = (heads + 2 * kv) * size;
    const int64_t sizes[4][2] = {{model, total}, {heads * size, model}, {model, 2 * mlp}, {mlp, model}};
    auto h = reals<bf16>(rows * width * model), gain = reals<bf16>(std::max(model, size));
    auto cos = reals<bf16>(rows * width * size), sin = reals<bf16>(rows * width * size);
    auto cache = reals<bf16>(rows * 2 * kv * slots * size), other = reals<bf16>(rows * 2 * kv * slots * size);
    const Four<W> products(sizes);
    std::unique_ptr<int64_t[]> index(new int64_t[rows]), places(new int64_t[rows * width]);
    for (int64_t b = 0; b < rows; ++b) {
        index[b] = rows - 1 - b;
        for (int64_t t = 0; t < width; ++t) places[b * width + t] = before + t;
    }
    Layer layer{products[0], products[1], products[2], products[3], gain.get(), nullptr, nullptr, gain.get(),
                {1e-5f, 1e-5f, 1e-5f, 1e-5f}, 0, 1};
    Layer second = layer;
    second.q_norm = second.k_norm = gain.get(), second.window = 3, second.turns = 0;
    const Layer both[] = {layer, second};
    void *const caches[] = {cache.get(), other.get()};
    Shape s{rows, width, heads, kv, size, size, width * total, total, 2 * kv * slots * size, slots * size, 0, 0, 0.3f};
    run_layers<W>(Slice{s, 2, both, caches, cos.get(), sin.get(), index.get(), places.get(), places.get()}, h.get());
}

// Drafts behind an adapter of `blocks`, and the best of each row.
template <typename W>
static void chains(int64_t rows, int64_t steps, int64_t width, int64_t mlp, int64_t size, int64_t blocks) {
    const int64_t sizes[4][2] = {{2 * width, width}, {width, size}, {width, 2 * mlp}, {mlp, width}};
    const Four<W> products(sizes);
    auto table = reals<bf16>(size * width), gain = reals<bf16>(width), known = reals<bf16>(rows * width);
    std::unique_ptr<int64_t[]> ids(new int64_t[size]), tokens(new int64_t[(steps + 1) * rows]);
    std::unique_ptr<float[]> chances(new float[steps * rows]);
    for (int64_t i = 0; i < size; ++i) ids[i] = i;
    for (int64_t r = 0; r < rows; ++r) tokens[r] = draw() % size;
    const Block each[] = {{products[2], products[3]}, {products[2], products[3]}};
    draft<W>(Drafts{rows, steps, width, blocks, products[0], products[1], each, table.get(), gain.get(), 1.5f, 1e-5f, 1e-6f,
                    ids.get()}, known.get(), tokens.get(), chances.get());
    auto x = reals<float>(rows * size);
    std::unique_ptr<float[]> values(new float[rows]);
    x[0] = NAN;
    best_f32(x.get(), tokens.get(), values.get(), rows, size);
}

int main() {
    for (int64_t rows : {1, 2, 5, 12, 13, 33})
        for (int64_t in : {1, 31, 32, 70})
            for (int64_t out : {1, 16, 33})
                for (float special : {0.f, NAN, INFINITY, 3e38f, 1e-40f}) {
                    product<Int8>(rows, in, out, special == 0.f, special);
                    product<Int4>(rows, in, out, special != 0.f, special);
#ifdef BFLOAT_PRODUCTS
                    product<Bfloat>(rows, in, out, special != 0.f, special);
#endif
                }
    for (int64_t width : {1, 2, 7, 20})
        for (int64_t before : {0, 5, 63, 64, 130}) {
            regions<float>(2, width, 8, 4, 2, before);
            regions<bf16>(1, width, 64, 6, 2, before);
            regions<bf16>(2, width, 16, 3, 1, before);
            slices<Int4>(1, width, 72, 40, 64, 3, 1, before);
            slices<Int8>(2, width, 33, 31, 8, 4, 2, before);
#ifdef BFLOAT_PRODUCTS
            slices<Bfloat>(2, width, 70, 100, 128, 2, 2, before);
#endif
        }
    for (int64_t rows : {1, 3, 13})
        for (int64_t blocks : {0, 1, 2}) {
            chains<Int8>(rows, 3, 33, 31, 17, blocks);
            chains<Int4>(rows, 1, 64, 70, 1, blocks);
        }
    std::puts("done");
}
