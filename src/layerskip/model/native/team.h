// A team: threads that call the same function at once, inside `#pragma omp parallel`; one thread alone is a team too.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
static inline void rest() { _mm_pause(); }
#else
static inline void rest() {}
#endif
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
// Where the threads of one team meet. OpenMP's own barrier sends threads to sleep at once where the process has more
// threads than the machine has cores, whatever they do: a server has, and a step has some three hundred meetings.
struct Team {
    alignas(64) std::atomic<int> here{0};
    alignas(64) std::atomic<unsigned> meetings{0};
    std::atomic<int> asleep{0};
};
static thread_local Team *own_team = nullptr;

struct Member {  // of a team, as long as it lives
    explicit Member(Team &team) { own_team = &team; }
    ~Member() { own_team = nullptr; }
    Member(const Member &) = delete;
};

// Sleep until a meeting is over. To yield is not enough where another process keeps a core: the thread that is waited for may
// then stand behind this one, which the scheduler runs again.
static inline void sleep_through(Team &team, unsigned meeting) {
#ifdef __linux__
    static_assert(sizeof team.meetings == 4);
    team.asleep.fetch_add(1);
    while (team.meetings.load() == meeting)
        syscall(SYS_futex, &team.meetings, FUTEX_WAIT_PRIVATE, meeting, nullptr, nullptr, 0);
    team.asleep.fetch_sub(1);
#else
    while (team.meetings.load(std::memory_order_acquire) == meeting) std::this_thread::yield();
#endif
}
static inline void wake(Team &team) {
#ifdef __linux__
    if (team.asleep.load()) syscall(SYS_futex, &team.meetings, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
}
// Turns of waiting before one sleeps, some 100 microseconds; once that was in vain, a hundredth of it but for every eighth meeting.
constexpr int PATIENCE = 20000, LITTLE = 200, ONCE_IN = 8;

// Go on when all are here, and see what they wrote.
static inline void together() {
    static thread_local bool crowded = false;
    const int64_t all = team_size();
    if (all == 1 || own_team == nullptr) return;
    Team &team = *own_team;
    const unsigned meeting = team.meetings.load(std::memory_order_relaxed);
    if (team.here.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
        team.here.store(0, std::memory_order_relaxed);
        team.meetings.store(meeting + 1);
        return wake(team);
    }
    const bool patient = !crowded || meeting % ONCE_IN == 0;
    for (int turns = patient ? PATIENCE : LITTLE; turns; --turns) {
        if (team.meetings.load(std::memory_order_acquire) != meeting) {
            if (patient) crowded = false;
            return;
        }
        rest();
    }
    crowded = true;
    sleep_through(team, meeting);
}
