// This file multiplies one step of the weights of a tile by the rows of x, in three ways: by pairs of rows with
// ROW_PAIRS, by pairs of elements along K with DOT_PRODUCTS, and otherwise one element after the other in float32.
// `gemm.inl` says what a tile is, and `formats.inl` what a step is.

#if defined(ROW_PAIRS)
#if defined(LEVEL_NEON)
constexpr int MAX_ROWS = 6, ACCUMULATORS = 24;
#else
constexpr int MAX_ROWS = 2, ACCUMULATORS = 4;  // The emulation need not be fast.
#endif
// An element of packed x is a pair, and two pairs of a row lie side by side: [pair / 2][row][2]. The file
// `row_pairs.inl` defines how pairs of rows are multiplied and added.
using PackedX = uint32_t;
constexpr int64_t X_PER_PAIR = 1, X_NEIGHBOURS = 2;
// The number of rows of accumulators of a tile of `rows` rows. Rows 2 i and 2 i + 1 of the tile share two vectors for
// each WIDTH columns: the first has their sums of the columns 0 and 1, and the second those of the columns 2 and 3.
constexpr int sum_rows(int rows) { return (rows + 1) / 2 * 2; }

// Multiplies four elements along K of MR rows of x, from pair number `pair` of a step on, by the weights of NS strips.
// If `is_last`, the second pair is beyond the end of K.
template <class W, int MR, int NS>
INLINE void multiply_pairs(Vec (&c)[sum_rows(MR)][VECTORS * NS], const TileReader<W>& reader, const PackedX* x,
                           const char* const (&w)[NS], int64_t offset, int pair, bool is_last) {
    using R = TileReader<W>;
#pragma GCC unroll 8
    for (int s = 0; s < NS; s++) {
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            const char* const step = w[s] + offset;
            const Lanes first = reader.pairs(step, v, pair);
            const Lanes second = is_last ? Lanes{} : R::PAIRS > 1 ? reader.pairs(step, v, pair + 1)
                                                                  : reader.pairs(step + R::BYTES, v, 0);
            const Lanes low = zip_low(first, second), high = zip_high(first, second);
#pragma GCC unroll 8
            for (int m = 0; m < MR; m += 2) {
                const Lanes rows = m + 1 < MR ? two_rows(x + 2 * m) : one_row(x + 2 * m);
                c[m][VECTORS * s + v] = add_products(c[m][VECTORS * s + v], rows, low);
                c[m + 1][VECTORS * s + v] = add_products(c[m + 1][VECTORS * s + v], rows, high);
            }
        }
    }
}

// Multiplies what lies between `offset` and `end`, but at most one step, or two neighbouring steps of one pair each.
template <class W, int MR, int NS>
INLINE void multiply_step(Vec (&c)[sum_rows(MR)][VECTORS * NS], const TileReader<W>& reader, const PackedX*& x,
                          const char* const (&w)[NS], int64_t& offset, int64_t end) {
    using R = TileReader<W>;
    constexpr int PAIRS = R::PAIRS > 1 ? R::PAIRS : 2;
    const bool is_last = R::PAIRS == 1 && offset + R::BYTES == end;
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; pair += 2, x += 2 * MR) {
        if (is_last) multiply_pairs<W, MR, NS>(c, reader, x, w, offset, pair, true);
        else multiply_pairs<W, MR, NS>(c, reader, x, w, offset, pair, false);
    }
    offset += is_last ? R::BYTES : R::BYTES * PAIRS / R::PAIRS;
}

// Writes the accumulators to `sums`, one row after the other.
template <int MR, int NV>
INLINE void separate_rows(const Vec (&c)[sum_rows(MR)][NV], Vec (&sums)[MR][NV]) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) {
            const Vec left = c[m / 2 * 2][v], right = c[m / 2 * 2 + 1][v];
            sums[m][v] = m % 2 ? join_high(left, right) : join_low(left, right);
        }
    }
}

// Packs n <= 2 * WIDTH elements of each of N rows of x for a tile of `rows` rows.
template <int N>
INLINE void interleave_rows(const bf16* const (&x)[N], int64_t n, PackedX* out, int64_t rows) {
    for (int m = 0; m < N; m++) {
        PackedX pairs[WIDTH] = {};
        std::memcpy(pairs, x[m], n * sizeof(bf16));
        for (int64_t i = 0; i < (n + 1) / 2; i += 2) std::memcpy(out + i * rows + 2 * m, pairs + i, 2 * sizeof(*out));
    }
}
#elif defined(DOT_PRODUCTS)
constexpr int MAX_ROWS = 12, ACCUMULATORS = 24;
// An element of packed x is two bf16 elements that are neighbours along K. The instruction VDPBF16PS multiplies these
// two elements by two elements of the weight and adds both products to an accumulator. The processor fixes the order of
// these additions.
using PackedX = uint32_t;
constexpr int64_t X_PER_PAIR = 1;

