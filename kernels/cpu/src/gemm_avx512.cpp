// The matrix products for AVX-512 without bf16 dot products.
#include "products.h"
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX512
namespace avx512 {
#define LEVEL_AVX512
#include "products.inl"
}  // namespace avx512
END_TARGET
#endif
