// This file reads weights in each format that `gemm.h` defines. The weights are converted to the type in which they are
// multiplied: bf16 with DOT_PRODUCTS, otherwise float32. The conversion is exact, because bf16 can represent every
// integer of 8 bits and every e4m3 number; only a table's numbers are rounded to bf16 with DOT_PRODUCTS. To convert an
// e4m3 number, the number's bits are moved to the places that they have in a float32, and a multiplication by 2^120
// corrects the exponent. This also converts subnormal e4m3 numbers correctly. If ROW_PAIRS is defined besides
// DOT_PRODUCTS, `Reader<W>` reads as without DOT_PRODUCTS, and `row_pairs.inl` makes pairs of bf16 of what it reads.
//
// A pair is two neighbouring elements along K. The struct `Reader<W>` reads weights of format W in steps. A step has
// PAIRS pairs of each column of a panel and takes BYTES bytes. Neighbouring columns are COLUMN_BYTES bytes apart. With
// DOT_PRODUCTS, the function `vector(step, v, pair)` returns pair number `pair` of the step, for the columns v * WIDTH
// to (v + 1) * WIDTH - 1 of a strip. Without DOT_PRODUCTS, the function `vector(step, v, pair, half)` returns only the
// first (half = 0) or the second (half = 1) element of this pair for each column. If SCALED is true, the scales of each
// group are stored after the last step of the group.

// A panel has STRIPS strips of STRIP columns each, which are VECTORS vectors.
#if defined(LEVEL_NEON)
constexpr int VECTORS = 4;  // so that a strip of bf16 weights is whole cache lines
#else
constexpr int VECTORS = 2;
#endif
constexpr int64_t STRIP = VECTORS * WIDTH, STRIPS = PANEL / STRIP;

// Reads WIDTH signed or unsigned bytes and returns their values as floats.
template <bool SIGNED>
INLINE Vec float_bytes(const char* p) {
#if defined(LEVEL_AVX512)
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return _mm512_cvtepi32_ps(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(LEVEL_AVX2)
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return _mm256_cvtepi32_ps(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(LEVEL_NEON)
    uint32_t four;
    std::memcpy(&four, p, sizeof(four));
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    if (SIGNED) return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(bytes)))));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
#else
    Vec x;
    for (int i = 0; i < 4; i++) x[i] = SIGNED ? float(int8_t(p[i])) : float(uint8_t(p[i]));
    return x;
#endif
}

#if defined(DOT_PRODUCTS) && defined(LEVEL_AVX512)
using Weight = __m512bh;  // A vector has two neighbouring elements along K, side by side, for each of its columns.

template <class W>
struct Reader;

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    explicit Reader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int) const {
        return (Weight)_mm512_loadu_si512(step + 64 * vector);
    }
};

template <bool SIGNED>
struct ByteReader {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    explicit ByteReader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int) const {
        // An integer of 8 bits that was converted to float32 has zeros in the lower 16 bits. So the first element of a
        // pair is shifted to the lower 16 bits, and a bitwise or combines the first element with the second element.
        const __m512i even = _mm512_castps_si512(float_bytes<SIGNED>(step + 16 * vector));
        const __m512i odd = _mm512_castps_si512(float_bytes<SIGNED>(step + PANEL + 16 * vector));
        return (Weight)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
    }
};
template <>
struct Reader<Int8> : ByteReader<true> {
    using ByteReader::ByteReader;
};
template <>
struct Reader<UInt8> : ByteReader<false> {
    using ByteReader::ByteReader;
};

template <>
struct Reader<Fp8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    explicit Reader(const Weights&) {}
    static INLINE __m512i bits(const char* p) {
        const __m512i moved = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)), 20);
        const __m512i places = _mm512_and_si512(moved, _mm512_set1_epi32(int(0x87f00000)));
        return _mm512_castps_si512(_mm512_castsi512_ps(places) * set(0x1p120f));
    }
    INLINE Weight vector(const char* step, int vector, int) const {
        const __m512i even = bits(step + 16 * vector), odd = bits(step + PANEL + 16 * vector);
        return (Weight)_mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
    }
};

// All formats of four bits are read with the table of their numbers.
template <>
struct Reader<Table4> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    // The bf16 number for each of the 16 patterns of bits. The permutation instruction uses five bits as the index, and
    // the fifth bit is part of the next number. The table is therefore stored twice in a row, so that the fifth bit
    // does not change the result.
    __m512i table;
    explicit Reader(const Weights& w) {
        const __m256i once = narrow(bf16{}, load(w.table));
        table = _mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1);
    }
    INLINE Weight vector(const char* step, int vector, int pair) const {
        const __m512i four = _mm512_srli_epi16(_mm512_loadu_si512(step + 64 * vector), 4 * pair);
        return (Weight)_mm512_permutexvar_epi16(four, table);
    }
};
#else
using Weight = Vec;  // A vector has one element along K for each of its columns.
#include "lanes.inl"

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

