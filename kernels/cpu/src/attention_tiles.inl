// This file updates running softmaxes with a block of keys by means of the matrix tiles of `amx_tiles.inl`. Queries, keys,
// softmax weights and values are multiplied in bf16, so the softmax weights are rounded to bf16 before they multiply the
// values; their sum is not rounded.
//
// A matrix tile of keys has 16 keys as its columns and 16 pairs of neighbouring elements as its rows. A matrix tile of
// values has 16 elements as its columns and 16 pairs of neighbouring keys as its rows. Both are made once for all query
// rows. Every score, and every weighted sum, is one element of a matrix tile, which adds its products in the same order
// for any number of query rows. A key that a query row does not attend to has a softmax weight of zero, which changes no
// sum if the value is finite. If it is not, each query row gets tiles of the values that it attends to. The next block is
// prefetched into the L2 cache, because its tiles are made from there.
using Query = bf16;
constexpr int64_t LANES = 32;                  // Rows of queries are filled with zeros to a multiple of LANES elements.
constexpr int64_t GROUP_ROWS = 2 * TILE_ROWS;  // the number of query rows that are multiplied together
constexpr int64_t GROUP_COLUMNS = 32;          // the number of columns of two neighbouring matrix tiles
constexpr int64_t STEP = 32;                   // the number of elements, or of keys, that a product of matrix tiles adds up
constexpr int64_t MATRIX = TILE_ROWS * TILE_BYTES;  // bytes of a matrix tile

// The struct `Columns` is the right-hand side of a product: two neighbouring matrix tiles for each step.
struct Columns {
    const char* first;  // the first of the two tiles of the first step
    int64_t second;     // the number of bytes from the first to the second tile
    int64_t step;       // the number of bytes from one step to the next
};

// Adds to `sums` the products of `rows` rows, at most GROUP_ROWS, with 32 columns. The rows of x are `x_stride` elements
// apart, and the rows of `sums` are `stride` floats apart. If `is_first`, the sums begin with zeros. If AHEAD is true, each
// step prefetches some of the next block of keys and values.
template <bool AHEAD>
INLINE void add_products(TileSet& set, int64_t rows, const bf16* x, int64_t x_stride, const Columns& columns, int64_t steps,
                         bool is_first, float* sums, int64_t stride, Ahead* ahead) {
    const bool two = rows > TILE_ROWS;
    float* const below = sums + TILE_ROWS * stride;
    const char* y = columns.first;
    if (is_first) {
        TILE_ZERO(set, 0);
        TILE_ZERO(set, 1);
        if (two) {
            TILE_ZERO(set, 2);
            TILE_ZERO(set, 3);
        }
    } else {
        TILE_LOAD(set, 0, sums, stride * 4);
        TILE_LOAD(set, 1, sums + 16, stride * 4);
        if (two) {
            TILE_LOAD(set, 2, below, stride * 4);
            TILE_LOAD(set, 3, below + 16, stride * 4);
        }
    }
    for (int64_t i = 0; i < steps; i++, x += STEP, y += columns.step) {
        TILE_LOAD(set, 6, y, TILE_BYTES);
        TILE_LOAD(set, 4, x, x_stride * 2);
        TILE_LOAD(set, 7, y + columns.second, TILE_BYTES);
        if (AHEAD) ahead->call<false>(8 * STEP);
        TILE_PRODUCT(set, 0, 4, 6);
        if (two) TILE_LOAD(set, 5, x + TILE_ROWS * x_stride, x_stride * 2);
        TILE_PRODUCT(set, 1, 4, 7);
        if (two) {
            TILE_PRODUCT(set, 2, 5, 6);
            TILE_PRODUCT(set, 3, 5, 7);
        }
    }
    TILE_STORE(set, 0, sums, stride * 4);
    TILE_STORE(set, 1, sums + 16, stride * 4);
    if (two) {
        TILE_STORE(set, 2, below, stride * 4);
        TILE_STORE(set, 3, below + 16, stride * 4);
    }
}

