// This header declares what all kernels share: number formats, the machine's instruction set, and threads.
//
// The result for a row must not depend on the other rows of the batch. Therefore every sum has one fixed order, for any
// number of rows and any number of threads. If a row does not fill its last vector, the last elements are computed by
// the same vector code, with the unused lanes masked. A multiplication and an addition are fused only where the code
// calls `fma`.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#define JAMBA_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define JAMBA_ARM 1
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))

// Code between BEGIN_TARGET_x and END_TARGET is compiled with the instruction set x. This code must run only if the
// function `level` returns x or a later value of the enum `Level`. No standard header may be included between the two
// macros, because the standard header's functions would then use x on every machine.
#if defined(__clang__)
#define JAMBA_TARGET(features) \
    _Pragma("clang diagnostic ignored \"-Wunknown-attributes\"") \
    _Pragma(JAMBA_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define JAMBA_STRING(x) #x
#define END_TARGET _Pragma("clang attribute pop")
#define BEGIN_TARGET_AVX2 JAMBA_TARGET("avx2,fma,f16c")
#define BEGIN_TARGET_AVX512 JAMBA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define BEGIN_TARGET_AVX512_BF16 JAMBA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define BEGIN_TARGET_AMX \
    JAMBA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")
#define BEGIN_TARGET_VNNI_512 JAMBA_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define BEGIN_TARGET_VNNI_256 JAMBA_TARGET("avx2,fma,f16c,avxvnni")
#define BEGIN_TARGET_NEON_DOT JAMBA_TARGET("dotprod")
#define BEGIN_TARGET_NEON_BF16 JAMBA_TARGET("dotprod,bf16,i8mm")
#else
#define END_TARGET _Pragma("GCC pop_options")
#define BEGIN_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define BEGIN_TARGET_AVX512 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq\")")
#define BEGIN_TARGET_AVX512_BF16 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16\")")
#define BEGIN_TARGET_AMX                \
    _Pragma("GCC push_options")         \
    _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16\")")
#define BEGIN_TARGET_VNNI_512 \
    _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni\")")
#define BEGIN_TARGET_VNNI_256 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,avxvnni\")")
#define BEGIN_TARGET_NEON_DOT _Pragma("GCC push_options") _Pragma("GCC target(\"arch=armv8.2-a+dotprod\")")
#define BEGIN_TARGET_NEON_BF16 _Pragma("GCC push_options") _Pragma("GCC target(\"arch=armv8.2-a+dotprod+bf16+i8mm\")")
#endif
// Compilers before GCC 11 and Clang 12 have no functions for AMX, and only Linux lets a process use AMX in the way that
// `amx.cpp` knows.
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define JAMBA_AMX 1
#endif
// These compilers do not have the instructions of AVX-VNNI either.
#if defined(__x86_64__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define JAMBA_AVX_VNNI 1
#endif

// The instruction sets for which kernels are compiled: `avx2` to `amx` for x86-64, and `neon` to `neon_bf16` for ARM of
// 64 bits. An instruction set includes those before it that belong to the same processors. Other processors than those of
// ARM also have `portable`.
//
// `neon` is in every such processor of ARM. `neon_dot` also has the dot product of bytes (SDOT), and `neon_bf16` has the
// matrix products of bf16 (BFMMLA) and of bytes (SMMLA).
//
// The last values are no instruction sets. With `amx_emulated`, products of bf16 with weights, and attention, compute in
// other instructions what `amx` computes, and with `neon_bf16_emulated` what `neon_bf16` computes, for tests.
enum class Level : int64_t {
    portable,
    avx2,
    avx512,
    avx512_bf16,
    amx,
    neon,
    neon_dot,
    neon_bf16,
    amx_emulated,
    neon_bf16_emulated
};
INLINE bool is_emulated(Level level) { return level >= Level::amx_emulated; }
// Returns the instruction set of all kernels but the matrix products and attention. It is never an emulated one.
Level level();
// Returns the instruction set of attention, and of the matrix products whose weights name none, unless a call names one.
Level product_level();

// These functions note that the calling thread uses the tiles of AMX, and release the thread's tiles if it used them.
void tiles_in_use();
void release_tiles();

