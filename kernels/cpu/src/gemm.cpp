// This file has the functions `linear` and `run_experts`, which multiply inputs by packed weights.
#include "products.h"
#include "amx.h"
#include "ops.h"

#include <type_traits>

// Returns the instruction set that multiplies a weight.
static Level level_of(const Weights& weights) { return weights.level < 0 ? product_level() : Level(weights.level); }

// Returns whether `amx.cpp` computes the products of bf16.
static bool uses_tiles(Level wanted) { return wanted == Level::amx || wanted == Level::amx_emulated; }

// Returns the machine's instruction set that multiplies where no emulation and no tiles are used.
static Level machine_level(Level wanted) { return uses_tiles(wanted) || is_emulated(wanted) ? level() : wanted; }

// This macro calls the version of the function f<T> that was compiled for the instruction set `wanted`. If T is bf16, f
// also has versions with bf16 dot products.
#if JAMBA_X86
#define RETURN_FROM_DOT_LEVEL(f, argument) \
    if (chosen >= Level::avx512_bf16) return avx512_bf16::f(argument)
#define RETURN_FROM_LEVEL(f, argument)                               \
    if (chosen >= Level::avx512) return avx512::f(argument);         \
    if (chosen == Level::avx2) return avx2::f(argument);             \
    return portable::f(argument)
#elif JAMBA_ARM
#define RETURN_FROM_DOT_LEVEL(f, argument) \
    if (chosen == Level::neon_bf16) return neon_bf16::f(argument)
#define RETURN_FROM_LEVEL(f, argument) return neon::f(argument)
#else
#define RETURN_FROM_DOT_LEVEL(f, argument)
#define RETURN_FROM_LEVEL(f, argument) return portable::f(argument)
#endif
#define DISPATCH_PRODUCT(wanted, f, argument)                                                         \
    do {                                                                                              \
        [[maybe_unused]] const Level chosen = machine_level(wanted);                                  \
        if constexpr (std::is_same_v<T, bf16>) {                                                      \
            if (wanted == Level::neon_bf16_emulated) return neon_bf16_emulated::f(argument);          \
            RETURN_FROM_DOT_LEVEL(f, argument);                                                       \
        }                                                                                             \
        RETURN_FROM_LEVEL(f, argument);                                                               \
    } while (0)

template <class T>
static void run_product(const Product<T>& p) {
    const Level wanted = level_of(p.weights);
    if constexpr (std::is_same_v<T, bf16>) {
        if (uses_tiles(wanted)) return amx_linear(wanted, p);
    }
    DISPATCH_PRODUCT(wanted, multiply, p);
}

// Computes y = x W^T + bias. x: [m, k], with rows `x_stride` elements apart; bias: [n] or null; y: [m, n], with rows
// `y_stride` elements apart.
EXPORT void linear(const void* x, int64_t x_stride, const Weights* weights, const void* bias, void* y, int64_t y_stride,
                   int64_t m, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        run_product(Product<T>{(const T*)x, x_stride, nullptr, *weights, (const T*)bias, (T*)y, y_stride, m, weights->n});
    });
}

// Computes sums = x W^T in float32, which is the product before it is rounded. x: [m, k], with rows `x_stride` elements
// apart; sums: [m, n], with rows `stride` elements apart.
EXPORT void linear_sums(const void* x, int64_t x_stride, const Weights* weights, float* sums, int64_t stride, int64_t m,
                        int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        run_product(Product<T>{(const T*)x, x_stride, nullptr, *weights, nullptr, nullptr, stride, m, weights->n, sums});
    });
}

template <class T>
static void run_mixture(const Experts<T>& e) {
    const Level wanted = level_of(e.gate_up);
    if constexpr (std::is_same_v<T, bf16>) {
        if (uses_tiles(wanted)) return amx_experts(wanted, e);
    }
    DISPATCH_PRODUCT(wanted, mix_experts, e);
}

// Computes the operation that `kernels.ops.RunExperts` defines. x: [tokens, hidden], with rows `x_stride` elements
// apart; gate_up: packed weights [experts, 2 * inner, hidden]; down: packed weights [experts, hidden, inner]; weights,
// ids: [tokens, top_k]; y: [tokens, hidden].
EXPORT void run_experts(const void* x, int64_t x_stride, const Weights* gate_up, const Weights* down,
                        const float* weights, const int32_t* ids, void* y, int64_t tokens, int64_t top_k,
                        int64_t experts, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        run_mixture(Experts<T>{(const T*)x, x_stride, *gate_up, *down, weights, ids, (T*)y,
                               tokens, top_k, experts, down->n, down->k});
    });
}

// Computes the same in float32: the outputs of the experts, their products with the weights, and the result are not
// rounded to the dtype of x. sums: [tokens, hidden].
EXPORT void run_experts_sums(const void* x, int64_t x_stride, const Weights* gate_up, const Weights* down,
                             const float* weights, const int32_t* ids, float* sums, int64_t tokens, int64_t top_k,
                             int64_t experts, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        run_mixture(Experts<T>{(const T*)x, x_stride, *gate_up, *down, weights, ids, nullptr,
                               tokens, top_k, experts, down->n, down->k, sums});
    });
}
