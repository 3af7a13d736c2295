// The matrix products of bf16 with the bits of `gemm_neon_bf16.cpp`, for tests on every machine.
#include "products.h"
#include "simd.h"

namespace neon_bf16_emulated {
using namespace portable;
#define DOT_PRODUCTS
#define ROW_PAIRS
#include "products.inl"
}  // namespace neon_bf16_emulated
