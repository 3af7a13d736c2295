#include <cmath>

#include "transpose.h"

namespace {

struct SampleRow {
    const float* logits;
    int64_t size;
    float temperature, top_p, least;  // `least` is ln(min_p), which is -infinity if min-p is off.
    int64_t top_k;  // `top_k` is 0 if top-k is off.
    uint64_t key;
};

// To find the tokens with the largest scores, scores are compared by integer keys of 31 bits (see the function
// `rank_key`). A key is divided into three digits: the highest digit has 11 bits, and the two lower digits have 10 bits
// each.
constexpr int DIGIT_BITS = 10;
constexpr int64_t BINS = 2 << DIGIT_BITS;

struct Bin {
    double mass;
    int64_t count;
};

}  // namespace

#define KERNEL_FILE "sample.inl"
#include "for_each_level.h"

// Samples one token for each row of `logits`: [rows, size], with rows `stride` elements apart. `size` must be below
// 2^24, because positions in a row are stored as float32, which represents every integer below 2^24 exactly.
EXPORT void sample(const float* logits, const float* temperature, const float* top_p, const float* min_p,
                   const int32_t* top_k, const int64_t* keys, int64_t* tokens, int64_t rows, int64_t size,
                   int64_t stride) {
    parallel_for(rows, 1, [&](int64_t r, int64_t end) {
        for (; r < end; r++) {
            const SampleRow row{logits + r * stride, size,     temperature[r],  top_p[r],
                                std::log(min_p[r]),  top_k[r], uint64_t(keys[r])};
            DISPATCH(sample_row, row, tokens + r);
        }
    });
}
