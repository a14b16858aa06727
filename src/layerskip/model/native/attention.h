// Attention of few positions on the CPU that reads every key and value of the cache once.
//
// A block is SLOTS slots of one key head. Its keys and its values are laid out for the vector unit once and used
// for all queries: the query heads that share the key head, at every position of the call. A chunk is a few blocks
// that one thread takes in order; it leaves for each query the largest score, the weighted values and the sum of
// weights (relative to that score). At the end the chunks of a query are added up.
//
// Exact: blocks and chunks begin at fixed slots, and sums run over slots, blocks and chunks in order. So what a
// position gets depends on what it sees alone, neither on its company nor on the number of threads. A slot adds
// nothing to a position that may not see it, a NaN in it included; a slot that no position sees is not read.
//
// Sums are in float32. Where bfloat16 is multiplied in pairs, weights are rounded to it, as FlashAttention does, and
// it is the rounded ones that sum to one; the error is of the size of the result's own rounding.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "numbers.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"

constexpr int SLOTS = 64;

struct Shape {  // of one call; strides in elements
    int64_t rows, width, heads, kv_heads, size, rotary;  // B, T, query heads, H, d, rotary dimensions (0: none)
    int64_t qkv_row, qkv_position;                       // strides of qkv [B, T, heads + 2 H, d]
    int64_t cache_row, cache_head;                       // strides of the cache [rows, 2 H, slots, d]
    int64_t window, padded;                              // 0: none; rows written, those behind T repeat the first
    float scale;
};

// Memory that begins at a cache line and is kept from call to call.
template <typename T>
struct Buffer {
    std::vector<T> kept;
    T *sized(int64_t count) {
        constexpr int64_t line = 64 / sizeof(T);
        if (int64_t(kept.size()) < count + line) kept.resize(count + line);
        return kept.data() + (-(uintptr_t(kept.data()) / sizeof(T)) & (line - 1));
    }
};

struct Seen {  // slots of a block
    int first, stop;
    bool any() const { return first < stop; }
    int lanes() const { return (stop + LANES - 1) / LANES * LANES; }  // that hold all of them
    bool operator==(const Seen &other) const { return first == other.first && stop == other.stop; }
};

// The largest score of a block; those of its lanes that are not seen become -inf.
static inline float largest_of(float *scores, Seen seen) {
    std::fill(scores, scores + seen.first, -INFINITY);
    std::fill(scores + seen.stop, scores + seen.lanes(), -INFINITY);
    auto larger = [](auto a, auto b) { return a > b ? a : b; };  // b where either is a NaN
    Floats most = Floats{} - FLT_MAX;
    for (int j = 0; j < seen.lanes(); j += LANES) most = larger(loaded<Floats>(scores + j), most);
    return over_lanes<LANES>(most, larger);
}

// Turn scores of so many lanes of a block into weights, and add them to `total`, lane by lane.
template <typename T>
static inline void weigh(const float *scores, int lanes, float largest, float scale, T *weights, float *total) {
    Floats sum = loaded<Floats>(total);
    for (int j = 0; j < lanes; j += LANES)
        sum += rounded_to(weights + j, exponential<Floats, Words>((loaded<Floats>(scores + j) - largest) * scale));
    kept(total, sum);
}

// Turn the queries of one position in place; put its turned keys and its values at their slot.
template <typename T>
static void turned_and_stored(const Shape &s, int64_t b, int64_t t, T *token, const T *cos, const T *sin, T *cache,
                              const int64_t *cache_rows, const int64_t *slots) {
    const int64_t at = b * s.width + t;
    T *place = cache + cache_rows[b] * s.cache_row + slots[at] * s.size;
    for (int64_t head = 0; head < s.heads + s.kv_heads; ++head)
        turned(token + head * s.size, cos + at * s.rotary, sin + at * s.rotary, s.rotary);
    for (int64_t head = 0; head < 2 * s.kv_heads; ++head)
        std::memcpy(place + head * s.cache_head, token + (s.heads + head) * s.size, s.size * sizeof(T));
}