// The accumulators of a full tile leave no register of AVX2 for the constants of a reader. gcc would then keep
// accumulators in memory. The function `reload` of a reader therefore reads the constants from memory before each use.
struct NoConstants {
    INLINE void reload() {}
};
#if defined(LEVEL_AVX2)
INLINE Lanes reloaded(const int32_t& constant) {
    Lanes lanes;
    asm volatile("vpbroadcastd %1, %0" : "=x"(lanes) : "m"(constant));
    return lanes;
}
#else
INLINE Lanes reloaded(int32_t constant) { return Lanes{} + constant; }
#endif

template <class T>
struct Reader : NoConstants {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = sizeof(T), PAIRS = 1, BYTES = PAIR_BYTES<T>;
    explicit Reader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int, int half) const {
        return load((const T*)step + half * PANEL + vector * WIDTH);
    }
};

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    static constexpr int32_t UPPER = int32_t(0xffff0000);
    Lanes upper = Lanes{} + UPPER;
    explicit Reader(const Weights&) {}
    INLINE void reload() { upper = reloaded(UPPER); }
    INLINE Weight vector(const char* step, int vector, int, int half) const {
        // A lane of 32 bits holds two neighbouring elements along K. The first element is in the lower 16 bits.
        const Lanes pairs = read_lanes(step + 4 * WIDTH * vector);
        return (Vec)(half ? pairs & upper : pairs << 16);
    }
};

template <bool SIGNED>
struct ByteReader : NoConstants {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    explicit ByteReader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int, int half) const {
        return float_bytes<SIGNED>(step + half * PANEL + WIDTH * vector);
    }
};
template <>
struct Reader<Int8> : ByteReader<true> {
    using ByteReader::ByteReader;
};
template <>
struct Reader<UInt8> : ByteReader<false> {
    using ByteReader::ByteReader;
};

template <>
struct Reader<Fp8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 1, PAIRS = 1, BYTES = PANEL * 2;
    static constexpr int32_t PLACES = int32_t(0x87f00000), SCALE = 0x7b800000;  // SCALE has the bits of 2^120.
    Lanes places = Lanes{} + PLACES, scale = Lanes{} + SCALE;
    explicit Reader(const Weights&) {}
    INLINE void reload() { places = reloaded(PLACES), scale = reloaded(SCALE); }
    INLINE Weight vector(const char* step, int vector, int, int half) const {
        return (Vec)(read_bytes(step + half * PANEL + WIDTH * vector) << 20 & places) * (Vec)scale;
    }
};

// The part of all readers of formats of four bits that is the same.
struct FourBits : NoConstants {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    static INLINE Lanes words(const char* step, int vector) { return read_lanes(step + 4 * WIDTH * vector); }
};

#if defined(LEVEL_AVX512)
template <>
struct Reader<Table4> : FourBits {
    Vec table;
    explicit Reader(const Weights& w) : table(load(w.table)) {}
    INLINE Weight vector(const char* step, int vector, int pair, int half) const {
        // The permutation instruction ignores all bits of an index but the lowest four.
        return _mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words(step, vector), 16 * half + 4 * pair), table);
    }
};
#else
template <>
struct Reader<Int4> : FourBits {
    explicit Reader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int pair, int half) const {
        return number(words(step, vector), 16 * half + 4 * pair, 4);
    }
};

template <>
struct Reader<UInt4> : FourBits {
    explicit Reader(const Weights&) {}
    INLINE Weight vector(const char* step, int vector, int pair, int half) const {
        return __builtin_convertvector(words(step, vector) >> (16 * half + 4 * pair) & 15, Vec);
    }
};

template <>
struct Reader<Table4> : FourBits {
    const float* table;
    explicit Reader(const Weights& w) : table(w.table) {}
    INLINE Weight vector(const char* step, int vector, int pair, int half) const {
        const Lanes index = words(step, vector) >> (16 * half + 4 * pair);
#if defined(LEVEL_AVX2)
        // Each permutation uses the lowest three bits of an index. The fourth bit selects one of the two results.
        const Vec low = _mm256_permutevar8x32_ps(load(table), (__m256i)index);
        const Vec high = _mm256_permutevar8x32_ps(load(table + 8), (__m256i)index);
        return _mm256_blendv_ps(low, high, (Vec)(index << 28));
#elif defined(LEVEL_NEON)
        // The instruction TBL looks up single bytes: an index i stands for the bytes 4 i to 4 i + 3.
        const uint8x16x4_t bytes = vld1q_u8_x4((const uint8_t*)table);
        const Lanes places = (index & 15) * 0x04040404 + 0x03020100;
        return vreinterpretq_f32_u8(vqtbl4q_u8(bytes, vreinterpretq_u8_s32((int32x4_t)places)));
#else
        return Vec{table[index[0] & 15], table[index[1] & 15], table[index[2] & 15], table[index[3] & 15]};
#endif
    }
};
#endif

#ifdef ROW_PAIRS
#include "row_pairs.inl"
template <class W>
using TileReader = PairReader<W>;
#endif
#endif
#ifndef ROW_PAIRS
template <class W>
using TileReader = Reader<W>;
#endif
