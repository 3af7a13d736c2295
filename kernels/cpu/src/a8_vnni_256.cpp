// The matrix products with 8-bit activations for AVX2 with AVX-VNNI.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_AVX_VNNI
BEGIN_TARGET_VNNI_256
namespace vnni_256 {
using namespace avx2;
#define LEVEL_AVX2
#define A8_DOT_256 _mm256_dpbusd_avx_epi32
#include "a8_kernels.inl"
}  // namespace vnni_256
END_TARGET
#endif