template <typename T, int D>  // D is the head size where it is a common one, 0 for any
class Attention {
    struct Row { int64_t task, first, stop; };  // its first task; the blocks that any of its positions sees
    struct Task { int64_t row, head, first, blocks, before; };  // its blocks; how many all tasks before it have
    struct Scratch { uint32_t *laid; float *scores; Factor<T> *weights; };  // of one thread

    const Shape s;
    const int64_t *cache_rows, *positions;
    const int64_t group = s.heads / s.kv_heads, queries = s.width * group;  // of a task
    std::vector<Row> rows;
    std::vector<Task> tasks;  // row by row, head by head, chunk by chunk
    int64_t num_blocks = 0;

    int64_t size() const { return D ? D : s.size; }
    int64_t bytes() const { return size() * sizeof(T); }
    int64_t words() const { return (bytes() + 3) / 4; }
    int64_t asks() const { return words() * IN_WORD<T>; }  // numbers of a query, in whole words
    int64_t width() const { return (size() + LANES - 1) / LANES * LANES; }
    int64_t stride() const { return width() + LANES; }  // of sums: weighted values; sum of weights, lane by lane

    // Four chunks of one block, so that a short context occupies several threads, then chunks of four.
    static int64_t chunk_of(int64_t block) { return block < 4 ? block : block / 4 + 3; }
    static int64_t first_block(int64_t chunk) { return chunk < 4 ? chunk : 4 * (chunk - 3); }

    int64_t first_seen(int64_t position) const {
        return s.window && position >= s.window ? position - s.window + 1 : 0;
    }
    Seen seen(int64_t position, int64_t block) const {
        int64_t begin = block * SLOTS;
        return {int(std::max<int64_t>(first_seen(position) - begin, 0)),
                int(std::min<int64_t>(position + 1 - begin, SLOTS))};
    }
    const T *keys_of(const T *cache, const Task &task) const {
        return cache + cache_rows[task.row] * s.cache_row + task.head * s.cache_head + task.first * SLOTS * size();
    }

    // Ask for rows of the block that comes next while one is laid out: for the second cache, since the first one
    // waits for few lines at once.
    void ask_for(const T *from, int count) const {
        for (int64_t i = 0; i < count * bytes(); i += 64)
            __builtin_prefetch(reinterpret_cast<const char *>(from) + i, 0, 2);
    }

    // Keys [SLOTS, d] to words [words, SLOTS]. Slots before `any.first` become 0; those of lanes behind `any.stop` keep what was
    // there, and their scores are never used.
    void lay_keys(const T *keys, Seen any, const T *next, uint32_t *to) const {
        const char *from = reinterpret_cast<const char *>(keys);
        for (int j = 0; j < SLOTS; j += EDGE) {
            ask_for(next + j * size(), EDGE);
            if (j >= any.stop) continue;  // what is there counts for nothing
            int64_t w = 0;
            if (j >= any.first && j + EDGE <= any.stop)
                for (; w + EDGE <= bytes() / 4; w += EDGE)
                    transposed(from + j * bytes() + 4 * w, bytes(), to + w * SLOTS + j, SLOTS);
            for (; w < words(); ++w)
                for (int i = j; i < j + EDGE; ++i) {
                    uint32_t word = 0;
                    if (i >= any.first && i < any.stop)
                        std::memcpy(&word, from + i * bytes() + 4 * w, std::min<int64_t>(4, bytes() - 4 * w));
                    to[w * SLOTS + i] = word;
                }
        }
    }

    // Values [SLOTS, d] to words [SLOTS / IN_WORD, width] that hold one dimension of neighbouring slots.
    void lay_values(const float *values, Seen any, const float *next, uint32_t *to) const {
        for (int j = any.first; j < any.stop; ++j) {
            ask_for(next + j * size(), 1);
            std::memcpy(to + j * width(), values + j * size(), bytes());
        }
    }
    void lay_values(const bf16 *values, Seen any, const bf16 *next, uint32_t *to) const {
        for (int j = any.first / 2 * 2; j < any.stop; j += 2) {  // a slot outside is not read: its pair stands in
            const bf16 *first = values + std::max(j, any.first) * size();
            const bf16 *second = values + std::min(j + 1, any.stop - 1) * size();
            ask_for(next + j * size(), 2);
            interleaved(first, second, size(), to + j / 2 * width());
        }
    }

