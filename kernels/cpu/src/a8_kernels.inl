// This file has the matrix products with 8-bit activations of one instruction set. It is compiled in a namespace of its
// own, in a source file `a8_LEVEL.cpp`. The functions that `a8_products.h` declares are instantiated at its end.
#include "silu.inl"
#include "entries.inl"
#include "a8_dot.inl"
#include "a8.inl"
#include "a8_experts.inl"

template void a8_multiply(const A8Product<float>&);
template void a8_multiply(const A8Product<bf16>&);
template void a8_multiply(const A8Product<f16>&);
template void a8_mix_experts(const A8Experts<float>&);
template void a8_mix_experts(const A8Experts<bf16>&);
template void a8_mix_experts(const A8Experts<f16>&);
