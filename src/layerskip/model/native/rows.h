// What a layer does to one row between its products and its attention.
#pragma once
#include <algorithm>

#include "numbers.h"

// RMS norm in float32, rounded once; y may be x, and there may be no gain.
template <typename T>
static void normed(const T *x, const T *gain, T *y, int64_t width, float eps) {
    float squares = 0.f;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += load(x[i]) * load(x[i]);
    float inverse = 1.f / std::sqrt(squares / float(width) + eps);
    if (!gain) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) store(y[i], load(x[i]) * inverse);
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) store(y[i], load(x[i]) * inverse * load(gain[i]));
}

// silu(gate) * up
template <typename T>
static void gated(const T *gate, const T *up, T *y, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float g = load(gate[i]);
        store(y[i], g / (1.f + exponential(std::min(-g, 88.f))) * load(up[i]));
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
