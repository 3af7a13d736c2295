// This file writes KV pages, and copies, compresses and restores Mamba states. A unit is one entry along a tensor's
// first dimension, for example the state in one slot.
#include <cmath>

#include "common.h"

// Copies row t of k and row t of v to token slot slots[t] of the KV pages. A row has `row_bytes` bytes, and a page has
// `block_size` token slots. The rows of k are `k_stride` bytes apart, and the rows of v are `v_stride` bytes apart.
EXPORT void write_kv(const char* k, const char* v, char* k_pages, char* v_pages, const int64_t* slots, int64_t rows,
                     int64_t row_bytes, int64_t k_stride, int64_t v_stride, int64_t block_size, int64_t page_stride) {
    for (int64_t t = 0; t < rows; t++) {
        const int64_t place = slots[t] / block_size * page_stride + slots[t] % block_size * row_bytes;
        std::memcpy(k_pages + place, k + t * k_stride, row_bytes);
        std::memcpy(v_pages + place, v + t * v_stride, row_bytes);
    }
}

// Copies unit sources[i] to unit destinations[i], for each i below `pairs`. The size of a unit is `bytes` bytes, and
// the starts of neighbouring units are `stride` bytes apart.
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

// Calls each(i, first channel, end channel) for every i below `pairs`, where slot sources[i] is converted into slot
// destinations[i]. The channels of one slot are divided among several calls, so that several threads can work on one
// slot.
template <class Each>
static void for_each_piece(int64_t pairs, int64_t channels, const Each& each) {
    constexpr int64_t PIECE = 4096;
    const int64_t pieces = (channels + PIECE - 1) / PIECE;
    parallel_for(pairs * pieces, 1, [&](int64_t item, int64_t end) {
        for (; item < end; item++) {
            const int64_t first = item % pieces * PIECE;
            each(item / pieces, first, first + PIECE < channels ? first + PIECE : channels);
        }
    });
}

// Compresses SSM states to one byte per element, by the formulas of `kernels.ops.CompressStates`. The function
// `restore_states` converts the bytes back to float32. The state in one slot has `channels` times `size` elements.
// Strides are counted in elements.
EXPORT void compress_states(const float* states, int64_t stride, int8_t* values, int64_t value_stride, float* scales,
                            int64_t scale_stride, const int64_t* sources, const int64_t* destinations, int64_t pairs,
                            int64_t channels, int64_t size) {
    constexpr float LEVELS = 127.0f, SMALLEST = 0x1p-100f;
    constexpr float ROUND = 12582912.0f;  // ROUND is 1.5 * 2^23, so (x + ROUND) - ROUND rounds x to an integer.
    for_each_piece(pairs, channels, [=](int64_t pair, int64_t first, int64_t last) {
        float* __restrict scale = scales + destinations[pair] * scale_stride;
        for (int64_t c = first; c < last; c++) {
            const float* __restrict x = states + sources[pair] * stride + c * size;
            int8_t* __restrict value = values + destinations[pair] * value_stride + c * size;
            float largest = 0.0f;
            for (int64_t i = 0; i < size; i++) largest = std::fabs(x[i]) > largest ? std::fabs(x[i]) : largest;
            if (largest < SMALLEST) largest = 0.0f;
            const float steps = largest == 0.0f ? 0.0f : LEVELS / largest;
            for (int64_t i = 0; i < size; i++)
                value[i] = static_cast<int8_t>(static_cast<int32_t>((x[i] * steps + ROUND) - ROUND));
            scale[c] = largest * (1 / LEVELS);
        }
    });
}

EXPORT void restore_states(const int8_t* values, int64_t value_stride, const float* scales, int64_t scale_stride,
                           float* states, int64_t stride, const int64_t* sources, const int64_t* destinations,
                           int64_t pairs, int64_t channels, int64_t size) {
    for_each_piece(pairs, channels, [=](int64_t pair, int64_t first, int64_t last) {
        const float* __restrict scale = scales + sources[pair] * scale_stride;
        for (int64_t c = first; c < last; c++) {
            const int8_t* __restrict value = values + sources[pair] * value_stride + c * size;
            float* __restrict x = states + destinations[pair] * stride + c * size;
            for (int64_t i = 0; i < size; i++) x[i] = value[i] * scale[c];
        }
    });
}
