// The matrix products for processors without another instruction set.
#include "products.h"
#include "simd.h"

#if !JAMBA_ARM  // Every such processor has NEON.
namespace portable {
#include "products.inl"
}  // namespace portable
#endif
