// This file multiplies inputs, with any number of rows, by packed weights. The file is compiled once for each
// instruction set. Each element of y is summed in one accumulator, in ascending order along K, whichever tile and
// thread computes the element. So the result for a row does not depend on the number of rows.
//
// A strip is VECTORS vectors of columns of y. A tile is the part of y that is computed at once in registers: up to
// MAX_ROWS rows of one strip, or fewer rows of several strips. A tile with few rows has several strips, so that enough
// accumulators are in use to hide the latency of the multiplications. Before the multiplication, the rows of x are
// packed: the elements are converted to the type in which they are multiplied, and are stored in the order in which a
// tile reads them. This order is [pair][row], where a pair is two neighbouring elements along K, but with ROW_PAIRS it
// is [pair / 2][row][2]. `multiply.inl` has the multiplication.

// Returns the largest number of strips that a tile of `rows` rows can have. The number is 1, 2 or 4, because the tile's
// accumulators must fit into registers. With AVX2, gcc keeps 12 accumulators in registers only if they belong to one
// strip.
constexpr int max_strips(int rows) {
    constexpr int MOST = WIDTH == 8 ? ACCUMULATORS - 1 : ACCUMULATORS;
    int strips = 1;
    while (2 * VECTORS * strips * sum_rows(rows) <= MOST && strips < 4) strips *= 2;
    return strips;
}

// Returns the number of elements along K in a packed row of x. The row is padded, so that the row's length is a whole
// number of steps in every weight format (see the struct `Reader` in `formats.inl`).
inline int64_t x_inputs(int64_t k) { return ceil_div(k, 2 * INT4_PAIRS) * INT4_PAIRS * X_PER_PAIR; }

// Returns the number of elements in a packed row of x. If a weight has offsets or zeros, the row's sum over each group
// follows the elements along K.
inline int64_t x_row(const Weights& w) {
    return x_inputs(w.k) + (w.quantized() && w.shift != Shift::none ? w.groups() : 0);
}

// Packs N rows of the input x, from row `first` on, for a tile of `size` rows. `out` is the address of the first of them
// in the packed tile.
template <int N, class T>
INLINE void pack_group(const Product<T>& p, int64_t first, int64_t size, PackedX* out) {
    const T* x[N];
    for (int m = 0; m < N; m++) x[m] = p.x + (p.rows ? p.rows[first + m] : first + m) * p.x_stride;
    for (int64_t k = 0; k < p.weights.k; k += 2 * WIDTH, out += WIDTH * X_PER_PAIR * size) {
        interleave_rows<N>(x, p.weights.k - k < 2 * WIDTH ? p.weights.k - k : 2 * WIDTH, out, size);
        for (int m = 0; m < N; m++) x[m] += 2 * WIDTH;
    }
}

// Packs rows `first` to `first` + `size` - 1 of the input x into `out`, in the order in which a tile reads these rows.
template <class T>
void pack_rows(const Product<T>& p, int64_t first, int64_t size, PackedX* out) {
    int64_t m = 0;
    for (; m + 4 <= size; m += 4) pack_group<4>(p, first + m, size, out + m * X_NEIGHBOURS);
    for (; m + 2 <= size; m += 2) pack_group<2>(p, first + m, size, out + m * X_NEIGHBOURS);
    if (m < size) pack_group<1>(p, first + m, size, out + m * X_NEIGHBOURS);
    const int64_t used = ceil_div(p.weights.k, 2 * X_NEIGHBOURS) * X_NEIGHBOURS * X_PER_PAIR, row = x_inputs(p.weights.k);
    std::memset(out + used * size, 0, (row - used) * size * sizeof(*out));
    if (x_row(p.weights) > row) sum_groups(p, first, size, reinterpret_cast<float*>(out + row * size));
}

// The struct `Walk` says which part of K one call of the function `tile` computes: steps `first` to `end` - 1 of the
// weights. The comment at the top of `formats.inl` defines a step.
struct Walk {
    const PackedX* x;  // address of the tile's packed input rows, at the first element along K
    int64_t strip;
    int64_t first, end;
    // If `next` is not null, each step prefetches another `stride` bytes of the memory at `next`. If `next` is null,
    // each step prefetches later weights of the panel that the tile is reading.
    const char* next;
    int64_t stride;
    // Memory for the tile's sums: [row][vector of columns]. If `first` is not 0, it has the sums of all earlier steps
    // before the call. After the call, it also includes the steps of this call.
    float* sums;
    // If `converted` is not null, it has the weights of the strip for the steps `first` to `end` - 1, converted to bf16
    // in the layout [pair][column][2].
    const char* converted = nullptr;
};

