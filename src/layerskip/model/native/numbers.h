// Numbers of the compiled regions: float32 and bfloat16 in memory, float32 in registers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16 { uint16_t bits; };

static inline float load(float x) { return x; }
static inline float load(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &wide, 4);
    return y;
}
static inline float half(uint16_t x) {  // of IEEE's half precision
    uint32_t sign = uint32_t(x & 0x8000) << 16, most = (x >> 10) & 31, rest = x & 1023;
    float y;
    if (most == 0) y = std::ldexp(float(rest), -24);
    else {
        uint32_t bits = most == 31 ? 0x7f800000 | rest << 13 : (most + 112) << 23 | rest << 13;
        std::memcpy(&y, &bits, 4);
    }
    return sign ? -y : y;
}
static inline void store(float &to, float x) { to = x; }
static inline void store(bf16 &to, float x) {  // round to nearest even; a NaN keeps a bit that says so
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    to.bits = uint16_t((wide & 0x7fffffff) > 0x7f800000 ? (wide >> 16) | 0x40 : rounded);
}

template <typename T>
static inline void put(T &to, T x) { to = x; }
static inline void put(float &to, bf16 x) { to = load(x); }

template <typename T>
static inline T rounded(float x) {
    T y;
    store(y, x);
    return y;
}

// exp up to 88 as 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (fitted for the least relative error: 1.4 ulp); 0
// below -87.7. F may be a vector; W is its bits.
template <typename F, typename W>
static inline F exponential(F x) {
    constexpr float whole = 12582912.f + 127.f;  // 1.5 * 2^23: floats there are integers; and the exponent's bias
    const F low = F{} - 88.f;
    x = low > x ? low : x;  // a NaN stays
    F biased = x * 1.44269504f + whole, n = biased - whole;
    F r = x - n * 0.693359375f + n * 2.12194440e-4f;
    F p = r * 8.290272e-3f + 4.189816e-2f;
    p = p * r + 1.6667639e-1f;
    p = p * r + 4.9999148e-1f;
    p = p * r + 9.9999970e-1f;
    p = p * r + 1.f;
    W bits;
    std::memcpy(&bits, &biased, sizeof bits);
    bits <<= 23;
    F power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}
static inline float exponential(float x) { return exponential<float, uint32_t>(x); }
