#include "ops.h"
#define KERNEL_FILE "norm.inl"
#include "for_each_level.h"

// Computes RMSNorm of x + residual. x, residual: [rows, size], with rows `x_stride` and `residual_stride` elements
// apart; normed, total: [rows, size]. The argument `total` receives x + residual. If `residual` is null, RMSNorm of x
// is computed and `total` is not written.
EXPORT void rms_norm(const void* x, const void* residual, const void* weight, void* normed, void* total, int64_t rows,
                     int64_t size, int64_t x_stride, int64_t residual_stride, int64_t dtype, float eps) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        parallel_for(rows, 1 + 16384 / (size + 1), [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; r++) {
                const T* const added = residual ? (const T*)residual + r * residual_stride : nullptr;
                DISPATCH(rms_norm_row, (const T*)x + r * x_stride, added, (const T*)weight, eps, (T*)normed + r * size,
                         (T*)total + r * size, size);
            }
        });
    });
}