// The struct `Results` writes the sums of tiles to the output of a product. The code that computes the sums does not
// know the dtype of the product, so it is compiled only once for all dtypes.
struct Results {
    const void* product;
    // Writes the sums of a tile, [row][vector of columns], to the product's rows from `row` on and its columns from
    // strip `strip` on.
    void (*write)(const void* product, int64_t row, int64_t rows, int64_t strip, int64_t vectors, const float* sums);
};

template <class T>
void write_tile(const Product<T>& p, int64_t row, int64_t rows, int64_t strip, int64_t vectors, const float* sums) {
    for (int64_t v = 0; v < vectors; v++, sums += WIDTH) {
        const int64_t column = strip * STRIP + v * WIDTH, left = p.n - column, n = left < WIDTH ? left : WIDTH;
        if (n <= 0) return;
        const int64_t place = row * p.y_stride + column, next = vectors * WIDTH;
        if (p.sums) {
            for (int64_t m = 0; m < rows; m++) put(p.sums + place + m * p.y_stride, load(sums + m * next), n);
        } else if (p.bias) {
            const Vec bias = take(p.bias + column, n);
            for (int64_t m = 0; m < rows; m++) put(p.y + place + m * p.y_stride, load(sums + m * next) + bias, n);
        } else {
            for (int64_t m = 0; m < rows; m++) put(p.y + place + m * p.y_stride, load(sums + m * next), n);
        }
    }
}

template <class T>
Results results_of(const Product<T>& p) {
    return {&p, [](const void* product, int64_t row, int64_t rows, int64_t strip, int64_t vectors, const float* sums) {
                write_tile(*static_cast<const Product<T>*>(product), row, rows, strip, vectors, sums);
            }};
}

// The struct `TileArguments` has the arguments of the functions that compute tiles which are not template arguments.
struct TileArguments {
    const Weights* weights;
    Results results;
    int64_t first_row;
    Walk walk;
};

// The struct `Steps` divides the steps of a weight (see the struct `Reader` in `formats.inl`) into groups of steps that
// share a scale.
template <class W>
struct Steps {
    int64_t count, group;  // count: number of steps along the whole of K; group: number of steps in a group
    explicit Steps(const Weights& w) : count(w.pairs() / Reader<W>::PAIRS) {
        group = Reader<W>::SCALED ? w.group_pairs() / Reader<W>::PAIRS : count;
    }
    // Returns the offset in bytes, within its panel, of a step along K.
    int64_t offset(const Weights& w, int64_t step) const {
        if (!Reader<W>::SCALED) return step * Reader<W>::BYTES;
        return w.group_offset(step / group) + step % group * Reader<W>::BYTES;
    }
};

template <int MR, int NV>
INLINE void load_sums(Vec (&c)[MR][NV], const float* sums) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) c[m][v] = load(sums + (m * NV + v) * WIDTH);
    }
}

template <int MR, int NV>
INLINE void store_sums(const Vec (&c)[MR][NV], float* sums) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) store(sums + (m * NV + v) * WIDTH, c[m][v]);
    }
}

