// This file packs quantised weights, and reads rows of packed quantised weights.
#include "panels.h"

namespace {

// Packs as many of `n` elements along K as fill whole tiles, for all columns of a panel, and returns their number.
template <int BITS>
int64_t pack_tiles(const uint8_t* values, uint8_t* out, int64_t k, int64_t n) {
    constexpr int64_t TILE = BITS == 8 ? 16 : 2 * INT4_PAIRS;
    for (int64_t i = 0; i + TILE <= n; i += TILE, out += PANEL * TILE * BITS / 8) {
        if (BITS == 8) {
            for (int64_t c = 0; c < PANEL; c += 16) transpose_bytes(values + c * k + i, k, out + c);
            continue;
        }
        // `pack_numbers` says where each of the eight elements is stored.
        for (int64_t c = 0; c < PANEL; c++) {
            const uint64_t low = eight_bytes(values + c * k + i) & 0x0f0f0f0f0f0f0f0f, two = low | low >> 12;
            const uint32_t word = uint32_t(two & 0xff) | uint32_t(two >> 24 & 0xff00) | uint32_t(two << 8 & 0xff0000) |
                                  uint32_t(two >> 16 & 0xff000000);
            std::memcpy(out + 4 * c, &word, 4);
        }
    }
    return n / TILE * TILE;
}

// Packs elements `start` to `end` - 1 along K, for `columns` columns of one panel, as numbers of BITS bits each.
template <int BITS>
void pack_numbers(const uint8_t* values, uint8_t* out, int64_t columns, int64_t k, int64_t start, int64_t end) {
    // Each iteration packs one step: INPUTS elements of each column, which take BYTES bytes per column.
    constexpr int64_t INPUTS = BITS == 8 ? 2 : 2 * INT4_PAIRS, BYTES = INPUTS * BITS / 8;
    if (columns == PANEL) {
        const int64_t packed = pack_tiles<BITS>(values + start, out, k, end - start);
        start += packed, out += packed * PANEL * BITS / 8;
    }
    for (; start < end; start += INPUTS, out += PANEL * BYTES) {
        std::memset(out, 0, PANEL * BYTES);
        for (int64_t c = 0; c < columns; c++) {
            for (int64_t i = 0; i < INPUTS && start + i < end; i++) {
                const uint8_t bits = values[c * k + start + i];
                if (BITS == 8) out[i * PANEL + c] = bits;
                // In a step of four bits, element i of a column is stored in the 16-bit word i % 2 of the column, from
                // bit 4 * (i / 2) on. The lower byte of a word is stored first.
                else out[4 * c + 2 * (i % 2) + i / 4] |= uint8_t((bits & 15) << (i / 2 % 2 * 4));
            }
        }
    }
}

// Copies the numbers of `columns` columns, which are `stride` numbers apart, and fills the rest of a panel with zeros.
// Each number takes `item` bytes.
void pack_factors(const uint8_t* numbers, uint8_t* out, int64_t columns, int64_t stride, int64_t item) {
    gather_items(numbers, out, columns, stride, item);
    std::memset(out + columns * item, 0, (PANEL - columns) * item);
}

// Reads factors of a packed weight one by one: those of one column.
struct Column {
    const Weights& w;
    const char* panel;
    int64_t column;

