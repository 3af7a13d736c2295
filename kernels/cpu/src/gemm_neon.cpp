// The matrix products for ARM.
#include "products.h"
#include "simd.h"

#if JAMBA_ARM
namespace neon {
#define LEVEL_NEON
#include "products.inl"
}  // namespace neon
#endif
