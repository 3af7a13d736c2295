// A tile is the query rows of some tokens of one sequence that read one KV head, token by token and head by head. Every
// row walks the keys that it sees in blocks of BLOCK from position 0 with an online softmax (Dao et al. 2022,
// FlashAttention, Algorithm 1); the running softmax starts anew every SPLIT keys, and the splits' are merged in order.
// A score is a sum over lanes in one order, a value a sum over keys in ascending order. So a row's bits depend on its
// own keys alone, and splits may go to different threads.

constexpr int ROWS = 4;                       // rows that share a key's trip to the registers
constexpr int COLUMNS = WIDTH == 16 ? 4 : 2;  // vectors of values at a time
constexpr int LONE_COLUMNS = 8;               // the same for a lone row
constexpr int64_t SOFTMAX = 2 * WIDTH;        // floats before the values of a row's running softmax:
constexpr int64_t PEAK = 0, TOTAL = WIDTH;    // its largest score, and its sum of weights by lane

// Brings a row of `size` elements to the first cache. The pages of a sequence lie where they were free, which no
// processor foresees: while the scores of a block are made, its values come, and meanwhile the keys of the next.
template <class K>
INLINE void prefetch(const K* row, int64_t size) {
    for (int64_t z = 0; z < size; z += 64 / sizeof(K)) __builtin_prefetch(row + z);
}

