// The matrix products with 8-bit activations for AVX-512 with VNNI.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_VNNI_512
namespace vnni_512 {
using namespace avx512;
#define A8_DOT_512
#include "a8_kernels.inl"
}  // namespace vnni_512
END_TARGET
#endif
