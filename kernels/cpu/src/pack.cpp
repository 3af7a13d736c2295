// This file packs weights that are not quantised, and reads rows of packed weights.
#include "panels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

template <class T>
void pack_panel(const T* weight, T* out, int64_t columns, int64_t k) {
    constexpr bool paired = COLUMN_BYTES<T> != sizeof(T), in_words = paired || sizeof(T) == 4;
    constexpr int64_t per_word = 4 / sizeof(T);
    int64_t start = 0;
    if (in_words && columns == PANEL) {  // a panel has words of 32 bits: one number each, or a pair of neighbours
        for (; start + 4 * per_word <= k; start += 4 * per_word) {
            for (int64_t c = 0; c < PANEL; c += 4) {
                transpose_words((const uint8_t*)(weight + c * k + start), k * sizeof(T),
                                (uint8_t*)(out + start * PANEL + c * per_word));
            }
        }
        out += start * PANEL;
    }
    const int64_t block = 32;
    for (; start < k; start += block) {
        // From each column, `block` elements along K are read at a time, because `block` elements fill whole cache
        // lines. The elements are written as pairs of neighbouring elements along K.
        T lines[PANEL][block] = {};
        const int64_t n = k - start < block ? k - start : block;
        for (int64_t c = 0; c < columns; c++) std::memcpy(lines[c], weight + c * k + start, n * sizeof(T));
        for (int64_t i = 0; i < (n + 1) / 2 * 2; i++, out += i % 2 ? 0 : 2 * PANEL) {
            for (int64_t c = 0; c < PANEL; c++) out[paired ? 2 * c + i % 2 : (i % 2) * PANEL + c] = lines[c][i];
        }
    }
}

}  // namespace

EXPORT int64_t packed_bytes(int64_t n, int64_t k, int64_t dtype) {
    int64_t bytes = 0;
    with_dtype(dtype, [&](auto t) { bytes = ceil_div(n, PANEL) * ceil_div(k, 2) * PAIR_BYTES<decltype(t)>; });
    return bytes;
}

// Asks the operating system for huge memory pages for memory that has not been written yet. With huge pages, one core
// reads memory 1.5 times as fast as with normal pages.
EXPORT void use_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;  // Other systems have no such request.
#endif
}

// Packs a weight that is not quantised. weight: [n, k], contiguous; packed: packed_bytes(n, k, dtype) bytes of memory.
EXPORT void pack_weight(const void* weight, void* packed, int64_t n, int64_t k, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t panel = ceil_div(k, 2) * 2 * PANEL;
        parallel_for(ceil_div(n, PANEL), 1, [=](int64_t p, int64_t end) {
            for (; p < end; p++) {
                const int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
                pack_panel((const T*)weight + p * PANEL * k, (T*)packed + p * panel, columns, k);
            }
        });
    });
}

// Copies row ids[i] of a weight matrix [n, k] to row i of `out`, for each i below `count`. ids: [count]; out: [count,
// k]. If `is_packed` is not 0, the argument `weight` was packed by the function `pack_weight`; otherwise `weight` is a
// contiguous array [n, k].
EXPORT void gather_rows(const void* weight, int64_t is_packed, const int64_t* ids, void* out, int64_t count, int64_t k,
                        int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        constexpr bool paired = COLUMN_BYTES<T> != sizeof(T);
        const int64_t panel = ceil_div(k, 2) * 2 * PANEL;
        parallel_for(count, ceil_div(1 << 13, k), [=](int64_t i, int64_t end) {
            for (; i < end; i++) {
                if (!is_packed) {
                    std::memcpy((T*)out + i * k, (const T*)weight + ids[i] * k, k * sizeof(T));
                    continue;
                }
                const T* const from = (const T*)weight + ids[i] / PANEL * panel;
                const int64_t column = ids[i] % PANEL;
                for (int64_t j = 0; j < k; j++) {
                    ((T*)out)[i * k + j] = from[paired ? (j / 2 * PANEL + column) * 2 + j % 2 : j * PANEL + column];
                }
            }
        });
    });
}
