// This file has the eight tiles of the processor extension AMX. A tile has up to 16 rows of 64 bytes. With the macro
// LEVEL_AMX the file uses the extension's instructions; without the macro, vector code computes what these instructions
// compute, so that tests run on every machine.
//
// The tiles 0 to 3 are sums, the tiles 4 and 5 are rows of x, and the tiles 6 and 7 are weights. Tiles 0, 1 and 4 have
// the first 16 rows, and tiles 2, 3 and 5 the other rows. The numbers of tiles must be literals.
constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64;

#ifdef LEVEL_AMX
// The memory layout that the instruction LDTILECFG reads.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, zero[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

struct TileSet {
    int64_t rows = 0;

    TileSet() { tiles_in_use(); }
    // Sets the number of rows of x, from 1 to 32. The processor keeps this setting between two calls of the library.
    // Other code of the process may have changed or released the tiles since then, so the first call of this function
    // compares the processor's setting with the wanted setting.
    void configure(int64_t wanted) {
        if (wanted == rows) return;
        const auto first = uint8_t(wanted < TILE_ROWS ? wanted : TILE_ROWS);
        const auto second = uint8_t(wanted > TILE_ROWS ? wanted - TILE_ROWS : 1);
        TileConfig config, now;
        for (int t = 0; t < 8; t++) {
            config.bytes[t] = TILE_BYTES;
            config.rows[t] = t > 5 ? TILE_ROWS : t < 2 || t == 4 ? first : second;
        }
        // The compiler does not know how much memory these instructions read and write.
        asm volatile("" ::"r"(&config), "r"(&now) : "memory");
        if (!rows) _tile_storeconfig(&now);
        asm volatile("" ::: "memory");
        if (rows || std::memcmp(&now, &config, sizeof(now))) _tile_loadconfig(&config);
        rows = wanted;
    }
};
// The compiler does not know that the instructions for tiles read memory. This macro makes it write everything before.
#define TILE_INPUTS_WRITTEN() asm volatile("" ::: "memory")
#define TILE_ZERO(set, t) _tile_zero(t)
#define TILE_LOAD(set, t, address, stride) _tile_loadd(t, address, stride)
#define TILE_STORE(set, t, address, stride) _tile_stored(t, address, stride)
#define TILE_PRODUCT(set, sums, x, weights) _tile_dpbf16ps(sums, x, weights)
#else
// Returns a * b + c, rounded once. The function `fma` of the namespace `portable` rounds twice.
INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(LEVEL_AVX512) || defined(LEVEL_AVX2) || defined(LEVEL_NEON)
    return fma(a, b, c);
#else
    for (int64_t i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// Replaces subnormal numbers by zeros of the same sign.
INLINE Vec flush(Vec x) {
    const Lanes bits = (Lanes)x;
    return (Vec)(bits & ~((bits & 0x7f800000) == 0 ? Lanes{} + 0x7fffffff : Lanes{}));
}

struct TileSet {
    alignas(64) char memory[8][TILE_ROWS * TILE_BYTES];
    int64_t counts[8] = {0, 0, 0, 0, 0, 0, TILE_ROWS, TILE_ROWS};

    void configure(int64_t rows) {
        for (int t = 0; t < 6; t++) {
            const bool first = t < 2 || t == 4;
            counts[t] = first ? (rows < TILE_ROWS ? rows : TILE_ROWS) : (rows < TILE_ROWS ? 0 : rows - TILE_ROWS);
        }
    }
    void zero(int t) { std::memset(memory[t], 0, sizeof(memory[t])); }
    void read(int t, const void* from, int64_t stride) {
        for (int64_t i = 0; i < counts[t]; i++) {
            std::memcpy(memory[t] + i * TILE_BYTES, (const char*)from + i * stride, TILE_BYTES);
        }
    }
    void write(int t, void* to, int64_t stride) const {
        for (int64_t i = 0; i < counts[t]; i++) {
            std::memcpy((char*)to + i * stride, memory[t] + i * TILE_BYTES, TILE_BYTES);
        }
    }
    // Adds the products of rows of x and columns of weights to the sums. The products of the even and of the odd
    // elements along K are summed separately, each with one rounding per product. The two sums are added, and the result
    // is added to the tile. All subnormal numbers, of the inputs and of the results, count as zeros.
    void add_product(int sums, int x, int weights) {
        constexpr int64_t PAIRS = TILE_ROWS, COLUMNS = 16;
        alignas(64) float even_weights[PAIRS][COLUMNS], odd_weights[PAIRS][COLUMNS];
        for (int64_t p = 0; p < PAIRS; p++) {
            for (int64_t c = 0; c < COLUMNS; c += WIDTH) {
                const Lanes pairs = read_lanes(memory[weights] + p * TILE_BYTES + 4 * c);
                store(even_weights[p] + c, flush((Vec)(pairs << 16)));
                store(odd_weights[p] + c, flush((Vec)(pairs & int(0xffff0000))));
            }
        }
        for (int64_t m = 0; m < counts[sums]; m++) {
            uint32_t pairs[PAIRS];
            std::memcpy(pairs, memory[x] + m * TILE_BYTES, sizeof(pairs));
            float* const row = (float*)(memory[sums] + m * TILE_BYTES);
            for (int64_t c = 0; c < COLUMNS; c += WIDTH) {
                Vec even = set(0.0f), odd = set(0.0f);
                for (int64_t p = 0; p < PAIRS; p++) {
                    const Vec first = flush(set(from_bits(pairs[p] << 16)));
                    const Vec second = flush(set(from_bits(pairs[p] & 0xffff0000)));
                    even = flush(fused(first, load(even_weights[p] + c), even));
                    odd = flush(fused(second, load(odd_weights[p] + c), odd));
                }
                store(row + c, flush(load(row + c) + flush(even + odd)));
            }
        }
    }
};
#define TILE_INPUTS_WRITTEN()
#define TILE_ZERO(set, t) (set).zero(t)
#define TILE_LOAD(set, t, address, stride) (set).read(t, address, stride)
#define TILE_STORE(set, t, address, stride) (set).write(t, address, stride)
#define TILE_PRODUCT(set, sums, x, weights) (set).add_product(sums, x, weights)
#endif
