// This header places memory on the nodes of a machine. Linux takes a page of memory from the node of the thread that
// first writes to the page, so a thread of each node writes to that node's share of the memory. Calls that name a node
// directly are not used, because containers often forbid them.
#pragma once
#include "pool.h"

// Asks for huge pages (see `pack.cpp`).
extern "C" void use_huge_pages(void* memory, int64_t bytes);

struct Placement {
    const Nodes* nodes;
    int64_t node;
    char* memory;  // memory: [count, bytes]
    int64_t bytes, count;
    int64_t first, last, threads;  // the node's share of each `bytes` bytes is first / threads to last / threads
    void (*touch)(char* page);
};

inline void* place_share(void* argument) {
    const Placement& p = *static_cast<const Placement*>(argument);
    constexpr int64_t PAGE = 4096;
    p.nodes->bind_this_thread(p.node);
    const int64_t begin = p.bytes * p.first / p.threads, end = p.bytes * p.last / p.threads;
    for (int64_t i = 0; i < p.count; i++) {
        for (int64_t at = begin; at < end; at += PAGE) p.touch(p.memory + i * p.bytes + at);
    }
    return nullptr;
}

// Places `count` arrays of `bytes` bytes each, one after the other, before anything is written to them: of each array,
// every node gets the share of which its threads take pieces first. touch(address) writes to the page with an address.
inline void place(const Nodes& nodes, int64_t threads, char* memory, int64_t bytes, int64_t count,
                  void (*touch)(char* page)) {
    int64_t before[Nodes::MOST + 1];
    nodes.divide(threads, before);
    Placement shares[Nodes::MOST];
    pthread_t workers[Nodes::MOST];
    bool started[Nodes::MOST];
    for (int64_t node = 0; node < nodes.count; node++) {
        shares[node] = {&nodes, node, memory, bytes, count, before[node], before[node + 1], threads, touch};
        started[node] = pthread_create(&workers[node], nullptr, place_share, &shares[node]) == 0;
    }
    for (int64_t node = 0; node < nodes.count; node++) {
        if (started[node]) pthread_join(workers[node], nullptr);
    }
}
