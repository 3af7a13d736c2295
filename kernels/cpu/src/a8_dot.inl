// This file has the vector operations on whole numbers that products with 8-bit activations need, for each instruction
// set. The type `Bytes` is a vector of four neighbouring inputs, one byte each, for WIDTH columns of a weight.
// The type `Whole` is a vector of WIDTH signed integers of 32 bits.
//
// The structs `Small` and `Large` compute the sum of number * q over words of four inputs. The numbers are from 0 to 15
// for `Small` and from 0 to 255 for `Large`. A sum begins with the start value of the block, which subtracts bias * q
// for all inputs. STRIDED is the number of 32-bit integers that hold a word of x. If it is 2, the first integer holds
// the inputs 0 and 2 of the word with 16 bits each, and the second holds the inputs 1 and 3. If PAIRED is true, the
// start value is two integers of 16 bits: the first belongs to the inputs 0 and 1 of all words, the second to the
// inputs 2 and 3. LESS is what the instruction set subtracts from every number, to make it signed; the start value
// subtracts so much less.
//
// KEEP_ORDER keeps the compiler from moving the computation of a variable. Otherwise gcc moves all multiplications ahead
// of the additions and runs out of registers.
//
// INLINE_IF_FAST inlines a function, but not in `portable`, where the long code of these functions would take long to
// compile.
#undef INLINE_IF_FAST
#if defined(A8_DOT_512) || defined(LEVEL_AVX2) || defined(LEVEL_NEON)
#define INLINE_IF_FAST INLINE
#else
#define INLINE_IF_FAST __attribute__((noinline)) inline
#endif
#undef KEEP_ORDER
#define KEEP_ORDER(variable) asm("" : "+v"(variable))
#if defined(A8_DOT_512)
using Bytes = __m512i;
using Whole = __m512i;
INLINE Bytes read_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Bytes low_halves(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes x) { return low_halves(_mm512_srli_epi16(x, 4)); }
INLINE Bytes look_up(const uint8_t* table, Bytes i) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), i);
}
INLINE Vec to_floats(Whole x) { return _mm512_cvtepi32_ps(x); }
INLINE Vec signed_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE Vec unsigned_bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
struct Large {
    static constexpr int STRIDED = 1;
    static constexpr bool PAIRED = false;
    static constexpr int32_t LESS = 0;
    Whole sum;
    INLINE void start(const int32_t* x) { sum = _mm512_set1_epi32(*x); }
    INLINE void add(Bytes numbers, const int32_t* x, int64_t) {
        sum = _mm512_dpbusd_epi32(sum, numbers, _mm512_set1_epi32(*x));
        KEEP_ORDER(sum);
    }
    INLINE Whole total() const { return sum; }
};
using Small = Large;
#elif defined(LEVEL_AVX2)
using Bytes = __m256i;
using Whole = __m256i;
INLINE Bytes read_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Bytes low_halves(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE Bytes high_halves(Bytes x) { return low_halves(_mm256_srli_epi16(x, 4)); }
INLINE Bytes look_up(const uint8_t* table, Bytes i) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), i);
}
INLINE Vec to_floats(Whole x) { return _mm256_cvtepi32_ps(x); }
INLINE Vec signed_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE Vec unsigned_bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
#if defined(A8_DOT_256)
struct Large {
    static constexpr int STRIDED = 1;
    static constexpr bool PAIRED = false;
    static constexpr int32_t LESS = 0;
    Whole sum;
    INLINE void start(const int32_t* x) { sum = _mm256_set1_epi32(*x); }
    INLINE void add(Bytes numbers, const int32_t* x, int64_t) {
        sum = A8_DOT_256(sum, numbers, _mm256_set1_epi32(*x));
        KEEP_ORDER(sum);
    }
    INLINE Whole total() const { return sum; }
};
using Small = Large;
#else
struct Small {
    static constexpr int STRIDED = 1;
    static constexpr bool PAIRED = true;
    static constexpr int32_t LESS = 0;
    __m256i pairs;  // sums of 16 bits, each over two of the four inputs of all words
    INLINE void start(const int32_t* x) { pairs = _mm256_set1_epi32(*x); }
    INLINE void add(Bytes numbers, const int32_t* x, int64_t) {
        // A sum of 16 bits has at most 16 products of at most 15 * 127, so that it does not overflow.
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(numbers, _mm256_set1_epi32(*x)));
        KEEP_ORDER(pairs);
    }
    INLINE Whole total() const { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
};
struct Large {
    static constexpr int STRIDED = 2;
    static constexpr bool PAIRED = false;
    static constexpr int32_t LESS = 0;
    Whole sum;
    INLINE void start(const int32_t* x) { sum = _mm256_set1_epi32(*x); }
    INLINE void add(Bytes numbers, const int32_t* x, int64_t stride) {
        const __m256i even = _mm256_and_si256(numbers, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(numbers, 8);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, _mm256_set1_epi32(x[0])));
        KEEP_ORDER(sum);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, _mm256_set1_epi32(x[stride])));
        KEEP_ORDER(sum);
    }
    INLINE Whole total() const { return sum; }
};
#endif
#elif defined(A8_SDOT)
using Bytes = uint8x16_t;
using Whole = int32x4_t;
INLINE Bytes read_bytes(const uint8_t* p) { return vld1q_u8(p); }
INLINE Bytes low_halves(Bytes x) { return vandq_u8(x, vdupq_n_u8(15)); }
INLINE Bytes high_halves(Bytes x) { return vshrq_n_u8(x, 4); }
INLINE Bytes look_up(const uint8_t* table, Bytes i) { return vqtbl1q_u8(vld1q_u8(table), i); }
INLINE Vec to_floats(Whole x) { return vcvtq_f32_s32(x); }
INLINE Vec unsigned_bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, sizeof(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}
INLINE Vec signed_bytes(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, sizeof(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four))))));
}
// The instructions SDOT and SMMLA multiply signed bytes by signed bytes.
template <int32_t SUBTRACTED>
struct Signed {
    static constexpr int STRIDED = 1;
    static constexpr bool PAIRED = false;
    static constexpr int32_t LESS = SUBTRACTED;
    Whole sum;
    static INLINE int8x16_t numbers(Bytes x) {
        return vreinterpretq_s8_u8(SUBTRACTED ? veorq_u8(x, vdupq_n_u8(0x80)) : x);
    }
    INLINE void start(const int32_t* x) { sum = vdupq_n_s32(*x); }
    INLINE void add(Bytes word, const int32_t* x, int64_t) {
        sum = vdotq_s32(sum, numbers(word), vreinterpretq_s8_s32(vdupq_n_s32(*x)));
    }
    INLINE Whole total() const { return sum; }
};
using Large = Signed<128>;
using Small = Signed<0>;
#else
typedef int32_t Whole __attribute__((vector_size(4 * WIDTH)));
using Bytes = Whole;  // a lane has the four bytes of a column
INLINE Bytes read_bytes(const uint8_t* p) {
    Bytes x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
INLINE Bytes low_halves(Bytes x) { return x & 0x0f0f0f0f; }
INLINE Bytes high_halves(Bytes x) { return x >> 4 & 0x0f0f0f0f; }
INLINE Bytes look_up(const uint8_t* table, Bytes i) {
    uint8_t bytes[sizeof(Bytes)];
    std::memcpy(bytes, &i, sizeof(i));
    for (uint8_t& byte : bytes) byte = table[byte];
    return read_bytes(bytes);
}
INLINE Vec to_floats(Whole x) { return __builtin_convertvector(x, Vec); }
INLINE Vec signed_bytes(const uint8_t* p) {
    Vec x = {};
    for (int i = 0; i < WIDTH; i++) x[i] = float(int8_t(p[i]));
    return x;
}
INLINE Vec unsigned_bytes(const uint8_t* p) {
    Vec x = {};
    for (int i = 0; i < WIDTH; i++) x[i] = float(p[i]);
    return x;
}
// Returns sum + number * q for a word of inputs.
INLINE_IF_FAST Whole add_word(Whole sum, Bytes numbers, int32_t x) {
    for (int i = 0; i < 4; i++) sum += (numbers >> 8 * i & 255) * int(int8_t(x >> 8 * i));
    return sum;
}
struct Large {
    static constexpr int STRIDED = 1;
    static constexpr bool PAIRED = false;
    static constexpr int32_t LESS = 0;
    Whole sum;
    INLINE void start(const int32_t* x) { sum = *x - Whole{}; }
    INLINE void add(Bytes numbers, const int32_t* x, int64_t) { sum = add_word(sum, numbers, *x); }
    INLINE Whole total() const { return sum; }
};
using Small = Large;
#endif

// Returns a * b + c, rounded once, for the instruction set `portable` too.
INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(A8_DOT_512) || defined(LEVEL_AVX2) || defined(LEVEL_NEON)
    return fma(a, b, c);
#else
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
