// This header has operations across the lanes of vectors: transposition, sums of lanes, and the largest lane. With
// AVX-512 the operations work on whole vectors, and so do the sums with AVX2 and NEON; otherwise they work on one lane at
// a time.
// The function `transpose16` requires vectors of 16 floats. In the namespaces with shorter vectors, `transpose16` is an
// empty function: calls of `transpose16` are compiled in these namespaces too, but never run.
#pragma once
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX512
namespace avx512 {

// Transposes the 128-bit parts of four vectors. The vector out[4 * i] receives four parts: part i of a, part i of b,
// part i of c and part i of d.
INLINE void transpose_parts(__m512 a, __m512 b, __m512 c, __m512 d, __m512* out) {
    const __m512 ab_low = _mm512_shuffle_f32x4(a, b, 0x44), ab_high = _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd_low = _mm512_shuffle_f32x4(c, d, 0x44), cd_high = _mm512_shuffle_f32x4(c, d, 0xee);
    out[0] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
    out[4] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
    out[8] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    out[12] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
}

// Transposes a 16 x 16 matrix. `from` and `to` must not overlap.
INLINE void transpose16(const float* from, float* to) {
    __m512 quads[16], out[16];  // quads[4 * j + i] has columns i, i + 4, i + 8, i + 12 of rows 4j to 4j + 3.
    for (int j = 0; j < 4; j++) {
        __m512 row[4], pair[4];
        for (int i = 0; i < 4; i++) row[i] = _mm512_loadu_ps(from + 16 * (4 * j + i));
        for (int i = 0; i < 2; i++) {
            pair[i] = i ? _mm512_unpackhi_ps(row[0], row[1]) : _mm512_unpacklo_ps(row[0], row[1]);
            pair[2 + i] = i ? _mm512_unpackhi_ps(row[2], row[3]) : _mm512_unpacklo_ps(row[2], row[3]);
        }
        for (int i = 0; i < 4; i++) {
            const __m512d left = _mm512_castps_pd(pair[i / 2]), right = _mm512_castps_pd(pair[2 + i / 2]);
            quads[4 * j + i] =
                _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(left, right) : _mm512_unpacklo_pd(left, right));
        }
    }
    for (int i = 0; i < 4; i++) transpose_parts(quads[i], quads[4 + i], quads[8 + i], quads[12 + i], out + i);
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + 16 * i, out[i]);
}

// Returns a vector whose lane i is the sum of the lanes of v[i]. The order of summation is the same for all i.
INLINE __m512 sums16(const __m512* v) {
    __m512 quads[4];  // Lane i of 128-bit part p of quads[j] is the sum of part p of v[4j + i].
    for (int j = 0; j < 4; j++) {
        const __m512* const x = v + 4 * j;
        const __m512 left = _mm512_unpacklo_ps(x[0], x[1]) + _mm512_unpackhi_ps(x[0], x[1]);
        const __m512 right = _mm512_unpacklo_ps(x[2], x[3]) + _mm512_unpackhi_ps(x[2], x[3]);
        const __m512d a = _mm512_castps_pd(left), b = _mm512_castps_pd(right);
        quads[j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    __m512 halves[2];
    for (int j = 0; j < 2; j++) {
        halves[j] = _mm512_shuffle_f32x4(quads[2 * j], quads[2 * j + 1], 0x88) +
                    _mm512_shuffle_f32x4(quads[2 * j], quads[2 * j + 1], 0xdd);
    }
    return _mm512_shuffle_f32x4(halves[0], halves[1], 0x88) + _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd);
}

constexpr int SUMS = 16;  // The function `sums` computes, for each of SUMS vectors, the sum of the vector's lanes.
INLINE void sums(const __m512* v, float* out) { _mm512_storeu_ps(out, sums16(v)); }
INLINE float largest(__m512 x) { return _mm512_reduce_max_ps(x); }

}  // namespace avx512
END_TARGET

BEGIN_TARGET_AVX2
namespace avx2 {
constexpr int SUMS = 8;
INLINE void transpose16(const float*, float*) {}
// Writes the sum of the lanes of each of the eight vectors, added in the order of the function `sum`.
INLINE void sums(const Vec* v, float* out) {
    // The lower half of halves[i] is the sum of both halves of v[i], and the upper half is that of v[i + 4].
    Vec halves[4];
    for (int i = 0; i < 4; i++) {
        halves[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    Vec pairs[2];  // For each of four vectors, pairs[i] has the last two partial sums, of four lanes each.
    for (int i = 0; i < 2; i++) {
        const __m256d a = _mm256_castps_pd(halves[2 * i]), b = _mm256_castps_pd(halves[2 * i + 1]);
        pairs[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)) + _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
    store(out, _mm256_shuffle_ps(pairs[0], pairs[1], 0x88) + _mm256_shuffle_ps(pairs[0], pairs[1], 0xdd));
}
INLINE float largest(Vec x) {
    alignas(32) float v[WIDTH];
    store(v, x);
    for (int64_t i = 1; i < WIDTH; i++) v[0] = v[0] > v[i] ? v[0] : v[i];
    return v[0];
}
}  // namespace avx2
END_TARGET
#elif JAMBA_ARM
namespace neon {
constexpr int SUMS = 8;
INLINE void transpose16(const float*, float*) {}
// Returns a vector whose lane i is the sum of the lanes of v[i], added in the order of the function `sum`.
INLINE Vec sums4(const Vec* v) {
    const Vec first = vcombine_f32(vadd_f32(vget_low_f32(v[0]), vget_high_f32(v[0])),
                                   vadd_f32(vget_low_f32(v[1]), vget_high_f32(v[1])));
    const Vec second = vcombine_f32(vadd_f32(vget_low_f32(v[2]), vget_high_f32(v[2])),
                                    vadd_f32(vget_low_f32(v[3]), vget_high_f32(v[3])));
    return vpaddq_f32(first, second);
}
INLINE void sums(const Vec* v, float* out) {
    for (int i = 0; i < SUMS; i += 4) store(out + i, sums4(v + i));
}
INLINE float largest(Vec x) {
    for (int64_t i = 1; i < WIDTH; i++) x[0] = x[0] > x[i] ? x[0] : x[i];
    return x[0];
}
}  // namespace neon
#endif

namespace portable {
constexpr int SUMS = 8;
INLINE void transpose16(const float*, float*) {}
INLINE void sums(const Vec* v, float* out) {
    for (int i = 0; i < SUMS; i++) out[i] = sum(v[i]);
}
INLINE float largest(Vec x) {
    for (int64_t i = 1; i < WIDTH; i++) x[0] = x[0] > x[i] ? x[0] : x[i];
    return x[0];
}
}  // namespace portable
