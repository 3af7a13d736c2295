// This file implements a thread pool. OpenMP is not used, because OpenMP's threads either spin while the server is idle
// or sleep between two kernels of a step.
//
// A job is one call of the function `parallel_for`. A job is open while the calling thread takes pieces of the job.
// Workers that are awake join the job, and all threads take pieces of the job from a shared counter. When no piece is
// left, the caller closes the job. The caller then waits for the workers that joined the job, but not for workers that
// were asleep. So if another process occupies a core, the pool loses only the work of that core. A worker without a job
// spins for SPIN_NS nanoseconds, which is longer than the time between two kernels of a step, and then sleeps.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "common.h"

namespace {

constexpr int64_t SPIN_NS = 50'000;
// The bit OPEN of the variable `gate_` is set while a job is open. The lower bits of `gate_` are the number of workers
// that have joined the job and have not left it.
constexpr uint64_t OPEN = uint64_t(1) << 32;

void relax() {
#if JAMBA_X86
    _mm_pause();
#elif JAMBA_ARM
    asm volatile("isb");  // The instruction YIELD would not wait at all on most processors.
#endif
}

int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

class Pool {
public:
    void run(int64_t n, int64_t grain, bool in_runs, Body body, const void* context) {
        if (threads_ == 1 || n <= grain || working) return body(context, 0, n);
        std::unique_lock<std::mutex> lock(caller_, std::try_to_lock);
        // The pool is running another thread's job, so this thread runs its own job alone.
        if (!lock) return body(context, 0, n);
        body_ = body, context_ = context, n_ = n, grain_ = grain, in_runs_ = in_runs;
        next_.store(0, std::memory_order_relaxed);
        gate_.fetch_or(OPEN);
        epoch_.fetch_add(1);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> guard(sleep_);
            wake_.notify_all();
        }
        work();
        gate_.fetch_and(~OPEN);
        for (int64_t i = 0; gate_.load() != 0; i++) {
            if (i < 4000) relax();
            else std::this_thread::yield();
        }
    }

    void set_threads(int64_t threads) {
        std::lock_guard<std::mutex> lock(caller_);
        threads = threads < 1 ? 1 : threads;
        if (threads == threads_) return;
        stop();
        threads_ = threads;
        stopping_.store(false);
        for (int64_t i = 1; i < threads; i++) workers_.emplace_back([this] { wait_and_work(); });
    }

    int64_t threads() const { return threads_; }

private:
    void work() {
        working = true;
        for (int64_t begin = next_.load(); begin < n_;) {
            // `run` is the number of neighbouring pieces that a thread takes at once. The number `run` is large at
            // first, because each thread then reads memory in order, which is faster. `run` becomes small at the end,
            // so that all threads finish at about the same time.
            const int64_t run = in_runs_ ? (n_ - begin) / (2 * threads_ * grain_) : 1;
            const int64_t size = run > 1 ? run * grain_ : grain_;
            if (!next_.compare_exchange_weak(begin, begin + size)) continue;
            body_(context_, begin, begin + size < n_ ? begin + size : n_);
            begin = next_.load();
        }
        working = false;
    }

    void wait_and_work() {
        uint64_t seen = 0;
        for (;;) {
            wait(seen);
            if (stopping_.load()) return;
            seen = epoch_.load();
            if (gate_.fetch_add(1) & OPEN) work();
            gate_.fetch_sub(1);
        }
    }

    void wait(uint64_t seen) {
        const int64_t limit = now() + SPIN_NS;
        do {
            for (int i = 0; i < 32; i++) {
                if (epoch_.load(std::memory_order_relaxed) != seen) return;
                relax();
            }
        } while (now() < limit);
        release_tiles();
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
    }

    void stop() {
        stopping_.store(true);
        {
            std::lock_guard<std::mutex> guard(sleep_);
            epoch_.fetch_add(1);
            wake_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
    }

    // `working` is true while the current thread runs pieces of a job. If such a piece itself starts another job, the
    // current thread alone runs that other job.
    static thread_local bool working;
    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
    int64_t threads_ = 1;
    Body body_ = nullptr;
    const void* context_ = nullptr;
    int64_t n_ = 0, grain_ = 1;
    bool in_runs_ = false;
    alignas(64) std::atomic<uint64_t> epoch_{1};
    alignas(64) std::atomic<uint64_t> gate_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stopping_{false};
};

thread_local bool Pool::working = false;

// The pool is never destroyed, and its threads end with the process. In a forked child process, the pool's threads do
// not exist, so joining the threads at exit could block the child process forever.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffers[5];

}  // namespace

void parallel_for_body(int64_t n, int64_t grain, bool in_runs, Body body, const void* context) {
    if (n > 0) pool().run(n, grain, in_runs, body, context);
}

int64_t num_threads() { return pool().threads(); }

EXPORT void set_threads(int64_t threads) { pool().set_threads(threads); }

void* scratch(int slot, int64_t bytes) {
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        buffer.data = std::aligned_alloc(4096, buffer.size);
        if (!buffer.data) std::abort();  // The process ends, because the kernels cannot report an error.
    }
    return buffer.data;
}
