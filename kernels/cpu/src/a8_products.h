// This header declares the matrix products with 8-bit activations of each instruction set, which the source files
// `a8_LEVEL.cpp` define. Each has a namespace of its own. `a8_multiply` computes a matrix product, and
// `a8_mix_experts` a layer of experts. T is any dtype.
#pragma once
#include "a8.h"

#define DECLARE_A8_PRODUCTS(level)                    \
    namespace level {                                 \
    template <class T>                                \
    void a8_multiply(const A8Product<T>& product);    \
    template <class T>                                \
    void a8_mix_experts(const A8Experts<T>& experts); \
    }
#if JAMBA_X86
DECLARE_A8_PRODUCTS(vnni_512)
#if JAMBA_AVX_VNNI
DECLARE_A8_PRODUCTS(vnni_256)
#endif
DECLARE_A8_PRODUCTS(a8_avx2)
#elif JAMBA_ARM
DECLARE_A8_PRODUCTS(a8_neon)
DECLARE_A8_PRODUCTS(a8_neon_dot)
DECLARE_A8_PRODUCTS(a8_neon_i8mm)
#endif
#if !JAMBA_ARM
DECLARE_A8_PRODUCTS(a8_portable)
#endif
#undef DECLARE_A8_PRODUCTS
