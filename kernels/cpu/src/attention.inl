// A tile is the query rows of some tokens of one sequence that read one KV head, token by token and head by head. Every
// row walks the keys that it sees in blocks of BLOCK from position 0 with an online softmax (Dao et al. 2022,
// FlashAttention, Algorithm 1); the running softmax starts anew every SPLIT keys, and the splits' are merged in order.
// A score is a sum over lanes in one order, a value a sum over keys in ascending order. So a row's bits depend on its
// own keys alone, and splits may go to different threads.
//
// With DOT_PRODUCTS, for bf16, queries and keys are multiplied as they are and scores are scaled; without, queries are
// converted to float32 and scaled.
//
// In decode a block's heads are read in turn, for its keys lie side by side in memory with all their heads.

constexpr int ROWS = 4;                       // rows that share a key's trip to the registers
constexpr int COLUMNS = WIDTH == 16 ? 4 : 2;  // vectors of values at a time
constexpr int LONE_COLUMNS = 8;               // the same for a lone row
constexpr int64_t WIDENED_ROWS = 2 * ROWS;    // more rows than these have what they read converted once for all
constexpr int64_t SOFTMAX = 2 * WIDTH;        // floats before the values of a row's running softmax:
constexpr int64_t PEAK = 0, TOTAL = WIDTH;    // its largest score, and its sum of weights by lane

#ifdef DOT_PRODUCTS
using Query = bf16;
using Lanes = __m512bh;  // pairs of bf16, one instruction for both products

INLINE Lanes take_lanes(const bf16* p, int64_t n) {
    return (__m512bh)(n == 2 * WIDTH ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((1u << n) - 1, p));
}
INLINE Vec multiply(Lanes a, Lanes b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
#else
using Query = float;
using Lanes = Vec;

template <class K>
INLINE Lanes take_lanes(const K* p, int64_t n) {
    return take(p, n);
}
INLINE Vec multiply(Lanes a, Lanes b, Vec c) { return fma(a, b, c); }
#endif
constexpr int64_t LANES = sizeof(Lanes) / sizeof(Query);

// Scores of R rows (zeros behind `size`) with n keys, as [R, BLOCK]. `keys` has entries up to a multiple of SUMS. With
// AHEAD as much of the next block is called to the caches as is read of this: the pages of a sequence lie where they
// were free, which no processor foresees.
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
        for (int r = 0; r < R; r++) {
            for (int c = 0; c < C; c++) scores[r * BLOCK + j + c] = out[r * C + c];
        }
    }
}

// Scores [BLOCK] to weights relative to the new peak. Returns by how much all earlier weights shrink.
INLINE float soften(float* scores, int64_t n, float* softmax) {
    for (int64_t j = n; j % WIDTH; j++) scores[j] = -__builtin_inff();
    Vec top = load(scores);
    for (int64_t j = WIDTH; j < n; j += WIDTH) top = max(top, load(scores + j));
    const float old = softmax[PEAK], in_block = largest(top), peak = old > in_block ? old : in_block;
    const float shrink = old == peak ? 1.0f : exp(set(old - peak))[0];
    Vec total = load(softmax + TOTAL) * set(shrink);
    for (int64_t j = 0; j < n; j += WIDTH) {
        const Vec weight = exp(load(scores + j) - set(peak));
        store(scores + j, weight);
        total = total + weight;
    }
    store(softmax + TOTAL, total);
    softmax[PEAK] = peak;
    return shrink;
}

// Columns [z, z + C vectors) of R rows: values = values * shrink + weights @ v.
template <int R, int C, bool AHEAD, class K, class V>
INLINE void add_columns(const float* weights, const float* shrink, const KeyBlock<K, V>& block, int64_t n, int64_t z,
                        int64_t count, float* values, int64_t stride) {
    Vec total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) total[r][c] = load(values + r * stride + z + c * WIDTH) * set(shrink[r]);
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

