// This header decides which workers of the thread pool are on duty if there are more threads than processors (see
// `pool.h`). It has no threads itself.
#pragma once
#include <cstdint>

#include "nodes.h"

// The workers of one memory node: the workers `begin` to `begin` + `workers` - 1 of the pool, in a ring. The worker
// `oldest` and those that follow it are on duty, `on_duty` in all. With each turn the oldest one leaves and the next
// one comes.
struct Ring {
    int64_t begin = 0, workers = 0, on_duty = 0, oldest = 0;
    int64_t taken = 0;  // how many ranges of items the oldest one had taken when it became the oldest

    // Returns how many steps a worker is behind the oldest one.
    int64_t distance(int64_t worker) const { return worker - oldest + (worker < oldest ? workers : 0); }

    // The following functions are about the workers `first` to `first` + `size` - 1, which are a group. Returns which
    // of them comes first on duty, counted from the worker `first`.
    int64_t first_of(int64_t first, int64_t size) const {
        const int64_t after = workers - distance(first);
        return after < size ? after : 0;
    }

    // Returns how many of them belong to the `count` workers from the oldest one on.
    int64_t count_of(int64_t first, int64_t size, int64_t count) const {
        const int64_t from = distance(first), after = workers - from;
        const int64_t begin_of_ring = after < size ? least(count, size - after) : 0;
        return begin_of_ring + (count > from ? least(count - from, least(size, after)) : 0);
    }

    // The oldest worker leaves.
    void pass() { oldest = oldest + 1 == begin + workers ? begin : oldest + 1; }

private:
    static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

struct Turns {
    int64_t threads = 1;  // the number of threads on duty, of which the caller is one
    int64_t passed = 0;   // the number of turns that are over
    Ring rings[Nodes::MOST];

    // workers: [nodes], the number of workers of each node. Together they are at least `threads_on_duty` - 1, and 1.
    void start(const int64_t* workers, int64_t nodes, int64_t threads_on_duty) {
        threads = threads_on_duty, passed = 0, all_ = 0;
        for (int64_t node = 0; node < nodes; all_ += workers[node++]) rings[node] = {all_, workers[node], 0, all_};
        divide(nodes);
    }

    // Divides the duties among the nodes in proportion to their workers. A node may have a fraction of a duty, so what
    // is rounded changes from turn to turn, and each node has its share over time.
    void divide(int64_t nodes) {
        const int64_t workers = threads - 1, shift = passed % all_;
        for (int64_t node = 0; node < nodes; node++) {
            Ring& ring = rings[node];
            const int64_t before = (workers * ring.begin + shift) / all_;
            ring.on_duty = (workers * (ring.begin + ring.workers) + shift) / all_ - before;
        }
    }

private:
    int64_t all_ = 0;  // the number of workers of all nodes
};
