// This file has the functions that pack weight matrices, and the functions `linear` and `run_experts`, which multiply
// inputs by packed weights.
#include "gemm.h"
#include "amx.h"
#include "ops.h"

#include <sys/mman.h>

#include <type_traits>

#define KERNEL_FILE "products.inl"
#include "for_each_level.h"
#if JAMBA_X86
BEGIN_TARGET_AVX512_BF16
namespace avx512_bf16 {
using namespace avx512;
#define DOT_PRODUCTS
#include "products.inl"
#undef DOT_PRODUCTS
}  // namespace avx512_bf16
END_TARGET
#endif

namespace {

template <class T>
void pack_panel(const T* weight, T* out, int64_t columns, int64_t k) {
    const int64_t block = 32;
    for (int64_t start = 0; start < k; start += block) {
        // From each column, `block` elements along K are read at a time, because `block` elements fill whole cache
        // lines. The elements are written as pairs of neighbouring elements along K.
        T lines[PANEL][block] = {};
        const int64_t n = k - start < block ? k - start : block;
        for (int64_t c = 0; c < columns; c++) std::memcpy(lines[c], weight + c * k + start, n * sizeof(T));
        for (int64_t i = 0; i < (n + 1) / 2 * 2; i++, out += i % 2 ? 0 : 2 * PANEL) {
            const bool paired = COLUMN_BYTES<T> != sizeof(T);
            for (int64_t c = 0; c < PANEL; c++) out[paired ? 2 * c + i % 2 : (i % 2) * PANEL + c] = lines[c][i];
        }
    }
}

}  // namespace

EXPORT int64_t packed_bytes(int64_t n, int64_t k, int64_t dtype) {
    int64_t bytes = 0;
    with_dtype(dtype, [&](auto t) { bytes = ceil_div(n, PANEL) * ceil_div(k, 2) * PAIR_BYTES<decltype(t)>; });
    return bytes;
}

// Asks the operating system for huge memory pages for memory that has not been written yet. With huge pages, one core
// reads memory 1.5 times as fast as with normal pages.
EXPORT void use_huge_pages(void* memory, int64_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

// Packs a weight that is not quantised. weight: [n, k], contiguous; packed: packed_bytes(n, k, dtype) bytes of memory.
EXPORT void pack_weight(const void* weight, void* packed, int64_t n, int64_t k, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t panel = ceil_div(k, 2) * 2 * PANEL;
        parallel_for(ceil_div(n, PANEL), 1, [=](int64_t p, int64_t end) {
            for (; p < end; p++) {
                const int64_t columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
                pack_panel((const T*)weight + p * PANEL * k, (T*)packed + p * panel, columns, k);
            }
        });
    });
}

// Copies row ids[i] of a weight matrix [n, k] to row i of `out`, for each i below `count`. ids: [count]; out: [count,
// k]. If `is_packed` is not 0, the argument `weight` was packed by the function `pack_weight`; otherwise `weight` is a
// contiguous array [n, k].
EXPORT void gather_rows(const void* weight, int64_t is_packed, const int64_t* ids, void* out, int64_t count, int64_t k,
                        int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        constexpr bool paired = COLUMN_BYTES<T> != sizeof(T);
        const int64_t panel = ceil_div(k, 2) * 2 * PANEL;
        parallel_for(count, ceil_div(1 << 13, k), [=](int64_t i, int64_t end) {
            for (; i < end; i++) {
                if (!is_packed) {
                    std::memcpy((T*)out + i * k, (const T*)weight + ids[i] * k, k * sizeof(T));
                    continue;
                }
                const T* const from = (const T*)weight + ids[i] / PANEL * panel;
                const int64_t column = ids[i] % PANEL;
                for (int64_t j = 0; j < k; j++) {
                    ((T*)out)[i * k + j] = from[paired ? (j / 2 * PANEL + column) * 2 + j % 2 : j * PANEL + column];
                }
            }
        });
    });
}

// Returns the instruction set that multiplies a weight.
static Level level_of(const Weights& weights) { return weights.level < 0 ? product_level() : Level(weights.level); }

// This macro calls the version of the function f<T> that was compiled for the instruction set `wanted`. If T is bf16, f
// also has a version for AVX-512 with bf16 dot products, in the namespace avx512_bf16.
#if JAMBA_X86
#define DISPATCH_PRODUCT(wanted, f, argument)                                            \
    do {                                                                                 \
        const Level chosen = wanted < Level::amx ? wanted : level();                     \
        if constexpr (std::is_same_v<T, bf16>) {                                         \
            if (chosen >= Level::avx512_bf16) return avx512_bf16::f(argument);           \
        }                                                                                \
        if (chosen >= Level::avx512) return avx512::f(argument);                         \
        if (chosen == Level::avx2) return avx2::f(argument);                             \
        return portable::f(argument);                                                    \
    } while (0)
#else
#define DISPATCH_PRODUCT(wanted, f, argument) portable::f(argument)
#endif

// Computes y = x W^T + bias. x: [m, k], with rows `x_stride` elements apart; bias: [n] or null; y: [m, n], with rows
// `y_stride` elements apart.
EXPORT void linear(const void* x, int64_t x_stride, const Weights* weights, const void* bias, void* y, int64_t y_stride,
                   int64_t m, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const Product<T> p{(const T*)x, x_stride, nullptr, *weights, (const T*)bias, (T*)y, y_stride, m, weights->n};
        const Level wanted = level_of(*weights);
        if constexpr (std::is_same_v<T, bf16>) {
            if (wanted >= Level::amx) return amx_linear(wanted, p);
        }
        DISPATCH_PRODUCT(wanted, multiply, p);
    });
}

// Computes the operation that `kernels.ops.RunExperts` defines. x: [tokens, hidden], with rows `x_stride` elements
// apart; gate_up: packed weights [experts, 2 * inner, hidden]; down: packed weights [experts, hidden, inner]; weights,
// ids: [tokens, top_k]; y: [tokens, hidden].
EXPORT void run_experts(const void* x, int64_t x_stride, const Weights* gate_up, const Weights* down,
                        const float* weights, const int32_t* ids, void* y, int64_t tokens, int64_t top_k,
                        int64_t experts, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const Experts<T> e{(const T*)x, x_stride, *gate_up, *down, weights, ids, (T*)y,
                           tokens, top_k, experts, down->n, down->k};
        const Level wanted = level_of(*gate_up);
        if constexpr (std::is_same_v<T, bf16>) {
            if (wanted >= Level::amx) return amx_experts(wanted, e);
        }
        DISPATCH_PRODUCT(wanted, mix_experts, e);
    });
}
