// This file has the functions that pack weights for products with 8-bit activations, and the functions `a8_linear` and
// `a8_experts`, which multiply inputs by these weights. `a8.h` describes the products and the layout.
#include "a8.h"
#include "simd.h"

#if JAMBA_X86
#if defined(__clang__)
#define BEGIN_TARGET_VNNI_512 JAMBA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define BEGIN_TARGET_VNNI_256 JAMBA_TARGET("avx2,fma,f16c,avxvnni")
#else
#define BEGIN_TARGET_VNNI_512 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni\")")
#define BEGIN_TARGET_VNNI_256 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avxvnni\")")
#endif

BEGIN_TARGET_VNNI_512
namespace vnni_512 {
using namespace avx512;
#define A8_DOT_512
#include "a8_kernels.inl"
#undef A8_DOT_512
}  // namespace vnni_512
END_TARGET
#define LEVEL_AVX2
BEGIN_TARGET_VNNI_256
namespace vnni_256 {
using namespace avx2;
#define A8_DOT_256 _mm256_dpbusd_avx_epi32
#include "a8_kernels.inl"
#undef A8_DOT_256
}  // namespace vnni_256
END_TARGET
BEGIN_TARGET_AVX2
namespace a8_avx2 {
using namespace avx2;
#include "a8_kernels.inl"
}  // namespace a8_avx2
END_TARGET
#undef LEVEL_AVX2
#endif
namespace a8_portable {
using namespace portable;
#include "a8_kernels.inl"
}  // namespace a8_portable

namespace {

// The instruction sets of products with 8-bit activations. There is no code for AVX-512 without VNNI (`avx512`), so that
// the code for AVX2 runs there.
enum class Units : int64_t { portable, avx2, avx_vnni, avx512, avx512_vnni };

// Returns the instruction set for a weight with the field `level` = `wanted`. There is no code for AMX.
Units units(int64_t wanted) {
#if JAMBA_X86
    static const bool has_512 = __builtin_cpu_supports("avx512vnni"), has_256 = __builtin_cpu_supports("avxvnni");
    const Level chosen = wanted < 0 || Level(wanted) >= Level::amx ? level() : Level(wanted);
    if (chosen >= Level::avx512) return has_512 ? Units::avx512_vnni : Units::avx512;
    if (chosen == Level::avx2) return has_256 ? Units::avx_vnni : Units::avx2;
#else
    (void)wanted;
#endif
    return Units::portable;
}

}  // namespace

#if JAMBA_X86
#define DISPATCH_A8(f, argument, level)                                 \
    switch (units(level)) {                                             \
        case Units::avx512_vnni: return vnni_512::f(argument);          \
        case Units::avx_vnni: return vnni_256::f(argument);             \
        case Units::avx512:                                             \
        case Units::avx2: return a8_avx2::f(argument);                  \
        case Units::portable: return a8_portable::f(argument);          \
    }
#else
#define DISPATCH_A8(f, argument, level) a8_portable::f(argument)
#endif

// Returns the instruction set of products with 8-bit activations whose weight has the field `level`, as a value of the
// enum `Units`.
EXPORT int64_t a8_units(int64_t level) { return int64_t(units(level)); }

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
    for (int64_t c = 0; c < columns; c++) std::memcpy(out + c * size, from + (c * row + index) * size, size);
}

void pack_panel(const A8Weights& w, const A8Layout& l, const Source& s, int64_t panel, uint8_t* out) {
    const int64_t first = panel * PANEL, columns = w.n - first < PANEL ? w.n - first : PANEL;
    const int64_t groups = w.group_size >= w.k ? 1 : ceil_div(w.k, w.group_size), supers = ceil_div(w.k, A8_SUPER);
    std::memset(out, 0, l.panel_bytes);
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
        for (int64_t c = 0; c < columns; c++) {
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

// Computes y = x W^T + bias. x: [m, k], with rows `x_stride` elements apart; bias: [n] or null; y: [m, n], with rows
// `y_stride` elements apart.
EXPORT void a8_linear(const void* x, int64_t x_stride, const A8Weights* weights, const void* bias, void* y,
                      int64_t y_stride, int64_t m, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const A8Product<T> p{(const T*)x, x_stride, nullptr, weights, weights->panels, (const T*)bias, (T*)y,
                             y_stride, m};
        DISPATCH_A8(a8_multiply, p, weights->level);
    });
}

// Computes the operation that `kernels.ops.RunExperts` defines. x: [tokens, hidden], with rows `x_stride` elements
// apart; gate_up: [experts, 2 * inner, hidden]; down: [experts, hidden, inner]; weights, ids: [tokens, top_k]; y:
// [tokens, hidden].
EXPORT void a8_experts(const void* x, int64_t x_stride, const A8Weights* gate_up, const A8Weights* down,
                       const float* weights, const int32_t* ids, void* y, int64_t tokens, int64_t top_k,
                       int64_t experts, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const A8Experts<T> e{(const T*)x, x_stride, gate_up, down, weights, ids, (T*)y, tokens, top_k, experts,
                             down->n, down->k};
        DISPATCH_A8(a8_mix_experts, e, gate_up->level);
    });
}