// R rows that see the same n keys of a block.
template <int R, bool AHEAD, class K, class V>
INLINE void attend_rows(const Tile<Query>& tile, const Query* q, const KeyBlock<K, V>& block, int64_t n,
                        float* softmax) {
    constexpr int C = R == 1 ? LONE_COLUMNS : COLUMNS;
    const int64_t stride = SOFTMAX + tile.padded, size = tile.size;
    alignas(64) float scores[R * BLOCK];
    float shrink[R];
    score<R, AHEAD>(tile, q, block, n, scores);
    for (int r = 0; r < R; r++) shrink[r] = soften(scores + r * BLOCK, n, softmax + r * stride);
    int64_t z = 0;
    float* const values = softmax + SOFTMAX;
    for (; z + C * WIDTH <= size; z += C * WIDTH) {
        add_columns<R, C, AHEAD>(scores, shrink, block, n, z, WIDTH, values, stride);
    }
    for (; z < size; z += WIDTH) {
        const int64_t count = size - z < WIDTH ? size - z : WIDTH;
        add_columns<R, 1, AHEAD>(scores, shrink, block, n, z, count, values, stride);
    }
}

// One block's n keys of one head for its rows; row r sees `visible(r)` keys, of which `start` lie before the block.
template <class K, class V>
void attend_block(const Tile<Query>& tile, const Query* q, const KeyBlock<K, V>& block, int64_t start, int64_t n,
                  float* softmax) {
    const int64_t stride = SOFTMAX + tile.padded;
    const auto count = [&](int64_t row) {
        const int64_t visible = tile.visible(row) - start;
        return visible < n ? visible : n;
    };
    for (int64_t r = 0; r < tile.rows;) {
        const Query* const row = q + r * tile.padded;
        float* const own = softmax + r * stride;
        if (r + ROWS <= tile.rows && count(r) > 0 && count(r) == count(r + ROWS - 1)) {  // the count never falls
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

// Where keys and values of a block lie, from position `start` of the sequence on; behind `end` the last again.
template <class T>
void locate(const AttentionArguments<T>& a, const Tile<Query>& tile, int64_t start, int64_t end, int64_t* places) {
    for (int64_t j = 0; j < BLOCK; j++) {
        const int64_t position = start + j < end ? start + j : end - 1, page = tile.table[position / a.block_size];
        places[j] = page * a.page_stride + position % a.block_size * a.token_stride + tile.head * a.head_stride;
    }
}

// n rows converted to float32 in `memory` [BLOCK, padded], and behind them the last again.
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

// One head's block; what many rows read is converted once for all, in memory of the thread.
template <class T>
void convert_and_attend(const Tile<Query>& tile, const Query* q, const KeyBlock<T, T>& block, int64_t start, int64_t n,
                        float* softmax) {
    if (tile.rows <= WIDENED_ROWS) return attend_block(tile, q, block, start, n, softmax);
    float* const memory = (float*)scratch(3, 2 * BLOCK * tile.padded * sizeof(float));
#ifdef DOT_PRODUCTS
    KeyBlock<T, float> wide;
    std::memcpy(wide.keys, block.keys, sizeof(wide.keys));
#else
    KeyBlock<float, float> wide;
    widen(block.keys, tile, n, memory, wide.keys);
#endif
    widen(block.values, tile, n, memory + BLOCK * tile.padded, wide.values);
    wide.ahead = block.ahead;
    attend_block(tile, q, wide, start, n, softmax);
}

INLINE void clear(float* softmax, int64_t rows, int64_t stride) {
    std::memset(softmax, 0, rows * stride * sizeof(float));
    for (int64_t r = 0; r < rows; r++) softmax[r * stride + PEAK] = -__builtin_inff();
}

// Keys [begin, end) of the sequence into fresh softmaxes [heads, rows, SOFTMAX + padded], block by block and head by
// head; `last` is how many keys will be read after all.
template <class T>
void attend_split(const AttentionArguments<T>& a, const Tile<Query>& tile, int64_t begin, int64_t end, int64_t last,
                  float* softmax) {
    const int64_t stride = SOFTMAX + tile.padded;
    clear(softmax, tile.heads * tile.rows, stride);
    int64_t places[BLOCK];
    locate(a, tile, begin, end, places);
    for (int64_t start = begin; start < end; start += BLOCK) {
        const int64_t n = end - start < BLOCK ? end - start : BLOCK;
        KeyBlock<T, T> block;
        for (int64_t j = 0; j < BLOCK; j++) block.keys[j] = a.k + places[j], block.values[j] = a.v + places[j];
        const char* rows[2 * BLOCK];
        if (start + BLOCK < last) locate(a, tile, start + BLOCK, last, places);
        for (int64_t j = 0; j < 2 * BLOCK; j++) {  // in the order of memory, for pages of PAGE keys
            const int64_t place = places[j / (2 * PAGE) * PAGE + j % PAGE];
            rows[j] = (const char*)((j / PAGE % 2 ? a.v : a.k) + place);
        }
        const int64_t row_bytes = (tile.heads - 1) * a.head_stride * sizeof(T) + a.size * sizeof(T);
        Ahead ahead{rows, rows + 2 * BLOCK - 1, row_bytes, rows[0], sizeof(T)};
        block.ahead = &ahead;
        for (int64_t head = 0; head < tile.heads; head++) {
            const int64_t row = head * tile.rows;
            convert_and_attend(tile, tile.q + row * tile.padded, block, start, n, softmax + row * stride);
            for (int64_t j = 0; j < BLOCK; j++) block.keys[j] += a.head_stride, block.values[j] += a.head_stride;
        }
    }
}

// One row's softmax over a split, added to that over the splits before it.
INLINE void merge(const float* from, float* into, int64_t padded) {
    const float a = into[PEAK], b = from[PEAK], peak = a > b ? a : b;
    const Vec old = exp(set(a - peak)), fresh = exp(set(b - peak));
    into[PEAK] = peak;
    for (int64_t i = TOTAL; i < SOFTMAX + padded; i += WIDTH) {
        store(into + i, fma(load(from + i), fresh, load(into + i) * old));
    }
}

template <class T>
INLINE void finish(const float* softmax, T* out, int64_t size) {
    const Vec total = set(sum(load(softmax + TOTAL)));
    for (int64_t z = 0; z < size; z += WIDTH) {
        put(out + z, load(softmax + SOFTMAX + z) / total, size - z < WIDTH ? size - z : WIDTH);
    }
}

INLINE int64_t whole_vectors(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

template <class T>
INLINE void copy_query(const AttentionArguments<T>& a, const T* q, Query* out) {
#ifdef DOT_PRODUCTS
    const int64_t padded = whole_vectors(a.size);
    std::memset(out, 0, padded * sizeof(T));
    std::memcpy(out, q, a.size * sizeof(T));
#else
    for (int64_t z = 0; z < a.size; z += WIDTH) {
        store(out + z, take(q + z, a.size - z < WIDTH ? a.size - z : WIDTH) * set(a.scale));
    }
#endif
}

// The queries of `tokens` tokens from row `row` of the batch on that read `heads` KV heads from `head` on, in `memory`.
template <class T>
Tile<Query> make_tile(const AttentionArguments<T>& a, int64_t sequence, int64_t head, int64_t heads, int64_t row,
                      int64_t tokens, int64_t first_visible, Query* memory) {
    const int64_t group = a.heads / a.kv_heads, padded = whole_vectors(a.size), rows = tokens * group;
    for (int64_t h = 0; h < heads; h++) {
        for (int64_t r = 0; r < rows; r++) {
            const T* const q = a.q + (row + r / group) * a.q_stride + ((head + h) * group + r % group) * a.size;
            copy_query(a, q, memory + (h * rows + r) * padded);
        }
    }
    return {memory, heads, rows, group, padded, a.size, a.scale, a.tables + sequence * a.table_stride, head,
            first_visible};
}

// Some tokens of a sequence, the first of which sees `first_visible` keys, with some KV heads, all splits in turn.
template <class T>
void attend_tile(const AttentionArguments<T>& a, int64_t sequence, int64_t head, int64_t heads, int64_t row,
                 int64_t tokens, int64_t first_visible) {
    const int64_t group = a.heads / a.kv_heads, padded = whole_vectors(a.size), stride = SOFTMAX + padded;
    const int64_t all = heads * tokens * group;
    float* const memory = (float*)scratch(0, all * (padded + WIDTH + 2 * stride) * sizeof(float));
    float *const split = memory + all * padded, *const whole = split + all * stride;
    const Tile<Query> tile = make_tile(a, sequence, head, heads, row, tokens, first_visible, (Query*)memory);
    const int64_t last = first_visible + tokens - 1;
    clear(whole, all, stride);
    for (int64_t begin = 0; begin < last; begin += SPLIT) {
        attend_split(a, tile, begin, begin + SPLIT < last ? begin + SPLIT : last, last, split);
        for (int64_t r = 0; r < all; r++) {
            if (tile.visible(r % tile.rows) > begin) merge(split + r * stride, whole + r * stride, padded);
        }
    }
    for (int64_t r = 0; r < all; r++) {
        const int64_t token = row + r % tile.rows / group, query_head = (head + r / tile.rows) * group + r % group;
        finish(whole + r * stride, a.out + (token * a.heads + query_head) * a.size, a.size);
    }
}

// Tiles of the whole batch, `heads` KV heads at a time. `first_tile` [sequences + 1] counts those of the sequences
// before each.
template <class T>
void attend_all(const AttentionArguments<T>& a, const int64_t* first_tile, int64_t tile_tokens, int64_t heads) {
    const int64_t parts = a.kv_heads / heads;
    parallel_for(first_tile[a.sequences] * parts, 1, [&](int64_t item, int64_t end) {
        for (int64_t sequence = 0; item < end; item++) {
            const int64_t tile = item / parts, head = item % parts * heads;
            while (first_tile[sequence + 1] <= tile) sequence++;
            const int64_t begin = a.first_row(sequence), rows = a.first_row(sequence + 1) - begin;
            const int64_t token = (tile - first_tile[sequence]) * tile_tokens;
            const int64_t tokens = rows - token < tile_tokens ? rows - token : tile_tokens;
            attend_tile(a, sequence, head, heads, begin + token, tokens, a.context_lens[sequence] - rows + token + 1);
        }
    });
}

// One row of each sequence, whose splits go to all threads, `run` of them and `heads` KV heads at a time: first every
// split's softmax, then their merger.
template <class T>
void attend_splits(const AttentionArguments<T>& a, int64_t splits, int64_t run, int64_t heads) {
    const int64_t group = a.heads / a.kv_heads, padded = whole_vectors(a.size), stride = SOFTMAX + padded;
    const int64_t parts = a.kv_heads / heads, rows = heads * group, runs = (splits + run - 1) / run;
    float* const all = (float*)scratch(1, a.sequences * a.heads * splits * stride * sizeof(float));
    parallel_for(a.sequences * parts * runs, 1, [&](int64_t item, int64_t end) {
        Query* const memory = (Query*)scratch(0, rows * padded * sizeof(Query));
        for (; item < end; item++) {
            const int64_t part = item / runs, sequence = part / parts, context = a.context_lens[sequence];
            const int64_t first = item % runs * run, end_of_run = (first + run) * SPLIT;
            const int64_t last = end_of_run < context ? end_of_run : context, head = part % parts * heads;
            const Tile<Query> tile = make_tile(a, sequence, head, heads, sequence, 1, context, memory);
            float* softmax = all + (part * splits + first) * rows * stride;
            for (int64_t begin = first * SPLIT; begin < last; begin += SPLIT, softmax += rows * stride) {
                attend_split(a, tile, begin, begin + SPLIT < last ? begin + SPLIT : last, last, softmax);
            }
        }
    });
    parallel_for(a.sequences * parts, 1, [&](int64_t part, int64_t end) {
        float* const whole = (float*)scratch(0, stride * sizeof(float));
        for (; part < end; part++) {
            const int64_t sequence = part / parts, context = a.context_lens[sequence];
            for (int64_t r = 0; r < rows; r++) {
                clear(whole, 1, stride);
                for (int64_t i = 0; i * SPLIT < context; i++) {
                    merge(all + ((part * splits + i) * rows + r) * stride, whole, padded);
                }
                finish(whole, a.out + (sequence * a.heads + part % parts * rows + r) * a.size, a.size);
            }
        }
    });
}
