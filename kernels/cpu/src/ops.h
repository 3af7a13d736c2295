// This header declares the exported functions that `mamba.cpp` also calls. The comments at the definitions of these
// functions explain the arguments.
#pragma once
#include "common.h"

EXPORT void causal_conv1d(const void* x, const void* weight, const void* bias, void* state, void* out, int64_t channels,
                          int64_t width, int64_t x_stride, int64_t state_stride, int64_t sequences,
                          const int32_t* query_start, const int32_t* state_ids, const uint8_t* has_state,
                          const int32_t* save_start, const int32_t* save_rows, const int32_t* save_slots, int64_t dtype);

struct Weights;  // a packed weight, defined in `gemm.h`

EXPORT void linear(const void* x, int64_t x_stride, const Weights* weights, const void* bias, void* y, int64_t y_stride,
                   int64_t m, int64_t dtype);

EXPORT void rms_norm(const void* x, const void* residual, const void* weight, void* normed, void* total, int64_t rows,
                     int64_t size, int64_t x_stride, int64_t residual_stride, int64_t dtype, float eps);

EXPORT void selective_scan(const void* u, const void* dt, const void* b, const void* c, const void* z, const float* a,
                           const float* d, const float* dt_bias, float* state, void* out, int64_t channels,
                           int64_t states, int64_t u_stride, int64_t dt_stride, int64_t b_stride, int64_t c_stride,
                           int64_t z_stride, int64_t state_stride, int64_t sequences, const int32_t* query_start,
                           const int32_t* state_ids, const uint8_t* has_state, const int32_t* save_start,
                           const int32_t* save_rows, const int32_t* save_slots, int64_t dtype);
