#include <type_traits>

#include "common.h"
#include "transpose.h"

namespace {

// The online softmax processes BLOCK keys at a time. The maximum score and the sum of the softmax weights are updated
// once per BLOCK keys.
constexpr int64_t BLOCK = 64;
// The number of consecutive tokens of a sequence whose keys are usually adjacent in memory. PAGE affects only the order
// in which keys and values are prefetched.
constexpr int64_t PAGE = 16;
// The keys of a sequence are divided into splits of SPLIT consecutive keys. Only the last split of a sequence can be
// shorter. A thread processes whole splits. SPLIT is a multiple of BLOCK.
constexpr int64_t SPLIT = 512;
// A tile (see the struct `Tile`) has at most about TILE_ROWS query rows per KV head. Each key is read from memory once
// for all these query rows.
constexpr int64_t TILE_ROWS = 64;

template <class T>
struct AttentionArguments {
    const T *q, *k, *v;  // q: [rows, heads, size]; k, v: [pages, block_size, kv_heads, size]
    T* out;              // out: [rows, heads, size]
    int64_t heads, kv_heads, size, block_size, q_stride, page_stride, token_stride, head_stride;
    float scale;
    int64_t sequences, table_stride;
    // tables: [sequences, blocks], the page ids of each sequence; context_lens: [sequences]
    const int32_t *tables, *context_lens;
    const int32_t* query_start;  // query_start: [sequences + 1]; null if each sequence has one query row

    int64_t first_row(int64_t sequence) const { return query_start ? query_start[sequence] : sequence; }
};

// The struct `Tile` has the query rows of consecutive tokens of one sequence, for the query heads that read the KV
// heads `head` to `head + heads - 1`.
template <class Q>
struct Tile {
    const Q* q;  // q: [heads, rows, padded], where each row has `size` elements and then padded - size zeros
    int64_t heads, rows, group, padded, size;
    float scale;
    const int32_t* table;
    int64_t head;
    int64_t first_visible;  // number of keys that the first token of the tile attends to

    int64_t visible(int64_t row) const { return first_visible + int32_t(row) / int32_t(group); }
};

// The struct `Ahead` prefetches the key rows and value rows of the next block of keys. Each of these rows has
// `row_bytes` bytes. Every call of the function `call` prefetches only a few cache lines. If a core requests more
// prefetches at once than the core can have in flight, the core stalls.
struct Ahead {
    const char *const *row, *const *last_row;
    int64_t row_bytes;
    const char* at;
    int64_t element_bytes;

    INLINE void call(int64_t elements) {
        for (int64_t b = elements * element_bytes; b > 0; b -= 64, at += 64) {
            if (at >= *row + row_bytes) row += row < last_row, at = *row;
            __builtin_prefetch(at);
        }
    }
};

// The struct `KeyBlock` has the addresses of the key rows and value rows of BLOCK consecutive tokens of a sequence.
template <class K, class V>
struct KeyBlock {
    const K* keys[BLOCK];
    const V* values[BLOCK];
    Ahead* ahead;  // the struct that prefetches the keys and values of the next block
};

}  // namespace

#define KERNEL_FILE "attention.inl"
#include "for_each_level.h"
#if JAMBA_X86
BEGIN_TARGET_AVX512_BF16
namespace avx512_bf16 {
using namespace avx512;
#define DOT_PRODUCTS
#include "attention.inl"
#undef DOT_PRODUCTS
}  // namespace avx512_bf16
END_TARGET
// This macro calls the version of the function f that was compiled for the machine's instruction set. For tensors of
// dtype bf16, f also has a version for AVX-512 with bf16 dot products, in the namespace avx512_bf16.
#define DISPATCH_ATTENTION(f, ...)                                                       \
    do {                                                                                 \
        if constexpr (std::is_same_v<T, bf16>) {                                         \
            if (level() >= Level::avx512_bf16) return avx512_bf16::f(__VA_ARGS__);       \
        }                                                                                \
        return DISPATCH(f, __VA_ARGS__);                                                 \
    } while (0)
#else
#define DISPATCH_ATTENTION(f, ...) return DISPATCH(f, __VA_ARGS__)
#endif

// Returns the number of KV heads that a thread processes together. The argument `parts` is the number of pieces of work
// if each piece has all KV heads. The keys of all heads of a token are adjacent in memory, so a piece with many heads
// reads memory in order. But each thread should get at least four pieces. Therefore the number of KV heads per piece is
// halved until there are enough pieces, or until the number is odd.
static int64_t heads_together(int64_t kv_heads, int64_t parts) {
    int64_t heads = kv_heads;
    while (heads % 2 == 0 && parts * (kv_heads / heads) < 4 * num_threads()) heads /= 2;
    return heads;
}

template <class T>
static void attend(const AttentionArguments<T>& a, int64_t max_context) {
    const int64_t group = a.heads / a.kv_heads, splits = (max_context + SPLIT - 1) / SPLIT;
    // Several threads share the splits of one sequence only if there are too few sequences to occupy all threads.
    if (!a.query_start && splits > 1 && a.sequences < 4 * num_threads()) {
        const int64_t heads = heads_together(a.kv_heads, a.sequences * splits);
        const int64_t share = a.sequences * (a.kv_heads / heads) * splits / (8 * num_threads());
        DISPATCH_ATTENTION(attend_splits, a, splits, share > 1 ? share : 1, heads);
    }
    const int64_t tile_tokens = group < TILE_ROWS ? TILE_ROWS / group : 1;
    int64_t* const first_tile = (int64_t*)scratch(2, (a.sequences + 1) * sizeof(int64_t));
    first_tile[0] = 0;
    for (int64_t i = 0; i < a.sequences; i++) {
        first_tile[i + 1] = first_tile[i] + (a.first_row(i + 1) - a.first_row(i) + tile_tokens - 1) / tile_tokens;
    }
    const int64_t heads = a.query_start ? 1 : heads_together(a.kv_heads, a.sequences);
    DISPATCH_ATTENTION(attend_all, a, first_tile, tile_tokens, heads);
}

EXPORT void attention(const void* q, const void* k, const void* v, void* out, int64_t heads, int64_t kv_heads,
                      int64_t size, int64_t block_size, int64_t q_stride, int64_t page_stride, int64_t token_stride,
                      int64_t head_stride, int64_t sequences, int64_t table_stride, const int32_t* tables,
                      const int32_t* context_lens, const int32_t* query_start, int64_t max_context, int64_t dtype,
                      float scale) {
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        attend(AttentionArguments<T>{(const T*)q, (const T*)k, (const T*)v, (T*)out, heads, kv_heads, size, block_size,
                                     q_stride, page_stride, token_stride, head_stride, scale, sequences, table_stride,
                                     tables, context_lens, query_start},
               max_context);
    });
}
