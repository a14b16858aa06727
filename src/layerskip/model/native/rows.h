// What a layer does to one row between its products and its attention.
#pragma once
#include "vectors.h"

// RMS norm in float32: 1 / root of the mean square; x times that and the gain (which may be null), rounded once. y may be x.
template <typename T>
static float inverse_norm(const T *x, int64_t width, float eps) {
    Floats even = {}, odd = {};
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        const Floats one = wide(x + i, width - i);
        even = plus(even, one, one);
        if (width - i <= LANES) break;
        const Floats two = wide(x + i + LANES, width - i - LANES);
        odd = plus(odd, two, two);
    }
    const float all = over_lanes<LANES>(even + odd, [](auto a, auto b) { return a + b; });
    return 1.f / std::sqrt(all / float(width) + eps);
}
template <typename T>
static void scaled(const T *x, float inverse, const T *gain, T *y, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats own = wide(x + i, width - i) * inverse;
        rounded_to(y + i, gain ? own * wide(gain + i, width - i) : own, width - i);
    }
}
template <typename T>
static void normed(const T *x, const T *gain, T *y, int64_t width, float eps) {
    scaled(x, inverse_norm(x, width, eps), gain, y, width);
}

enum Activation { SILU, GELU_TANH, GELU };

// g / (1 + exp(-x)); a NaN stays
INLINED Floats sigmoid_of(Floats g, Floats x) {
    const Floats most = Floats{} + 88.f;
    return g / (1.f + exponential<Floats, Words>(-x > most ? most : -x));
}
// The part of a normal law below g, by erfc(z) = t exp(-z^2 + a polynomial of t), t = 1 / (1 + z / 2), fitted to 6e-8.
INLINED Floats normal_below(Floats g) {
    const Floats z = (g < 0.f ? -g : g) * 0.70710678f, t = 1.f / (1.f + 0.5f * z);
    Floats p = t * 1.57751014e-1f - 7.50181579e-1f;
    p = p * t + 1.31865295f;
    p = p * t - 9.09740677e-1f;
    p = p * t + 9.43214299e-2f;
    p = p * t - 9.02556600e-2f;
    p = p * t + 6.52326513e-2f;
    p = p * t + 3.80354122e-1f;
    p = p * t + 9.99348078e-1f;
    p = p * t - 1.26548227f;
    const Floats half = 0.5f * t * exponential<Floats, Words>(p - z * z);
    return g < 0.f ? half : 1.f - half;
}
template <Activation A>
INLINED Floats activated(Floats g) {
    if constexpr (A == SILU) return sigmoid_of(g, g);
    else if constexpr (A == GELU_TANH) return sigmoid_of(g, g * (1.59576912f + 7.13548163e-2f * g * g));
    else return g * normal_below(g);
}

// activation(gate) * up
template <Activation A, typename T>
static void gated(const T *gate, const T *up, T *y, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES)
        rounded_to(y + i, activated<A>(wide(gate + i, width - i)) * wide(up + i, width - i), width - i);
}

// Turn the first dimensions of a head by the angles of its position, in place.
template <typename T>
static void turned(T *x, const T *cos, const T *sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        const auto of = [&](const T *from) { return wide(from + i, half - i); };
        const Floats first = of(x), second = of(x + half);
        rounded_to(x + i, plus(-second * of(sin), first, of(cos)), half - i);
        rounded_to(x + half + i, plus(second * of(cos + half), first, of(sin + half)), half - i);
    }
}
