// This file says how far ahead matrix products prefetch weights, and measures the memory bandwidth.
#include <atomic>

#include "common.h"
#if JAMBA_X86
#include <cpuid.h>
#endif

namespace {

// The number of bytes from the weights in use to the weights that are prefetched, for processors of one vendor. The
// numbers were found by measurement: on AMD's Zen 4 and Zen 5, and on Intel's Granite Rapids.
struct Distance {
    uint32_t vendor;  // the register EBX of the instruction CPUID with argument 0
    int64_t bytes;
};
// "Auth"enticAMD and "Genu"ineIntel.
[[maybe_unused]] constexpr Distance DISTANCES[] = {{0x68747541, 8192}, {0x756e6547, 2048}};
constexpr int64_t OTHER_DISTANCE = 4096;

int64_t find_distance() {
#if JAMBA_X86
    unsigned a, b, c, d;
    if (__get_cpuid(0, &a, &b, &c, &d)) {
        for (const Distance& known : DISTANCES) {
            if (known.vendor == b) return known.bytes;
        }
    }
#endif
    return OTHER_DISTANCE;
}

std::atomic<int64_t> distance{find_distance()};

}  // namespace

int64_t prefetch_distance() { return distance.load(std::memory_order_relaxed); }

// Sets the number of bytes that `prefetch_distance` returns, for benchmarks. A number below 0 restores the processor's
// own number. Returns the number in use.
EXPORT int64_t set_prefetch_distance(int64_t bytes) {
    distance.store(bytes < 0 ? find_distance() : bytes);
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