// Writes one matrix tile with the elements z to z + 31 of 16 keys. The elements after the last one are zeros.
INLINE void make_key_tile(const bf16* const* keys, int64_t size, int64_t z, char* out) {
    const int64_t count = size - z < STEP ? size - z : STEP;
#ifdef LEVEL_AMX
    alignas(64) float rows[TILE_ROWS * 16];
    const auto mask = __mmask32((uint64_t(1) << count) - 1);
    for (int64_t i = 0; i < 16; i++) _mm512_store_si512(rows + 16 * i, _mm512_maskz_loadu_epi16(mask, keys[i] + z));
    transpose16(rows, (float*)out);
#else
    auto* const to = (bf16*)out;
    for (int64_t e = 0; e < STEP; e++) {
        for (int64_t i = 0; i < 16; i++) to[(e / 2 * 16 + i) * 2 + e % 2] = e < count ? keys[i][z + e] : bf16{0};
    }
#endif
}

// Writes one row of two neighbouring matrix tiles, with the elements z to z + 31 of two neighbouring values. The elements
// after the last one are zeros. `second` is null if there is no second value, which then counts as zero.
INLINE void make_value_rows(const bf16* first, const bf16* second, int64_t size, int64_t z, char* out) {
    const int64_t count = size - z < STEP ? size - z : STEP;
#ifdef LEVEL_AMX
    const auto mask = __mmask32((uint64_t(1) << count) - 1);
    const __m512i a = _mm512_maskz_loadu_epi16(mask, first + z);
    const __m512i b = second ? _mm512_maskz_loadu_epi16(mask, second + z) : _mm512_setzero_si512();
    // The first vector has the pairs of the elements 0 to 3 of each 128-bit part, and the second one those of 4 to 7.
    const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    const __m512i left = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), right = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_store_si512(out, _mm512_permutex2var_epi64(low, left, high));
    _mm512_store_si512(out + MATRIX, _mm512_permutex2var_epi64(low, right, high));
#else
    for (int64_t c = 0; c < STEP; c++) {
        auto* const to = (bf16*)(out + c / 16 * MATRIX) + 2 * (c % 16);
        to[0] = c < count ? first[z + c] : bf16{0};
        to[1] = c < count && second ? second[z + c] : bf16{0};
    }
#endif
}

// Writes the matrix tiles of the first n keys of a block to `out`: [BLOCK / 16, padded / STEP, MATRIX]. The last tiles
// repeat the last key. Prefetches three eighths of the next block.
INLINE void make_key_tiles(const Tile<Query>& tile, const KeyBlock<bf16, bf16>& block, int64_t n, char* out) {
    for (int64_t j = 0; j < round_up(n, GROUP_COLUMNS); j += 16) {
        for (int64_t z = 0; z < tile.padded; z += STEP, out += MATRIX) {
            block.ahead->call<false>(12 * STEP);
            make_key_tile(block.keys + j, tile.size, z, out);
        }
    }
}

// Writes the matrix tiles of the first n values of a block to `out`: [BLOCK / STEP, padded / 16, MATRIX]. The values after
// the last one are zeros. Prefetches three eighths of the next block.
INLINE void make_value_tiles(const Tile<Query>& tile, const KeyBlock<bf16, bf16>& block, int64_t n, char* out) {
    const int64_t tiles = tile.padded / 16;
    for (int64_t j = 0; j < round_up(n, STEP); j += 2) {
        char* row = out + j / STEP * tiles * MATRIX + j % STEP / 2 * TILE_BYTES;
        block.ahead->call<false>(tile.size + tile.size / 2);
        for (int64_t z = 0; z < tile.padded; z += STEP, row += 2 * MATRIX) {
            if (j < n) {
                make_value_rows(block.values[j], j + 1 < n ? block.values[j + 1] : nullptr, tile.size, z, row);
            } else {
                std::memset(row, 0, TILE_BYTES);
                std::memset(row + MATRIX, 0, TILE_BYTES);
            }
        }
    }
}