// Scores of R rows (zeros behind `size`) with n keys, as [R, BLOCK]. `keys` has entries up to a multiple of SUMS.
template <int R, class K>
INLINE void score(const float* q, int64_t padded, const K* const* keys, int64_t n, int64_t size, const K* const* ahead,
                  float* scores) {
    constexpr int C = SUMS / R;
    for (int64_t j = 0; j < n; j += C) {
        for (int c = 0; ahead && c < C; c++) prefetch(ahead[j + c], size);
        Vec total[SUMS];
        for (int i = 0; i < SUMS; i++) total[i] = set(0);
        for (int64_t z = 0; z < size; z += WIDTH) {
            const int64_t count = size - z < WIDTH ? size - z : WIDTH;
            Vec rows[R];
            for (int r = 0; r < R; r++) rows[r] = load(q + r * padded + z);
            for (int c = 0; c < C; c++) {
                const Vec key = take(keys[j + c] + z, count);
                for (int r = 0; r < R; r++) total[r * C + c] = fma(rows[r], key, total[r * C + c]);
            }
        }
        float out[SUMS];
        sums(total, out);
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
template <int R, int C, class K>
INLINE void add_columns(const float* weights, const float* shrink, const K* const* v, int64_t n, int64_t z,
                        int64_t count, float* values, int64_t stride) {
    Vec total[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) total[r][c] = load(values + r * stride + z + c * WIDTH) * set(shrink[r]);
    }
    for (int64_t j = 0; j < n; j++) {
        for (int c = 0; c < C; c++) {
            const Vec value = take(v[j] + z + c * WIDTH, count);
            for (int r = 0; r < R; r++) total[r][c] = fma(set(weights[r * BLOCK + j]), value, total[r][c]);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) store(values + r * stride + z + c * WIDTH, total[r][c]);
    }
}

// R rows that see the same n keys of a block.
template <int R, class K>
INLINE void attend_rows(const float* q, const Tile& tile, const KeyBlock<K>& block, int64_t n, float* softmax) {
    constexpr int C = R == 1 ? LONE_COLUMNS : COLUMNS;
    const int64_t stride = SOFTMAX + tile.padded, size = tile.size;
    alignas(64) float scores[R * BLOCK];
    float shrink[R];
    score<R>(q, tile.padded, block.keys, n, size, block.prefetched ? block.values : nullptr, scores);
    for (int r = 0; r < R; r++) shrink[r] = soften(scores + r * BLOCK, n, softmax + r * stride);
    for (int64_t j = 0; block.prefetched && j < n; j++) prefetch(block.next_keys[j], size);
    int64_t z = 0;
    float* const values = softmax + SOFTMAX;
    for (; z + C * WIDTH <= size; z += C * WIDTH) {
        add_columns<R, C>(scores, shrink, block.values, n, z, WIDTH, values, stride);
    }
    for (; z < size; z += WIDTH) {
        add_columns<R, 1>(scores, shrink, block.values, n, z, size - z < WIDTH ? size - z : WIDTH, values, stride);
    }
}

// One block's n keys for all rows; row r sees `visible[r]` keys of the sequence, of which `start` lie before the block.
template <class K>
void attend_block(const Tile& tile, const KeyBlock<K>& block, int64_t start, int64_t n, float* softmax) {
    const int64_t stride = SOFTMAX + tile.padded;
    const auto count = [&](int64_t row) {
        const int64_t visible = tile.visible(row) - start;
        return visible < n ? visible : n;
    };
    for (int64_t r = 0; r < tile.rows;) {
        const float* const q = tile.q + r * tile.padded;
        if (r + ROWS <= tile.rows && count(r) > 0 && count(r) == count(r + ROWS - 1)) {  // the count never falls
            attend_rows<ROWS>(q, tile, block, count(r), softmax + r * stride);
            r += ROWS;
        } else {
            if (count(r) > 0) attend_rows<1>(q, tile, block, count(r), softmax + r * stride);
            r++;
        }
    }
}

// Where the keys and values of a block lie, from position `start` of the sequence on; behind `end` the last again.
template <class T>
void locate(const AttentionArguments<T>& a, const Tile& tile, int64_t start, int64_t end, KeyBlock<T>& block) {
    for (int64_t j = 0; j < BLOCK; j++) {
        const int64_t position = start + j < end ? start + j : end - 1, page = tile.table[position / a.block_size];
        const int64_t place =
            page * a.page_stride + position % a.block_size * a.token_stride + tile.head * a.head_stride;
        block.keys[j] = a.k + place, block.values[j] = a.v + place;
    }
}

// The block as float32, converted once for many rows. Lives until the thread's next call.
template <class T>
KeyBlock<float> widen(const KeyBlock<T>& block, const Tile& tile, int64_t n) {
    float* const memory = (float*)scratch(3, 2 * BLOCK * tile.padded * sizeof(float));
    KeyBlock<float> wide;
    for (int64_t j = 0; j < BLOCK; j++) {
        const int64_t row = j < n ? j : n - 1;
        float *const key = memory + row * tile.padded, *const value = key + BLOCK * tile.padded;
        wide.keys[j] = key, wide.values[j] = value;
        if (row < j) continue;
        prefetch(block.next_keys[j], tile.size);
        for (int64_t z = 0; z < tile.size; z += WIDTH) {
            const int64_t count = tile.size - z < WIDTH ? tile.size - z : WIDTH;
            store(key + z, take(block.keys[j] + z, count));
            store(value + z, take(block.values[j] + z, count));
        }
    }
    wide.next_keys = nullptr, wide.prefetched = false;
    return wide;
}

INLINE void clear(float* softmax, int64_t rows, int64_t stride) {
    std::memset(softmax, 0, rows * stride * sizeof(float));
    for (int64_t r = 0; r < rows; r++) softmax[r * stride + PEAK] = -__builtin_inff();
}

// Keys [begin, end) of the sequence into fresh softmaxes [rows, SOFTMAX + padded].
template <class T>
void attend_split(const AttentionArguments<T>& a, const Tile& tile, int64_t begin, int64_t end, float* softmax) {
    clear(softmax, tile.rows, SOFTMAX + tile.padded);
    KeyBlock<T> blocks[2];
    locate(a, tile, begin, end, blocks[0]);
    for (int64_t start = begin, i = 0; start < end; start += BLOCK, i++) {
        const int64_t n = end - start < BLOCK ? end - start : BLOCK;
        KeyBlock<T>&block = blocks[i % 2], &next = blocks[(i + 1) % 2];
        locate(a, tile, start + BLOCK < end ? start + BLOCK : start, end, next);
        block.next_keys = next.keys;
        block.prefetched = tile.rows <= 2 * ROWS;
        if (block.prefetched) attend_block(tile, block, start, n, softmax);
        else attend_block(tile, widen(block, tile, n), start, n, softmax);
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

INLINE int64_t whole_vectors(int64_t size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

// The queries of `tokens` tokens from row `row` of the batch on, scaled, in `memory`.
template <class T>
Tile make_tile(const AttentionArguments<T>& a, int64_t sequence, int64_t head, int64_t row, int64_t tokens,
               int64_t first_visible, float* memory) {
    const int64_t group = a.heads / a.kv_heads, padded = whole_vectors(a.size);
    for (int64_t r = 0; r < tokens * group; r++) {
        const T* const q = a.q + (row + r / group) * a.q_stride + (head * group + r % group) * a.size;
        for (int64_t z = 0; z < a.size; z += WIDTH) {
            const int64_t n = a.size - z < WIDTH ? a.size - z : WIDTH;
            store(memory + r * padded + z, take(q + z, n) * set(a.scale));
        }
    }
    return {memory, tokens * group, group, padded, a.size, a.tables + sequence * a.table_stride, head, first_visible};
}

template <class T>
T* out_row(const AttentionArguments<T>& a, const Tile& tile, int64_t row, int64_t r) {
    return a.out + ((row + r / tile.group) * a.heads + tile.head * tile.group + r % tile.group) * a.size;
}

// Some tokens of a sequence, the first of which sees `first_visible` keys, with one KV head, all splits in turn.
template <class T>
void attend_tile(const AttentionArguments<T>& a, int64_t sequence, int64_t head, int64_t row, int64_t tokens,
                 int64_t first_visible) {
    const int64_t rows = tokens * (a.heads / a.kv_heads), padded = whole_vectors(a.size), stride = SOFTMAX + padded;
    float* const memory = (float*)scratch(0, rows * (padded + 2 * stride) * sizeof(float));
    float *const split = memory + rows * padded, *const whole = split + rows * stride;
    const Tile tile = make_tile(a, sequence, head, row, tokens, first_visible, memory);
    const int64_t last = first_visible + tokens - 1;
    clear(whole, rows, stride);
    for (int64_t begin = 0; begin < last; begin += SPLIT) {
        attend_split(a, tile, begin, begin + SPLIT < last ? begin + SPLIT : last, split);
        for (int64_t r = 0; r < rows; r++) {
            if (tile.visible(r) > begin) merge(split + r * stride, whole + r * stride, padded);
        }
    }
    for (int64_t r = 0; r < rows; r++) finish(whole + r * stride, out_row(a, tile, row, r), a.size);
}

// Tiles of the whole batch. `first_tile` [sequences + 1] counts those of the sequences before each.
template <class T>
void attend_all(const AttentionArguments<T>& a, const int64_t* first_tile, int64_t tile_tokens) {
    parallel_for(first_tile[a.sequences] * a.kv_heads, 1, [&](int64_t item, int64_t end) {
        for (int64_t sequence = 0; item < end; item++) {
            const int64_t tile = item / a.kv_heads, head = item % a.kv_heads;
            while (first_tile[sequence + 1] <= tile) sequence++;
            const int64_t begin = a.first_row(sequence), rows = a.first_row(sequence + 1) - begin;
            const int64_t token = (tile - first_tile[sequence]) * tile_tokens;
            const int64_t tokens = rows - token < tile_tokens ? rows - token : tile_tokens;
            attend_tile(a, sequence, head, begin + token, tokens, a.context_lens[sequence] - rows + token + 1);
        }
    });
}

// One row of each sequence, whose splits go to all threads: first every split's softmax, then their merger.
template <class T>
void attend_splits(const AttentionArguments<T>& a, int64_t max_context) {
    const int64_t group = a.heads / a.kv_heads, padded = whole_vectors(a.size), stride = SOFTMAX + padded;
    const int64_t splits = (max_context + SPLIT - 1) / SPLIT, pairs = a.sequences * a.kv_heads;
    float* const all = (float*)scratch(1, pairs * splits * group * stride * sizeof(float));
    parallel_for(pairs * splits, 1, [&](int64_t item, int64_t end) {
        float* const memory = (float*)scratch(0, group * padded * sizeof(float));
        for (; item < end; item++) {
            const int64_t pair = item / splits, sequence = pair / a.kv_heads, context = a.context_lens[sequence];
            const int64_t begin = item % splits * SPLIT, stop = begin + SPLIT < context ? begin + SPLIT : context;
            if (begin >= stop) continue;
            const Tile tile = make_tile(a, sequence, pair % a.kv_heads, sequence, 1, context, memory);
            attend_split(a, tile, begin, stop, all + item * group * stride);
        }
    });
    parallel_for(pairs, 8, [&](int64_t pair, int64_t end) {
        float* const whole = (float*)scratch(0, group * stride * sizeof(float));
        for (; pair < end; pair++) {
            const int64_t sequence = pair / a.kv_heads;
            clear(whole, group, stride);
            for (int64_t r = 0; r < group; r++) {
                for (int64_t i = 0; i * SPLIT < a.context_lens[sequence]; i++) {
                    merge(all + ((pair * splits + i) * group + r) * stride, whole + r * stride, padded);
                }
                T* const out = a.out + (sequence * a.heads + pair % a.kv_heads * group + r) * a.size;
                finish(whole + r * stride, out, a.size);
            }
        }
    });
}
