// The matrix products with 8-bit activations for ARM with SMMLA.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_ARM
BEGIN_TARGET_NEON_BF16
namespace a8_neon_i8mm {
using namespace neon;
#define LEVEL_NEON
#define A8_SDOT
#define A8_ROW_PAIRS
#include "a8_kernels.inl"
}  // namespace a8_neon_i8mm
END_TARGET
#endif
