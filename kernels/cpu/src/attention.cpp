#include "common.h"
#include "transpose.h"

namespace {

constexpr int64_t BLOCK = 64;      // keys between two updates of the online softmax
constexpr int64_t SPLIT = 512;     // keys whose softmax is one piece of work; a multiple of BLOCK
constexpr int64_t TILE_ROWS = 64;  // as many tokens' heads as make these share a trip over the keys

template <class T>
struct AttentionArguments {
    const T *q, *k, *v;  // q: [rows, heads, size]; k, v: [pages, block_size, kv_heads, size]
    T* out;              // [rows, heads, size]
    int64_t heads, kv_heads, size, block_size, q_stride, page_stride, token_stride, head_stride;
    float scale;
    int64_t sequences, table_stride;
    const int32_t *tables, *context_lens;  // [sequences, blocks], [sequences]
    const int32_t* query_start;            // [sequences + 1]; null where each has one row

    int64_t first_row(int64_t sequence) const { return query_start ? query_start[sequence] : sequence; }
};

struct Tile {
    const float* q;  // [rows, padded], zeros behind `size`
    int64_t rows, group, padded, size;
    const int32_t* table;
    int64_t head;           // the KV head
    int64_t first_visible;  // how many keys the first token sees

    int64_t visible(int64_t row) const { return first_visible + int32_t(row) / int32_t(group); }
};

// Rows of K and V of BLOCK keys, and where the next block's keys lie. Are they to be brought to the cache on the way?
template <class K>
struct KeyBlock {
    const K *keys[BLOCK], *values[BLOCK];
    const K* const* next_keys;
    bool prefetched;
};

}  // namespace

#define KERNEL_FILE "attention.inl"
#include "for_each_level.h"

template <class T>
static void attend(const AttentionArguments<T>& a, int64_t max_context) {
    // With work for everybody, splits need not be divided.
    if (!a.query_start && max_context > SPLIT && a.sequences * a.kv_heads < 8 * num_threads()) {
        return DISPATCH(attend_splits, a, max_context);
    }
    const int64_t group = a.heads / a.kv_heads, tile_tokens = group < TILE_ROWS ? TILE_ROWS / group : 1;
    int64_t* const first_tile = (int64_t*)scratch(2, (a.sequences + 1) * sizeof(int64_t));
    first_tile[0] = 0;
    for (int64_t i = 0; i < a.sequences; i++) {
        first_tile[i + 1] = first_tile[i] + (a.first_row(i + 1) - a.first_row(i) + tile_tokens - 1) / tile_tokens;
    }
    DISPATCH(attend_all, a, first_tile, tile_tokens);
}

EXPORT void attention(const void* q, const void* k, const void* v, void* out, int64_t heads, int64_t kv_heads,
                      int64_t size, int64_t block_size, int64_t q_stride, int64_t page_stride, int64_t token_stride,
                      int64_t head_stride, float scale, int64_t sequences, int64_t table_stride, const int32_t* tables,
                      const int32_t* context_lens, const int32_t* query_start, int64_t max_context, int64_t dtype) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        attend(AttentionArguments<T>{(const T*)q, (const T*)k, (const T*)v, (T*)out, heads, kv_heads, size, block_size,
                                     q_stride, page_stride, token_stride, head_stride, scale, sequences, table_stride,
                                     tables, context_lens, query_start},
               max_context);
    });
}
