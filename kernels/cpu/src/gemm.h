// This header defines the memory layout of packed weights, and how the rows of a matrix product are divided into tiles.
// The layout is the same for every instruction set.
#pragma once
#include "common.h"
#include "parts.h"

// A weight [N, K] is packed in panels. A panel has 32 columns of the transposed weight [K, N]. A pair is two
// neighbouring elements along K. Pairs are stored in ascending order, and an odd K is padded with a zero. The layout of
// bf16 is [panel][pair][column][2], which the dot-product instruction needs. The layout of f32 and f16 is
// [panel][pair][2][column].
//
// In a quantised weight, a group is the elements along K that share a scale. A panel stores the numbers of each group,
// followed by the group's factors: the scale of each column, and then the offset or the zero of each column if the
// weight has them. int8, uint8 and fp8 (e4m3 without infinities) are stored as [pair][2][column]. The formats of four
// bits are stored in steps of four pairs. For each column, a step has two words of 16 bits: [step][column][2]. Word 0
// holds the first elements of the four pairs, and word 1 holds the second elements. The elements of the first pair are
// in the lowest bits of the words. For these formats, K is padded with zeros to a multiple of 8 elements, so that all
// steps are complete.
//
// With two levels, a factor of a group is an integer of 8 bits, and a float16 number for SUPER_GROUP elements along K
// multiplies it. These numbers are stored before the first of their groups: those of the scales [column], then those of
// the offsets [column] if there are offsets.
constexpr int64_t PANEL = 32;
constexpr int64_t SUPER_GROUP = 256;
struct Int8 {};
struct UInt8 {};
struct Int4 {};
struct UInt4 {};
struct Table4 {};
struct Fp8 {};
// The numbers of these enumerations are those in `kernels/cpu/formats.py`.
enum class Kind : int64_t { plain, int8, uint8, int4, uint4, table4, fp8 };
enum class Scale : int64_t { f32, f16, two_levels_unsigned, two_levels_signed };
enum class Shift : int64_t { none, offset, zero };
constexpr int64_t INT4_PAIRS = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class T>
constexpr int64_t PAIR_BYTES = PANEL * 2 * sizeof(T);
template <class T>
// COLUMN_BYTES is the distance in bytes between neighbouring columns of a packed weight with elements of type T.
constexpr int64_t COLUMN_BYTES = sizeof(T) == 4 ? 4 : 2;
template <>
inline constexpr int64_t COLUMN_BYTES<bf16> = 4;

// The struct `Weights` has the address and the format of a packed weight matrix [N, K], in the same memory layout as in
// `kernels/cpu/formats.py`. If several packed matrices are adjacent in memory, `panels` points to the first matrix.
struct Weights {
    const char* panels;
    int64_t n, k;
    Kind kind;  // `plain` means that the weight is not quantised. The fields below then have no meaning.
    // `group_size` is the number of elements along K that share a scale. If a row of W has several scales, `group_size`
    // is a multiple of 8. If each row of W has only one scale, `group_size` is allowed to be any number from K on.
    int64_t group_size;
    Scale scale;
    Shift shift;
    float table[16];  // for the kinds of four bits: the number that each pattern of bits stands for
    int64_t level;  // the instruction set that multiplies this weight (see the enum `Level`), or -1 for the machine's

    bool quantized() const { return kind != Kind::plain; }
    bool four_bits() const { return kind == Kind::int4 || kind == Kind::uint4 || kind == Kind::table4; }
    bool two_levels() const { return scale == Scale::two_levels_unsigned || scale == Scale::two_levels_signed; }
    int64_t pairs() const { return four_bits() ? ceil_div(k, 2 * INT4_PAIRS) * INT4_PAIRS : ceil_div(k, 2); }
    int64_t groups() const { return quantized() ? ceil_div(k, group_size) : 1; }
    int64_t group_pairs() const { return !quantized() || k <= group_size ? pairs() : group_size / 2; }
    // Returns the number of pairs in group `g`. The last group of a row may be shorter than the others.
    int64_t group_pairs(int64_t g) const { return g + 1 < groups() ? group_pairs() : pairs() - g * group_pairs(); }
    // Returns the number of bytes of one column's number for K elements.
    int64_t number_bytes(int64_t elements) const { return four_bits() ? elements / 2 : elements; }
    int64_t scale_item() const { return scale == Scale::f32 ? 4 : scale == Scale::f16 ? 2 : 1; }
    int64_t shift_item() const { return shift == Shift::none ? 0 : shift == Shift::zero ? 1 : scale_item(); }
    // Returns the number of bytes of a group's factors, for the columns of a panel.
    int64_t factor_bytes() const { return PANEL * (scale_item() + shift_item()); }
    // Returns the number of bytes that SUPER_GROUP elements have in addition, for the columns of a panel.
    int64_t super_bytes() const { return two_levels() ? PANEL * 2 * (shift == Shift::offset ? 2 : 1) : 0; }
    // Returns the offset in a panel of the numbers of group `g`.
    int64_t group_offset(int64_t g) const {
        const int64_t supers = two_levels() ? g * group_size / SUPER_GROUP + 1 : 0;
        return g * (PANEL * number_bytes(2 * group_pairs()) + factor_bytes()) + supers * super_bytes();
    }
    // Returns the offset in a panel of the numbers of the second level that group `g` uses, or 0 if the weight has one
    // level. With two levels, group_size is a power of 2.
    int64_t super_offset(int64_t g) const {
        if (!two_levels()) return 0;
        const int64_t groups_before = g * group_size % SUPER_GROUP >> __builtin_ctzll(uint64_t(group_size));
        return group_offset(g - groups_before) - super_bytes();
    }
    int64_t quantized_panel_bytes() const {
        const int64_t supers = two_levels() ? ceil_div(k, SUPER_GROUP) : 0;
        return PANEL * number_bytes(2 * pairs()) + groups() * factor_bytes() + supers * super_bytes();
    }
};
template <class T>
int64_t panel_bytes(const Weights& w) {
    return w.quantized() ? w.quantized_panel_bytes() : w.pairs() * PAIR_BYTES<T>;
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
    T* y;           // y: [m, n], with rows y_stride elements apart
    int64_t y_stride;
    int64_t m, n;
    // If `sums` is not null, the sums are written there as float32, and not rounded to T: [m, n], with rows y_stride
    // elements apart. There is no bias then, and `y` is null.
    float* sums = nullptr;
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
    float* sums = nullptr;  // if not null, the result is written there as float32: [tokens, hidden], and `y` is null
};