    // One chunk: asked [queries, asks] to sums [queries, stride] and largest [queries]. `next`: the keys
    // of the one behind it.
    void run(const Task &task, const T *first, const T *next, const Factor<T> *asked, float *sums, float *largest,
             const Scratch &own) const {
        const int64_t *position = positions + task.row * s.width, apart = s.kv_heads * s.cache_head;
        for (int64_t i = 0; i < task.blocks; ++i) {
            auto sees = [&](int64_t q) { return seen(position[q / group], task.first + i); };
            Seen any = {SLOTS, 0};
            for (int64_t q = 0; q < queries; q += group)
                if (Seen one = sees(q); one.any())
                    any = {std::min(any.first, one.first), std::max(any.stop, one.stop)};
            const T *keys = first + i * SLOTS * size(), *values = keys + apart;
            const T *later = i + 1 < task.blocks ? keys + SLOTS * size() : next;
            lay_keys(keys, any, later, own.laid);
            for (int64_t q = 0; q < queries; q += QUERIES)
                product<T>(std::min<int64_t>(QUERIES, queries - q), asked + q * asks(), asks(), own.laid, SLOTS,
                           any.lanes(), 0, asks(), {own.scores + q * SLOTS, SLOTS, false});
            for (int64_t q = 0; q < queries; ++q) {
                float *sum = sums + q * stride();
                if (i == 0) {
                    largest[q] = -FLT_MAX;  // finite: scores that are all -inf must not make a NaN
                    std::fill(sum + (sees(q).any() ? width() : 0), sum + stride(), 0.f);
                }
                if (!sees(q).any()) continue;
                float most = largest_of(own.scores + q * SLOTS, sees(q));
                if (most <= largest[q]) continue;
                if (i > 0) {
                    float factor = exponential((largest[q] - most) * s.scale);
                    for (int64_t j = 0; j < stride(); ++j) sum[j] *= factor;
                }
                largest[q] = most;
            }
            for (int64_t q = 0; q < queries; ++q)
                if (sees(q).any())
                    weigh(own.scores + q * SLOTS, sees(q).lanes(), largest[q], s.scale, own.weights + q * SLOTS,
                          sums + q * stride() + width());
            lay_values(values, any, later + apart, own.laid);
            for (int64_t q = 0, same; q < queries; q += same) {
                for (same = 1; same < QUERIES && q + same < queries && sees(q + same) == sees(q);) ++same;
                if (sees(q).any())
                    product<T>(same, own.weights + q * SLOTS, SLOTS, own.laid, width(), width(),
                               sees(q).first, sees(q).stop, {sums + q * stride(), stride(), i > 0});
            }
        }
    }

