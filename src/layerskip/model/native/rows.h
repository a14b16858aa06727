// What a layer does to one row between its products and its attention.
#pragma once
#include "vectors.h"

// RMS norm in float32, rounded once; y may be x, and there may be no gain.
template <typename T>
static void normed(const T *x, const T *gain, T *y, int64_t width, float eps) {
    Floats squares[2] = {};
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats own = wide(x + i, width - i);
        squares[i / LANES % 2] += own * own;
    }
    const float all = over_lanes<LANES>(squares[0] + squares[1], [](auto a, auto b) { return a + b; });
    const float inverse = 1.f / std::sqrt(all / float(width) + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats own = wide(x + i, width - i) * inverse;
        rounded_to(y + i, gain ? own * wide(gain + i, width - i) : own, width - i);
    }
}

// silu(gate) * up
template <typename T>
static void gated(const T *gate, const T *up, T *y, int64_t width) {
    const Floats most = Floats{} + 88.f;
    for (int64_t i = 0; i < width; i += LANES) {
        const Floats g = wide(gate + i, width - i), less = -g > most ? most : -g;  // a NaN stays
        const Floats share = g / (1.f + exponential<Floats, Words>(less));
        rounded_to(y + i, share * wide(up + i, width - i), width - i);
    }
}

// Turn the first dimensions of a head by the angles of its position, in place.
template <typename T>
static void turned(T *x, const T *cos, const T *sin, int64_t rotary) {
    const int64_t half = rotary / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        float first = load(x[i]), second = load(x[i + half]);
        store(x[i], first * load(cos[i]) - second * load(sin[i]));
        store(x[i + half], second * load(cos[i + half]) + first * load(sin[i + half]));
    }
}
