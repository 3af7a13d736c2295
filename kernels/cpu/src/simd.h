// This header defines vectors of float32 for each instruction set. The namespaces `portable`, `avx2`, `avx512` and
// `neon` have the same operations. A kernel that uses these operations is in a .inl file, which `for_each_level.h` compiles in each
// namespace.
//
// The type `Vec` is a vector of WIDTH floats with the arithmetic operators of C++. Loads and stores accept unaligned
// addresses. A load converts from float, bf16 or f16, and a store converts to one of these types. A load or store with
// an argument `n` accesses only the first n elements; the load sets the other elements to zero.
#pragma once
#include "common.h"

#if JAMBA_X86
BEGIN_TARGET_AVX512
namespace avx512 {
constexpr int64_t WIDTH = 16;
using Vec = __m512;

INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
INLINE Vec set(float x) { return _mm512_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Vec load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
INLINE Vec widen(bf16, __m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
INLINE Vec widen(f16, __m256i x) { return _mm512_cvtph_ps(x); }
template <class T>
INLINE Vec load(const T* p) {
    return widen(T{}, _mm256_loadu_si256((const __m256i*)p));
}
template <class T>
INLINE Vec load(const T* p, int64_t n) {
    return widen(T{}, _mm256_maskz_loadu_epi16(first(n), p));
}
INLINE __m256i narrow(bf16, Vec x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
INLINE __m256i narrow(f16, Vec x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
INLINE void store(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
template <class T>
INLINE void store(T* p, Vec x) {
    _mm256_storeu_si256((__m256i*)p, narrow(T{}, x));
}
template <class T>
INLINE void store(T* p, Vec x, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(T{}, x));
}
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // `fma` returns a * b + c, rounded once.
// If an operand is NaN, the functions `min` and `max` return the second operand.
INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Vec sqrt(Vec x) { return _mm512_sqrt_ps(x); }
INLINE Vec round(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Returns x * 2^n. n must be a whole number from -252 to 252.
INLINE Vec scale(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// Returns, for each element, `then` if a > b, and `otherwise` if not.
INLINE Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), otherwise, then);
}
// Splits x into m * 2^e with m in [0.75, 1.5). x must be positive and not subnormal.
INLINE void split(Vec x, Vec& m, Vec& e) {
    m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
    // A mantissa of at least 1.5 was halved.
    const __mmask16 halved = _mm512_cmp_ps_mask(m, set(1.0f), _CMP_LT_OQ);
    const Vec exponent = _mm512_getexp_ps(x);
    e = _mm512_mask_add_ps(exponent, halved, exponent, set(1.0f));
}
#include "math.inl"
}  // namespace avx512
END_TARGET

BEGIN_TARGET_AVX2
namespace avx2 {
constexpr int64_t WIDTH = 8;
using Vec = __m256;

INLINE __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE Vec set(float x) { return _mm256_set1_ps(x); }
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE Vec load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
INLINE Vec widen(bf16, __m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
INLINE Vec widen(f16, __m128i x) { return _mm256_cvtph_ps(x); }
template <class T>
INLINE Vec load(const T* p) {
    return widen(T{}, _mm_loadu_si128((const __m128i*)p));
}
template <class T>
INLINE Vec load(const T* p, int64_t n) {
    alignas(16) T part[8] = {};
    std::memcpy(part, p, n * sizeof(T));
    return widen(T{}, _mm_load_si128((const __m128i*)part));
}
INLINE __m128i narrow(bf16, Vec x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
INLINE __m128i narrow(f16, Vec x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
INLINE void store(float* p, Vec x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
template <class T>
INLINE void store(T* p, Vec x) {
    _mm_storeu_si128((__m128i*)p, narrow(T{}, x));
}
template <class T>
INLINE void store(T* p, Vec x, int64_t n) {
    alignas(16) T part[8];
    _mm_store_si128((__m128i*)part, narrow(T{}, x));
    std::memcpy(p, part, n * sizeof(T));
}
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INLINE Vec sqrt(Vec x) { return _mm256_sqrt_ps(x); }
INLINE Vec round(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE Vec scale(Vec x, Vec n) {
    // The multiplication by 2^n is done in two steps, so that a result that is infinite, subnormal or zero is also
    // correct.
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return x * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}
INLINE Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
INLINE void split(Vec x, Vec& m, Vec& e) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000));  // 0.75
    const __m256i exponent = _mm256_srai_epi32(shifted, 23);
    m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
    e = _mm256_cvtepi32_ps(exponent);
}
#include "math.inl"
}  // namespace avx2
END_TARGET
#elif JAMBA_ARM
namespace neon {
constexpr int64_t WIDTH = 4;
using Vec = float32x4_t;

INLINE Vec set(float x) { return vdupq_n_f32(x); }
INLINE Vec load(const float* p) { return vld1q_f32(p); }
INLINE Vec widen(bf16, uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 16)); }
INLINE Vec widen(f16, uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
template <class T>
INLINE Vec load(const T* p) {
    return widen(T{}, vld1_u16((const uint16_t*)p));
}
template <class T>
INLINE Vec load(const T* p, int64_t n) {
    T part[WIDTH] = {};
    std::memcpy(part, p, n * sizeof(T));
    return load((const T*)part);
}
INLINE uint16x4_t narrow(bf16, Vec x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet), 16);
}
INLINE uint16x4_t narrow(f16, Vec x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
INLINE void store(float* p, Vec x) { vst1q_f32(p, x); }
template <class T>
INLINE void store(T* p, Vec x) {
    vst1_u16((uint16_t*)p, narrow(T{}, x));
}
template <class T>
INLINE void store(T* p, Vec x, int64_t n) {
    T part[WIDTH];
    store(part, x);
    std::memcpy(p, part, n * sizeof(T));
}
INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
INLINE Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) { return vbslq_f32(vcgtq_f32(a, b), then, otherwise); }
INLINE Vec min(Vec a, Vec b) { return where_greater(b, a, a, b); }
INLINE Vec max(Vec a, Vec b) { return where_greater(a, b, a, b); }
INLINE Vec sqrt(Vec x) { return vsqrtq_f32(x); }
INLINE Vec round(Vec x) { return vrndnq_f32(x); }
INLINE Vec power_of_two(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
INLINE Vec scale(Vec x, Vec n) {  // in two steps, as with AVX2
    const int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return x * power_of_two(half) * power_of_two(vsubq_s32(whole, half));
}
INLINE void split(Vec x, Vec& m, Vec& e) {
    const int32x4_t bits = vreinterpretq_s32_f32(x);
    const int32x4_t exponent = vshrq_n_s32(vsubq_s32(bits, vdupq_n_s32(0x3f400000)), 23);  // 0.75
    m = vreinterpretq_f32_s32(vsubq_s32(bits, vshlq_n_s32(exponent, 23)));
    e = vcvtq_f32_s32(exponent);
}
#include "math.inl"
}  // namespace neon
#endif

// The namespace `portable` uses the compiler's generic vectors, which are compiled to SSE2, NEON or scalar code. The
// portable `fma` rounds twice, because a fused multiply-add is slow on machines that have no instruction for it.
namespace portable {
constexpr int64_t WIDTH = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));

INLINE Vec set(float x) { return Vec{x, x, x, x}; }
template <class T>
INLINE Vec load(const T* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
INLINE Vec load(const T* p, int64_t n) {
    Vec x = {};
    for (int64_t i = 0; i < n; i++) x[i] = to_float(p[i]);
    return x;
}
template <class T>
INLINE void store(T* p, Vec x) {
    for (int i = 0; i < 4; i++) p[i] = from_float<T>(x[i]);
}
template <class T>
INLINE void store(T* p, Vec x, int64_t n) {
    for (int64_t i = 0; i < n; i++) p[i] = from_float<T>(x[i]);
}
INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
INLINE Vec sqrt(Vec x) {
    for (int i = 0; i < 4; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
}
INLINE Vec round(Vec x) {  // This method of rounding to an integer requires x to be from -2^22 to 2^22.
    const Vec shift = set(12582912.0f);
    return (x + shift) - shift;
}
INLINE Vec power_of_two(IntVec n) { return (Vec)((n + 127) << 23); }
INLINE Vec scale(Vec x, Vec n) {
    const IntVec whole = __builtin_convertvector(n, IntVec), half = whole >> 1;
    return x * power_of_two(half) * power_of_two(whole - half);
}
INLINE Vec where_greater(Vec a, Vec b, Vec then, Vec otherwise) { return a > b ? then : otherwise; }
INLINE void split(Vec x, Vec& m, Vec& e) {
    const IntVec bits = (IntVec)x, exponent = (bits - 0x3f400000) >> 23;
    m = (Vec)(bits - (exponent << 23));
    e = __builtin_convertvector(exponent, Vec);
}
#include "math.inl"
}  // namespace portable
