// The matrix products with 8-bit activations for ARM with SDOT.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_ARM
BEGIN_TARGET_NEON_DOT
namespace a8_neon_dot {
using namespace neon;
#define LEVEL_NEON
#define A8_SDOT
#include "a8_kernels.inl"
}  // namespace a8_neon_dot
END_TARGET
#endif
