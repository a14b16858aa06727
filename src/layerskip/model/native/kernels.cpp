// The regions between the matrix products of one decoding step on the CPU, each in one call: RMS norm, SwiGLU,
// rotary angles with the cache write, attention of few positions. `kernels.py` compiles and calls them.
//
// Exact: every row (position) is computed by the same loop in the same order whatever rows stand beside it, so
// verifying K+1 positions gives the bits of K+1 single steps. No fast-math: NaN must stay NaN.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 { uint16_t bits; };

static inline float load(float x) { return x; }
static inline float load(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
static inline void store(float &to, float x) { to = x; }
static inline void store(bf16 &to, float x) {  // round to nearest even; a NaN keeps a bit that says so
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    to.bits = uint16_t((wide & 0x7fffffff) > 0x7f800000 ? (wide >> 16) | 0x40 : rounded);
}

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), 2 ulp; below -87 it is about 0.
static inline float exponential(float x) {
    float clamped = x < -87.f ? -87.f : (x > 88.f ? 88.f : x);  // a NaN passes: both comparisons are false
    float n = std::nearbyint(clamped * 1.44269504f);
    float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// A single row may be wanted several times over (see `Packed` in linear.py): row 0 of `out` is copied behind itself.
template <typename T>
static void copy_behind(T *out, int64_t width, int64_t copies) {
    for (int64_t i = 1; i < copies; ++i) std::memcpy(out + i * width, out, width * sizeof(T));
}

template <typename T>
static void norm(const T *h, const T *gain, T *out, int64_t rows, int64_t width, int64_t copies, float eps) {
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
    copy_behind(out, width, copies);
}

// gate and up stand side by side: [rows, 2 width] -> silu(gate) * up [rows, width].
template <typename T>
static void swiglu(const T *x, T *out, int64_t rows, int64_t width, int64_t copies) {
#pragma omp parallel for if (rows > 32)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = x + 2 * row * width, *up = gate + width;
        T *y = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
            float g = load(gate[i]);
            store(y[i], g / (1.f + exponential(-g)) * load(up[i]));
        }
    }
    copy_behind(out, width, copies);
}

struct Shape {  // of one call; strides in elements
    int64_t rows, width, heads, kv_heads, size, rotary;  // B, T, query heads, H, d, rotary dimensions (0: none)
    int64_t qkv_row, qkv_position;                       // strides of qkv [B, T, heads + 2 H, d]
    int64_t cache_row, cache_head;                       // strides of the cache [rows, 2 H, slots, d]
    int64_t window, copies;                              // 0: none; how often a single row is written
    float scale;
};

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

// Attention of every position over the slots it may see: out [B, T, place in group, H, d]. D is the head size where
// it is a common one, so that a head stays in registers; 0 means any.
template <typename T, int D>
static void attend_sized(const Shape &s, const T *qkv, const T *cache, const int64_t *cache_rows,
                         const int64_t *positions, T *out) {
    const int64_t size = D ? D : s.size;
    int64_t group = s.heads / s.kv_heads, tasks = s.rows * s.width * s.kv_heads;
#pragma omp parallel if (tasks > 1)
    {
        std::vector<float> scores, query(group * size), any(D ? 0 : size);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            int64_t head = task % s.kv_heads, at = task / s.kv_heads, b = at / s.width, t = at % s.width;
            int64_t last = positions[at], first = s.window && last >= s.window ? last - s.window + 1 : 0;
            int64_t length = last - first + 1;
            const T *keys = cache + cache_rows[b] * s.cache_row + head * s.cache_head + first * size;
            const T *values = keys + s.kv_heads * s.cache_head;
            const T *q = qkv + b * s.qkv_row + t * s.qkv_position + head * group * size;
            scores.resize(group * length);
            for (int64_t i = 0; i < group * size; ++i) query[i] = load(q[i]) * s.scale;
            float fixed[D ? D : 1];
            float *one = D ? fixed : any.data();  // a key, later the mixed values
            for (int64_t j = 0; j < length; ++j) {
                const T *key = keys + j * size;
#pragma omp simd
                for (int64_t i = 0; i < size; ++i) one[i] = load(key[i]);
                for (int64_t g = 0; g < group; ++g) {
                    const float *own = query.data() + g * size;
                    float dot = 0.f;
#pragma omp simd reduction(+ : dot)
                    for (int64_t i = 0; i < size; ++i) dot += own[i] * one[i];
                    scores[g * length + j] = dot;
                }
            }
            for (int64_t g = 0; g < group; ++g) {
                float *own = scores.data() + g * length, largest = own[0], total = 0.f;
                for (int64_t j = 1; j < length; ++j) largest = own[j] > largest ? own[j] : largest;
#pragma omp simd reduction(+ : total)
                for (int64_t j = 0; j < length; ++j) {
                    own[j] = exponential(own[j] - largest);
                    total += own[j];
                }
                for (int64_t i = 0; i < size; ++i) one[i] = 0.f;
                for (int64_t j = 0; j < length; ++j) {
                    const T *value = values + j * size;
                    float weight = own[j];
#pragma omp simd
                    for (int64_t i = 0; i < size; ++i) one[i] += weight * load(value[i]);
                }
                T *y = out + ((at * group + g) * s.kv_heads + head) * size;
                for (int64_t i = 0; i < size; ++i) store(y[i], one[i] / total);
            }
        }
    }
}

template <typename T>
static void attend(const Shape &s, const T *qkv, const T *cache, const int64_t *cache_rows,
                   const int64_t *positions, T *out) {
    switch (s.size) {
        case 64: return attend_sized<T, 64>(s, qkv, cache, cache_rows, positions, out);
        case 80: return attend_sized<T, 80>(s, qkv, cache, cache_rows, positions, out);
        case 96: return attend_sized<T, 96>(s, qkv, cache, cache_rows, positions, out);
        case 128: return attend_sized<T, 128>(s, qkv, cache, cache_rows, positions, out);
        default: return attend_sized<T, 0>(s, qkv, cache, cache_rows, positions, out);
    }
}

#define EXPORT(T, suffix)                                                                                       \
    extern "C" void norm_##suffix(const T *h, const T *gain, T *out, int64_t rows, int64_t width,              \
                                  int64_t copies, float eps) {                                                 \
        norm(h, gain, out, rows, width, copies, eps);                                                          \
    }                                                                                                          \
    extern "C" void swiglu_##suffix(const T *x, T *out, int64_t rows, int64_t width, int64_t copies) {         \
        swiglu(x, out, rows, width, copies);                                                                   \
    }                                                                                                          \
    extern "C" void attention_##suffix(const Shape *s, T *qkv, const T *cos, const T *sin, T *cache,           \
                                       const int64_t *cache_rows, const int64_t *positions,                    \
                                       const int64_t *slots, T *out) {                                         \
        rotate_and_store(*s, qkv, cos, sin, cache, cache_rows, slots);                                         \
        attend(*s, qkv, cache, cache_rows, positions, out);                                                    \
        copy_behind(out, s->heads * s->size, s->copies);                                                       \
    }

EXPORT(float, f32)
EXPORT(bf16, bf16)
