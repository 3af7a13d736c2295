// This file updates running softmaxes with a block of keys in vectors: each key is multiplied by a few query rows at a
// time, and each of these query rows by the values.

constexpr int ROWS = 4;  // When a key is in registers, the key is multiplied by ROWS query rows.
// For ROWS query rows at once, the weighted sum of the values is computed for COLUMNS vectors of WIDTH columns at a
// time.
constexpr int COLUMNS = WIDTH == 16 ? 4 : 2;
// For a single query row, the weighted sum of the values is computed for LONE_COLUMNS vectors of WIDTH columns at a
// time.
constexpr int LONE_COLUMNS = 8;
// If a tile has more than WIDENED_ROWS query rows, keys and values are converted to float32 once for the whole tile. With
// DOT_PRODUCTS, the keys stay in bf16 and are transposed.
constexpr int64_t WIDENED_ROWS = 2 * ROWS;
// Two neighbouring elements of a key, in the layout of the function `pair_keys`.
struct Pair {
    bf16 first, second;
};

#ifdef DOT_PRODUCTS
using Query = bf16;
// Each lane of a vector has two neighbouring bf16 elements of a row. In each lane, the instruction VDPBF16PS multiplies
// the two elements of a query by the two elements of a key, and adds both products to a float32 sum.
using Lanes = __m512bh;
constexpr int64_t LANES = sizeof(Lanes) / sizeof(Query);