// Computes steps `a.walk.first` to `a.walk.end` - 1 of one tile, and writes the sums to `a.walk.sums`. If the weight
// has one group, the sums are multiplied by the scales after the last step of K. If it has several groups, the sum
// over each group was multiplied by the group's scale before the sums over the groups were added.
template <class W, int MR, int NS>
void tile(const TileArguments& a) {
    using R = TileReader<W>;
    const Weights& weights = *a.weights;
    const Walk& walk = a.walk;
    const Steps<W> steps(weights);
    const int64_t panel = panel_bytes<W>(weights);
    const bool one_group = steps.group == steps.count;
    const char *w[NS], *panels[NS];
    for (int s = 0; s < NS; s++) {
        const int64_t strip = walk.strip + s;
        panels[s] = weights.panels + strip / STRIPS * panel;
        w[s] = panels[s] + strip % STRIPS * STRIP * R::COLUMN_BYTES;
    }
    const R reader(weights);
    const PackedX* x = walk.x + walk.first * R::PAIRS * MR * X_PER_PAIR;
    const auto* const sums_of_x = reinterpret_cast<const float*>(walk.x + x_inputs(weights.k) * MR);
    int64_t offset = steps.offset(weights, walk.first);
    // Several strips are read as several streams, which share the distance.
    const int64_t ahead = prefetch_distance() / NS;
    const char* next = walk.next ? walk.next : w[0] + offset + ahead;
    const int64_t stride = (walk.next ? walk.stride : R::BYTES) * (R::PAIRS % X_NEIGHBOURS ? X_NEIGHBOURS : 1);
    // The variable `totals` has the sums over the groups that were already computed, each multiplied by the group's
    // scale.
    Vec totals[MR][VECTORS * NS] = {};
    if (R::SCALED && !one_group && walk.first) load_sums(totals, walk.sums);
    for (int64_t step = walk.first; step < walk.end; step += steps.group) {
        Vec c[sum_rows(MR)][VECTORS * NS] = {};
        if (one_group && walk.first) load_sums(c, walk.sums);
        const int64_t end = offset + (walk.end - step < steps.group ? walk.end - step : steps.group) * R::BYTES;
        while (offset < end) {
            if constexpr (NS == 1) {
                for (const char* const until = next + stride; next < until; next += 64) __builtin_prefetch(next, 0, 3);
                next += stride - ceil_div(stride, 64) * 64;
            } else {
#pragma GCC unroll 8
                for (int s = 0; s < NS; s++) {
                    __builtin_prefetch(w[s] + offset + ahead, 0, 3);
                    if (R::BYTES > 64) __builtin_prefetch(w[s] + offset + ahead + 64, 0, 3);
                }
            }
            multiply_step<W, MR, NS>(c, reader, x, w, offset, end);
        }
        if (one_group && walk.end < steps.count) return store_sums(c, walk.sums);
#ifndef ROW_PAIRS
        if constexpr (!R::SCALED) return store_sums(c, walk.sums);
#endif
        Vec sums[MR][VECTORS * NS];
        separate_rows<MR, VECTORS * NS>(c, sums);
        if constexpr (!R::SCALED) return store_sums(sums, walk.sums);
        const int64_t group = step / steps.group;
        add_group<MR, NS>(sums, weights, {panels, walk.strip, group, offset}, sums_of_x + group * MR, totals);
        offset = weights.group_offset(group + 1);
    }
    store_sums(totals, walk.sums);
}

// Whether the weights of format W are converted to bf16 once for all tiles that share a strip. This is done where every
// number of W is exact in bf16, and where a conversion for each tile takes longer than reading bf16.
template <class W>
constexpr bool CONVERTS = false;
#if defined(LEVEL_AVX2)
template <>
constexpr bool CONVERTS<Fp8> = true;
#endif
constexpr int64_t CONVERTING_TILES = 4;  // the least number of tiles that share a strip for which its weights are converted

#ifndef DOT_PRODUCTS
// Converts steps `first` to `end` - 1 of a strip to bf16, in the layout [pair][column][2].
template <class W>
void convert_strip(const Weights& weights, int64_t strip, int64_t first, int64_t end, char* out) {
    using R = Reader<W>;
    const R reader(weights);
    const Steps<W> steps(weights);
    const char* const start = weights.panels + strip / STRIPS * panel_bytes<W>(weights) +
                              strip % STRIPS * STRIP * R::COLUMN_BYTES;
    for (int64_t step = first; step < end; step++) {
        const char* const from = start + steps.offset(weights, step);
        for (int pair = 0; pair < R::PAIRS; pair++) {
            for (int v = 0; v < VECTORS; v++, out += 4 * WIDTH) {
                // A number that is exact in bf16 has zeros in the lower 16 bits of its float32.
                const Lanes even = (Lanes)reader.vector(from, v, pair, 0), odd = (Lanes)reader.vector(from, v, pair, 1);
                const Lanes both = (even >> 16 & 0xffff) | odd;
                std::memcpy(out, &both, sizeof(both));
            }
        }
    }
}

