// This file interleaves the rows of a tile of x, so that the elements which a tile multiplies one after the other lie
// side by side.

// Interleaves words of 32 bits of N rows, where N is 1, 2 or 4: word w of row m goes to out[w * stride + m]. Rows of
// `from` have `WORDS` words, of which the first `count` are used.
template <int N, int64_t WORDS, class W>
INLINE void interleave_words(const W (&from)[N][WORDS], int64_t count, W* out, int64_t stride) {
    static_assert(sizeof(W) == 4);
    int64_t w = 0;
#if JAMBA_X86  // every x86-64 processor has SSE2
    for (; N > 1 && w + 4 <= count; w += 4, out += 4 * stride) {
        const __m128 a = _mm_loadu_ps((const float*)(from[0] + w)), b = _mm_loadu_ps((const float*)(from[N > 1] + w));
        const __m128 low = _mm_unpacklo_ps(a, b), high = _mm_unpackhi_ps(a, b);
        if constexpr (N == 4) {
            const __m128 c = _mm_loadu_ps((const float*)(from[2] + w)), d = _mm_loadu_ps((const float*)(from[3] + w));
            const __m128 low_2 = _mm_unpacklo_ps(c, d), high_2 = _mm_unpackhi_ps(c, d);
            _mm_storeu_ps((float*)out, _mm_movelh_ps(low, low_2));
            _mm_storeu_ps((float*)(out + stride), _mm_movehl_ps(low_2, low));
            _mm_storeu_ps((float*)(out + 2 * stride), _mm_movelh_ps(high, high_2));
            _mm_storeu_ps((float*)(out + 3 * stride), _mm_movehl_ps(high_2, high));
        } else {
            _mm_storel_pi((__m64*)out, low), _mm_storeh_pi((__m64*)(out + stride), low);
            _mm_storel_pi((__m64*)(out + 2 * stride), high), _mm_storeh_pi((__m64*)(out + 3 * stride), high);
        }
    }
#endif
    for (; w < count; w++, out += stride) {
        for (int m = 0; m < N; m++) out[m] = from[m][w];
    }
}
