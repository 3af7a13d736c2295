// This file runs a recorded list of calls to this library's exported functions, so that a decode step has no Python
// code between its kernels.
#include <utility>

#include "common.h"

constexpr int64_t MOST_ARGUMENTS = 32;

// The struct `Call` is one recorded call of an exported function, in the same memory layout as in
// `kernels/cpu/graph.py`. The arguments of every exported function are 64-bit integers and pointers, optionally
// followed by one float.
struct Call {
    void (*function)();
    int64_t count;
    int64_t arguments[MOST_ARGUMENTS];
    float number;
    int32_t has_number;
};

namespace {

template <size_t>
using Whole = int64_t;

template <size_t... I>
void call_with(const Call& c, std::index_sequence<I...>) {
    if (c.has_number) reinterpret_cast<void (*)(Whole<I>..., float)>(c.function)(c.arguments[I]..., c.number);
    else reinterpret_cast<void (*)(Whole<I>...)>(c.function)(c.arguments[I]...);
}

template <int64_t N>
void call(const Call& c) {
    if constexpr (N <= MOST_ARGUMENTS) {
        if (c.count == N) call_with(c, std::make_index_sequence<N>{});
        else call<N + 1>(c);
    }
}

}  // namespace

EXPORT void replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) call<0>(calls[i]);
    release_tiles();  // The calling thread may sleep until the next step.
}
