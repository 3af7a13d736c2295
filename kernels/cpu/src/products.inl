// This file has the matrix products of one instruction set. It is compiled in the instruction set's namespace, in a
// source file of its own, `gemm_LEVEL.cpp`. The functions that `products.h` declares are instantiated at its end: for
// all dtypes, or with DOT_PRODUCTS only for bf16.
#include "formats.inl"
#include "factors.inl"
#include "interleave.inl"
#include "multiply.inl"
#include "gemm.inl"
#include "silu.inl"
#include "entries.inl"
#include "experts.inl"

template void multiply(const Product<bf16>&);
template void mix_experts(const Experts<bf16>&);
#ifndef DOT_PRODUCTS
template void multiply(const Product<float>&);
template void multiply(const Product<f16>&);
template void mix_experts(const Experts<float>&);
template void mix_experts(const Experts<f16>&);
#endif
