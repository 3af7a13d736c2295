// This file says how far ahead matrix products prefetch weights, and measures the memory bandwidth.
#include <atomic>

#include "common.h"
#if JAMBA_X86
#include <cpuid.h>
#endif

namespace {

// The number of bytes from the weights in use to the weights that are prefetched, for processors of one vendor. The
// numbers were found by measurement: on AMD's Zen 4 and Zen 5, and on Intel's Granite Rapids.
//
// `few_rows` is for products of one or two rows with weights of 8 bits and 8-bit activations, which are the fastest to
// read their weights, if each block of weights has its own scales. With 0 they prefetch the block of weights in use, which
// lets its reads overlap, and the processor itself reads further ahead. On AMD's Zen 4 that is up to 1.2 times as fast.
struct Distance {
    uint32_t vendor;  // the register EBX of the instruction CPUID with argument 0
    int64_t bytes, few_rows;
};
// "Auth"enticAMD and "Genu"ineIntel.
[[maybe_unused]] constexpr Distance DISTANCES[] = {{0x68747541, 8192, 0}, {0x756e6547, 2048, 2048}};
constexpr Distance OTHER_DISTANCE{0, 4096, 4096};

Distance find_distance() {
#if JAMBA_X86
    unsigned a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        for (const Distance& known : DISTANCES) {
            if (known.vendor == b) return known;
        }
    }
#endif
    return OTHER_DISTANCE;
}

std::atomic<int64_t> distance{find_distance().bytes}, distance_of_few_rows{find_distance().few_rows};

}  // namespace

int64_t prefetch_distance() { return distance.load(std::memory_order_relaxed); }
int64_t prefetch_distance_of_few_rows() { return distance_of_few_rows.load(std::memory_order_relaxed); }

// Sets the number of bytes that both functions return, for benchmarks. A number below 0 restores the processor's own
// numbers. Returns the number that `prefetch_distance` returns.
EXPORT int64_t set_prefetch_distance(int64_t bytes) {
    distance.store(bytes < 0 ? find_distance().bytes : bytes);
    distance_of_few_rows.store(bytes < 0 ? find_distance().few_rows : bytes);
    return distance.load();
}

// Reads `bytes` bytes with all threads, and prefetches `ahead` bytes ahead, or not at all if `ahead` is 0. The result
// depends on all bytes, so that the compiler does not leave the reading out.
EXPORT int64_t read_memory(const void* memory, int64_t bytes, int64_t ahead) {
    typedef int64_t Line __attribute__((vector_size(64)));
    constexpr int64_t BLOCK = 1 << 20, LINES = 4;
    std::atomic<int64_t> total{0};
    parallel_for(bytes / BLOCK, 1, [&](int64_t block, int64_t end) {
        const auto* line = static_cast<const Line*>(memory) + block * (BLOCK / 64);
        const auto* const last = static_cast<const Line*>(memory) + end * (BLOCK / 64);
        Line sums[LINES] = {};
        for (; line < last; line += LINES) {
            for (int64_t i = 0; i < LINES; i++) {
                if (ahead) __builtin_prefetch((const char*)(line + i) + ahead, 0, 3);
                sums[i] ^= line[i];
            }
        }
        const Line sum = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
        int64_t own = 0;
        for (int64_t i = 0; i < 8; i++) own ^= sum[i];
        total.fetch_xor(own);
    }, /*in_runs=*/true);
    return total.load();
}
