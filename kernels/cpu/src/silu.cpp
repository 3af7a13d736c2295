#include "common.h"
#define KERNEL_FILE "silu.inl"
#include "for_each_level.h"

// Computes silu(gate) * up. x: [rows, 2 * size], with rows `stride` elements apart, where each row has `size` elements
// of `gate` and then `size` elements of `up`; out: [rows, size].
EXPORT void silu_and_mul(const void* x, void* out, int64_t rows, int64_t size, int64_t stride, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        DISPATCH(silu_and_mul, static_cast<const T*>(x), static_cast<T*>(out), rows, size, stride);
    });
}
