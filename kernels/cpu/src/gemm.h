// This header defines the memory layout of packed weights, and how the rows of a matrix product are divided into tiles.
// The layout is the same for every instruction set.
#pragma once
#include "common.h"

// A weight [N, K] is packed in panels. A panel has 32 columns of the transposed weight [K, N]. A pair is two
// neighbouring elements along K. Pairs are stored in ascending order, and an odd K is padded with a zero. The layout of
// bf16 is [panel][pair][column][2], which the dot-product instruction needs. The layout of f32 and f16 is
// [panel][pair][2][column].
//
// In a quantised weight, a group is the elements along K that share a scale. A panel stores the numbers of each group,
// followed by the group's scales: float32 [column]. int8 and fp8 (e4m3 without infinities) are stored as
// [pair][2][column]. int4 is stored in steps of four pairs. For each column, a step has two words of 16 bits:
// [step][column][2]. Word 0 holds the first elements of the four pairs, and word 1 holds the second elements. The
// elements of the first pair are in the lowest bits of the words. For int4, K is padded with zeros to a multiple of 8
// elements, so that all steps are complete.
constexpr int64_t PANEL = 32;
struct Int8 {};
struct Int4 {};
struct Fp8 {};
constexpr int64_t FP8 = -8;  // the value of the field `bits` for fp8, because 8 means int8
constexpr int64_t INT4_PAIRS = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
template <class T>
constexpr int64_t PAIR_BYTES = PANEL * 2 * sizeof(T);
template <class T>
// COLUMN_BYTES is the distance in bytes between neighbouring columns of a packed weight with elements of type T.
constexpr int64_t COLUMN_BYTES = sizeof(T) == 4 ? 4 : 2;
template <>
inline constexpr int64_t COLUMN_BYTES<bf16> = 4;

// The struct `Weights` has the address and the format of a packed weight matrix [N, K]. If several packed matrices are
// adjacent in memory, `panels` points to the first matrix.
struct Weights {
    const char* panels;
    int64_t k;
    int64_t bits;  // `bits` is 8 for int8, 4 for int4, FP8 for fp8, and 0 for a weight that is not quantised.
    // `group_size` is the number of elements along K that share a scale. If a row of W has several scales, `group_size`
    // is a multiple of 8. If each row of W has only one scale, `group_size` is allowed to be any number from K on.
    int64_t group_size;

    int64_t pairs() const { return bits == 4 ? ceil_div(k, 2 * INT4_PAIRS) * INT4_PAIRS : ceil_div(k, 2); }
    int64_t groups() const { return bits ? ceil_div(k, group_size) : 1; }
    int64_t group_pairs() const { return groups() == 1 ? pairs() : group_size / 2; }
};
template <class T>
int64_t panel_bytes(const Weights& w) {
    const int64_t bits = w.bits == FP8 ? 8 : w.bits;
    return bits ? w.pairs() * PANEL * bits / 4 + w.groups() * PANEL * 4 : w.pairs() * PAIR_BYTES<T>;
}

// The struct `Tiles` divides `rows` rows into as few tiles as possible, with at most `highest` rows each. The numbers
// of rows of two tiles differ by at most one.
struct Tiles {
    int64_t count, base, extra;
    Tiles(int64_t rows, int64_t highest)
        : count(ceil_div(rows, highest)), base(rows / (count ? count : 1)), extra(rows - base * count) {}
    int64_t first(int64_t t) const { return t * base + (t < extra ? t : extra); }
    int64_t size(int64_t t) const { return base + (t < extra ? 1 : 0); }
};

// The struct `Product` has the inputs and the output of the matrix product y = x W^T + bias. If `rows` is not null, row
// i of y is computed from row rows[i] of x, otherwise from row i of x.
template <class T>
struct Product {
    const T* x;
    int64_t x_stride;
    const int32_t* rows;
    Weights weights;
    const T* bias;  // bias: [n], or null if there is no bias
    T* y;           // y: [m, n]
    int64_t m, n;
};

// The struct `Experts` has the weights of a layer of experts, and the tokens with the experts that each token chose.
// The comment at the function `run_experts` gives the shapes of the fields.
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
