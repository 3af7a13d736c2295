#include "common.h"
#define KERNEL_FILE "route.inl"
#include "for_each_level.h"

// Chooses the experts of each token. logits: [rows, experts], with rows `stride` elements apart; weights, ids: [rows,
// top_k].
EXPORT void route_experts(const void* logits, float* weights, int32_t* ids, int64_t rows, int64_t experts,
                          int64_t top_k, int64_t stride, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        parallel_for(rows, 64, [&](int64_t begin, int64_t end) {
            float* const memory = (float*)scratch(0, (experts + 16) * sizeof(float));
            for (int64_t r = begin; r < end; r++) {
                DISPATCH(route_row, (const T*)logits + r * stride, experts, top_k, weights + r * top_k, ids + r * top_k,
                         memory);
            }
        });
    });
}
