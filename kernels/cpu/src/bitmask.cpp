#include <limits>

#include "common.h"
#define KERNEL_FILE "bitmask.inl"
#include "for_each_level.h"

// Sets the logits of forbidden tokens to minus infinity in row rows[i] of `logits`, for each i below `count`. A row has
// `size` logits. Bit v % 32 of word v / 32 of masks[i] is 1 if token v is allowed. The rows of `logits` are `stride`
// floats apart, and the rows of `masks` are `mask_stride` words apart.
EXPORT void apply_bitmask(float* logits, const uint32_t* masks, const int64_t* rows, int64_t count, int64_t size,
                          int64_t stride, int64_t mask_stride) {
    constexpr int64_t PIECE = 1 << 14;  // The number of logits that one thread changes at a time.
    const int64_t pieces = (size + PIECE - 1) / PIECE;
    parallel_for(count * pieces, 2, [=](int64_t item, int64_t end) {
        for (; item < end; item++) {
            const int64_t row = item / pieces, start = item % pieces * PIECE;
            DISPATCH(forbid, logits + rows[row] * stride + start, masks + row * mask_stride + start / 32,
                     size - start < PIECE ? size - start : PIECE);
        }
    });
}
