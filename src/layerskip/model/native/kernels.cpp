// The regions between the matrix products of one decoding step on the CPU, each in one call: RMS norm, SwiGLU,
// rotary angles with the cache write, attention of few positions. `kernels.py` compiles and calls them.
//
// Exact: every row (position) is computed by the same loop in the same order whatever rows stand beside it, so
// verifying K+1 positions gives the bits of K+1 single steps. No fast-math: NaN must stay NaN.
#include <algorithm>

#include "attention.h"
#include "numbers.h"
#include "quantized.h"

// More rows may be wanted than there are (see `Packed` in linear.py): row 0 of `out` stands for those behind.
template <typename T>
static void fill_behind(T *out, int64_t width, int64_t rows, int64_t padded) {
    for (int64_t i = rows; i < padded; ++i) std::memcpy(out + i * width, out, width * sizeof(T));
}

template <typename T>
static void norm(const T *h, const T *gain, T *out, int64_t rows, int64_t width, int64_t padded, float eps) {
#pragma omp parallel for if (rows > 32)
    for (int64_t row = 0; row < rows; ++row) {
        const T *x = h + row * width;
        T *y = out + row * width;
        float squares = 0.f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += load(x[i]) * load(x[i]);
        float inverse = 1.f / std::sqrt(squares / float(width) + eps);
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(y[i], load(x[i]) * inverse * load(gain[i]));
    }
    fill_behind(out, width, rows, padded);
}

// gate and up stand side by side: [rows, 2 width] -> silu(gate) * up [rows, width].
template <typename T>
static void swiglu(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {
#pragma omp parallel for if (rows > 32)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = x + 2 * row * width, *up = gate + width;
        T *y = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float g = load(gate[i]);
            store(y[i], g / (1.f + exponential(std::min(-g, 88.f))) * load(up[i]));
        }
    }
    fill_behind(out, width, rows, padded);
}

// Turn queries in place; put turned keys and the values at their slots. `cos`, `sin`: [B, T, rotary].
template <typename T>
static void rotate_and_store(const Shape &s, T *qkv, const T *cos, const T *sin, T *cache,
                             const int64_t *cache_rows, const int64_t *slots) {
    int64_t half = s.rotary / 2;
    for (int64_t b = 0; b < s.rows; ++b)
        for (int64_t t = 0; t < s.width; ++t) {
            const T *c = cos + (b * s.width + t) * s.rotary, *sn = sin + (b * s.width + t) * s.rotary;
            T *token = qkv + b * s.qkv_row + t * s.qkv_position;
            T *place = cache + cache_rows[b] * s.cache_row + slots[b * s.width + t] * s.size;
            for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
                T *x = token + head * s.size;
#pragma omp simd
                for (int64_t i = 0; i < half; ++i) {
                    float first = load(x[i]), second = load(x[i + half]);
                    store(x[i], first * load(c[i]) - second * load(sn[i]));
                    store(x[i + half], second * load(c[i + half]) + first * load(sn[i + half]));
                }
            }
            for (int64_t head = 0; head < 2 * s.kv_heads; ++head)
                std::memcpy(place + head * s.cache_head, token + (s.heads + head) * s.size, s.size * sizeof(T));
        }
}

template <typename T>
static void attend(const Shape &s, const T *qkv, const T *cache, const int64_t *cache_rows,
                   const int64_t *positions, T *out) {
    switch (s.size) {
        case 64: return Attention<T, 64>(s, qkv, cache, cache_rows, positions)(out);
        case 128: return Attention<T, 128>(s, qkv, cache, cache_rows, positions)(out);
        default: return Attention<T, 0>(s, qkv, cache, cache_rows, positions)(out);
    }
}

#define EXPORT(T, suffix)                                                                                       \
    extern "C" void norm_##suffix(const T *h, const T *gain, T *out, int64_t rows, int64_t width,              \
                                  int64_t padded, float eps) {                                                 \
        norm(h, gain, out, rows, width, padded, eps);                                                          \
    }                                                                                                          \
    extern "C" void swiglu_##suffix(const T *x, T *out, int64_t rows, int64_t width, int64_t padded) {         \
        swiglu(x, out, rows, width, padded);                                                                   \
    }                                                                                                          \
    extern "C" void attention_##suffix(const Shape *s, T *qkv, const T *cos, const T *sin, T *cache,           \
                                       const int64_t *cache_rows, const int64_t *positions,                    \
                                       const int64_t *slots, T *out) {                                         \
        rotate_and_store(*s, qkv, cos, sin, cache, cache_rows, slots);                                         \
        attend(*s, qkv, cache, cache_rows, positions, out);                                                  \
        fill_behind(out, s->heads * s->size, s->width, s->padded);                                                       \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)

extern "C" void int8_bf16(const Product *p, const bf16 *x, bf16 *y) { multiply<Int8>(*p, x, y); }
extern "C" void int4_bf16(const Product *p, const bf16 *x, bf16 *y) { multiply<Int4>(*p, x, y); }
