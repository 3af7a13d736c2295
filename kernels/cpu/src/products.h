// This header declares the matrix products of each instruction set, which the source files `gemm_LEVEL.cpp` define.
// Each has a namespace of its name. `multiply` computes a matrix product, and `mix_experts` a layer of
// experts. T is any dtype in the namespaces of `simd.h`, and bf16 in the others.
#pragma once
#include "gemm.h"

#define DECLARE_PRODUCTS(level)                  \
    namespace level {                            \
    template <class T>                           \
    void multiply(const Product<T>& product);    \
    template <class T>                           \
    void mix_experts(const Experts<T>& experts); \
    }
#if JAMBA_X86
DECLARE_PRODUCTS(avx2)
DECLARE_PRODUCTS(avx512)
DECLARE_PRODUCTS(avx512_bf16)
#elif JAMBA_ARM
DECLARE_PRODUCTS(neon)
DECLARE_PRODUCTS(neon_bf16)
#endif
#if !JAMBA_ARM
DECLARE_PRODUCTS(portable)
#endif
DECLARE_PRODUCTS(neon_bf16_emulated)
#undef DECLARE_PRODUCTS
