// This file has the thread pool of the kernels, the placement of their memory, and the scratch memory of each thread.
#include "pool.h"

#include "common.h"
#include "place.h"

static_assert(MOST_NODES == Nodes::MOST);

namespace {

// The pool is never destroyed, and its threads end with the process.
Pool pool(release_tiles);

void watch_forks() {
    static std::atomic_flag watches = ATOMIC_FLAG_INIT;
    if (watches.test_and_set()) return;
    pthread_atfork([] { pool.before_fork(); }, [] { pool.after_fork_in_parent(); },
                   [] { pool.after_fork_in_child(); });
}

struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
};
constexpr int64_t HUGE_PAGE = 1 << 21;
thread_local Buffer buffers[6];

}  // namespace

void parallel_for_body(int64_t n, int64_t grain, bool in_runs, Body body, const void* context,
                       const int64_t* first_of_node) {
    pool.run(n, grain, in_runs, body, context, first_of_node);
}

int64_t num_threads() { return pool.threads(); }
int64_t num_nodes() { return pool.nodes().count; }
int64_t least_piece_bytes() { return pool.together() ? 1 : 1 << 14; }
int64_t node_share(int64_t count, int64_t node) { return pool.share(count, node); }

// Sets the number of threads. Returns how many there are now: fewer if the system starts no more.
EXPORT int64_t set_threads(int64_t threads) {
    watch_forks();
    return pool.set_threads(threads);
}

// Tells the pool which processors it may use and to which memory node each belongs: numbers, nodes_of: [size]. Returns
// the number of threads that cannot be bound to the processors of their node, or -1 if the description is wrong.
EXPORT int64_t set_nodes(const int64_t* numbers, const int64_t* nodes_of, int64_t size, int64_t nodes) {
    static Nodes described;
    if (!Nodes::make(numbers, nodes_of, size, nodes, described)) return -1;
    watch_forks();
    pool.set_nodes(described);
    return pool.unbound();
}

// For tests: if `together` is not 0, every thread that a job needs takes a part of it.
EXPORT void set_together(int64_t together) { pool.set_together(together != 0); }

// Writes to counts: [size] how many ranges of pieces each thread has taken.
EXPORT void pieces_taken(int64_t* counts, int64_t size) { pool.taken(counts, size); }

// For measurements: runs `times` jobs in which every thread waits for all others.
EXPORT void meet(int64_t times) {
    for (; times > 0; times--) {
        const int64_t threads = num_threads();
        std::atomic<int64_t> arrived{0};
        parallel_for(threads, 1, [&](int64_t first, int64_t last) {
            arrived.fetch_add(last - first);
            while (arrived.load() < threads) {
            }
        });
    }
}

// Returns how many jobs several threads have run together.
EXPORT int64_t jobs_run() { return pool.jobs(); }

// Places `count` arrays of `bytes` bytes on the memory nodes (see `place`). Nothing may have been written to them.
EXPORT void place_memory(char* memory, int64_t bytes, int64_t count) {
    if (num_nodes() == 1) return;
    place(pool.nodes(), pool.threads(), memory, bytes, count, [](char* page) { *static_cast<volatile char*>(page) = 0; });
}

void* scratch(int slot, int64_t bytes) {
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        std::free(buffer.data);
        // A large buffer has huge pages, because a cache holds all of their lines. Pages of 4 KB compete for the same lines
        // by chance.
        const int64_t page = bytes < HUGE_PAGE / 2 ? 4096 : HUGE_PAGE;
        buffer.size = (bytes + bytes / 4 + page - 1) / page * page;
        buffer.data = std::aligned_alloc(page, buffer.size);
        if (!buffer.data) std::abort();  // The process ends, because the kernels cannot report an error.
        if (page == HUGE_PAGE) use_huge_pages(buffer.data, buffer.size);
    }
    return buffer.data;
}
