// How a product reads its weights: from each format of `gemm.h` to the numbers that the level multiplies. Nothing is
// rounded: whole numbers of seven bits and a sign are numbers of bf16.
//
// Reader<W>: steps of PAIRS pairs in BYTES bytes, COLUMN_BYTES from a column to the next. `vector` gives the columns
// vector * WIDTH and on of one of the pairs. Where SCALED, float32 scales of all COLUMNS follow each group's steps.

constexpr int64_t STRIP = 2 * WIDTH, STRIPS = PANEL / STRIP;  // columns of a strip; STRIPS to a panel

template <class W>
struct Reader;
struct Unpacked {};  // a strip's weights as the level multiplies them, and scales

#ifdef DOT_PRODUCTS
constexpr int HALVES = 1;  // both numbers of a pair side by side
using Weight = __m512bh;

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    static INLINE Weight vector(const char* step, int vector, int, int) {
        return (Weight)_mm512_loadu_si512(step + 64 * vector);
    }
};

template <>
struct Reader<Unpacked> : Reader<bf16> {
    static constexpr bool SCALED = true;
    static INLINE void put(Weight x, char* step, int vector, int) {
        _mm512_storeu_si512(step + 64 * vector, (__m512i)x);
    }
};

template <>
struct Reader<Int8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 2, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE Vec eight_columns(const char* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    }
    static INLINE Weight vector(const char* step, int vector, int, int) {
        return _mm512_cvtne2ps_pbh(eight_columns(step + 32 * vector + 16), eight_columns(step + 32 * vector));
    }
};

template <>
struct Reader<Int4> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    static INLINE Weight vector(const char* step, int vector, int pair, int) {
        // -8..7 by the numbers' four bits, twice: the fifth bit of an index belongs to the next number.
        const __m256i once = _mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, -0x3f00,
                                               -0x3f20, -0x3f40, -0x3f60, -0x3f80, -0x3fc0, -0x4000, -0x4080);
        const __m512i four = _mm512_srli_epi16(_mm512_loadu_si512(step + 64 * vector), 4 * pair);
        return (Weight)_mm512_permutexvar_epi16(four, _mm512_broadcast_i64x4(once));
    }
};
#else
constexpr int HALVES = 2;  // the first numbers of the pairs, then the second ones
using Weight = Vec;
typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int16_t Words __attribute__((vector_size(2 * WIDTH)));

template <class V>
INLINE V read(const char* p) {
    V x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
// Bits first..first+size-1 of each lane, the highest of them being the sign.
INLINE Vec number(Lanes x, int first, int size) {
    return __builtin_convertvector(x << (32 - first - size) >> (32 - size), Vec);
}

template <class T>
struct Reader {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = sizeof(T), PAIRS = 1, BYTES = PAIR_BYTES<T>;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        return load((const T*)step + half * PANEL + vector * WIDTH);
    }
};

template <>
struct Reader<bf16> {
    static constexpr bool SCALED = false;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 4, PAIRS = 1, BYTES = PAIR_BYTES<bf16>;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        const Lanes pairs = read<Lanes>(step + 4 * WIDTH * vector);  // the first number in the lower half
        return (Vec)(half ? pairs & int(0xffff0000) : pairs << 16);
    }
};

template <>
struct Reader<Unpacked> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMNS = STRIP, COLUMN_BYTES = 4, PAIRS = 1, BYTES = STRIP * 8;
    static INLINE float* place(const char* step, int vector, int half) {
        return (float*)step + half * STRIP + vector * WIDTH;
    }
    static INLINE Weight vector(const char* step, int vector, int, int half) { return load(place(step, vector, half)); }
    static INLINE void put(Weight x, char* step, int vector, int half) { store(place(step, vector, half), x); }
};

template <>
struct Reader<Int8> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 2, PAIRS = 1, BYTES = PANEL * 2;
    static INLINE Weight vector(const char* step, int vector, int, int half) {
        const Words pairs = read<Words>(step + 2 * WIDTH * vector);
        return number(__builtin_convertvector(pairs, Lanes), 8 * half, 8);
    }
};

template <>
struct Reader<Int4> {
    static constexpr bool SCALED = true;
    static constexpr int64_t COLUMNS = PANEL, COLUMN_BYTES = 4, PAIRS = INT4_PAIRS, BYTES = PANEL * 4;
    static INLINE Weight vector(const char* step, int vector, int pair, int half) {
        return number(read<Lanes>(step + 4 * WIDTH * vector), 16 * half + 4 * pair, 4);
    }
};
#endif

// A strip's weights as `Unpacked`, in scratch memory.
template <class T, class W>
const char* unpack_strip(const Weights& weights, int64_t strip) {
    using R = Reader<W>;
    using U = Reader<Unpacked>;
    const int64_t column = strip % STRIPS * STRIP, pairs = weights.pairs(), group = weights.group_pairs();
    const char* from = weights.panels + strip / STRIPS * panel_bytes<T>(weights);
    char* const unpacked = static_cast<char*>(scratch(4, pairs * U::BYTES + weights.groups() * U::COLUMNS * 4));
    char* to = unpacked;
    for (int64_t start = 0; start < pairs; start += group) {
        for (int64_t left = pairs - start < group ? pairs - start : group; left > 0; left -= R::PAIRS) {
#pragma GCC unroll 4
            for (int pair = 0; pair < R::PAIRS; pair++, to += U::BYTES) {
                for (int i = 0; i < 2 * HALVES; i++) {
                    U::put(R::vector(from + column * R::COLUMN_BYTES, i % 2, pair, i / 2), to, i % 2, i / 2);
                }
            }
            from += R::BYTES;
        }
        std::memcpy(to, from + 4 * column, 4 * STRIP);
        from += 4 * R::COLUMNS;
        to += 4 * U::COLUMNS;
    }
    return unpacked;
}
