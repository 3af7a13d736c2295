// This file multiplies pairs of rows by the instruction SMMLA of ARM. It multiplies eight inputs of two rows,
// [row][input], by eight inputs of two columns, [column][input], and adds to four whole sums, [row][column]. An odd row
// takes SDOT. Whole sums are exact, so that both give the same bits.

INLINE int8x16_t zip_low(Bytes a, Bytes b) {
    return vreinterpretq_s8_u32(vzip1q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
}
INLINE int8x16_t zip_high(Bytes a, Bytes b) {
    return vreinterpretq_s8_u32(vzip2q_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
}

// Reads two words of inputs of each column.
template <class R>
INLINE void read_two(const uint8_t* p, const uint8_t* table, Bytes (&words)[2]) {
    if constexpr (R::WORDS == 2) {
        R::read(p, table, words);
    } else {
        for (int i = 0; i < 2; i++) {
            Bytes word[1];
            R::read(p + i * 4 * PANEL, table, word);
            words[i] = word[0];
        }
    }
    for (Bytes& word : words) word = vreinterpretq_u8_s8(R::Dot::numbers(word));
}

// Computes c += scale * sum of number * q, for one half or the whole of a block.
template <class R, int MR, int NV, int HALVES>
INLINE void multiply_words(const uint8_t* p, const uint8_t* table, const int32_t* x, const int32_t* starts,
                           const float* scales, Vec (&c)[MR][NV]) {
    // For two rows, sums[m] has the sums of the columns 0 and 1, and sums[m + 1] those of the columns 2 and 3. An odd
    // row has the sums of its columns.
    Whole sums[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
        const int first = m / 2 * 2;
        const int32x2_t one = vdup_n_s32(starts[first]), two = vdup_n_s32(starts[first + 1 < MR ? first + 1 : first]);
        for (int v = 0; v < NV; v++) sums[m][v] = vcombine_s32(one, two);
    }
#pragma GCC unroll 4
    for (int word = 0; word < A8_WORDS / HALVES; word += 2, p += 8 * PANEL / R::WORDS) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            Bytes words[2];
            read_two<R>(p + 4 * WIDTH * v, table, words);
            const int8x16_t low = zip_low(words[0], words[1]), high = zip_high(words[0], words[1]);
#pragma GCC unroll 8
            for (int m = 0; m + 1 < MR; m += 2) {
                const int32_t* const of_rows = x + word * MR + m;
                const int32x2_t first = vld1_s32(of_rows), second = vld1_s32(of_rows + MR);
                const int32x4_t both = vcombine_s32(vzip1_s32(first, second), vzip2_s32(first, second));
                const int8x16_t rows = vreinterpretq_s8_s32(both);
                sums[m][v] = vmmlaq_s32(sums[m][v], rows, low);
                sums[m + 1][v] = vmmlaq_s32(sums[m + 1][v], rows, high);
            }
            for (int i = 0; MR % 2 && i < 2; i++) {
                const int8x16_t row = vreinterpretq_s8_s32(vdupq_n_s32(x[(word + i) * MR + MR - 1]));
                sums[MR - 1][v] = vdotq_s32(sums[MR - 1][v], vreinterpretq_s8_u8(words[i]), row);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
        const Vec scale = set(scales[m]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            const Whole left = sums[m / 2 * 2][v], right = sums[m / 2 * 2 + 1 < MR ? m / 2 * 2 + 1 : m][v];
            const Whole total = MR % 2 && m + 1 == MR ? left
                                : m % 2               ? vcombine_s32(vget_high_s32(left), vget_high_s32(right))
                                                      : vcombine_s32(vget_low_s32(left), vget_low_s32(right));
            c[m][v] = fused(to_floats(total), scale, c[m][v]);
        }
    }
}
