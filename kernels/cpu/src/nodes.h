// This header describes the memory nodes of a machine: which processors are near which part of the memory.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

struct Nodes {
    static constexpr int64_t MOST = 64, MOST_PROCESSORS = 8192;

    int64_t count = 1;
    // The number of processors of each node that this process may use, and the node of each processor.
    int64_t processors[MOST] = {1};
    uint8_t node_of[MOST_PROCESSORS] = {};
    bool usable[MOST_PROCESSORS] = {};

    // Makes a description from `size` pairs of a processor's number and its node, with nodes 0 to `nodes` - 1. Returns
    // false if a number is out of range or a node has no processor.
    static bool make(const int64_t* numbers, const int64_t* nodes_of, int64_t size, int64_t nodes, Nodes& out) {
        if (nodes < 1 || nodes > MOST) return false;
        out = Nodes{};
        out.count = nodes, out.processors[0] = 0;
        for (int64_t i = 0; i < size; i++) {
            const int64_t number = numbers[i], node = nodes_of[i];
            if (number < 0 || number >= MOST_PROCESSORS || node < 0 || node >= nodes) return false;
            out.node_of[number] = uint8_t(node), out.usable[number] = true, out.processors[node]++;
        }
        for (int64_t node = 0; node < nodes; node++) {
            if (out.processors[node] == 0) return false;
        }
        return true;
    }

    bool operator==(const Nodes& other) const {
        return count == other.count && !std::memcmp(node_of, other.node_of, sizeof(node_of)) &&
               !std::memcmp(usable, other.usable, sizeof(usable));
    }

    // The node of the processor that runs the calling thread at this moment.
    int64_t current() const {
#if defined(__linux__)
        const int number = sched_getcpu();
        if (number >= 0 && number < MOST_PROCESSORS) return node_of[number];
#endif
        return 0;
    }

    // Divides `threads` threads among the nodes in proportion to their processors. before: [MOST + 1], the number of
    // threads of all earlier nodes.
    void divide(int64_t threads, int64_t* before) const {
        int64_t all = 0, earlier = 0;
        for (int64_t node = 0; node < count; node++) all += processors[node];
        for (int64_t node = 0; node <= count; node++) {
            before[node] = node == count ? threads : (threads * earlier + all / 2) / all;
            if (node < count) earlier += processors[node];
        }
        // The caller's node has at least one thread.
        for (int64_t node = 1; node < count && before[node] == 0; node++) before[node] = 1;
    }

    // Lets the calling thread run on the processors of one node only. Returns whether the system allowed it.
    bool bind_this_thread(int64_t node) const {
#if defined(__linux__)
        unsigned long mask[MOST_PROCESSORS / (8 * sizeof(unsigned long))] = {};
        constexpr int64_t BITS = 8 * sizeof(unsigned long);
        for (int64_t i = 0; i < MOST_PROCESSORS; i++) {
            if (usable[i] && node_of[i] == node) mask[i / BITS] |= 1ul << i % BITS;
        }
        return sched_setaffinity(0, sizeof(mask), reinterpret_cast<const cpu_set_t*>(mask)) == 0;
#else
        return node == 0;
#endif
    }
};

// Returns on how many processors this process may run.
inline int64_t usable_processors() {
#if defined(__linux__)
    unsigned long mask[Nodes::MOST_PROCESSORS / (8 * sizeof(unsigned long))] = {};
    if (sched_getaffinity(0, sizeof(mask), reinterpret_cast<cpu_set_t*>(mask)) == 0) {
        int64_t count = 0;
        for (unsigned long word : mask) count += __builtin_popcountl(word);
        return count > 0 ? count : 1;
    }
#endif
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? count : 1;
}
