// This file has the instruction BFMMLA of ARM, which multiplies two rows of x by two columns of a weight, and vector code
// that computes what the instruction computes, so that tests run on every machine.
//
// A lane of 32 bits is a pair of bf16 elements that are neighbours along K. BFMMLA takes two pairs of two rows, [row][2],
// and two pairs of two columns, [column][2], and adds to four sums, [row][column]. For the processor's usual setting
// (FPCR.EBF is 0, as operating systems leave it) ARM defines the bits: first the products of the first pair are added to
// each other and this sum to the result, then those of the second pair. Every sum is rounded to odd: where it is not
// exact, its last bit is 1. Subnormal numbers, of the inputs and of the results, count as zeros. So a row has the same
// bits beside any other row, and it has those of two instructions BFDOT.

#ifdef LEVEL_NEON
INLINE Vec add_products(Vec c, Lanes rows, Lanes columns) {
    return vbfmmlaq_f32(c, vreinterpretq_bf16_s32((int32x4_t)rows), vreinterpretq_bf16_s32((int32x4_t)columns));
}
// Reads two pairs of elements along K of two rows, or of one row and zeros.
INLINE Lanes two_rows(const uint32_t* x) { return (Lanes)vld1q_u32(x); }
INLINE Lanes one_row(const uint32_t* x) { return (Lanes)vcombine_u32(vld1_u32(x), vdup_n_u32(0)); }
// Interleaves the first halves, or the second halves, of two vectors.
INLINE Lanes zip_low(Lanes a, Lanes b) { return (Lanes)vzip1q_s32((int32x4_t)a, (int32x4_t)b); }
INLINE Lanes zip_high(Lanes a, Lanes b) { return (Lanes)vzip2q_s32((int32x4_t)a, (int32x4_t)b); }
// Joins the first halves, or the second halves, of two vectors.
INLINE Vec join_low(Vec a, Vec b) { return vcombine_f32(vget_low_f32(a), vget_low_f32(b)); }
INLINE Vec join_high(Vec a, Vec b) { return vcombine_f32(vget_high_f32(a), vget_high_f32(b)); }
#else
// Returns a * b + c, rounded once as with NEON, for the scales of quantised weights. `portable::fma` rounds twice.
INLINE Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}

// Rounds a sum to float32, to odd. The exact sum is x + error, where |error| is at most half of the last place of x.
inline float round_to_odd(double x, double error) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    // First the sum is rounded to odd in float64.
    if (error != 0 && bits % 2 == 0) bits += (error > 0) == (x > 0) ? 1 : -1;
    const uint64_t magnitude = bits & ~(uint64_t(1) << 63), rest = magnitude & ((uint64_t(1) << 29) - 1);
    const uint32_t sign = uint32_t(bits >> 63) << 31;
    if (x != x) return from_bits(0x7fc00000);
    if (magnitude >= uint64_t(1023 + 128) << 52) return from_bits(sign | 0x7f800000);
    if (magnitude < uint64_t(1023 - 126) << 52) return from_bits(sign);
    return from_bits(sign | (uint32_t((magnitude >> 29) - (uint64_t(1023 - 127) << 23)) | (rest != 0)));
}
// Both operands are exact in float64. So is the error of their sum in float64 (Knuth's TwoSum).
inline float add_to_odd(double a, double b) {
    const double sum = a + b, of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);
    return round_to_odd(sum, error == error ? error : 0);
}
inline double flushed(uint32_t bits) { return bits & 0x7f800000 ? double(from_bits(bits)) : 0.0 * from_bits(bits); }
inline float multiply_to_odd(uint32_t a, uint32_t b) { return round_to_odd(flushed(a) * flushed(b), 0); }

__attribute__((noinline)) inline Vec add_products(Vec c, Lanes rows, Lanes columns) {
    for (int i = 0; i < 4; i++) {
        for (int pair = 0; pair < 2; pair++) {
            const uint32_t a = uint32_t(rows[i / 2 * 2 + pair]), b = uint32_t(columns[i % 2 * 2 + pair]);
            const float first = multiply_to_odd(a << 16, b << 16);
            c[i] = add_to_odd(c[i], add_to_odd(first, multiply_to_odd(a & 0xffff0000, b & 0xffff0000)));
        }
    }
    return c;
}
INLINE Lanes two_rows(const uint32_t* x) { return read_lanes((const char*)x); }
INLINE Lanes one_row(const uint32_t* x) { return Lanes{int32_t(x[0]), int32_t(x[1]), 0, 0}; }
INLINE Lanes zip_low(Lanes a, Lanes b) { return Lanes{a[0], b[0], a[1], b[1]}; }
INLINE Lanes zip_high(Lanes a, Lanes b) { return Lanes{a[2], b[2], a[3], b[3]}; }
INLINE Vec join_low(Vec a, Vec b) { return Vec{a[0], a[1], b[0], b[1]}; }
INLINE Vec join_high(Vec a, Vec b) { return Vec{a[2], a[3], b[2], b[3]}; }
#endif

// Reads the weights of format W as pairs, converted to bf16: `pairs(step, v, pair)` returns pair number `pair` of the
// step for the columns of vector v. All numbers but a table's are exact in bf16.
template <class W>
struct PairReader : Reader<W> {
    using Reader<W>::Reader;
    INLINE Lanes pairs(const char* step, int vector, int pair) const {
        // A number that is exact in bf16 has zeros in the lower 16 bits of its float32.
        const Lanes even = (Lanes)this->vector(step, vector, pair, 0), odd = (Lanes)this->vector(step, vector, pair, 1);
        return (even >> 16 & 0xffff) | odd;
    }
};

template <>
struct PairReader<bf16> : Reader<bf16> {
    using Reader<bf16>::Reader;
    INLINE Lanes pairs(const char* step, int vector, int) const { return read_lanes(step + 4 * WIDTH * vector); }
};

// All formats of four bits are read with the table of their numbers, rounded to bf16.
template <>
struct PairReader<Table4> : FourBits {
#ifdef LEVEL_NEON
    uint8x16x2_t table;
#else
    bf16 table[16];
#endif
    explicit PairReader(const Weights& w) {
        bf16 numbers[16];
        for (int i = 0; i < 16; i++) numbers[i] = from_float<bf16>(w.table[i]);
        std::memcpy(&table, numbers, sizeof(table));
    }
    INLINE Lanes pairs(const char* step, int vector, int pair) const {
        const Lanes index = words(step, vector) >> 4 * pair & 0x000f000f;  // two indices: one for each half of a lane
#ifdef LEVEL_NEON
        // The instruction TBL looks up single bytes: an index i stands for the bytes 2 i and 2 i + 1.
        return (Lanes)vqtbl2q_u8(table, vreinterpretq_u8_s32((int32x4_t)(index * 0x0202 + 0x01000100)));
#else
        Lanes both;
        for (int i = 0; i < WIDTH; i++) {
            both[i] = int32_t(table[index[i] & 15].bits | uint32_t(table[index[i] >> 16].bits) << 16);
        }
        return both;
#endif
    }
};
