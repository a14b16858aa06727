// A team: threads that call the same function at once, inside `#pragma omp parallel`; one thread alone is a team too.
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

struct Share { int64_t first, stop; };

static inline int64_t own_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}
static inline int64_t team_size() {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}
// What this thread does of so many: neighbours, and always the same ones.
static inline Share own_share(int64_t count) {
    const int64_t thread = own_number(), threads = team_size();
    return {count * thread / threads, count * (thread + 1) / threads};
}
// Go on when all are here, and see what they wrote.
static inline void together() {
#pragma omp barrier
}