// Computes what the function `tile` computes for one strip, from weights that were converted to bf16.
template <class W, int MR>
void converted_tile(const TileArguments& a) {
    using R = Reader<W>;
    const Weights& weights = *a.weights;
    const Walk& walk = a.walk;
    const Steps<W> steps(weights);
    const bool one_group = steps.group == steps.count;
    const char* const panel = weights.panels + walk.strip / STRIPS * panel_bytes<W>(weights);
    const char* const w[1] = {walk.converted};
    const Reader<bf16> reader(weights);
    const PackedX* x = walk.x + walk.first * R::PAIRS * MR * X_PER_PAIR;
    const auto* const sums_of_x = reinterpret_cast<const float*>(walk.x + x_inputs(weights.k) * MR);
    const char* next = walk.next;
    Vec totals[MR][VECTORS] = {};
    if (!one_group && walk.first) load_sums(totals, walk.sums);
    int64_t offset = 0;
    for (int64_t step = walk.first; step < walk.end; step += steps.group) {
        Vec c[MR][VECTORS] = {};
        if (one_group && walk.first) load_sums(c, walk.sums);
        const int64_t count = walk.end - step < steps.group ? walk.end - step : steps.group;
        for (int64_t i = 0; i < count; i++) {
            for (const char* const until = next + walk.stride; next < until; next += 64) {
                __builtin_prefetch(next, 0, 3);
            }
            next += walk.stride - ceil_div(walk.stride, 64) * 64;
#pragma GCC unroll 4
            for (int pair = 0; pair < R::PAIRS; pair++, x += MR * X_PER_PAIR, offset += 4 * STRIP) {
                multiply_pair<bf16, MR, 1>(c, reader, x, w, offset, 0);
            }
        }
        if (one_group && walk.end < steps.count) return store_sums(c, walk.sums);
        const int64_t group = step / steps.group;
        const int64_t factors = steps.offset(weights, step) + count * R::BYTES;
        Vec sums[MR][VECTORS];
        std::memcpy(sums, c, sizeof(sums));
        add_group<MR, 1>(sums, weights, {&panel, walk.strip, group, factors}, sums_of_x + group * MR, totals);
    }
    store_sums(totals, walk.sums);
}
#endif

// Writes the results of a tile of `strips` strips if its last step of K has been computed.
template <class W>
void finish_tile(const TileArguments& a, int64_t rows, int64_t strips) {
    if (a.walk.end < Steps<W>(*a.weights).count) return;
    a.results.write(a.results.product, a.first_row, rows, a.walk.strip, VECTORS * strips, a.walk.sums);
}

// Computes strips `a.walk.strip` to `end` - 1 of a tile of MR rows, NS strips at a time.
template <class W, int MR, int NS>
void tile_strips(TileArguments a, int64_t end) {
    int64_t& strip = a.walk.strip;
    for (; strip + NS <= end; strip += NS) {
        tile<W, MR, NS>(a);
        finish_tile<W>(a, MR, NS);
    }
    if constexpr (NS > 1) {
        if (strip < end) tile_strips<W, MR, NS / 2>(a, end);
    }
}

template <class W, int MR>
void tile_rows(int64_t rows, const TileArguments& a, int64_t end) {
    if constexpr (MR > 0) {
        if (rows != MR) return tile_rows<W, MR - 1>(rows, a, end);
#ifndef DOT_PRODUCTS
        if constexpr (CONVERTS<W>) {
            if (a.walk.converted) {
                converted_tile<W, MR>(a);
                return finish_tile<W>(a, MR, 1);
            }
        }
#endif
        if (end - a.walk.strip == 1) {
            tile<W, MR, 1>(a);
            return finish_tile<W>(a, MR, 1);
        }
        tile_strips<W, MR, max_strips(MR)>(a, end);
    }
}

// A span is a range of K that is short enough for one strip's weights in this range to fit into the L1 cache. A span
// has about SPAN_PAIRS pairs of elements along K, or fewer if SPAN_PAIRS pairs of all columns of a panel would take
// more than SPAN_BYTES bytes.
constexpr int64_t SPAN_PAIRS = 256, SPAN_BYTES = 1 << 15;

// The struct `Block` is some neighbouring tiles of a product of any dtype: the tiles `tile` to `tile_end` - 1.
struct Block {
    const Weights* weights;
    int64_t m;         // the number of rows of the product
    const PackedX* x;  // the packed rows of all tiles of the product, one tile after the other
    int64_t tile, tile_end;
    Results results;
};