// Replaces N vectors of differences x <= 0 by e^x.
template <int N>
INLINE void exp_below_zero(Vec* x) {
    for (int i = 0; i < N; i++) x[i] = x[i] * set(1.44269504f);  // e^x is 2^(x / ln 2)
    exp2_below_one<N>(x, x);
}

// Computes the softmax weights of one query row for the first `count` keys of a block, with zeros for the other keys up to
// `width`. Updates the row's running softmax: the maximum, the sum of the weights, and the weighted sum of the earlier
// values, which is multiplied by the factor that the new maximum requires. If WHOLE is true, `count` must be BLOCK.
template <bool WHOLE>
INLINE void weigh(const float* products, int64_t count, int64_t width, float scale, int64_t padded, float* softmax,
                  bf16* weights) {
    constexpr int64_t VECTORS = BLOCK / WIDTH;
    static constexpr float LANE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const int64_t vectors = WHOLE ? VECTORS : (count + WIDTH - 1) / WIDTH;
    Vec scores[VECTORS], top = set(-__builtin_inff()), sum = load(softmax + WEIGHT_SUM);
    for (int64_t v = 0; v < vectors; v++) scores[v] = load(products + v * WIDTH) * set(scale);
    if (!WHOLE) {  // The lanes after the last key get a weight of zero.
        const float left = float(count - (vectors - 1) * WIDTH);
        scores[vectors - 1] = where_greater(set(left), load(LANE), scores[vectors - 1], set(-__builtin_inff()));
    }
    for (int64_t v = 0; v < vectors; v++) top = max(top, scores[v]);
    const float old = softmax[MAXIMUM], in_block = largest(top), maximum = old > in_block ? old : in_block;
    softmax[MAXIMUM] = maximum;
    if (old != maximum && old != -__builtin_inff()) {
        Vec rescale = set(old - maximum);
        exp_below_zero<1>(&rescale);
        sum = sum * rescale;
        for (int64_t z = 0; z < padded; z += WIDTH) store(softmax + SOFTMAX + z, load(softmax + SOFTMAX + z) * rescale);
    }
    for (int64_t v = 0; v < vectors; v++) scores[v] = scores[v] - set(maximum);
    if (WHOLE) {
        for (int64_t v = 0; v < VECTORS; v += 4) exp_below_zero<4>(scores + v);
    } else {
        for (int64_t v = 0; v < vectors; v++) exp_below_zero<1>(scores + v);
    }
    for (int64_t v = 0; v < vectors; v++) {
        sum = sum + scores[v];
#ifdef LEVEL_AMX
        // This instruction rounds subnormal numbers to zero, as which matrix tiles count them anyway.
        _mm256_storeu_si256((__m256i*)(weights + v * WIDTH), (__m256i)_mm512_cvtneps_pbh(scores[v]));
#else
        store(weights + v * WIDTH, scores[v]);
#endif
    }
    if (!WHOLE) std::memset(weights + vectors * WIDTH, 0, (width - vectors * WIDTH) * sizeof(bf16));
    store(softmax + WEIGHT_SUM, sum);
}

