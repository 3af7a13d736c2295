// This file reads weights in each format that `gemm.h` defines. The weights are converted to the type in which they are
// multiplied: bf16 with DOT_PRODUCTS, otherwise float32. The conversion is exact, because bf16 can represent every
// int4, int8 and e4m3 number. To convert an e4m3 number, the number's bits are moved to the places that they have in a
// float32, and a multiplication by 2^120 corrects the exponent. This also converts subnormal e4m3 numbers correctly.
//
// A pair is two neighbouring elements along K. The struct `Reader<W>` reads weights of format W in steps. A step has
// PAIRS pairs of each column of a panel and takes BYTES bytes. Neighbouring columns are COLUMN_BYTES bytes apart. With
// DOT_PRODUCTS, the function `vector(step, v, pair)` returns pair number `pair` of the step, for the columns v * WIDTH
// to (v + 1) * WIDTH - 1 of a strip. Without DOT_PRODUCTS, the function `vector(step, v, pair, half)` returns only the
// first (half = 0) or the second (half = 1) element of this pair for each column. If SCALED is true, the scales of each
// group are stored after the last step of the group.

// A panel has STRIPS strips of STRIP columns each.
constexpr int64_t STRIP = 2 * WIDTH, STRIPS = PANEL / STRIP;

#ifdef DOT_PRODUCTS
using Weight = __m512bh;  // A vector has two neighbouring elements along K, side by side, for each of its columns.

template <class W>
struct Reader;

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    static INLINE Weight vector(const char* step, int vector, int) {
        return (Weight)_mm512_loadu_si512(step + 64 * vector);
    }
};

template <>
struct Reader<Int8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE __m512i bits(const char* p) {
        return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))));
    }
    static INLINE Weight vector(const char* step, int vector, int) {
        // An int8 number that was converted to float32 has zeros in the lower 16 bits. So the first element of a pair
        // is shifted to the lower 16 bits, and a bitwise or combines the first element with the second element.
        const __m512i even = bits(step + 16 * vector), odd = bits(step + PANEL + 16 * vector);
        return (Weight)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
    }
};

template <>
struct Reader<Fp8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE __m512i bits(const char* p) {
        const __m512i moved = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)), 20);
        const __m512i places = _mm512_and_si512(moved, _mm512_set1_epi32(int(0x87f00000)));
        return _mm512_castps_si512(_mm512_castsi512_ps(places) * set(0x1p120f));
    }
    static INLINE Weight vector(const char* step, int vector, int) {
        const __m512i even = bits(step + 16 * vector), odd = bits(step + PANEL + 16 * vector);
        return (Weight)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
    }
};

template <>
struct Reader<Int4> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    static INLINE Weight vector(const char* step, int vector, int pair) {
        // This table has the bf16 number for each of the 16 bit patterns of int4. The permutation instruction uses five
        // bits as the index, and the fifth bit is part of the next int4 number. The table is therefore stored twice in
        // a row, so that the fifth bit does not change the result.
        const __m256i once = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, -0x3f00,
                                               -0x3f20, -0x3f40, -0x3f60, -0x3f80, -0x3fc0, -0x4000, -0x4080);
        const __m512i four = _mm512_srli_epi16(_mm512_loadu_si512(step + 64 * vector), 4 * pair);
        return (Weight)_mm512_permutexvar_epi16(four, _mm512_broadcast_i64x4(once));
    }
};
#else
using Weight = Vec;  // A vector has one element along K for each of its columns.
typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH)));

INLINE Lanes read_lanes(const char* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
// Reads WIDTH signed bytes and returns their values, one per lane.
INLINE Lanes read_bytes(const char* p) {
#if defined(LEVEL_AVX512)
    return (Lanes)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(LEVEL_AVX2)
    return (Lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    int32_t four;
    std::memcpy(&four, p, sizeof(four));
    return Lanes{four, four, four, four} << Lanes{24, 16, 8, 0} >> 24;
#endif
}
// Takes the bits `first` to `first + size - 1` of each lane as a signed integer and returns this integer as a float.
INLINE Vec number(Lanes x, int first, int size) {
    return __builtin_convertvector(x << (32 - first - size) >> (32 - size), Vec);
}

template <class T>
struct Reader {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = sizeof(T), PAIRS = 1, BYTES = PAIR_BYTES<T>;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        return load((const T*)step + half * PANEL + vector * WIDTH);
    }
};

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        // A lane of 32 bits holds two neighbouring elements along K. The first element is in the lower 16 bits.
        const Lanes pairs = read_lanes(step + 4 * WIDTH * vector);
        return (Vec)(half ? pairs & int(0xffff0000) : pairs << 16);
    }
};

template <>
struct Reader<Int8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        return __builtin_convertvector(read_bytes(step + half * PANEL + WIDTH * vector), Vec);
    }
};

template <>
struct Reader<Fp8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        return (Vec)(read_bytes(step + half * PANEL + WIDTH * vector) << 20 & int(0x87f00000)) * set(0x1p120f);
    }
};

template <>
struct Reader<Int4> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    static INLINE Weight vector(const char* step, int vector, int pair, int half) {
        return number(read_lanes(step + 4 * WIDTH * vector), 16 * half + 4 * pair, 4);
    }
};
#endif