// Computes several tiles that use the same strips, and reads the weights of each strip from memory only once. Every
// tile processes one span of K before any tile starts the next span. While a tile processes a span, the tile prefetches
// a part of the next span's weights. All weights of the next span must be in the cache before the first tile starts the
// next span.
template <class W>
void share_strips(const Block& b, int64_t strip, int64_t strip_end) {
    using R = Reader<W>;
    constexpr int64_t PAIR = R::BYTES / R::PAIRS, SUMS = MAX_ROWS * STRIP;
    constexpr int64_t UNIT = (SPAN_PAIRS * PAIR > SPAN_BYTES ? SPAN_BYTES / PAIR : SPAN_PAIRS) / R::PAIRS;
    const Weights& weights = *b.weights;
    const Tiles tiles(b.m, MAX_ROWS);
    const Steps<W> steps(weights);
    const int64_t span = steps.group == steps.count ? UNIT : ceil_div(UNIT, steps.group) * steps.group;
    const int64_t sharers = b.tile_end - b.tile, row = x_row(weights), panel = panel_bytes<W>(weights);
    const bool converts = CONVERTS<W> && sharers >= CONVERTING_TILES;
    auto* const sums = static_cast<float*>(scratch(4, sharers * SUMS * 4 + converts * span * R::PAIRS * STRIP * 4));
    char* const converted = converts ? (char*)(sums + sharers * SUMS) : nullptr;
    auto address = [&](int64_t of_strip, int64_t step) {
        const int64_t column = of_strip % STRIPS * STRIP;
        return weights.panels + of_strip / STRIPS * panel + column * R::COLUMN_BYTES + steps.offset(weights, step);
    };
    for (; strip < strip_end; strip++) {
        for (int64_t first = 0; first < steps.count; first += span) {
            const int64_t end = first + span < steps.count ? first + span : steps.count;
            const char* next = end < steps.count ? address(strip, end) : address(strip + (strip + 1 < strip_end), 0);
            const int64_t stride = ceil_div(span * R::BYTES, (end - first) * sharers);
#ifndef DOT_PRODUCTS
            if constexpr (CONVERTS<W>) {
                if (converts) convert_strip<W>(weights, strip, first, end, converted);
            }
#endif
            for (int64_t t = b.tile; t < b.tile_end; t++) {
                const int64_t first_row = tiles.first(t), turn = t - b.tile;
                const char* const share = next + turn * (end - first) * stride;
                const Walk walk{b.x + first_row * row, strip, first, end, share, stride, sums + turn * SUMS, converted};
                tile_rows<W, MAX_ROWS>(tiles.size(t), {&weights, b.results, first_row, walk}, strip + 1);
            }
        }
    }
}

template <class W>
void multiply_strips(const Block& b, int64_t strip, int64_t strip_end) {
    if (b.tile_end - b.tile > 1) return share_strips<W>(b, strip, strip_end);
    static_assert(MAX_ROWS * VECTORS <= ACCUMULATORS);
    alignas(64) float sums[ACCUMULATORS * WIDTH];
    const Tiles tiles(b.m, MAX_ROWS);
    const int64_t first = tiles.first(b.tile);
    const Walk walk{b.x + first * x_row(*b.weights), strip, 0, Steps<W>(*b.weights).count, nullptr, 0, sums};
    tile_rows<W, MAX_ROWS>(tiles.size(b.tile), {b.weights, b.results, first, walk}, strip_end);
}

// Computes the strips `strip` to `strip_end` - 1 of a block of a product of dtype T.
template <class T>
void multiply_block(const Block& b, int64_t strip, int64_t strip_end) {
    switch (b.weights->kind) {
        case Kind::plain: return multiply_strips<T>(b, strip, strip_end);
        case Kind::int8: return multiply_strips<Int8>(b, strip, strip_end);
        case Kind::uint8: return multiply_strips<UInt8>(b, strip, strip_end);
        case Kind::fp8: return multiply_strips<Fp8>(b, strip, strip_end);
#if !defined(LEVEL_AVX512) && !defined(DOT_PRODUCTS)
        case Kind::int4: return multiply_strips<Int4>(b, strip, strip_end);
        case Kind::uint4: return multiply_strips<UInt4>(b, strip, strip_end);
#endif
        default: return multiply_strips<Table4>(b, strip, strip_end);
    }
}

// The approximate size of a piece of work, counted as the number of bytes of the piece's weights times the number of
// tiles that use these weights.
constexpr int64_t PIECE_BYTES = 1 << 17;
// The approximate number of bytes of packed input rows in one part of a product. These rows fit into the cache.
constexpr int64_t X_BLOCK_BYTES = 1 << 20;

