// Packed weights and how the rows of x fall into tiles: what does not depend on the level.
#pragma once
#include "common.h"

// A weight [N, K] is packed in panels of 32 columns of its transpose, K upwards in pairs (an odd K gets a zero):
// bf16: [panel][pair][column][2], as the dot product of pairs takes it; f32 and f16: [panel][pair][2][column].
//
// Quantised weights: each group of a panel's inputs, then its scales, float32 [column]. int8 and fp8 (e4m3 without
// infinities): [pair][2][column]. int4: [step][column][2] words of 16 bits, each of its number of four pairs, the first
// in the lowest bits (K is filled up with zeros to whole steps).
constexpr int64_t PANEL = 32;
struct Int8 {};
struct Int4 {};
struct Fp8 {};
constexpr int64_t FP8 = -8;  // in place of 8 bits
constexpr int64_t INT4_PAIRS = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
constexpr int64_t PAIR_BYTES = PANEL * 2 * sizeof(T);
template <class T>
constexpr int64_t COLUMN_BYTES = sizeof(T) == 4 ? 4 : 2;  // from a column to the next within a pair
template <>
inline constexpr int64_t COLUMN_BYTES<bf16> = 4;

// A packed matrix [N, K], or the first of several.
struct Weights {
    const char* panels;
    int64_t k;
    int64_t bits;        // 8 or 4: whole numbers with scales; FP8: with scales, too; 0: numbers of the product's dtype
    int64_t group_size;  // inputs to a scale, a multiple of 8; K or more is one group

    int64_t pairs() const { return bits == 4 ? ceil_div(k, 2 * INT4_PAIRS) * INT4_PAIRS : ceil_div(k, 2); }
    int64_t groups() const { return bits ? ceil_div(k, group_size) : 1; }
    int64_t group_pairs() const { return groups() == 1 ? pairs() : group_size / 2; }
};
template <class T>
int64_t panel_bytes(const Weights& w) {
    const int64_t bits = w.bits == FP8 ? 8 : w.bits;
    return bits ? w.pairs() * PANEL * bits / 4 + w.groups() * PANEL * 4 : w.pairs() * PAIR_BYTES<T>;
}

// `rows` in as few tiles of at most `highest` as possible, of nearly equal sizes.
struct Tiles {
    int64_t count, base, extra;
    Tiles(int64_t rows, int64_t highest)
        : count(ceil_div(rows, highest)), base(rows / (count ? count : 1)), extra(rows - base * count) {}
    int64_t first(int64_t t) const { return t * base + (t < extra ? t : extra); }
    int64_t size(int64_t t) const { return base + (t < extra ? 1 : 0); }
};

// y = x W^T + bias. `rows`, where given, says which row of x each row of y belongs to.
template <class T>
struct Product {
    const T* x;
    int64_t x_stride;
    const int32_t* rows;
    Weights weights;
    const T* bias;  // or null
    T* y;           // rows of n
    int64_t m, n;
};

// A layer of experts and the rows that choose among them; see `run_experts`.
template <class T>
struct Experts {
    const T* x;
    int64_t x_stride;
    Weights gate_up, down;
    const float* weights;
    const int32_t* ids;
    T* y;
    int64_t tokens, top_k, experts, hidden, inner;
};
