// This file computes causal attention in tiles. A tile consists of the query rows of consecutive tokens of one
// sequence, for the query heads that read the tile's KV heads. The query rows that read the same KV head are ordered by
// token and then by query head. A query row attends to the keys from position 0 of its sequence upwards. These keys are
// processed in blocks of BLOCK keys, with an online softmax (Dao et al. 2022, FlashAttention, Algorithm 1). A split is
// SPLIT consecutive keys. Each split has a softmax of its own, and the softmaxes of all splits are merged in ascending
// order of position. Scores and weighted values are summed in a fixed order, so the result of a query row depends only
// on this row's query, keys and values. The result does not depend on which thread computes which split.
//
// If DOT_PRODUCTS or TILES is defined (both for bf16 only), queries and keys are multiplied in bf16, and the scores are
// multiplied by the softmax scale afterwards. Otherwise the queries are converted to float32 and multiplied by the softmax
// scale before the queries are multiplied by the keys. How the running softmaxes are updated with a block of keys is in
// `attention_tiles.inl` if TILES is defined, and otherwise in `attention_rows.inl`.
//
// In decode, a thread processes a block of keys for several KV heads in turn, because the keys of all KV heads of a
// token are adjacent in memory.

// The online softmax processes BLOCK keys at a time. The maximum score and the sum of the softmax weights are updated
// once per BLOCK keys.
#ifdef TILES
constexpr int64_t BLOCK = 128;
#else
constexpr int64_t BLOCK = 64;
#endif
// The running softmax of a query row consists of the maximum score, the sum of the softmax weights and the weighted sum
// of the values, in this order. SOFTMAX is the number of floats before the weighted sum of the values.
constexpr int64_t SOFTMAX = 2 * WIDTH;
constexpr int64_t MAXIMUM = 0;  // offset, in floats, of the maximum score in a row's running softmax
// Offset, in floats, of the sum of the softmax weights. The sum is stored as one partial sum per lane.
constexpr int64_t WEIGHT_SUM = WIDTH;

template <class K, class V>
using KeyBlock = KeyRows<K, V, BLOCK>;

#ifdef TILES
#include "attention_tiles.inl"
#else
#include "attention_rows.inl"
#endif

// Computes the offsets, in elements, of the keys and values at BLOCK positions of the sequence, from position `start`
// on. Positions from `end` on get the offset of position end - 1.
template <class T>
void locate(const AttentionArguments<T>& a, const Tile<Query>& tile, int64_t start, int64_t end, int64_t* places) {
    for (int64_t j = 0; j < BLOCK; j++) {
        const int64_t position = start + j < end ? start + j : end - 1, page = tile.table[position / a.block_size];
        places[j] = page * a.page_stride + position % a.block_size * a.token_stride + tile.head * a.head_stride;
    }
}

INLINE void clear(float* softmax, int64_t rows, int64_t stride) {
    std::memset(softmax, 0, rows * stride * sizeof(float));
    for (int64_t r = 0; r < rows; r++) softmax[r * stride + MAXIMUM] = -__builtin_inff();
}

// Computes attention of a tile over the keys at positions `begin` to `end` - 1 of the sequence. The keys are processed
// block by block. Each block is processed for one KV head after the other. Writes the running softmaxes of the tile's
// query rows to `softmax`: [heads, rows, SOFTMAX + padded]. Only keys and values at positions below `last` are
// prefetched.
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
        // The rows are prefetched in this order: the keys of PAGE tokens, the values of the same PAGE tokens, the keys
        // of the next PAGE tokens, and so on.
        for (int64_t j = 0; j < 2 * BLOCK; j++) {
            const int64_t place = places[j / (2 * PAGE) * PAGE + j % PAGE];
            rows[j] = (const char*)((j / PAGE % 2 ? a.v : a.k) + place);
        }
        const int64_t row_bytes = (tile.heads - 1) * a.head_stride * sizeof(T) + a.size * sizeof(T);
        Ahead ahead{rows, rows + 2 * BLOCK - 1, row_bytes, rows[0], sizeof(T)};
        block.ahead = &ahead;
        for (int64_t head = 0; head < tile.heads; head++) {
            const int64_t row = head * tile.rows;
            attend_block(tile, tile.q + row * tile.padded, block, start, n, softmax + row * stride);
            for (int64_t j = 0; j < BLOCK; j++) block.keys[j] += a.head_stride, block.values[j] += a.head_stride;
        }
    }
}

// Merges two running softmaxes of the same query row. The argument `from` is the softmax over one split of the keys.
// The argument `into` is the softmax over all earlier splits, and receives the merged softmax.
INLINE void merge(const float* from, float* into, int64_t padded) {
    const float a = into[MAXIMUM], b = from[MAXIMUM], maximum = a > b ? a : b;
    const Vec old = exp(set(a - maximum)), fresh = exp(set(b - maximum));
    into[MAXIMUM] = maximum;
    for (int64_t i = WEIGHT_SUM; i < SOFTMAX + padded; i += WIDTH) {
        store(into + i, fma(load(from + i), fresh, load(into + i) * old));
    }
}

template <class T>
INLINE void finish(const float* softmax, T* out, int64_t size) {
    const Vec weight_sum = set(sum(load(softmax + WEIGHT_SUM)));
    for (int64_t z = 0; z < size; z += WIDTH) {
        put(out + z, load(softmax + SOFTMAX + z) / weight_sum, size - z < WIDTH ? size - z : WIDTH);
    }
}

INLINE int64_t whole_vectors(int64_t size) { return round_up(size, LANES); }

template <class T>
INLINE void copy_query(const AttentionArguments<T>& a, const T* q, Query* out) {
#if defined(DOT_PRODUCTS) || defined(TILES)
    const int64_t padded = whole_vectors(a.size);
    std::memset(out, 0, padded * sizeof(T));
    std::memcpy(out, q, a.size * sizeof(T));
#else
    for (int64_t z = 0; z < a.size; z += WIDTH) {
        store(out + z, take(q + z, a.size - z < WIDTH ? a.size - z : WIDTH) * set(a.scale));
    }
#endif
}

// Copies the queries of a tile to `memory` and returns the tile. The tile has the query rows of `tokens` consecutive
// tokens, and the first token is row `row` of the batch. For each token, the tile has the query heads that read the KV
// heads `head` to `head + heads - 1`.
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

// Computes attention of `tokens` consecutive tokens of a sequence, for the query heads that read the KV heads `head` to
// `head + heads - 1`. The splits of SPLIT keys are processed one after another. The first token attends to
// `first_visible` keys.
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

// Computes attention of all sequences of the batch, tile by tile, with `heads` KV heads per tile. first_tile:
// [sequences + 1], where first_tile[i] is the total number of tiles of the sequences 0 to i - 1.
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

// Computes attention in decode, where each sequence has one token. The splits of a sequence (SPLIT keys each) are
// divided among the threads. A piece of work is `run` consecutive splits of one sequence, for `heads` KV heads. First,
// the softmaxes of all splits are computed. Then, for each query row, the softmaxes of the row's splits are merged.
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
