// The matrix products for AVX2.
#include "products.h"
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX2
namespace avx2 {
#define LEVEL_AVX2
#include "products.inl"
}  // namespace avx2
END_TARGET
#endif
