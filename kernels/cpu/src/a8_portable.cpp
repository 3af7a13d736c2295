// The matrix products with 8-bit activations for processors without another instruction set.
#include "a8_products.h"
#include "simd.h"

#if !JAMBA_ARM  // Every such processor has NEON.
namespace a8_portable {
using namespace portable;
#include "a8_kernels.inl"
}  // namespace a8_portable
#endif