    float factor(const char* numbers, const char* supers) const {
        const auto half = [](const char* p) {
            f16 x;
            std::memcpy(&x, p, 2);
            return to_float(x);
        };
        float x;
        switch (w.scale) {
            case Scale::f32: return std::memcpy(&x, numbers + 4 * column, 4), x;
            case Scale::f16: return half(numbers + 2 * column);
            case Scale::two_levels_unsigned: return half(supers + 2 * column) * float(uint8_t(numbers[column]));
            default: return half(supers + 2 * column) * float(int8_t(numbers[column]));
        }
    }
    // Returns element i of a group whose numbers begin at `group`.
    float number(const char* group, int64_t i) const {
        if (!w.four_bits()) {
            const uint8_t bits = uint8_t(group[i * PANEL + column]);
            if (w.kind == Kind::uint8) return float(bits);
            if (w.kind == Kind::int8) return float(int8_t(bits));
            return from_bits(uint32_t(bits & 0x80) << 24 | uint32_t(bits & 0x7f) << 20) * 0x1p120f;
        }
        const char* const step = group + i / 8 * 4 * PANEL;
        const uint8_t two = uint8_t(step[4 * column + 2 * (i % 2) + i % 8 / 4]);
        return w.table[two >> (i / 2 % 2 * 4) & 15];
    }
    // Computes the elements of the column as `kernels.ops.QuantizedWeight.dequantized` defines them.
    template <class T>
    void read(T* out) const {
        for (int64_t g = 0; g < w.groups(); g++) {
            const int64_t start = g * w.group_size, n = w.k - start < w.group_size ? w.k - start : w.group_size;
            const char* const group = panel + w.group_offset(g);
            const char* const scales = group + PANEL * w.number_bytes(2 * w.group_pairs(g));
            const char *const supers = panel + w.super_offset(g), *const shifts = scales + PANEL * w.scale_item();
            const float scale = factor(scales, supers);
            const float zero = w.shift == Shift::zero ? float(uint8_t(shifts[column])) : 0.0f;
            const bool has_offset = w.shift == Shift::offset;
            const float offset = has_offset ? factor(shifts, supers + 2 * PANEL) : 0.0f;
            for (int64_t i = 0; i < n; i++) {
                const float element = scale * (number(group, i) - zero);
                out[start + i] = from_float<T>(has_offset ? element + offset : element);
            }
        }
    }
};

}  // namespace

EXPORT int64_t packed_quantized_bytes(const Weights* w) { return ceil_div(w->n, PANEL) * w->quantized_panel_bytes(); }

// Packs a quantised weight to w->panels, which has packed_quantized_bytes(w) bytes. values: [n, k]; scales, shifts: [n,
// groups]; super_scales, super_offsets: [n, ceil(k / SUPER_GROUP)]. All are contiguous. What the weight does not have is
// null.
EXPORT void pack_quantized(const Weights* weights, const uint8_t* values, const uint8_t* scales, const uint8_t* shifts,
                           const uint8_t* super_scales, const uint8_t* super_offsets) {
    const Weights& w = *weights;
    const int64_t groups = w.groups(), supers = ceil_div(w.k, SUPER_GROUP);
    parallel_for(ceil_div(w.n, PANEL), 1, [&](int64_t p, int64_t last) {
        for (; p < last; p++) {
            const int64_t first = p * PANEL, columns = w.n - first < PANEL ? w.n - first : PANEL;
            uint8_t* const panel = (uint8_t*)w.panels + p * w.quantized_panel_bytes();
            for (int64_t g = 0; g < groups; g++) {
                const int64_t start = g * w.group_size, end = w.k - start < w.group_size ? w.k : start + w.group_size;
                uint8_t *const numbers = panel + w.group_offset(g), *const second = panel + w.super_offset(g);
                (w.four_bits() ? pack_numbers<4> : pack_numbers<8>)(values + first * w.k, numbers, columns, w.k, start,
                                                                    end);
                uint8_t* const factors = numbers + PANEL * w.number_bytes(2 * w.group_pairs(g));
                const int64_t scale = w.scale_item(), shift = w.shift_item(), from = first * groups + g;
                pack_factors(scales + from * scale, factors, columns, groups, scale);
                if (shift) pack_factors(shifts + from * shift, factors + PANEL * scale, columns, groups, shift);
                if (!w.two_levels() || start % SUPER_GROUP) continue;
                const int64_t of_super = (first * supers + start / SUPER_GROUP) * 2;
                pack_factors(super_scales + of_super, second, columns, supers, 2);
                if (super_offsets) pack_factors(super_offsets + of_super, second + 2 * PANEL, columns, supers, 2);
            }
        }
    });
}

// Computes row ids[i] of a packed quantised weight [n, k] and writes it to row i of `out`, for each i below `count`.
// ids: [count]; out: [count, k].
EXPORT void gather_quantized(const Weights* weights, const int64_t* ids, void* out, int64_t count, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const Weights& w = *weights;
        parallel_for(count, ceil_div(1 << 11, w.k), [&](int64_t i, int64_t end) {
            for (; i < end; i++) {
                const char* const panel = w.panels + ids[i] / PANEL * w.quantized_panel_bytes();
                Column{w, panel, ids[i] % PANEL}.read((T*)out + i * w.k);
            }
        });
    });
}
