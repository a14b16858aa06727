// One decoding step on the CPU. What stands between its matrix products, each in one call: RMS norm, gated units, rotary
// angles with the cache write, attention of few positions; products in several formats; and in one call whole layers,
// or the drafts of an adapter. `kernels.py` compiles and calls them.
//
// Exact: every row (position) is computed by the same loop in the same order whatever rows stand beside it, so
// verifying K+1 positions gives the bits of K+1 single steps. No fast-math: NaN must stay NaN.
#include "attention.h"
#include "bfloat.h"
#include "drafts.h"
#include "layers.h"
#include "quantized.h"
#include "rows.h"

// More rows may be wanted than there are (see `Packed` in linear.py): row 0 of `out` stands for those behind.
template <typename T>
static void fill_behind(T *out, int64_t width, int64_t rows, int64_t padded) {
    for (int64_t i = rows; i < padded; ++i) std::memcpy(out + i * width, out, width * sizeof(T));
}

template <typename T>
static void norm(const T *h, const T *gain, T *out, int64_t rows, int64_t width, int64_t padded, float eps) {
#pragma omp parallel for if (rows > 32)
    for (int64_t row = 0; row < rows; ++row) normed(h + row * width, gain, out + row * width, width, eps);
    fill_behind(out, width, rows, padded);
}

// gate and up stand side by side: [rows, 2 width] -> activation(gate) * up [rows, width].
template <Activation A, typename T>
static void glu(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {
#pragma omp parallel for if (rows > 32)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = x + 2 * row * width;
        for (int64_t at = 0; at < width; at += GROUP)  // as where it is rounded next
            gated<A>(gate + at, gate + width + at, out + row * width + at, std::min<int64_t>(GROUP, width - at));
    }
    fill_behind(out, width, rows, padded);
}

template <typename T, int D>
static void attend(const Shape &s, T *qkv, const T *cos, const T *sin, T *cache, const int64_t *cache_rows,
                   const int64_t *positions, const int64_t *slots, T *out) {
    const Attention<T, D> plan(s, cache_rows, positions);
    const auto room = plan.room(plan.chunks());
    for (int64_t b = 0; b < s.rows; ++b)
        for (int64_t t = 0; t < s.width; ++t) {
            T *token = qkv + b * s.qkv_row + t * s.qkv_position;
            turned_and_stored(s, b, t, token, cos, sin, cache, cache_rows, slots);
            plan.gather(b, t, token, room);
        }
    Team team;
#pragma omp parallel if (plan.chunks() > 1)
    {
        const Member member(team);
        plan(cache, room, out);
    }
}

template <typename T>
static void attention(const Shape &s, T *qkv, const T *cos, const T *sin, T *cache, const int64_t *cache_rows,
                      const int64_t *positions, const int64_t *slots, T *out) {
    switch (s.size) {
        case 64: attend<T, 64>(s, qkv, cos, sin, cache, cache_rows, positions, slots, out); break;
        case 128: attend<T, 128>(s, qkv, cos, sin, cache, cache_rows, positions, slots, out); break;
        default: attend<T, 0>(s, qkv, cos, sin, cache, cache_rows, positions, slots, out);
    }
    fill_behind(out, s.heads * s.size, s.width, s.padded);
}

#define EXPORT(T, suffix)                                                                                       \
    extern "C" void norm_##suffix(const T *h, const T *gain, T *out, int64_t rows, int64_t width,              \
                                  int64_t padded, float eps) {                                                 \
        norm(h, gain, out, rows, width, padded, eps);                                                          \
    }                                                                                                          \
    extern "C" void silu_##suffix(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {           \
        glu<SILU>(x, out, rows, width, padded);                                                                \
    }                                                                                                          \
    extern "C" void gelu_tanh_##suffix(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {      \
        glu<GELU_TANH>(x, out, rows, width, padded);                                                           \
    }                                                                                                          \
    extern "C" void gelu_##suffix(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {           \
        glu<GELU>(x, out, rows, width, padded);                                                                \
    }                                                                                                          \
    extern "C" void attention_##suffix(const Shape *s, T *qkv, const T *cos, const T *sin, T *cache,           \
                                       const int64_t *cache_rows, const int64_t *positions,                    \
                                       const int64_t *slots, T *out) {                                         \
        attention(*s, qkv, cos, sin, cache, cache_rows, positions, slots, out);                                \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)

// Of each row [rows, width]: the first of the largest values, and that value; NaN where there is one.
extern "C" void best_f32(const float *x, int64_t *ids, float *values, int64_t rows, int64_t width) {
#pragma omp parallel for if (rows > 1)
    for (int64_t r = 0; r < rows; ++r) ids[r] = best_of(x + r * width, width, values[r]);
}

#define EXPORT_PRODUCT(W, name)                                                                                 \
    extern "C" void name##_bf16(const Product *p, const bf16 *x, bf16 *y) { multiply<W>(*p, x, y); }           \
    extern "C" void layers_##name##_bf16(const Slice *slice, bf16 *h) { run_layers<W>(*slice, h); }             \
    extern "C" void drafts_##name##_bf16(const Drafts *d, bf16 *known, int64_t *tokens, float *chances) {       \
        draft<W>(*d, known, tokens, chances);                                                                   \
    }

EXPORT_PRODUCT(Int8, int8)
EXPORT_PRODUCT(Int4, int4)
#ifdef BFLOAT_PRODUCTS
EXPORT_PRODUCT(Bfloat, bfloat16)
#endif
