// The matrix products with 8-bit activations for AVX2.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX2
namespace a8_avx2 {
using namespace avx2;
#define LEVEL_AVX2
#include "a8_kernels.inl"
}  // namespace a8_avx2
END_TARGET
#endif
