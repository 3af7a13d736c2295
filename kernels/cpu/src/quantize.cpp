// This file quantises weights to 8 bits as `engine/quantization/int8.py` defines it, with the same bits.
#include "common.h"

namespace {

constexpr float LIMIT = 127;

// Quantises a row of `k` finite numbers. `memory` has room for k floats.
template <class T>
float quantize_row(const T* row, int8_t* values, int64_t k, float* memory) {
    float largest = 0;
    for (int64_t i = 0; i < k; i++) {
        const float x = to_float(row[i]);
        memory[i] = x;
        const float magnitude = from_bits(to_bits(x) & 0x7fffffff);
        largest = magnitude > largest ? magnitude : largest;
    }
    // The scale of a row of zeros is set to 1, because 0 would lead to 0/0. So is one that is too small for a float.
    float scale = largest / LIMIT;
    scale = scale > 0 ? scale : 1.0f;
    // A number of a magnitude below 2^22 is rounded to the nearest whole number, and to an even one of two equally near
    // ones, if 1.5 * 2^23 is added and subtracted again.
    constexpr float shift = 12582912.0f;
    for (int64_t i = 0; i < k; i++) {
        float x = memory[i] / scale + shift - shift;
        x = x > LIMIT ? LIMIT : x < -LIMIT ? -LIMIT : x;
        values[i] = int8_t(int32_t(x));
    }
    return scale;
}

}  // namespace

// Quantises a weight. weight: [rows, k], finite numbers; values: [rows, k]; scales: [rows].
EXPORT void quantize_int8(const void* weight, int8_t* values, float* scales, int64_t rows, int64_t k, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        parallel_for(rows, 8, [&](int64_t row, int64_t end) {
            auto* const memory = static_cast<float*>(scratch(0, k * int64_t(sizeof(float))));
            for (; row < end; row++) {
                scales[row] = quantize_row((const T*)weight + row * k, values + row * k, k, memory);
            }
        });
    });
}
