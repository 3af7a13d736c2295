// This file packs weights for products with 8-bit activations, and reads rows of packed weights. `a8.h` describes the
// layout.
#include "a8.h"
#include "panels.h"

// Returns the number of bytes of one packed matrix. The address of the panels may be null.
EXPORT int64_t a8_packed_bytes(const A8Weights* weights) {
    return ceil_div(weights->n, PANEL) * A8Layout(*weights).panel_bytes;
}

namespace {

// The struct `Source` has a matrix as it is before it is packed. All arrays are contiguous. The numbers of factors of
// two levels are in the arrays `scales` and `offsets`, and the half precision numbers in the arrays `super_...`.
struct Source {
    const uint8_t* values;                      // [n, k], one byte each
    const uint8_t *scales, *offsets, *zeros;    // [n, groups]
    const uint8_t *super_scales, *super_offsets;  // f16 [n, ceil(k / 256)]
};

// Copies one element of `size` bytes for each column of a panel: element `index` of the column's row of `row` elements.
void pack_column(uint8_t* out, const uint8_t* from, int64_t columns, int64_t row, int64_t index, int64_t size) {
    gather_items(from + index * size, out, columns, row, size);
}

// Packs the numbers of a whole block for all columns of a panel. values: [columns, k], from the first input of the block
// on.
void pack_block(const A8Weights& w, const uint8_t* values, uint8_t* numbers) {
    const auto bias = uint8_t(w.has_table ? 0 : w.bias);
    if (w.bits == 8) {
        for (int64_t word = 0; word < A8_WORDS; word += 4) {
            for (int64_t c = 0; c < PANEL; c += 4) {
                transpose_words(values + c * w.k + 4 * word, w.k, numbers + 4 * (word * PANEL + c), bias);
            }
        }
        return;
    }
    constexpr uint64_t ones = 0x0101010101010101, low = 15 * ones;
    for (int64_t i = 0; i < A8_WORDS / 2; i++) {
        for (int64_t c = 0; c < PANEL; c++) {
            const uint64_t two = ((eight_bytes(values + c * w.k + 8 * i) & low) + (bias & 15) * ones) & low;
            const auto word = uint32_t(two | two >> 28);  // the upper four bytes move to the upper halves of the others
            std::memcpy(numbers + 4 * (i * PANEL + c), &word, 4);
        }
    }
}

void pack_panel(const A8Weights& w, const A8Layout& l, const Source& s, int64_t panel, uint8_t* out) {
    const int64_t first = panel * PANEL, columns = w.n - first < PANEL ? w.n - first : PANEL;
    const int64_t groups = w.group_size >= w.k ? 1 : ceil_div(w.k, w.group_size), supers = ceil_div(w.k, A8_SUPER);
    if (columns < PANEL || w.k % A8_BLOCK) std::memset(out, 0, l.panel_bytes);
    auto pack_factors = [&](uint8_t* to, int64_t group) {
        if (group >= groups) return;
        const int64_t scale = A8Layout::size(w.scales), offset = A8Layout::size(w.offsets), from = first * groups;
        pack_column(to, s.scales + from * scale, columns, groups, group, scale);
        if (offset) pack_column(to + l.scale_bytes, s.offsets + from * offset, columns, groups, group, offset);
        if (w.has_zeros) pack_column(to + l.scale_bytes + l.offset_bytes, s.zeros + from, columns, groups, group, 1);
    };
    for (int64_t block = 0; block < l.blocks; block++) {
        uint8_t* const numbers = out + l.numbers(block);
        if (l.super_bytes && block % (A8_SUPER / A8_BLOCK) == 0) {
            uint8_t* to = numbers - l.super_bytes;
            const int64_t from = first * supers * 2, index = block / (A8_SUPER / A8_BLOCK);
            if (A8Layout::two_levels(w.scales)) {
                pack_column(to, s.super_scales + from, columns, supers, index, 2), to += 2 * PANEL;
            }
            if (A8Layout::two_levels(w.offsets)) pack_column(to, s.super_offsets + from, columns, supers, index, 2);
        }
        const bool is_whole = columns == PANEL && (block + 1) * A8_BLOCK <= w.k;
        if (is_whole) pack_block(w, s.values + first * w.k + block * A8_BLOCK, numbers);
        for (int64_t c = 0; !is_whole && c < columns; c++) {
            for (int64_t i = 0; i < A8_BLOCK && block * A8_BLOCK + i < w.k; i++) {
                const uint8_t value = s.values[(first + c) * w.k + block * A8_BLOCK + i];
                const auto number = uint8_t(w.has_table ? value : value + w.bias);
                const int64_t word = i / 4;
                if (w.bits == 8) numbers[(word * PANEL + c) * 4 + i % 4] = number;
                else numbers[(word / 2 * PANEL + c) * 4 + i % 4] |= uint8_t((number & 15) << (word % 2 * 4));
            }
        }
        const bool is_last = (block + 1) % l.group_blocks == 0 || block + 1 == l.blocks;
        if (!is_last) continue;
        const int64_t group = block / l.group_blocks * l.halves;
        for (int64_t half = 0; half < l.halves; half++) {
            pack_factors(numbers + l.block_bytes + half * l.factor_bytes, group + half);
        }
    }
}

// Returns the factor of one column from the factors of a group. `supers` has the half precision numbers of all columns.
float read_factor(int64_t kind, const uint8_t* p, int64_t column, const uint8_t* supers) {
    f16 half;
    float single;
    switch (Factor(kind)) {
        case Factor::none: return 0;
        case Factor::f32: return std::memcpy(&single, p + 4 * column, 4), single;
        case Factor::f16: return std::memcpy(&half, p + 2 * column, 2), to_float(half);
        default: break;
    }
    std::memcpy(&half, supers + 2 * column, 2);
    return to_float(half) * (Factor(kind) == Factor::int8 ? float(int8_t(p[column])) : float(p[column]));
}

// Writes the elements of one row of a packed matrix.
template <class T>
void unpack_row(const A8Weights& w, const A8Layout& l, int64_t row, T* out) {
    const int64_t c = row % PANEL, size = A8_BLOCK / l.halves;
    const uint8_t* const panel = w.panels + row / PANEL * l.panel_bytes;
    for (int64_t k = 0; k < w.k; k++) {
        const int64_t block = k / A8_BLOCK, word = k % A8_BLOCK / 4, unit = block / (A8_SUPER / A8_BLOCK);
        const uint8_t* const numbers = panel + l.numbers(block);
        const int64_t after = (block / l.group_blocks + 1) * l.group_blocks;
        const int64_t group_end = after < l.blocks ? after : l.blocks;
        const uint8_t* const factors =
            numbers + (group_end - block) * l.block_bytes + k % A8_BLOCK / size * l.factor_bytes;
        const uint8_t* const supers = panel + l.numbers(unit * (A8_SUPER / A8_BLOCK)) - l.super_bytes;
        const uint8_t byte = numbers[((w.bits == 8 ? word : word / 2) * PANEL + c) * 4 + k % 4];
        const uint8_t stored = w.bits == 8 ? byte : byte >> (word % 2 * 4) & 15;
        const int64_t zero = w.has_zeros ? factors[l.scale_bytes + l.offset_bytes + c] : 0;
        const auto number = float((w.has_table ? w.table[stored] : stored) - w.bias - zero);
        const float product = read_factor(w.scales, factors, c, supers) * number;
        const uint8_t* const second = supers + (A8Layout::two_levels(w.scales) ? 2 * PANEL : 0);
        const float offset = read_factor(w.offsets, factors + l.scale_bytes, c, second);
        out[k] = from_float<T>(w.offsets ? product + offset : product);
    }
}

}  // namespace

