#include "ops.h"
#include "segments.h"

namespace {

// Number of rows that a thread computes for one vector of channels before the thread computes the next vector of
// channels.
constexpr int64_t AHEAD = 64;
// The smallest size of a piece of work that a thread takes, in output vectors (number of rows times number of vectors
// per row). A piece of this size takes about 8 us.
constexpr int64_t MIN_PIECE = 256;

template <class T>
struct ConvArguments {
    const T *x, *weight, *bias;  // x: [rows, channels]; weight: [width, channels]; bias: [channels] or null
    T *state, *out;              // state: [slots, width - 1, channels]; out: [rows, channels]
    int64_t channels, width, x_stride, state_stride;
    Segments segments;
};

}  // namespace

#define KERNEL_FILE "conv.inl"
#include "for_each_level.h"

EXPORT void causal_conv1d(const void* x, const void* weight, const void* bias, void* state, void* out, int64_t channels,
                          int64_t width, int64_t x_stride, int64_t state_stride, int64_t sequences,
                          const int32_t* query_start, const int32_t* state_ids, const uint8_t* has_state,
                          const int32_t* save_start, const int32_t* save_rows, const int32_t* save_slots,
                          int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const ConvArguments<T> arguments{
            (const T*)x,    (const T*)weight,
            (const T*)bias, (T*)state,
            (T*)out,        channels,
            width,          x_stride,
            state_stride,   {sequences, query_start, state_ids, has_state, save_start, save_rows, save_slots}};
        DISPATCH(convolve_all, arguments);
    });
}