INLINE Lanes take_lanes(const bf16* p, int64_t n) {
    return (__m512bh)(n == 2 * WIDTH ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
}
INLINE Vec multiply(Lanes a, Lanes b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }

// Writes the n keys of a block to `out`: [BLOCK / WIDTH, padded / 2, WIDTH]. A vector has the same two elements of WIDTH
// keys, one key in each lane. The entries after the last key repeat it.
INLINE void pair_keys(const bf16* const* keys, const Tile<Query>& tile, int64_t n, float* out) {
    for (int64_t j = 0; j < n; j += WIDTH) {
        for (int64_t z = 0; z < tile.size; z += LANES, out += WIDTH * WIDTH) {
            alignas(64) float rows[WIDTH * WIDTH];
            const int64_t count = tile.size - z < LANES ? tile.size - z : LANES;
            for (int64_t i = 0; i < WIDTH; i++) {
                _mm512_store_si512(rows + i * WIDTH, (__m512i)take_lanes(keys[j + i < n ? j + i : n - 1] + z, count));
            }
            transpose16(rows, out);
        }
    }
}

// Returns in `total` what lane i of the sums of the function `score` is for R query rows and WIDTH keys, which
// `pair_keys` has written.
template <int R, bool AHEAD>
INLINE void lane_of_sums(const Tile<Query>& tile, const Query* q, const float* keys, Ahead* ahead, int64_t i,
                         Vec* total) {
    if (AHEAD) ahead->call(tile.padded);
    for (int r = 0; r < R; r++) total[r] = set(0);
    for (int64_t z = i; z < tile.padded / 2; z += WIDTH) {
        const Lanes key = (Lanes)_mm512_loadu_si512(keys + z * WIDTH);
        for (int r = 0; r < R; r++) {
            int32_t pair;
            std::memcpy(&pair, q + r * tile.padded + 2 * z, sizeof(pair));
            total[r] = multiply((Lanes)_mm512_set1_epi32(pair), key, total[r]);
        }
    }
}

// Returns in `total` the sums of the lanes i to i + 3, in the order in which the function `sums16` adds them.
template <int R, bool AHEAD>
INLINE void part_of_sums(const Tile<Query>& tile, const Query* q, const float* keys, Ahead* ahead, int64_t i,
                         Vec* total) {
    Vec other[R], odd[R];
    lane_of_sums<R, AHEAD>(tile, q, keys, ahead, i, total);
    lane_of_sums<R, AHEAD>(tile, q, keys, ahead, i + 2, other);
    for (int r = 0; r < R; r++) total[r] = total[r] + other[r];
    lane_of_sums<R, AHEAD>(tile, q, keys, ahead, i + 1, odd);
    lane_of_sums<R, AHEAD>(tile, q, keys, ahead, i + 3, other);
    for (int r = 0; r < R; r++) total[r] = total[r] + (odd[r] + other[r]);
}

// Computes for R query rows the scores of the first n keys of a block, which `pair_keys` has written. The scores have
// the same bits as those of the function `score`. Here nothing has to move from one lane to another.
template <int R, bool AHEAD, class V>
INLINE void score_pairs(const Tile<Query>& tile, const Query* q, const KeyBlock<Pair, V>& block, int64_t n,
                        float* scores) {
    const float* keys = (const float*)block.keys[0];
    for (int64_t j = 0; j < n; j += WIDTH, keys += tile.padded / 2 * WIDTH) {
        Vec total[R], other[R], upper[R];
        part_of_sums<R, AHEAD>(tile, q, keys, block.ahead, 0, total);
        part_of_sums<R, AHEAD>(tile, q, keys, block.ahead, 4, other);
        for (int r = 0; r < R; r++) total[r] = total[r] + other[r];
        part_of_sums<R, AHEAD>(tile, q, keys, block.ahead, 8, upper);
        part_of_sums<R, AHEAD>(tile, q, keys, block.ahead, 12, other);
        for (int r = 0; r < R; r++) {
            store(scores + r * BLOCK + j, (total[r] + (upper[r] + other[r])) * set(tile.scale));
        }
    }
}
#else
using Query = float;
using Lanes = Vec;
constexpr int64_t LANES = sizeof(Lanes) / sizeof(Query);

template <class K>
INLINE Lanes take_lanes(const K* p, int64_t n) {
    return take(p, n);
}
INLINE Vec multiply(Lanes a, Lanes b, Vec c) { return fma(a, b, c); }
#endif
// Computes scores: [R, BLOCK], the dot products of R query rows with the first n keys of a block. Each query row has
// zeros after its `size` elements. The address block.keys[j] must be valid for every j below n rounded up to a multiple
// of SUMS. If AHEAD is true, the next block of keys and values is prefetched, at the speed at which the current block
// is read. The processor's own prefetcher cannot predict the addresses of the next block, because the pages of a
// sequence are scattered in memory.
template <int R, bool AHEAD, class K, class V>
INLINE void score(const Tile<Query>& tile, const Query* q, const KeyBlock<K, V>& block, int64_t n, float* scores) {
    constexpr int C = SUMS / R;
    for (int64_t j = 0; j < n; j += C) {
        Vec total[SUMS];
        for (int i = 0; i < SUMS; i++) total[i] = set(0);
        for (int64_t z = 0; z < tile.size; z += LANES) {
            if (AHEAD) block.ahead->call(C * LANES);
            const int64_t count = tile.size - z < LANES ? tile.size - z : LANES;
            Lanes rows[R];
            for (int r = 0; r < R; r++) rows[r] = take_lanes(q + r * tile.padded + z, LANES);
            for (int c = 0; c < C; c++) {
                const Lanes key = take_lanes(block.keys[j + c] + z, count);
                for (int r = 0; r < R; r++) total[r * C + c] = multiply(rows[r], key, total[r * C + c]);
            }
        }
        alignas(64) float out[SUMS];
        sums(total, out);
#ifdef DOT_PRODUCTS
        store(out, load(out) * set(tile.scale));
#endif
        for (int r = 0; r < R; r++) std::memcpy(scores + r * BLOCK + j, out + r * C, C * sizeof(float));
    }
}

// Replaces the scores of one query row for the first n keys of a block by the softmax weights exp(score - maximum). The
// maximum is the query row's largest score in this block and in all earlier blocks. Updates the maximum and the sum of
// the softmax weights in the row's running softmax. Returns the factor by which the weighted sum of the earlier blocks'
// values must be multiplied.
INLINE float update_softmax(float* scores, int64_t n, float* softmax) {
    for (int64_t j = n; j % WIDTH; j++) scores[j] = -__builtin_inff();
    Vec top = load(scores);
    for (int64_t j = WIDTH; j < n; j += WIDTH) top = max(top, load(scores + j));
    const float old = softmax[MAXIMUM], in_block = largest(top), maximum = old > in_block ? old : in_block;
    const float rescale = old == maximum ? 1.0f : exp(set(old - maximum))[0];
    Vec weight_sum = load(softmax + WEIGHT_SUM) * set(rescale);
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Vec weight = exp(load(scores + j) - set(maximum));
        store(scores + j, weight);
        weight_sum = weight_sum + weight;
    }
    store(softmax + WEIGHT_SUM, weight_sum);
    softmax[MAXIMUM] = maximum;
    return rescale;
}

// Updates the weighted sums of the values for R query rows: values = values * rescale + weights @ v. The matrix v has
// the first n value rows of the block. Only the columns z to z + C * WIDTH - 1 are updated.
template <int R, int C, bool AHEAD, class K, class V>
INLINE void add_columns(const float* weights, const float* rescale, const KeyBlock<K, V>& block, int64_t n, int64_t z,
                        int64_t count, float* values, int64_t stride) {
    Vec total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) total[r][c] = load(values + r * stride + z + c * WIDTH) * set(rescale[r]);
    }
    for (int64_t j = 0; j < n; j++) {
        if (AHEAD) block.ahead->call(C * WIDTH);
        Vec value[C];
        for (int c = 0; c < C; c++) value[c] = take(block.values[j] + z + c * WIDTH, count);
        for (int r = 0; r < R; r++) {
            const Vec weight = set(weights[r * BLOCK + j]);
            for (int c = 0; c < C; c++) total[r][c] = fma(weight, value[c], total[r][c]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) store(values + r * stride + z + c * WIDTH, total[r][c]);
    }
}