// Packs one matrix. packed: a8_packed_bytes(weights) bytes of memory; `Source` describes the other arguments. Arguments
// that the weight's format does not need may be null.
EXPORT void a8_pack(const A8Weights* weights, const uint8_t* values, const uint8_t* scales, const uint8_t* super_scales,
                    const uint8_t* offsets, const uint8_t* super_offsets, const uint8_t* zeros, uint8_t* packed) {
    const A8Layout layout(*weights);
    const Source source{values, scales, offsets, zeros, super_scales, super_offsets};
    parallel_for(ceil_div(weights->n, PANEL), 1, [&](int64_t panel, int64_t end) {
        for (; panel < end; panel++) pack_panel(*weights, layout, source, panel, packed + panel * layout.panel_bytes);
    });
}

// Copies row ids[i] of a weight [n, k] to row i of `out`, for each i below `count`. ids: [count]; out: [count, k]. An
// element is scale * (number - zero), rounded to float32, then plus the offset, rounded to float32 and then to the dtype.
EXPORT void a8_rows(const A8Weights* weights, const int64_t* ids, void* out, int64_t count, int64_t dtype) {
    const A8Layout l(*weights);
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        parallel_for(count, ceil_div(1 << 12, weights->k), [&](int64_t i, int64_t end) {
            for (; i < end; i++) unpack_row(*weights, l, ids[i], static_cast<T*>(out) + i * weights->k);
        });
    });
}
