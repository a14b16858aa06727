// Layers whose products are all of one format, one behind the other in one call: a team of threads goes through them together,
// so that nothing is called, allocated or forked in between. What each step does is what `kernels.cpp` does alone.
#pragma once
#include "attention.h"
#include "products.h"
#include "rows.h"

struct Layer {
    Product qkv, out, gate_up, down;
    const void *before_attention, *q_norm, *k_norm, *before_mlp;  // gains; null: there is no such norm
    float eps[4];                                                 // of these norms
    int64_t window, turns;                                        // 0: none; whether angles turn its queries and keys
};

struct Slice {  // of a stack, and one call
    Shape shape;  // window and rotary are of the layers that have one
    int64_t count;
    const Layer *layers;
    void *const *caches;
    const void *cos, *sin;
    const int64_t *cache_rows, *positions, *slots;
};

// By a team: x [rows, width] behind a norm (null: without gains), as inputs. Of few rows every
// thread computes the norm of each, and scales and keeps its share of the groups.
template <typename W, typename T>
static void norm_into(const Inputs<W> &in, const T *x, const void *gain, float eps, T *scratch) {
    const auto take = [&](int64_t r, int64_t from, int64_t to) {
        const T *row = x + r * in.width, *gains = static_cast<const T *>(gain);
        const int64_t first = from * GROUP, count = std::min(to * GROUP, in.width) - first;
        scaled(row + first, inverse_norm(row, in.width, eps), gains ? gains + first : nullptr, scratch + first, count);
        in.take(scratch, r, from, to);
    };
    const Share parts = own_share(in.parts);
    if (in.parts < team_size()) in.shared(take);
    else for (int64_t r = in.first(parts.first); r < in.first(parts.stop); ++r) take(r, 0, in.groups);
    together();
}
template <typename W, typename T>
static void multiplied_onto(Product p, const Inputs<W> &in, const T *onto, T *y) {
    p.rows = in.rows, p.onto = onto;
    multiplied<W>(p, in, y);
}
template <typename W, typename T>
static void gate_into(const Inputs<W> &in, const T *gate_up, T *scratch) {
    in.shared([&](int64_t r, int64_t from, int64_t to) {
        const T *gate = gate_up + 2 * r * in.width;
        for (int64_t g = from; g < to; ++g) {
            const int64_t at = g * GROUP;
            gated<SILU>(gate + at, gate + in.width + at, scratch + at, std::min<int64_t>(GROUP, in.width - at));
        }
        in.take(scratch, r, from, to);
    });
    together();
}

template <typename W, typename T, int D>
class Layers {
    const Slice &slice;
    const Shape &s = slice.shape;
    const int64_t rows = s.rows * s.width;
    std::vector<Attention<T, D>> plans;  // one a window
    std::vector<int64_t> windows;

    const Attention<T, D> &plan_of(const Layer &layer) const {
        return plans[std::find(windows.begin(), windows.end(), layer.window) - windows.begin()];
    }

    // By a team, as all below.
    void attend(const Layer &layer, T *cache, T *qkv, const typename Attention<T, D>::Room &room, T *mixed) const {
        const Attention<T, D> &plan = plan_of(layer);
        Shape own = s;
        if (!layer.turns) own.rotary = 0;
        const Share share = own_share(rows);
        for (int64_t at = share.first; at < share.stop; ++at) {
            T *token = qkv + at * s.qkv_position;
            for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
                const int which = head < s.heads ? 1 : 2;
                const void *gain = which == 1 ? layer.q_norm : layer.k_norm;
                T *x = token + head * s.size;
                if (gain) normed(x, static_cast<const T *>(gain), x, s.size, layer.eps[which]);
            }
            turned_and_stored(own, at / s.width, at % s.width, token, static_cast<const T *>(slice.cos),
                              static_cast<const T *>(slice.sin), cache, slice.cache_rows, slice.slots);
            plan.gather(at / s.width, at % s.width, token, room);
        }
        together();
        plan(cache, room, mixed);
    }

public:
    explicit Layers(const Slice &slice) : slice(slice) {
        for (int64_t i = 0; i < slice.count; ++i) {
            const int64_t window = slice.layers[i].window;
            if (std::find(windows.begin(), windows.end(), window) != windows.end()) continue;
            Shape own = s;
            own.window = window;
            windows.push_back(window);
            plans.emplace_back(own, slice.cache_rows, slice.positions);
        }
    }

    // h [rows, width of the model] becomes what the layers make of it.
    void operator()(T *h) const {
        static thread_local Buffer<T> kept_qkv, kept_mixed, kept_gate_up;
        const Layer &one = slice.layers[0];
        const int64_t widest = std::max({one.qkv.in, one.out.in, one.down.in});
        const auto states = Inputs<W>::of(rows, one.qkv.in, widest), mixes = Inputs<W>::of(rows, one.out.in, widest),
                     gates = Inputs<W>::of(rows, one.down.in, widest);
        T *qkv = kept_qkv.sized(rows * one.qkv.out), *mixed = kept_mixed.sized(rows * one.out.in),
          *gate_up = kept_gate_up.sized(rows * one.gate_up.out);
        int64_t chunks = 0;
        for (auto &plan : plans) chunks = std::max(chunks, plan.chunks());
        const auto room = plans[0].room(chunks);
        Team team;
#pragma omp parallel
        {
            const Member member(team);
            static thread_local Buffer<T> kept_scratch;
            T *scratch = kept_scratch.sized(widest);
            for (int64_t i = 0; i < slice.count; ++i) {
                const Layer &layer = slice.layers[i];
                norm_into(states, h, layer.before_attention, layer.eps[0], scratch);
                multiplied_onto<W, T>(layer.qkv, states, nullptr, qkv);
                attend(layer, static_cast<T *>(slice.caches[i]), qkv, room, mixed);
                mixes.fill(mixed);
                multiplied_onto(layer.out, mixes, h, h);
                norm_into(states, h, layer.before_mlp, layer.eps[3], scratch);
                multiplied_onto<W, T>(layer.gate_up, states, nullptr, gate_up);
                gate_into(gates, gate_up, scratch);
                multiplied_onto(layer.down, gates, h, h);
            }
        }
    }
};

template <typename W, typename T>
static void run_layers(const Slice &slice, T *h) {
    switch (slice.shape.size) {
        case 64: return Layers<W, T, 64>(slice)(h);
        case 128: return Layers<W, T, 128>(slice)(h);
        default: return Layers<W, T, 0>(slice)(h);
    }
}
