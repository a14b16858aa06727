// Attention of few positions on the CPU that reads every key and value of the cache once.
//
// A block is SLOTS slots of one key head. Its keys, and its values where pairs are multiplied, are laid out for the vector
// unit once and used for all queries: the query heads that share the key head, at every position of the call. A chunk is a few blocks
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
public:
    struct Room { float *sums, *largest; Factor<T> *asked; };  // of a team

private:
    struct Row { int64_t task, first, stop; };  // its first task; the blocks that any of its positions sees
    struct Task { int64_t row, head, first, blocks, before; };  // its blocks; how many all tasks before it have
    struct Scratch { uint32_t *laid; float *scores; Factor<T> *weights; Seen *seen; };  // of one thread

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
    // Values are read where they stand if their rows fill whole vectors, unless pairs of slots are multiplied.
    static constexpr bool PAIRED = PAIRS && IN_WORD<T> == 2;
    int64_t value_words() const { return (words() + LANES - 1) / LANES * LANES; }
    int64_t width() const { return PAIRED ? (size() + LANES - 1) / LANES * LANES : value_words() * IN_WORD<T>; }
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
    // waits for few lines at once. Other machines than Zen bring them in time by themselves.
    void ask_for(const T *from, int count) const {
        if constexpr (!ZEN) return;
        for (int64_t i = 0; i < count * bytes(); i += 64)
            __builtin_prefetch(reinterpret_cast<const char *>(from) + i, 0, 2);
    }

    // Keys [SLOTS, d] to words [words, SLOTS]. In lanes of slots that nobody sees stands what another slot has, or what
    // was there: their scores are never used.
    void lay_keys(const T *keys, Seen any, const T *next, uint32_t *to) const {
        const char *from = reinterpret_cast<const char *>(keys);
        for (int j = 0; j < SLOTS; j += EDGE) {
            ask_for(next + j * size(), EDGE);
            if (j >= any.stop) continue;
            const bool whole = j >= any.first && j + EDGE <= any.stop;
            auto slot = [&](int i) { return std::min(std::max(j + i, any.first), any.stop - 1); };
            int64_t w = 0;
            for (; w + EDGE <= bytes() / 4; w += EDGE) {
                uint32_t *place = to + w * SLOTS + j;
                if (whole) transposed([&](int i) { return from + (j + i) * bytes() + 4 * w; }, place, SLOTS);
                else transposed([&](int i) { return from + slot(i) * bytes() + 4 * w; }, place, SLOTS);
            }
            for (; w < words(); ++w)
                for (int i = 0; i < EDGE; ++i) {
                    uint32_t word = 0;
                    std::memcpy(&word, from + slot(i) * bytes() + 4 * w, std::min<int64_t>(4, bytes() - 4 * w));
                    to[w * SLOTS + j + i] = word;
                }
        }
    }

    // Add the values of slots [first, stop), times weights, to the sums of so many queries.
    void add_values(const T *values, const uint32_t *laid, int count, const Factor<T> *weights, Seen seen,
                    const Sums &to) const {
        if constexpr (PAIRED)
            product<T>(count, weights, SLOTS, laid, width(), width(), seen.first, seen.stop, to);
        else {
            const bool whole = words() % LANES == 0 && bytes() % 4 == 0;
            weighted_sum<T>(count, weights, SLOTS, whole ? reinterpret_cast<const uint32_t *>(values) : laid,
                            whole ? words() : value_words(), value_words(), seen.first, seen.stop, to);
        }
    }
    // What `add_values` needs laid out: words [SLOTS / 2, width] that hold one dimension of neighbouring slots; else
    // rows [SLOTS, value_words], where they do not fill these.
    void lay_values(const T *values, Seen any, const T *next, uint32_t *to) const {
        for (int j = any.first / 2 * 2; j < any.stop; j += 2) {
            ask_for(next + j * size(), 2);
            if constexpr (PAIRED)  // a slot outside is not read: its pair stands in
                interleaved(values + std::max(j, any.first) * size(), values + std::min(j + 1, any.stop - 1) * size(),
                            size(), to + j / 2 * width());
            else if (value_words() * 4 != bytes())
                for (int i = std::max(j, any.first); i < std::min(j + 2, any.stop); ++i) {
                    std::memset(to + i * value_words(), 0, 4 * value_words());
                    std::memcpy(to + i * value_words(), values + i * size(), bytes());
                }
        }
    }

    // Raise the largest score of a query's chunk to that of its next block, and scale what is summed up already.
    void raise(float most, bool begins, float *sum, float &largest) const {
        if (begins) std::fill(sum + width(), sum + stride(), 0.f);
        else if (most > largest) {
            const float factor = exponential((largest - most) * s.scale);
            for (int64_t j = 0; j < stride(); ++j) sum[j] *= factor;
        }
        if (begins || most > largest) largest = most;
    }

    // One chunk: asked [queries, asks] to sums [queries, stride] and largest [queries]. `next`: the keys
    // of the one behind it.
    void run(const Task &task, const T *first, const T *next, const Factor<T> *asked, float *sums, float *largest,
             const Scratch &own) const {
        const int64_t *position = positions + task.row * s.width, apart = s.kv_heads * s.cache_head;
        for (int64_t i = 0; i < task.blocks; ++i) {
            Seen any = {SLOTS, 0};
            for (int64_t t = 0; t < s.width; ++t)
                if (Seen one = own.seen[t] = seen(position[t], task.first + i); one.any())
                    any = {std::min(any.first, one.first), std::max(any.stop, one.stop)};
            const T *keys = first + i * SLOTS * size(), *values = keys + apart;
            const T *later = i + 1 < task.blocks ? keys + SLOTS * size() : next;
            lay_keys(keys, any, later, own.laid);
            for (int64_t q = 0; q < queries; q += QUERIES)
                product<T>(std::min<int64_t>(QUERIES, queries - q), asked + q * asks(), asks(), own.laid, SLOTS,
                           any.lanes(), 0, asks(), {own.scores + q * SLOTS, SLOTS, false});
            for (int64_t t = 0, q = 0; t < s.width; ++t)
                for (int64_t stop = q + group; q < stop; ++q) {
                    float *sum = sums + q * stride();
                    if (own.seen[t].any())
                        raise(largest_of(own.scores + q * SLOTS, own.seen[t]), i == 0, sum, largest[q]);
                    else if (i == 0) {
                        largest[q] = -FLT_MAX;
                        std::fill(sum, sum + stride(), 0.f);
                    }
                }
            for (int64_t t = 0, q = 0; t < s.width; ++t)
                for (int64_t stop = q + group; q < stop; ++q)
                    if (own.seen[t].any())
                        weigh(own.scores + q * SLOTS, own.seen[t].lanes(), largest[q], s.scale,
                              own.weights + q * SLOTS, sums + q * stride() + width());
            lay_values(values, any, later + apart, own.laid);
            for (int64_t t = 0, same; t < s.width; t += same) {  // positions that see the same slots
                for (same = 1; t + same < s.width && own.seen[t + same] == own.seen[t];) ++same;
                if (own.seen[t].any())
                    for (int64_t q = t * group; q < (t + same) * group; q += QUERIES)
                        add_values(values, own.laid, std::min<int64_t>(QUERIES, (t + same) * group - q),
                                   own.weights + q * SLOTS, own.seen[t], {sums + q * stride(), stride(), i > 0});
            }
        }
    }

    // Add the chunks of queries [first, stop) of a row and key head up; `factors` has room for theirs. A chunk that a
    // query does not see adds nothing.
    void combine(int64_t b, int64_t head, int64_t first, int64_t stop, const Room &room, float *factors, T *out) const {
        const int64_t before = chunk_of(rows[b].first), chunks = chunk_of(rows[b].stop - 1) - before + 1;
        const int64_t at = (rows[b].task + head * chunks) * queries;
        auto larger = [](auto a, auto b) { return a > b ? a : b; };  // b where either is a NaN
        int64_t t = first / group, place = first % group;
        for (int64_t q = first; q < stop; q += LANES) {
            Floats most = Floats{} - FLT_MAX;
            for (int64_t i = 0; i < chunks; ++i) most = larger(loaded<Floats>(room.largest + at + i * queries + q), most);
            for (int64_t i = 0; i < chunks; ++i)
                kept(factors + i * LANES,
                     exponential<Floats, Words>((loaded<Floats>(room.largest + at + i * queries + q) - most) * s.scale));
            for (int64_t lane = 0; lane < std::min<int64_t>(LANES, stop - q); ++lane) {
                added_up(room.sums + (at + q + lane) * stride(), chunks, factors + lane,
                         out + (((b * s.width + t) * group + place) * s.kv_heads + head) * size());
                if (++place == group) place = 0, ++t;
            }
        }
    }
    // The same of one query.
    void added_up(const float *sums, int64_t chunks, const float *factors, T *to) const {
        auto all = [&](int64_t from) {
            Floats sum = {};
            for (int64_t i = 0; i < chunks; ++i)
                sum = plus(sum, loaded<Floats>(sums + i * queries * stride() + from), factors[i * LANES]);
            return sum;
        };
        const float share = 1.f / over_lanes<LANES>(all(width()), [](auto a, auto b) { return a + b; });
        if constexpr (IN_WORD<T> == 2 && !PAIRED)
            for (int64_t from = 0; from < width(); from += 2 * LANES)
                rounded_words(to + from, all(from) * share, all(from + LANES) * share, size() - from);
        else
            for (int64_t from = 0; from < width(); from += LANES)
                rounded_to(to + from, all(from) * share, size() - from);
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

    int64_t chunks() const { return tasks.size(); }

    // Room for as many chunks as this or another one of the same shape has; the thread's that asks for it.
    Room room(int64_t count) const {
        static thread_local Buffer<float> sums, largest;
        static thread_local Buffer<Factor<T>> asked;
        return {sums.sized(count * queries * stride()), largest.sized(count * queries + LANES),
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
        static thread_local Buffer<Seen> kept_seen;
        const int64_t count = chunks(), thread = own_number(), threads = team_size();
        float *factors = kept_factors.sized(count / s.kv_heads * LANES);
        Scratch own = {kept_laid.sized(std::max(words(), value_words()) * SLOTS), kept_scores.sized(queries * SLOTS),
                       kept_weights.sized(queries * SLOTS), kept_seen.sized(s.width)};
        for (int64_t i = 0; i < count; ++i) {
            const Task &task = tasks[i], &next = tasks[std::min(i + 1, count - 1)];
            if ((2 * task.before + task.blocks) * threads / (2 * num_blocks) == thread)
                run(task, keys_of(cache, task), keys_of(cache, next),
                    room.asked + (task.row * s.kv_heads + task.head) * queries * asks(),
                    room.sums + i * queries * stride(), room.largest + i * queries, own);
        }
        together();
        const Share share = own_share(s.rows * s.kv_heads * queries);
        for (int64_t i = share.first, stop; i < share.stop; i = stop) {  // the queries of a row and a key head
            const int64_t pair = i / queries, zero = pair * queries;
            stop = std::min(zero + queries, share.stop);
            combine(pair / s.kv_heads, pair % s.kv_heads, i - zero, stop - zero, room, factors, out);
        }
        together();
    }
};
