// The matrix products with 8-bit activations for ARM.
#include "a8_products.h"
#include "simd.h"

#if JAMBA_ARM
namespace a8_neon {
using namespace neon;
#define LEVEL_NEON
#include "a8_kernels.inl"
}  // namespace a8_neon
#endif
