// The matrix products of bf16 for ARM with the instruction BFMMLA.
#include "products.h"
#include "simd.h"

#if JAMBA_ARM
BEGIN_TARGET_NEON_BF16
namespace neon_bf16 {
using namespace neon;
#define LEVEL_NEON
#define DOT_PRODUCTS
#define ROW_PAIRS
#include "products.inl"
}  // namespace neon_bf16
END_TARGET
#endif