// Updates the running softmaxes of `rows` query rows, at most GROUP_ROWS, from query row `first` on, with the matrix tiles
// of a block of n keys. `start` is the position of the block's first key in the sequence. `memory` has room for the scores and
// the softmax weights of the query rows. If AHEAD is true, the products prefetch a quarter of the next block.
template <bool AHEAD>
INLINE void attend_group(TileSet& set, const Tile<Query>& tile, const Query* q, int64_t first, int64_t rows,
                         const char* keys, const char* values, int64_t start, int64_t n, float* memory, float* softmax,
                         Ahead* ahead) {
    const int64_t stride = SOFTMAX + tile.padded, key_steps = tile.padded / STEP, value_tiles = tile.padded / 16;
    const int64_t seen = tile.visible(first + rows - 1) - start;
    if (seen <= 0) return;
    const int64_t width = round_up(seen < n ? seen : n, STEP);
    auto* const weights = (bf16*)(memory + GROUP_ROWS * BLOCK);
    const Query* const x = q + first * tile.padded;
    float* const own = softmax + first * stride;
    TILE_INPUTS_WRITTEN();
    set.configure(rows);
    for (int64_t j = 0; j < width; j += GROUP_COLUMNS) {
        const Columns columns{keys + j / 16 * key_steps * MATRIX, key_steps * MATRIX, MATRIX};
        add_products<AHEAD>(set, rows, x, tile.padded, columns, key_steps, true, memory + j, BLOCK, ahead);
    }
    TILE_INPUTS_WRITTEN();
    for (int64_t r = 0; r < rows; r++) {
        const int64_t visible = tile.visible(first + r) - start, count = visible < n ? visible : n;
        const float* const products = memory + r * BLOCK;
        bf16* const row = weights + r * BLOCK;
        if (count == BLOCK) weigh<true>(products, count, width, tile.scale, tile.padded, own + r * stride, row);
        else if (count > 0) weigh<false>(products, count, width, tile.scale, tile.padded, own + r * stride, row);
        else std::memset(row, 0, width * sizeof(bf16));
    }
    TILE_INPUTS_WRITTEN();
    for (int64_t z = 0; z < tile.padded; z += GROUP_COLUMNS) {
        const Columns columns{values + z / 16 * MATRIX, MATRIX, value_tiles * MATRIX};
        const bool is_first = start % SPLIT == 0;  // Before the first block of a split, the weighted sums are zeros.
        float* const sums = own + SOFTMAX + z;
        add_products<AHEAD>(set, rows, weights, BLOCK, columns, width / STEP, is_first, sums, stride, ahead);
    }
    TILE_INPUTS_WRITTEN();
}

// Returns whether no element of the first n values of a block is infinite or NaN.
INLINE bool has_finite_values(const Tile<Query>& tile, const KeyBlock<bf16, bf16>& block, int64_t n) {
    uint16_t largest = 0;
    for (int64_t j = 0; j < n; j++) {
        for (int64_t z = 0; z < tile.size; z++) {
            const uint16_t magnitude = block.values[j][z].bits & 0x7fff;
            largest = magnitude > largest ? magnitude : largest;
        }
    }
    return largest < 0x7f80;
}

// Updates the running softmaxes of a tile's query rows with one block of keys and values of one KV head.
inline void attend_block(const Tile<Query>& tile, const Query* q, const KeyBlock<bf16, bf16>& block, int64_t start,
                         int64_t n, float* softmax) {
    const int64_t bytes = BLOCK * tile.padded * sizeof(bf16);
    auto* const keys = (char*)scratch(3, 2 * bytes + GROUP_ROWS * BLOCK * (sizeof(float) + sizeof(bf16)));
    char* const values = keys + bytes;
    auto* const memory = (float*)(values + bytes);
    const bool see_all = tile.visible(0) - start >= n, together = see_all || has_finite_values(tile, block, n);
    make_key_tiles(tile, block, n, keys);
    TileSet set;
    if (together) {
        make_value_tiles(tile, block, n, values);
        for (int64_t r = 0; r < tile.rows; r += GROUP_ROWS) {
            const int64_t left = tile.rows - r, rows = left < GROUP_ROWS ? left : GROUP_ROWS;
            if (r == 0) attend_group<true>(set, tile, q, r, rows, keys, values, start, n, memory, softmax, block.ahead);
            else attend_group<false>(set, tile, q, r, rows, keys, values, start, n, memory, softmax, nullptr);
        }
        return;
    }
    for (int64_t r = 0; r < tile.rows; r++) {
        const int64_t visible = tile.visible(r) - start, count = visible < n ? visible : n;
        if (count <= 0) continue;
        make_value_tiles(tile, block, count, values);
        attend_group<false>(set, tile, q, r, 1, keys, values, start, count, memory, softmax, nullptr);
    }
}
