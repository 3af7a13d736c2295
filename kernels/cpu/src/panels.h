// This header has the steps by which weights are reordered into panels. A panel has 32 columns, which are rows of the
// weight. Each function takes a small tile of the weight, whose rows are `stride` bytes apart, and writes it transposed.
#pragma once
#include "gemm.h"

// Writes byte j of row i of a tile of 16 x 16 bytes to to[j * PANEL + i].
inline void transpose_bytes(const uint8_t* from, int64_t stride, uint8_t* to) {
#if JAMBA_X86  // every x86-64 processor has SSE2
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm_loadu_si128((const __m128i*)(from + i * stride));
    // Each round interleaves rows i and i + 8. After four rounds, the index of a byte has become the index of its row.
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
            b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        for (int i = 0; i < 16; i++) a[i] = b[i];
    }
    for (int j = 0; j < 16; j++) _mm_storeu_si128((__m128i*)(to + j * PANEL), a[j]);
#else
    for (int j = 0; j < 16; j++) {
        for (int i = 0; i < 16; i++) to[j * PANEL + i] = from[i * stride + j];
    }
#endif
}

// Writes word j of row i of a tile of 4 x 4 words of 32 bits to word j * PANEL + i of `to`. `bias` is added to each
// byte.
inline void transpose_words(const uint8_t* from, int64_t stride, uint8_t* to, uint8_t bias = 0) {
#if JAMBA_X86
    __m128i a[4];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm_add_epi8(_mm_loadu_si128((const __m128i*)(from + i * stride)), _mm_set1_epi8(char(bias)));
    }
    const __m128i low01 = _mm_unpacklo_epi32(a[0], a[1]), low23 = _mm_unpacklo_epi32(a[2], a[3]);
    const __m128i high01 = _mm_unpackhi_epi32(a[0], a[1]), high23 = _mm_unpackhi_epi32(a[2], a[3]);
    _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi64(low01, low23));
    _mm_storeu_si128((__m128i*)(to + 4 * PANEL), _mm_unpackhi_epi64(low01, low23));
    _mm_storeu_si128((__m128i*)(to + 8 * PANEL), _mm_unpacklo_epi64(high01, high23));
    _mm_storeu_si128((__m128i*)(to + 12 * PANEL), _mm_unpackhi_epi64(high01, high23));
#else
    for (int j = 0; j < 4; j++) {
        for (int i = 0; i < 4; i++) {
            for (int b = 0; b < 4; b++) to[4 * (j * PANEL + i) + b] = uint8_t(from[i * stride + 4 * j + b] + bias);
        }
    }
#endif
}

// Returns eight neighbouring bytes of a row as a number, the first byte in its lowest bits.
inline uint64_t eight_bytes(const uint8_t* from) {
    uint64_t bytes;
    std::memcpy(&bytes, from, 8);
    return bytes;
}

// Copies numbers of ITEM bytes, which are `stride` numbers apart, to neighbouring places.
template <int64_t ITEM>
inline void gather_items(const uint8_t* from, uint8_t* to, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; i++) std::memcpy(to + i * ITEM, from + i * stride * ITEM, ITEM);
}

// Copies numbers of `item` bytes (1, 2 or 4), which are `stride` numbers apart, to neighbouring places.
inline void gather_items(const uint8_t* from, uint8_t* to, int64_t count, int64_t stride, int64_t item) {
    if (item == 4) return gather_items<4>(from, to, count, stride);
    if (item == 2) return gather_items<2>(from, to, count, stride);
    gather_items<1>(from, to, count, stride);
}
