// This file runs the part of a Mamba layer's decode step that is between the projections in_proj and out_proj. It calls
// the functions for the convolution, projections, norms and scan one after the other and keeps their results in scratch
// memory. Each of these functions takes microseconds. Calling each function from Python, with a new tensor for each
// result, would double that time.
#include "ops.h"

namespace {

// The struct `Memory` divides one buffer into pieces. Each piece starts at the beginning of a cache line.
struct Memory {
    char* next;
    char* take(int64_t bytes) {
        char* const piece = next;
        next += (bytes + 63) / 64 * 64;
        return piece;
    }
};

}  // namespace

// The weights of a Mamba layer, in the same memory layout as in `kernels/cpu/mamba.py`. a: [channels, states]; x_proj:
// packed weight [rank + 2 * states, channels]; dt_proj: packed weight [channels, rank], where `rank` is the model's
// dt_rank.
struct MambaWeights {
    const void *conv_weight, *conv_bias;
    const Weights* x_proj;
    const void *dt_norm, *b_norm, *c_norm;
    const Weights* dt_proj;
    const float *a, *d, *dt_bias;
    int64_t width, channels, states, rank, dtype;
    float eps;
};

// Computes the output of this part of the layer for `rows` sequences, with one token per sequence. xz: [rows, 2 *
// channels], with rows `stride` elements apart. The first `channels` elements of each row of xz are the convolution's
// inputs, and the last `channels` elements are the gate. out: [rows, channels].
EXPORT void mamba_decode(const MambaWeights* weights, const void* xz, int64_t stride, int64_t rows, void* conv_state,
                         int64_t conv_stride, float* ssm_state, int64_t ssm_stride, const int32_t* state_ids,
                         void* out) {
    const MambaWeights& w = *weights;
    const int64_t item = w.dtype == int64_t(Dtype::f32) ? 4 : 2, projected = w.rank + 2 * w.states;
    const int64_t bytes = 2 * (w.channels + projected) * item * rows + 6 * 64;
    // Scratch buffer 3 is used here, because the functions called below use other scratch buffers.
    Memory memory{static_cast<char*>(scratch(3, bytes))};
    char *const u = memory.take(rows * w.channels * item), *const parts = memory.take(rows * projected * item);
    char *const rank = memory.take(rows * w.rank * item), *const dt = memory.take(rows * w.channels * item);
    char *const b = memory.take(rows * w.states * item), *const c = memory.take(rows * w.states * item);

    causal_conv1d(xz, w.conv_weight, w.conv_bias, conv_state, u, w.channels, w.width, stride, conv_stride, rows,
                  nullptr, state_ids, nullptr, nullptr, nullptr, nullptr, w.dtype);
    linear(u, w.channels, w.x_proj, nullptr, parts, projected, rows, w.dtype);
    auto norm = [&](int64_t first, int64_t size, const void* weight, void* normed) {
        rms_norm(parts + first * item, nullptr, weight, normed, nullptr, rows, size, projected, 0, w.dtype, w.eps);
    };
    norm(0, w.rank, w.dt_norm, rank);
    norm(w.rank, w.states, w.b_norm, b);
    norm(w.rank + w.states, w.states, w.c_norm, c);
    linear(rank, w.rank, w.dt_proj, nullptr, dt, w.channels, rows, w.dtype);
    selective_scan(u, dt, b, c, static_cast<const char*>(xz) + w.channels * item, w.a, w.d, w.dt_bias, ssm_state, out,
                   w.channels, w.states, w.channels, w.channels, w.states, w.states, stride, ssm_stride, rows, nullptr,
                   state_ids, nullptr, nullptr, nullptr, nullptr, w.dtype);
}
