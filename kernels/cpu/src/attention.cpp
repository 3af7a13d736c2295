#include <type_traits>

#include "amx.h"
#include "transpose.h"

namespace {

// The number of consecutive tokens of a sequence whose keys are usually adjacent in memory. PAGE affects only the order
// in which keys and values are prefetched.
constexpr int64_t PAGE = 16;
// The keys of a sequence are divided into splits of SPLIT consecutive keys. Only the last split of a sequence can be
// shorter. A thread processes whole splits. SPLIT is a multiple of every BLOCK (see `attention_rows.inl`).
constexpr int64_t SPLIT = 512;
// A tile (see the struct `Tile`) has at most about QUERY_ROWS query rows per KV head. Each key is read from memory once
// for all these query rows.
// With the tiles of AMX, a thread makes matrix tiles of each key once for all these query rows, so it takes more of them.
constexpr int64_t QUERY_ROWS = 64, MATRIX_QUERY_ROWS = 256;

template <class T>
struct AttentionArguments {
    const T *q, *k, *v;  // q: [rows, heads, size]; k, v: [pages, block_size, kv_heads, size]
    T* out;              // out: [rows, heads, size]
    int64_t heads, kv_heads, size, block_size, q_stride, page_stride, token_stride, head_stride;
    float scale;
    Level level;  // the instruction set that computes the attention
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

    // Prefetches into the L1 cache if NEAR is true, and otherwise into the L2 cache.
    template <bool NEAR = true>
    INLINE void call(int64_t elements) {
        for (int64_t b = elements * element_bytes; b > 0; b -= 64, at += 64) {
            if (at >= *row + row_bytes) row += row < last_row, at = *row;
            __builtin_prefetch(at, 0, NEAR ? 3 : 2);
        }
    }
};

// The struct `KeyRows` has the addresses of the key rows and value rows of N consecutive tokens of a sequence.
template <class K, class V, int64_t N>
struct KeyRows {
    const K* keys[N];
    const V* values[N];
    Ahead* ahead;  // the struct that prefetches the keys and values of the next block
};

}  // namespace

#define KERNEL_FILE "attention.inl"
#include "for_each_level.h"
#undef KERNEL_FILE
#define KERNEL_FILE "attention_emulated.inl"
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
#endif
#if JAMBA_AMX
BEGIN_TARGET_AMX
namespace amx {
using namespace avx512;
#define LEVEL_AMX
#define TILES
#include "amx_tiles.inl"
#include "attention.inl"
#include "amx_tiles_end.inl"
#undef TILES
#undef LEVEL_AMX
}  // namespace amx
END_TARGET
#endif

// This macro calls the version of the function f that was compiled for the instruction set a.level. For tensors of dtype
// bf16, f has more versions: one with the tiles of AMX, one with their emulation, and one with the bf16 dot products of
// AVX-512.
#if JAMBA_AMX
#define RETURN_FROM_TILES(f, ...) \
    if (a.level == Level::amx) return amx::f(__VA_ARGS__)
#else
#define RETURN_FROM_TILES(f, ...)
#endif
#if JAMBA_X86
#define RETURN_FROM_DOT_LEVEL(f, ...) \
    if (chosen >= Level::avx512_bf16) return avx512_bf16::f(__VA_ARGS__)
#define RETURN_FROM_LEVEL(f, ...)                                   \
    if (chosen >= Level::avx512) return avx512::f(__VA_ARGS__);     \
    if (chosen == Level::avx2) return avx2::f(__VA_ARGS__);         \
    return portable::f(__VA_ARGS__)
#else
#define RETURN_FROM_DOT_LEVEL(f, ...)
#define RETURN_FROM_LEVEL(f, ...) return DISPATCH(f, __VA_ARGS__)
#endif
#define DISPATCH_ATTENTION(f, ...)                                                            \
    do {                                                                                      \
        [[maybe_unused]] const Level chosen = is_emulated(a.level) ? level() : a.level;       \
        if constexpr (std::is_same_v<T, bf16>) {                                              \
            RETURN_FROM_TILES(f, __VA_ARGS__);                                                \
            if (a.level == Level::amx_emulated) return DISPATCH(emulated::f, __VA_ARGS__);    \
            RETURN_FROM_DOT_LEVEL(f, __VA_ARGS__);                                            \
        }                                                                                     \
        RETURN_FROM_LEVEL(f, __VA_ARGS__);                                                    \
    } while (0)

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
    const bool has_tiles = std::is_same_v<T, bf16> && (a.level == Level::amx || a.level == Level::amx_emulated);
    const int64_t most = has_tiles ? MATRIX_QUERY_ROWS : QUERY_ROWS, tile_tokens = group < most ? most / group : 1;
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
                      int64_t wanted, float scale) {
    const Level used = wanted < 0 ? product_level() : Level(wanted);
    with_dtype(dtype, [&](auto t) {
        using T = decltype(t);
        attend(AttentionArguments<T>{(const T*)q, (const T*)k, (const T*)v, (T*)out, heads, kv_heads, size, block_size,
                                     q_stride, page_stride, token_stride, head_stride, scale, used, sequences, table_stride,
                                     tables, context_lens, query_start},
               max_context);
    });
}