// Multiplies two elements along K of MR rows of x by the weights of NS strips, and adds the products to the
// accumulators c. The weights of strip s are `offset` bytes after the address w[s].
template <class W, int MR, int NS>
INLINE void multiply_pair(Vec (&c)[MR][VECTORS * NS], const Reader<W>& reader, const PackedX* x, const char* const (&w)[NS],
                          int64_t offset, int pair) {
#pragma GCC unroll 8
    for (int s = 0; s < NS; s++) {
        const Weight b0 = reader.vector(w[s] + offset, 0, pair), b1 = reader.vector(w[s] + offset, 1, pair);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(int(x[m]));
            c[m][2 * s] = _mm512_dpbf16_ps(c[m][2 * s], a, b0);
            c[m][2 * s + 1] = _mm512_dpbf16_ps(c[m][2 * s + 1], a, b1);
        }
    }
}

// Packs n <= 2 * WIDTH elements of each of N rows of x for a tile of `rows` rows. Pair i of row m is written to out[i *
// rows + m]. The pairs with the same number i are therefore adjacent for all rows of the tile.
template <int N>
INLINE void interleave_rows(const bf16* const (&x)[N], int64_t n, PackedX* out, int64_t rows) {
    PackedX pairs[N][WIDTH] = {};
    for (int m = 0; m < N; m++) std::memcpy(pairs[m], x[m], n == 2 * WIDTH ? sizeof(pairs[m]) : n * sizeof(bf16));
    interleave_words<N, WIDTH>(pairs, (n + 1) / 2, out, rows);
}
#else
#if defined(LEVEL_NEON)
constexpr int MAX_ROWS = 6, ACCUMULATORS = 24;
#else
constexpr int MAX_ROWS = WIDTH == 16 ? 12 : WIDTH == 8 ? 6 : 4;
constexpr int ACCUMULATORS = WIDTH == 16 ? 24 : 12;
#endif
#if defined(LEVEL_AVX2)
constexpr bool RELOADS = true;  // Full tiles read the constants of a reader before each use (see `formats.inl`).
#else
constexpr bool RELOADS = false;
#endif
// An element of packed x is a float32. For two neighbouring elements along K, an accumulator takes two fused
// multiply-adds.
using PackedX = float;
constexpr int64_t X_PER_PAIR = 2;

template <class W, int MR, int NS>
INLINE void multiply_pair(Vec (&c)[MR][VECTORS * NS], const Reader<W>& reader, const PackedX* x, const char* const (&w)[NS],
                          int64_t offset, int pair) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 8
        for (int s = 0; s < NS; s++) {
            Weight b[VECTORS];
            Reader<W> own = reader;
            if constexpr (RELOADS && MR * VECTORS * NS == ACCUMULATORS) own.reload();
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) b[v] = own.vector(w[s] + offset, v, pair, half);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) {
                const Vec a = set(x[half * MR + m]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) c[m][VECTORS * s + v] = fma(a, b[v], c[m][VECTORS * s + v]);
            }
        }
    }
}

// Packs n <= 2 * WIDTH elements of each of N rows of x for a tile of `rows` rows. Element i of row m is written to out[i *
// rows + m].
template <int N, class T>
INLINE void interleave_rows(const T* const (&x)[N], int64_t n, PackedX* out, int64_t rows) {
    float wide[N][2 * WIDTH];
    for (int m = 0; m < N; m++) {
        if (n == 2 * WIDTH) {
            store(wide[m], load(x[m])), store(wide[m] + WIDTH, load(x[m] + WIDTH));
        } else {
            store(wide[m], load(x[m], n < WIDTH ? n : WIDTH));
            store(wide[m] + WIDTH, load(x[m] + WIDTH, n > WIDTH ? n - WIDTH : 0));
        }
    }
    interleave_words<N, 2 * WIDTH>(wide, (n + 1) / 2 * 2, out, rows);
}
#endif

#ifndef ROW_PAIRS
constexpr int64_t X_NEIGHBOURS = 1;
constexpr int sum_rows(int rows) { return rows; }

// Multiplies one step, and moves to the next one.
template <class W, int MR, int NS>
INLINE void multiply_step(Vec (&c)[MR][VECTORS * NS], const Reader<W>& reader, const PackedX*& x,
                          const char* const (&w)[NS], int64_t& offset, int64_t) {
#pragma GCC unroll 4
    for (int pair = 0; pair < Reader<W>::PAIRS; pair++, x += MR * X_PER_PAIR) {
        multiply_pair<W, MR, NS>(c, reader, x, w, offset, pair);
    }
    offset += Reader<W>::BYTES;
}

// Copies the accumulators, so that they can stay in registers if `add_group` is not inlined.
template <int MR, int NV>
INLINE void separate_rows(const Vec (&c)[MR][NV], Vec (&sums)[MR][NV]) {
    std::memcpy(sums, c, sizeof(sums));
}
#endif