// Returns how many bytes ahead of the weights in use a matrix product with one stream of weights prefetches.
int64_t prefetch_distance();
// Returns the same for products of one or two rows with 8-bit activations and weights of 8 bits (see `prefetch.cpp`).
int64_t prefetch_distance_of_few_rows();

// Divides the items 0 to n - 1 into pieces of `grain` items. Calls body(begin, end) for ranges of pieces, on the
// calling thread and on idle workers. Any of these threads can run any piece, so the result of a piece must not depend
// on the thread. If `in_runs` is true, a thread takes many neighbouring pieces at once while many pieces are left, so
// that each thread reads memory in order. But then the work is divided evenly only if all pieces take the same time.
// `first_of_node`: [num_nodes() + 1], the first item that the threads of each memory node take first, or null if the
// items are divided among the nodes in proportion to their threads.
using Body = void (*)(const void* context, int64_t begin, int64_t end);
void parallel_for_body(int64_t n, int64_t grain, bool in_runs, Body body, const void* context,
                       const int64_t* first_of_node);
int64_t num_threads();

// Returns the number of memory nodes on which the threads run.
int64_t num_nodes();
constexpr int64_t MOST_NODES = 64;
// Returns the first of `count` items in the share of a memory node. The shares are in proportion to the nodes' threads,
// and node_share(count, num_nodes()) is `count`.
int64_t node_share(int64_t count, int64_t node);

// Returns how many bytes of weights a piece of a product has at least. A core reads them in about the time in which it
// joins a job, so a small product runs on fewer threads than there are.
int64_t least_piece_bytes();

template <class F>
inline void parallel_for(int64_t n, int64_t grain, const F& f, bool in_runs = false,
                         const int64_t* first_of_node = nullptr) {
    parallel_for_body(
        n, grain, in_runs,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f,
        first_of_node);
}

// Returns at least `bytes` bytes of scratch memory of the calling thread, aligned to 64 bytes. The thread keeps one
// buffer for each `slot` (0..5) between calls. A buffer grows and never shrinks. If the body of a `parallel_for` needs
// memory for each thread, the body itself must call this function, because each thread has buffers of its own.
void* scratch(int slot, int64_t bytes);

// The dtypes of tensors. `kernels/cpu/library.py` has the same integer for each dtype.
enum class Dtype : int64_t { f32, bf16, f16 };
struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) { return from_bits(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
    // The exponent and mantissa bits of the f16 number are shifted to the places that they have in a float32. The
    // exponent is then too small by 112, and a multiplication by 2^112 corrects the exponent. This also converts
    // subnormal f16 numbers correctly.
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const float scaled = from_bits(rest) * from_bits(0x77800000);  // 2^112
    return from_bits(sign | (rest >= 0x0f800000 ? rest | 0x7f800000 : to_bits(scaled)));
}

// Converts a float to the nearest number of type T. If two numbers are equally near, the result is the one whose last
// bit is 0.
template <class T>
T from_float(float x);
template <>
INLINE float from_float<float>(float x) {
    return x;
}
template <>
INLINE bf16 from_float<bf16>(float x) {
    const uint32_t bits = to_bits(x);
    if (x != x) return {uint16_t(bits >> 16 | 0x40)};  // A NaN, signalling or quiet, becomes a quiet NaN.
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
    const uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // Magnitudes from 65520 on become infinite in f16.
    // Subnormal f16 numbers are 2^-24 apart. Neighbouring float32 numbers from 0.5 to 1 are also 2^-24 apart, so adding
    // 0.5 rounds x to a multiple of 2^-24.
    if (magnitude < 0x38800000) {
        return {uint16_t(sign | (to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f)))};
    }
    return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// Calls the function f with a value of the C++ type for the dtype number `dtype` (see the enum `Dtype`). Example:
// with_dtype(dtype, [&](auto t) { using T = decltype(t); }).
template <class F>
inline void with_dtype(int64_t dtype, const F& f) {
    switch (Dtype(dtype)) {
        case Dtype::f32: return f(float{});
        case Dtype::bf16: return f(bf16{});
        case Dtype::f16: return f(f16{});
    }
}
