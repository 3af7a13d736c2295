// Movements of whole units; nothing is computed.
#include "common.h"

// Row t of k and v, `row_bytes` each and `k_stride` and `v_stride` bytes apart, to token slot slots[t].
EXPORT void write_kv(const char* k, const char* v, char* k_pages, char* v_pages, const int64_t* slots, int64_t rows,
                     int64_t row_bytes, int64_t k_stride, int64_t v_stride, int64_t block_size, int64_t page_stride) {
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = slots[t] / block_size * page_stride + slots[t] % block_size * row_bytes;
        std::memcpy(k_pages + place, k + t * k_stride, row_bytes);
        std::memcpy(v_pages + place, v + t * v_stride, row_bytes);
    }
}

// Unit sources[i] to unit destinations[i]; units of `bytes`, `stride` bytes apart.
EXPORT void copy_slots(char* units, int64_t bytes, int64_t stride, const int64_t* sources, const int64_t* destinations,
                       int64_t pairs) {
    constexpr int64_t PIECE = 1 << 18;
    const int64_t pieces = (bytes + PIECE - 1) / PIECE;
    parallel_for(pairs * pieces, 1, [&](int64_t item, int64_t end) {
        for (; item < end; item++) {
            const int64_t pair = item / pieces, offset = item % pieces * PIECE;
            std::memcpy(units + destinations[pair] * stride + offset, units + sources[pair] * stride + offset,
                        bytes - offset < PIECE ? bytes - offset : PIECE);
        }
    });
}
