// The matrix products of bf16 for AVX-512 with its bf16 dot products.
#include "products.h"
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX512_BF16
namespace avx512_bf16 {
using namespace avx512;
#define LEVEL_AVX512
#define DOT_PRODUCTS
#include "products.inl"
}  // namespace avx512_bf16
END_TARGET
#endif
