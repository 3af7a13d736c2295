// This header has the groups of the thread pool's workers, and how a worker waits for a job (see `pool.h`).
#pragma once
#include <pthread.h>
#include <time.h>

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using Body = void (*)(const void* context, int64_t begin, int64_t end);

// Data of different threads are kept this many bytes apart: processors fetch cache lines of 64 bytes in pairs.
constexpr int64_t LINE = 128;

// Lets a thread that waits in a loop use less of the processor.
inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // The instruction YIELD would not wait at all on most processors.
#endif
}

struct Job {
    Body body;
    const void* context;
    int64_t grain;
    bool in_runs;
    int64_t together;  // the number of threads that wait for each other after their first piece, or 0
};

// The job of a group is written before its gate is opened, and read by workers that have joined.
struct alignas(LINE) Group {
    // The bit OPEN of `gate` is set while a job is open. The lower bits are the number of workers of the group that
    // have joined the job and have not left it.
    static constexpr uint64_t OPEN = uint64_t(1) << 32;

    std::atomic<uint64_t> epoch{1};
    // Workers have positions in the group. The worker with the index `first` has position 0, the next one has position
    // 1, and so on around the group. Those with positions below `limit` take part in the job. Those with positions
    // below `on_duty` spin for a while when they have no job. All of this changes only while no job is open.
    std::atomic<int64_t> first{0}, limit{0}, on_duty{0};
    Job job{};
    alignas(LINE) std::atomic<uint64_t> gate{0};
    alignas(LINE) std::atomic<int64_t> next{0};
    int64_t end = 0;
    int64_t sharing = 0;  // the number of threads for which the group's range of the job is meant
    alignas(LINE) int64_t index = 0, node = 0, threads = 0, first_worker = 0, workers = 0;

    // Returns the index of the worker with a position.
    int64_t index_at(int64_t position) const {
        const int64_t index = first.load(std::memory_order_relaxed) + position;
        return index < workers ? index : index - workers;
    }
    int64_t position_of(int64_t index) const {
        const int64_t position = index - first.load(std::memory_order_relaxed);
        return position < 0 ? position + workers : position;
    }
};

class Pool;

struct alignas(LINE) Worker {
    // The time for which a worker on duty waits for a job before it sleeps.
    static constexpr int64_t SPIN_NS = 50'000;

    Pool* pool;
    Group* group;
    int64_t index;  // in the group
    pthread_t thread;
    alignas(LINE) std::atomic<int64_t> taken{0};
    alignas(LINE) std::atomic<bool> asleep{false};
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t awake = PTHREAD_COND_INITIALIZER;

    int64_t position() const { return group->position_of(index); }

    // Waits until the group's epoch is not `seen`. Calls `before_sleep` if the worker is going to sleep.
    void wait(uint64_t seen, void (*before_sleep)()) {
        if (position() < group->on_duty.load(std::memory_order_relaxed)) {
            const int64_t limit = now() + SPIN_NS;
            do {
                for (int i = 0; i < 32; i++) {
                    if (group->epoch.load(std::memory_order_relaxed) != seen) return;
                    relax();
                }
            } while (now() < limit);
        }
        before_sleep();
        pthread_mutex_lock(&mutex);
        asleep.store(true);
        while (group->epoch.load() == seen) pthread_cond_wait(&awake, &mutex);
        asleep.store(false);
        pthread_mutex_unlock(&mutex);
    }

    // Wakes the worker if it sleeps. The epoch of its group must have changed before. Either this function then sees
    // that the worker sleeps, or the worker sees the new epoch before it sleeps.
    void wake() {
        if (!asleep.load()) return;
        pthread_mutex_lock(&mutex);
        pthread_cond_signal(&awake);
        pthread_mutex_unlock(&mutex);
    }

private:
    static int64_t now() {
        timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec * 1'000'000'000 + time.tv_nsec;
    }
};
