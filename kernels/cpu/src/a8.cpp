// This file has the functions `a8_linear` and `a8_experts`, which multiply inputs by weights packed for products with
// 8-bit activations. `a8.h` describes the products and the layout.
#include "a8_products.h"
#if JAMBA_AVX_VNNI
#include <cpuid.h>
#endif

namespace {

// The instruction sets of products with 8-bit activations. There is no code for AVX-512 without VNNI (`avx512`), so that
// the code for AVX2 runs there.
enum class Units : int64_t { portable, avx2, avx_vnni, avx512, avx512_vnni, neon, neon_dot, neon_i8mm };

// Returns whether the processor and the compiler have AVX-VNNI. Clang's `__builtin_cpu_supports` does not know it.
[[maybe_unused]] bool has_avx_vnni() {
#if JAMBA_AVX_VNNI
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#else
    return false;
#endif
}

// Returns the instruction set for a weight with the field `level` = `wanted`. There is no code for AMX.
Units units(int64_t wanted) {
#if JAMBA_X86
    static const bool has_512 = __builtin_cpu_supports("avx512vnni"), has_256 = has_avx_vnni();
    const Level chosen = wanted < 0 || Level(wanted) >= Level::amx ? level() : Level(wanted);
    if (chosen >= Level::avx512) return has_512 ? Units::avx512_vnni : Units::avx512;
    if (chosen == Level::avx2) return has_256 ? Units::avx_vnni : Units::avx2;
#elif JAMBA_ARM
    switch (wanted < 0 || is_emulated(Level(wanted)) ? level() : Level(wanted)) {
        case Level::neon_bf16: return Units::neon_i8mm;
        case Level::neon_dot: return Units::neon_dot;
        default: return Units::neon;
    }
#endif
    (void)wanted;
    return Units::portable;
}

}  // namespace

#if JAMBA_AVX_VNNI
#define CASE_AVX_VNNI(f, argument) \
    case Units::avx_vnni: return vnni_256::f(argument);
#else
#define CASE_AVX_VNNI(f, argument)
#endif
#if JAMBA_X86
#define DISPATCH_A8(f, argument, level)                                 \
    switch (units(level)) {                                             \
        case Units::avx512_vnni: return vnni_512::f(argument);          \
        CASE_AVX_VNNI(f, argument)                                      \
        case Units::avx512:                                             \
        case Units::avx2: return a8_avx2::f(argument);                  \
        default: return a8_portable::f(argument);                       \
    }
#elif JAMBA_ARM
#define DISPATCH_A8(f, argument, level)                                 \
    switch (units(level)) {                                             \
        case Units::neon_i8mm: return a8_neon_i8mm::f(argument);        \
        case Units::neon_dot: return a8_neon_dot::f(argument);          \
        default: return a8_neon::f(argument);                           \
    }
#else
#define DISPATCH_A8(f, argument, level) a8_portable::f(argument)
#endif

// Returns the instruction set of products with 8-bit activations whose weight has the field `level`, as a value of the
// enum `Units`.
EXPORT int64_t a8_units(int64_t level) { return int64_t(units(level)); }

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