// Updates the running softmaxes of R query rows with the first n keys and values of a block. All R query rows must
// attend to these n keys.
template <int R, bool AHEAD, class K, class V>
INLINE void attend_rows(const Tile<Query>& tile, const Query* q, const KeyBlock<K, V>& block, int64_t n,
                        float* softmax) {
    constexpr int C = R == 1 ? LONE_COLUMNS : COLUMNS;
    const int64_t stride = SOFTMAX + tile.padded, size = tile.size;
    alignas(64) float scores[R * BLOCK];
    float rescale[R];
#ifdef DOT_PRODUCTS
    if constexpr (std::is_same_v<K, Pair>) score_pairs<R, AHEAD>(tile, q, block, n, scores);
    else score<R, AHEAD>(tile, q, block, n, scores);
#else
    score<R, AHEAD>(tile, q, block, n, scores);
#endif
    for (int r = 0; r < R; r++) rescale[r] = update_softmax(scores + r * BLOCK, n, softmax + r * stride);
    int64_t z = 0;
    float* const values = softmax + SOFTMAX;
    for (; z + C * WIDTH <= size; z += C * WIDTH) {
        add_columns<R, C, AHEAD>(scores, rescale, block, n, z, WIDTH, values, stride);
    }
    for (; z < size; z += WIDTH) {
        const int64_t count = size - z < WIDTH ? size - z : WIDTH;
        add_columns<R, 1, AHEAD>(scores, rescale, block, n, z, count, values, stride);
    }
}

// Updates the running softmaxes of a tile's query rows with the n keys and values of one block of one KV head. `start`
// is the position of the block's first key in the sequence. Query row r attends to the first `tile.visible(r)` keys of
// the sequence.
template <class K, class V>
void attend_block_of(const Tile<Query>& tile, const Query* q, const KeyBlock<K, V>& block, int64_t start, int64_t n,
                  float* softmax) {
    const int64_t stride = SOFTMAX + tile.padded;
    const auto count = [&](int64_t row) {
        const int64_t visible = tile.visible(row) - start;
        return visible < n ? visible : n;
    };
    for (int64_t r = 0; r < tile.rows;) {
        const Query* const row = q + r * tile.padded;
        float* const own = softmax + r * stride;
        // A query row attends to at least as many keys as the query rows before it. So if the first and the last of
        // ROWS consecutive query rows attend to the same number of keys, all ROWS query rows attend to this number of
        // keys.
        if (r + ROWS <= tile.rows && count(r) > 0 && count(r) == count(r + ROWS - 1)) {
            if (r == 0) attend_rows<ROWS, true>(tile, row, block, count(r), own);
            else attend_rows<ROWS, false>(tile, row, block, count(r), own);
            r += ROWS;
        } else {
            if (r == 0 && count(r) > 0) attend_rows<1, true>(tile, row, block, count(r), own);
            else if (count(r) > 0) attend_rows<1, false>(tile, row, block, count(r), own);
            r++;
        }
    }
}

// Converts n key rows or n value rows to float32 in `memory`: [BLOCK, padded]. Stores the addresses of the converted
// rows in `wide`. The entries of `wide` after the first n repeat the address of the last converted row.
template <class T>
INLINE void widen(const T* const* rows, const Tile<Query>& tile, int64_t n, float* memory, const float** wide) {
    for (int64_t j = 0; j < BLOCK; j++) {
        float* const row = memory + (j < n ? j : n - 1) * tile.padded;
        wide[j] = row;
        for (int64_t z = 0; j < n && z < tile.size; z += WIDTH) {
            store(row + z, take(rows[j] + z, tile.size - z < WIDTH ? tile.size - z : WIDTH));
        }
    }
}

// Updates the running softmaxes of a tile's query rows with one block of keys and values of one KV head. If the tile
// has more than WIDENED_ROWS query rows, the values are first converted to float32 in the thread's scratch memory, once
// for all query rows. Without DOT_PRODUCTS, the keys are converted in the same way; with it, they are transposed.
template <class T>
void attend_block(const Tile<Query>& tile, const Query* q, const KeyBlock<T, T>& block, int64_t start, int64_t n,
                        float* softmax) {
    if (tile.rows <= WIDENED_ROWS) return attend_block_of(tile, q, block, start, n, softmax);
    float* const memory = (float*)scratch(3, 2 * BLOCK * tile.padded * sizeof(float));
#ifdef DOT_PRODUCTS
    KeyBlock<Pair, float> wide;
    pair_keys(block.keys, tile, n, memory);
    wide.keys[0] = (const Pair*)memory;
#else
    KeyBlock<float, float> wide;
    widen(block.keys, tile, n, memory, wide.keys);
#endif
    widen(block.values, tile, n, memory + BLOCK * tile.padded, wide.values);
    wide.ahead = block.ahead;
    attend_block_of(tile, q, wide, start, n, softmax);
}

