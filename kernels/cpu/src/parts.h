// This header divides the pieces of several matrix products, or of several parts of one, among the threads.
#pragma once
#include "common.h"

// Calls f(part, first, last) for ranges of pieces that together are all pieces of `count` parts, where pieces_before(i)
// is the number of pieces in all parts before part i. A thread takes many neighbouring pieces at once while many are
// left. With several memory nodes, each node has the same share of the pieces of every part, so that it reads the same
// panels of a weight whatever the parts are.
template <class Before, class F>
inline void parallel_for_parts(int64_t count, const Before& pieces_before, const F& f) {
    const int64_t nodes = num_nodes();
    if (nodes == 1 || count == 1) {
        parallel_for(pieces_before(count), 1, [&](int64_t piece, int64_t end) {
            for (int64_t part = 0; piece < end; part++) {
                const int64_t next = pieces_before(part + 1), last = end < next ? end : next;
                if (piece < last) f(part, piece - pieces_before(part), last - pieces_before(part)), piece = last;
            }
        }, /*in_runs=*/true);
        return;
    }
    // The pieces are numbered node by node: first the share of node 0 of all parts, then that of node 1, and so on.
    int64_t first_of_node[MOST_NODES + 1] = {};
    const auto share = [&](int64_t part, int64_t node) {
        return node_share(pieces_before(part + 1) - pieces_before(part), node);
    };
    for (int64_t node = 0; node < nodes; node++) {
        first_of_node[node + 1] = first_of_node[node];
        for (int64_t part = 0; part < count; part++) {
            first_of_node[node + 1] += share(part, node + 1) - share(part, node);
        }
    }
    parallel_for(pieces_before(count), 1, [&](int64_t piece, int64_t end) {
        for (int64_t node = 0; piece < end; node++) {
            int64_t before = first_of_node[node];
            for (int64_t part = 0; part < count && piece < end && piece < first_of_node[node + 1]; part++) {
                const int64_t from = share(part, node), next = before + share(part, node + 1) - from;
                const int64_t last = end < next ? end : next;
                if (piece < last) f(part, from + piece - before, from + last - before), piece = last;
                before = next;
            }
        }
    }, /*in_runs=*/true, first_of_node);
}