// The struct `Part` is a part of a matrix product: some of the tiles of rows, with all strips of columns. The work of a
// part is divided into pieces of `grain` strips, which the threads share.
template <class T>
struct Part {
    Product<T> product;
    PackedX* x;  // address of the packed input rows of the whole product, not only of this part
    int64_t tile, tile_end, strips, grain;
    int64_t tiles_before, pieces_before;  // number of tiles in all earlier parts; number of pieces in all earlier parts
};

template <class T>
struct Parts {
    Part<T>* parts;
    int64_t count = 0, tiles = 0, pieces = 0;

    // Divides the tiles of a product into `blocks` parts (at least one part, and at most one part per tile). Appends
    // these parts to the array `parts`. The argument x is memory for the packed input rows of the product, with
    // x_row(k) elements per row.
    void add(const Product<T>& p, PackedX* x, int64_t blocks) {
        const Tiles whole(p.m, MAX_ROWS);
        const int64_t strips = ceil_div(p.n, STRIP), share = ceil_div(strips, num_threads());
        blocks = blocks < 1 ? 1 : blocks > whole.count ? whole.count : blocks;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t tile = whole.count * block / blocks, end = whole.count * (block + 1) / blocks;
            // With many threads the pieces are smaller than PIECE_BYTES, so that all threads have work.
            const int64_t least = ceil_div(least_piece_bytes() * STRIPS, panel_bytes<T>(p.weights) * (end - tile));
            const int64_t together = end - tile == 1 ? max_strips(int(whole.size(tile))) : 1;
            int64_t grain = ceil_div(PIECE_BYTES * STRIPS, panel_bytes<T>(p.weights) * (end - tile));
            grain = ceil_div(grain, together) * together;
            if (grain > share) grain = share > least ? share : least;
            parts[count++] = {p, x, tile, end, strips, grain, tiles, pieces};
            tiles += end - tile;
            pieces += ceil_div(strips, grain);
        }
    }
};

// Packs the input rows of all parts, in the order in which the tiles read the rows. Before rows `first` to `first` +
// `size` - 1 of a product are packed, the function before(product, first, size) is called.
template <class T, class F>
void pack_parts(const Parts<T>& all, const F& before) {
    if (!all.tiles) return;
    const Product<T>& typical = all.parts[0].product;
    const int64_t tile_bytes = x_row(typical.weights) * 4 * ceil_div(typical.m, Tiles(typical.m, MAX_ROWS).count);
    parallel_for(all.tiles, ceil_div(PIECE_BYTES / 2, tile_bytes), [&](int64_t tile, int64_t end) {
        const Part<T>* part = all.parts;
        for (; tile < end; tile++) {
            while (part + 1 < all.parts + all.count && part[1].tiles_before <= tile) part++;
            const Tiles tiles(part->product.m, MAX_ROWS);
            const int64_t t = part->tile + tile - part->tiles_before, first = tiles.first(t);
            before(part->product, first, tiles.size(t));
            pack_rows(part->product, first, tiles.size(t), part->x + first * x_row(part->product.weights));
        }
    });
}

template <class T>
void multiply_parts(const Parts<T>& all) {
    const auto pieces_before = [&](int64_t i) { return i < all.count ? all.parts[i].pieces_before : all.pieces; };
    parallel_for_parts(all.count, pieces_before, [&](int64_t i, int64_t first, int64_t last) {
        const Part<T>& part = all.parts[i];
        const int64_t strip_end = last * part.grain < part.strips ? last * part.grain : part.strips;
        const Product<T>& p = part.product;
        const Block block{&p.weights, p.m, part.x, part.tile, part.tile_end, results_of(p)};
        multiply_block<T>(block, first * part.grain, strip_end);
    });
}

template <class T>
void multiply(const Product<T>& p) {
    if (p.m == 0) return;
    const int64_t x_bytes = p.m * x_row(p.weights) * 4, tiles = Tiles(p.m, MAX_ROWS).count, threads = num_threads();
    // A product with few columns is divided by rows into more parts than the cache size requires, so that all threads
    // have work.
    const int64_t by_size = ceil_div(x_bytes, X_BLOCK_BYTES), by_threads = ceil_div(4 * threads, ceil_div(p.n, STRIP));
    Parts<T> all{static_cast<Part<T>*>(scratch(1, tiles * int64_t(sizeof(Part<T>))))};
    all.add(p, static_cast<PackedX*>(scratch(0, x_bytes)),
            threads > 1 && by_threads > by_size ? by_threads : by_size);
    pack_parts(all, [](const Product<T>&, int64_t, int64_t) {});
    multiply_parts(all);
}
