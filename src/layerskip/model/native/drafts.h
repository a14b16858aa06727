// Drafts behind an adapter at exit layer 0, several in one call: what a token's embedding and the normed state of the position
// before say goes through the adapter and the draft head, and the best token is the next one's embedding. How likely the
// head finds it says how far drafts are worth verifying.
#pragma once
#include "layers.h"

struct Block { Product gate_up, down; };

struct Drafts {
    int64_t rows, steps, width, blocks;
    Product join, head;
    const Block *each;
    const void *table, *gain;  // embeddings [vocabulary, width]; of the final norm
    float embed_scale, eps, adapter_eps;
    const int64_t *ids;  // of the head's rows
};

// The first of the largest; whatever it is, where there is none because of a NaN.
template <typename T>
static int64_t best_of(const T *x, int64_t width, float &best) {
    float top = -INFINITY, wrong = 0.f;
#pragma omp simd reduction(max : top) reduction(+ : wrong)
    for (int64_t i = 0; i < width; ++i) {
        const float own = load(x[i]);
        top = own > top ? own : top;
        wrong += own == own ? 0.f : 1.f;
    }
    best = wrong > 0.f ? NAN : top;
    int64_t at = 0;
    while (at + 1 < width && load(x[at]) != top) ++at;
    return at;
}

// The probability of the largest; 0 where there is none.
template <typename T>
static float share_of(const T *x, int64_t width, float top) {
    float all = 0.f;
#pragma omp simd reduction(+ : all)
    for (int64_t i = 0; i < width; ++i) all += exponential(load(x[i]) - top);
    return all >= 1.f ? 1.f / all : 0.f;
}

// tokens [steps + 1, rows], of which the first are given; chances [steps, rows]
template <typename W, typename T>
static void draft(const Drafts &d, T *known, int64_t *tokens, float *chances) {
    const int64_t rows = d.rows, width = d.width, hidden = d.blocks ? d.each[0].down.in : 0;
    const int64_t widest = std::max(2 * width, hidden);
    static thread_local Buffer<T> kept_z, kept_gate_up, kept_logits;
    const auto joined = Inputs<W>::of(rows, 2 * width, widest), states = Inputs<W>::of(rows, width, widest),
               gates = Inputs<W>::of(rows, hidden, widest);
    T *z = kept_z.sized(rows * width), *gate_up = kept_gate_up.sized(rows * 2 * hidden),
      *logits = kept_logits.sized(rows * d.head.out);
    const T *table = static_cast<const T *>(d.table), *gain = static_cast<const T *>(d.gain);
    Team team;
#pragma omp parallel
    {
        const Member member(team);
        static thread_local Buffer<T> kept_scratch;
        T *scratch = kept_scratch.sized(widest);
        const Share share = own_share(rows);
        for (int64_t step = 0; step < d.steps; ++step) {
            const int64_t *now = tokens + step * rows;
            for (int64_t r = share.first; r < share.stop; ++r) {
                for (int64_t i = 0; i < width; ++i) store(scratch[i], load(table[now[r] * width + i]) * d.embed_scale);
                normed<T>(scratch, nullptr, scratch, width, d.adapter_eps);
                normed<T>(known + r * width, nullptr, scratch + width, width, d.adapter_eps);
                joined.take(scratch, r, 0, joined.groups);
            }
            together();
            multiplied_onto<W, T>(d.join, joined, nullptr, z);
            for (int64_t i = 0; i < d.blocks; ++i) {
                norm_into<W, T>(states, z, nullptr, d.adapter_eps, scratch);
                multiplied_onto<W, T>(d.each[i].gate_up, states, nullptr, gate_up);
                gate_into<W, T>(gates, gate_up, scratch);
                multiplied_onto<W, T>(d.each[i].down, gates, z, z);
            }
            for (int64_t r = share.first; r < share.stop; ++r) {
                normed(z + r * width, gain, known + r * width, width, d.eps);
                states.take(known + r * width, r, 0, states.groups);
            }
            together();
            multiplied_onto<W, T>(d.head, states, nullptr, logits);
            for (int64_t r = share.first; r < share.stop; ++r) {
                float value;
                const T *own = logits + r * d.head.out;
                tokens[(step + 1) * rows + r] = d.ids[best_of(own, d.head.out, value)];
                chances[step * rows + r] = share_of(own, d.head.out, value);
            }
            together();
        }
    }
}
