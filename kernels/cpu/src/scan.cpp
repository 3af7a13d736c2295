#include "ops.h"
#include "segments.h"
#include "transpose.h"

namespace {

// Number of rows that a thread computes for one group (one vector) of channels before the thread computes the next
// group of channels.
constexpr int64_t AHEAD = 16;
// The smallest size of a piece of work that a thread takes, in output vectors (number of rows times number of vectors
// per row). A piece of this size takes about 6 us.
constexpr int64_t MIN_PIECE = 64;
constexpr float PER_LN_2 = 1.44269504f;

template <class T>
struct ScanArguments {
    // u, dt, z: [rows, channels]; b, c: [rows, states]; each tensor has its own row stride
    const T *u, *dt, *b, *c, *z;
    const float *a, *d, *dt_bias;  // a: [channels, states]; d and dt_bias: [channels]
    float* state;                  // state: [slots, channels, states]
    T* out;                        // out: [rows, channels]
    int64_t channels, states, u_stride, dt_stride, b_stride, c_stride, z_stride, state_stride;
    Segments segments;
};

}  // namespace

#define KERNEL_FILE "scan.inl"
#include "for_each_level.h"

EXPORT void selective_scan(const void* u, const void* dt, const void* b, const void* c, const void* z, const float* a,
                           const float* d, const float* dt_bias, float* state, void* out, int64_t channels,
                           int64_t states, int64_t u_stride, int64_t dt_stride, int64_t b_stride, int64_t c_stride,
                           int64_t z_stride, int64_t state_stride, int64_t sequences, const int32_t* query_start,
                           const int32_t* state_ids, const uint8_t* has_state, const int32_t* save_start,
                           const int32_t* save_rows, const int32_t* save_slots, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        const ScanArguments<T> arguments{
            (const T*)u,
            (const T*)dt,
            (const T*)b,
            (const T*)c,
            (const T*)z,
            a,
            d,
            dt_bias,
            state,
            (T*)out,
            channels,
            states,
            u_stride,
            dt_stride,
            b_stride,
            c_stride,
            z_stride,
            state_stride,
            {sequences, query_start, state_ids, has_state, save_start, save_rows, save_slots}};
        DISPATCH(scan_all, arguments);
    });
}
