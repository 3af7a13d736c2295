// This header defines the layout of weights that are multiplied by activations of 8 bits ("a8" in names).
//
// A product with 8-bit activations computes y = x W^T from whole numbers. The inputs of a row of x are divided into
// blocks of 32. The inputs of a block become whole numbers q from -127 to 127 with one scale: x is about scale * q. The
// weights are small whole numbers too, and a group of inputs of one column shares the factors of the weight. The sum of
// q * number over a block is computed in whole numbers, so that it is exact in any order. All other arithmetic is in
// float32, in one order, with fused multiply-adds. So every instruction set computes the same bits for a row, for any
// number of rows.
#pragma once
#include "gemm.h"

// The type of the factors (scales or offsets) of a weight. A factor of two levels is the product of a number of 8 bits
// and a number in half precision that the groups of 256 inputs share.
enum class Factor : int64_t { none, f32, f16, int8, uint8 };

// The struct `A8Weights` describes one or more packed weight matrices [n, k], which are adjacent in memory from the
// address `panels` on. It has the same memory layout as in `kernels/cpu/a8.py`. A matrix is divided into panels of 32
// columns of the transposed matrix; a panel has a record for each group of inputs. See `A8Layout` for a record.
struct A8Weights {
    const uint8_t* panels;
    int64_t n, k;
    int64_t bits;        // 4 or 8
    int64_t group_size;  // 16, a multiple of 32, or any number from k on
    int64_t scales, offsets;  // values of the enum `Factor`
    int64_t has_zeros;   // 1 if each group has a whole number that is subtracted from the numbers of the group
    int64_t bias;        // `bias` was added to each number, so that the stored numbers are not negative.
    int64_t level;       // the instruction set that multiplies this weight (see the enum `Level`), or -1 for the machine's
    int64_t has_table;   // 1 if the stored numbers are indices into `table`
    uint8_t table[16];   // whole numbers, to each of which `bias` was added
};

constexpr int64_t A8_BLOCK = 32, A8_SUPER = 256;
constexpr int64_t A8_WORDS = A8_BLOCK / 4;  // a word is four neighbouring inputs of a row of x

// The struct `A8Layout` has the sizes in a packed weight. All sizes are in bytes if the name ends in `bytes`.
//
// A record has the numbers of a group, then its scales, then its offsets, then its zeros, each [column]. With 8 bits,
// the numbers are stored as [word][column][4]. With 4 bits, a byte has a number of word 2 i in its lower half and a
// number of word 2 i + 1 in its upper half: [word / 2][column][4]. If a group has 16 inputs, a record has two groups:
// 32 inputs, then the factors of the first group, then those of the second. Before the first record of each 256 inputs
// come the half precision numbers of factors of two levels, first of the scales and then of the offsets. If k is not a
// multiple of 32, the numbers of the missing inputs are zeros.
struct A8Layout {
    int64_t blocks, halves, group_blocks, groups;  // halves: groups per record, 1 or 2; groups: records per panel
    int64_t block_bytes, scale_bytes, offset_bytes, zero_bytes, factor_bytes, super_bytes, panel_bytes;

    explicit A8Layout(const A8Weights& w) {
        blocks = ceil_div(w.k, A8_BLOCK), halves = w.group_size < A8_BLOCK && w.k > w.group_size ? 2 : 1;
        group_blocks = halves == 2 ? 1 : w.group_size >= w.k ? blocks : w.group_size / A8_BLOCK;
        groups = ceil_div(blocks, group_blocks);
        block_bytes = PANEL * A8_BLOCK * w.bits / 8;
        scale_bytes = size(w.scales) * PANEL, offset_bytes = size(w.offsets) * PANEL;
        zero_bytes = w.has_zeros ? PANEL : 0;
        factor_bytes = scale_bytes + offset_bytes + zero_bytes;  // of one group
        super_bytes = (two_levels(w.scales) + two_levels(w.offsets)) * PANEL * 2;
        panel_bytes = numbers(blocks - 1) + block_bytes + halves * factor_bytes;
    }

    static int64_t size(int64_t factor) {
        switch (Factor(factor)) {
            case Factor::none: return 0;
            case Factor::f32: return 4;
            case Factor::f16: return 2;
            default: return 1;
        }
    }
    static bool two_levels(int64_t factor) { return Factor(factor) == Factor::int8 || Factor(factor) == Factor::uint8; }
    // Returns the offset of a block's numbers in its panel.
    int64_t numbers(int64_t block) const {
        const int64_t supers = super_bytes ? block / (A8_SUPER / A8_BLOCK) + 1 : 0;
        return block * block_bytes + block / group_blocks * halves * factor_bytes + supers * super_bytes;
    }
};

// The struct `A8Product` has the inputs and the output of the product y = x W^T + bias. If `rows` is not null, row i of
// y is computed from row rows[i] of x, otherwise from row i of x.
template <class T>
struct A8Product {
    const T* x;
    int64_t x_stride;
    const int32_t* rows;
    const A8Weights* weights;
    const uint8_t* panels;  // the panels of the matrix that is multiplied
    const T* bias;          // bias: [n], or null if there is no bias
    T* y;                   // y: [m, n], with rows `y_stride` elements apart
    int64_t y_stride, m;
};

// The struct `A8Experts` has the weights of a layer of experts, and the tokens with the experts that each token chose.
template <class T>
struct A8Experts {
    const T* x;
    int64_t x_stride;
    const A8Weights *gate_up, *down;
    const float* weights;
    const int32_t* ids;
    T* y;
    int64_t tokens, top_k, experts, hidden, inner;
};
