#include "common.h"
#define KERNEL_FILE "sample.inl"
#include "for_each_level.h"

// One token for each row of logits [rows, size], rows `stride` elements apart; size below 2^24, places being floats.
// least: ln(min_p).
EXPORT void sample(const float* logits, const float* temperature, const float* least, const int64_t* keys,
                   int64_t* tokens, int64_t rows, int64_t size, int64_t stride) {
    parallel_for(rows, 1, [&](int64_t r, int64_t end) {
        for (; r < end; r++) {
            DISPATCH(sample_row, logits + r * stride, size, temperature[r], least[r], uint64_t(keys[r]), tokens + r);
        }
    });
}