    // Add the chunks of one query up; `factors` has room for them.
    void combine(int64_t b, int64_t head, int64_t query, const float *sums, const float *largest, float *factors,
                 T *out) const {
        int64_t position = positions[b * s.width + query / group];
        int64_t first = chunk_of(first_seen(position) / SLOTS), count = chunk_of(position / SLOTS) - first + 1;
        int64_t before = chunk_of(rows[b].first), chunks = chunk_of(rows[b].stop - 1) - before + 1;
        int64_t at = (rows[b].task + head * chunks + first - before) * queries + query;
        float most = -FLT_MAX;
        for (int64_t i = 0; i < count; ++i) most = std::max(most, largest[at + i * queries]);
        for (int64_t i = 0; i < count; ++i) factors[i] = exponential((largest[at + i * queries] - most) * s.scale);
        auto added_up = [&](int64_t from) {
            Floats sum = {};
            for (int64_t i = 0; i < count; ++i)
                sum += factors[i] * loaded<Floats>(sums + (at + i * queries) * stride() + from);
            return sum;
        };
        const float share = 1.f / over_lanes<LANES>(added_up(width()), [](auto a, auto b) { return a + b; });
        int64_t place = (b * s.width + query / group) * group + query % group;
        T *to = out + (place * s.kv_heads + head) * size();
        for (int64_t from = 0; from < width(); from += LANES)
            rounded_to(to + from, added_up(from) * share, size() - from);
    }

public:
    Attention(const Shape &shape, const int64_t *cache_rows, const int64_t *positions)
        : s(shape), cache_rows(cache_rows), positions(positions) {
        for (int64_t b = 0; b < s.rows; ++b) {
            const int64_t *own = positions + b * s.width;
            int64_t first = first_seen(*std::min_element(own, own + s.width)) / SLOTS;
            int64_t stop = *std::max_element(own, own + s.width) / SLOTS + 1;
            rows.push_back({int64_t(tasks.size()), first, stop});
            for (int64_t head = 0; head < s.kv_heads; ++head)
                for (int64_t chunk = chunk_of(first); chunk <= chunk_of(stop - 1); ++chunk) {
                    int64_t from = std::max(first_block(chunk), first), to = std::min(first_block(chunk + 1), stop);
                    tasks.push_back({b, head, from, to - from, num_blocks});
                    num_blocks += to - from;
                }
        }
    }

    struct Room { float *sums, *largest; Factor<T> *asked; };  // of a team

    int64_t chunks() const { return tasks.size(); }

    // Room for as many chunks as this or another one of the same shape has; the thread's that asks for it.
    Room room(int64_t count) const {
        static thread_local Buffer<float> sums, largest;
        static thread_local Buffer<Factor<T>> asked;
        return {sums.sized(count * queries * stride()), largest.sized(count * queries),
                asked.sized(s.rows * s.kv_heads * queries * asks())};
    }

    // Put the queries of a position beside those that share their key head: asked [B, H, queries, asks].
    void gather(int64_t b, int64_t t, const T *token, const Room &room) const {
        for (int64_t head = 0; head < s.heads; ++head) {
            int64_t at = (b * s.kv_heads + head / group) * queries + t * group + head % group;
            Factor<T> *to = room.asked + at * asks();
            to[asks() - 1] = Factor<T>{};  // an odd size fills half a word
            for (int64_t i = 0; i < size(); ++i) put(to[i], token[head * size() + i]);
        }
    }

    // By a team, when all is gathered and stored: out [B, T, place in group, H, d]. Each thread takes tasks in a row
    // that have as many blocks.
    void operator()(const T *cache, const Room &room, T *out) const {
        static thread_local Buffer<float> kept_scores, kept_factors;
        static thread_local Buffer<uint32_t> kept_laid;
        static thread_local Buffer<Factor<T>> kept_weights;
        const int64_t count = chunks(), thread = own_number(), threads = team_size();
        float *factors = kept_factors.sized(count / s.kv_heads);
        Scratch own = {kept_laid.sized(std::max(words() * SLOTS, SLOTS / IN_WORD<T> * width())),
                       kept_scores.sized(queries * SLOTS), kept_weights.sized(queries * SLOTS)};
        for (int64_t i = 0; i < count; ++i) {
            const Task &task = tasks[i], &next = tasks[std::min(i + 1, count - 1)];
            if ((2 * task.before + task.blocks) * threads / (2 * num_blocks) == thread)
                run(task, keys_of(cache, task), keys_of(cache, next),
                    room.asked + (task.row * s.kv_heads + task.head) * queries * asks(),
                    room.sums + i * queries * stride(), room.largest + i * queries, own);
        }
        together();
        const Share share = own_share(s.rows * s.kv_heads * queries);
        for (int64_t i = share.first; i < share.stop; ++i)
            combine(i / queries / s.kv_heads, i / queries % s.kv_heads, i % queries, room.sums, room.largest, factors,
                    out);
        together();
    }
};
