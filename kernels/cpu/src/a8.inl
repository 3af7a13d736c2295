// This file multiplies inputs, with any number of rows, by packed weights of 4 or 8 bits, with 8-bit activations. The
// file is compiled once for each instruction set. `a8.h` says what is computed.
//
// A tile is up to A8_ROWS rows of x. Its inputs are quantised first, into the order in which they are read: for each
// block of 32 inputs the words [word][row], the start values [half][row] (see `a8_dot.inl`) and the scales [row]. A
// block has two start values if a group of the weight has 16 inputs.

#if defined(A8_DOT_512)
constexpr int A8_ROWS = 8;
constexpr int a8_vectors(int) { return 2; }
#else
constexpr int A8_ROWS = 4;
// Returns how many vectors of columns are computed at once for a tile of `rows` rows.
constexpr int a8_vectors(int rows) { return rows <= 2 ? 4 : 2; }
#endif

// The structs `Eight`, `Four` and `Looked` read numbers of 8 bits, numbers of 4 bits, and numbers of 4 bits that are
// indices into a table. One read gives WORDS words of inputs of each column.
struct Eight {
    using Dot = Large;
    static constexpr int WORDS = 1;
    static INLINE void read(const uint8_t* p, const uint8_t*, Bytes (&words)[WORDS]) { words[0] = read_bytes(p); }
};
struct Four {
    using Dot = Small;
    static constexpr int WORDS = 2;
    static INLINE void read(const uint8_t* p, const uint8_t*, Bytes (&words)[WORDS]) {
        const Bytes both = read_bytes(p);
        words[0] = low_halves(both), words[1] = high_halves(both);
    }
};
struct Looked {
    using Dot = Large;
    static constexpr int WORDS = 2;
    static INLINE void read(const uint8_t* p, const uint8_t* table, Bytes (&words)[WORDS]) {
        Four::read(p, table, words);
        words[0] = look_up(table, words[0]), words[1] = look_up(table, words[1]);
    }
};

// Returns the number of 32-bit integers of a quantised row of x.
template <class R>
int64_t a8_row(const A8Layout& l) {
    return l.blocks * (A8_WORDS * R::Dot::STRIDED + l.halves + 1);
}

// Quantises one block of inputs, x[0] to x[31], of one row of a tile. The row's words are `rows` integers apart.
// Returns the scale. `sums` receives the sum of q over the first and over the second 16 inputs.
template <class R>
INLINE float quantize_block(const float* x, int32_t* out, int64_t rows, int64_t halves, int32_t bias,
                            int32_t (&sums)[2]) {
    using Dot = typename R::Dot;
    uint32_t largest = 0;
    for (int i = 0; i < A8_BLOCK; i++) {
        const uint32_t magnitude = to_bits(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    // A scale below 2^-126 would not be exact, so that it counts as zero. An infinity or NaN makes the scale NaN.
    const float divided = from_bits(largest) / 127;
    const bool is_finite = largest < 0x7f800000, is_zero = divided < 0x1p-126f;
    int32_t q[A8_BLOCK];
    if (!is_finite || is_zero) {
        std::memset(q, 0, sizeof(q));
    } else {
        // Adding 1.5 * 2^23 rounds the quotient to a whole number, and the sum's lowest bits are this number.
        for (int i = 0; i < A8_BLOCK; i++) q[i] = int32_t(to_bits(x[i] / divided + 0x1.8p23f) - 0x4b400000);
    }
    // lanes[h][j]: sum of q over input j of all words of half h
    int32_t lanes[2][4] = {};
    for (int w = 0; w < A8_WORDS; w++) {
        for (int j = 0; j < 4; j++) lanes[w / (A8_WORDS / 2)][j] += q[4 * w + j];
    }
    if constexpr (Dot::STRIDED == 2) {
        for (int w = 0; w < A8_WORDS; w++) {
            const int32_t* const four = q + 4 * w;
            out[2 * w * rows] = (four[0] & 0xffff) | int32_t(uint32_t(four[2]) << 16);
            out[(2 * w + 1) * rows] = (four[1] & 0xffff) | int32_t(uint32_t(four[3]) << 16);
        }
    } else {
        int8_t bytes[A8_BLOCK];
        for (int i = 0; i < A8_BLOCK; i++) bytes[i] = int8_t(q[i]);
        for (int w = 0; w < A8_WORDS; w++) std::memcpy(out + w * rows, bytes + 4 * w, 4);
    }
    out += A8_WORDS * Dot::STRIDED * rows;
    for (int h = 0; h < halves; h++) {
        int32_t first = lanes[h][0] + lanes[h][1], second = lanes[h][2] + lanes[h][3];
        if (halves == 1) first += lanes[1][0] + lanes[1][1], second += lanes[1][2] + lanes[1][3];
        out[h * rows] = Dot::PAIRED ? (-bias * first & 0xffff) | int32_t(uint32_t(-bias * second) << 16)
                                    : (Dot::LESS - bias) * (first + second);
    }
    for (int h = 0; h < 2; h++) sums[h] = lanes[h][0] + lanes[h][1] + lanes[h][2] + lanes[h][3];
    const float scale = !is_finite ? from_bits(0x7fc00000) : is_zero ? 0 : divided;
    std::memcpy(out + halves * rows, &scale, 4);
    return scale;
}

// Quantises rows `first` to `first` + `size` - 1 of x into `out`. If `totals` is not null, it receives the sum of
// scale * q over the inputs of each group of the weight: [group][row].
template <class R, class T>
void quantize_rows(const A8Product<T>& p, const A8Layout& l, int64_t first, int64_t size, int32_t* out, float* totals) {
    const int64_t k = p.weights->k, step = a8_row<R>(l) / l.blocks * size;
    for (int64_t m = 0; m < size; m++) {
        const T* const x = p.x + (p.rows ? p.rows[first + m] : first + m) * p.x_stride;
        float total = 0;
        for (int64_t b = 0; b < l.blocks; b++) {
            alignas(64) float wide[A8_BLOCK];
            const int64_t n = k - b * A8_BLOCK < A8_BLOCK ? k - b * A8_BLOCK : A8_BLOCK;
            for (int64_t i = 0; i < A8_BLOCK; i += WIDTH) {
                const T* const from = x + b * A8_BLOCK + i;
                store(wide + i, n - i >= WIDTH ? load(from) : n > i ? load(from, n - i) : set(0.0f));
            }
            int32_t sums[2];
            const float scale = quantize_block<R>(wide, out + b * step + m, size, l.halves, int32_t(p.weights->bias), sums);
            if (!totals) continue;
            if (l.halves == 2) {
                for (int64_t h = 0; h < 2; h++) totals[(2 * b + h) * size + m] = fused(float(sums[h]), scale, 0.0f);
            } else {
                total = fused(float(sums[0] + sums[1]), scale, total);
                if ((b + 1) % l.group_blocks == 0 || b + 1 == l.blocks) {
                    totals[b / l.group_blocks * size + m] = total;
                    total = 0;
                }
            }
        }
    }
}

// The struct `A8Walk` says which part of a panel one call of the function `a8_tile` computes: blocks `first` to `end` -
// 1 for some columns.
struct A8Walk {
    const A8Weights* weights;
    const A8Layout* layout;
    const uint8_t* panel;
    int64_t vector;        // the first vector of columns
    const int32_t* x;      // the tile's quantised inputs, at the first block
    const float* totals;   // the sums over the inputs of each group (see `quantize_rows`)
    int64_t first, end;
    float* sums;           // [2][row][column]: the results so far, and the sums of the group that is not complete
    const char* next;      // Each block prefetches another `stride` bytes of the memory at `next`.
    int64_t stride;
};

// Reads WIDTH factors of type `kind`. `supers` has the half precision numbers of factors of two levels.
INLINE_IF_FAST Vec read_factors(int64_t kind, const uint8_t* p, int64_t column, Vec supers) {
    switch (Factor(kind)) {
        case Factor::f32: return load((const float*)p + column);
        case Factor::f16: return load((const f16*)p + column);
        case Factor::int8: return signed_bytes(p + column) * supers;
        default: return unsigned_bytes(p + column) * supers;
    }
}

#ifdef A8_ROW_PAIRS
#include "a8_row_pairs.inl"
#else
// Computes c += scale * sum of number * q, for one half or the whole of a block.
template <class R, int MR, int NV, int HALVES>
INLINE void multiply_words(const uint8_t* p, const uint8_t* table, const int32_t* x, const int32_t* starts,
                           const float* scales, Vec (&c)[MR][NV]) {
    using Dot = typename R::Dot;
    Dot dots[MR][NV];
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) dots[m][v].start(starts + m);
    }
#pragma GCC unroll 8
    for (int word = 0; word < A8_WORDS / HALVES; word += R::WORDS, p += 4 * PANEL) {
        Bytes words[NV][R::WORDS];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) R::read(p + 4 * WIDTH * v, table, words[v]);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
#pragma GCC unroll 2
            for (int i = 0; i < R::WORDS; i++) {
#pragma GCC unroll 4
                for (int v = 0; v < NV; v++) {
                    dots[m][v].add(words[v][i], x + (word + i) * Dot::STRIDED * MR + m, MR);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
        const Vec scale = set(scales[m]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) c[m][v] = fused(to_floats(dots[m][v].total()), scale, c[m][v]);
    }
}
#endif

// Adds a group to the results: results += scale * (c - zero * total) + offset * total, where `totals` has the total of
// each row. Sets c to zero.
template <int MR, int NV>
INLINE_IF_FAST void add_group(const A8Walk& a, const uint8_t* factors, const float* totals,
                              const Vec (&supers)[2][NV], Vec (&c)[MR][NV], Vec (&results)[MR][NV]) {
    const A8Layout& l = *a.layout;
    const uint8_t *const offsets = factors + l.scale_bytes, *const zeros = offsets + l.offset_bytes;
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
        const int64_t column = (a.vector + v) * WIDTH;
        if (l.zero_bytes) {
            const Vec zero = set(0.0f) - unsigned_bytes(zeros + column);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) c[m][v] = fused(zero, set(totals[m]), c[m][v]);
        }
        const Vec scale = read_factors(a.weights->scales, factors, column, supers[0][v]);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) results[m][v] = fused(scale, c[m][v], results[m][v]), c[m][v] = set(0.0f);
        if (l.offset_bytes) {
            const Vec offset = read_factors(a.weights->offsets, offsets, column, supers[1][v]);
#pragma GCC unroll 16
            for (int m = 0; m < MR; m++) results[m][v] = fused(offset, set(totals[m]), results[m][v]);
        }
    }
}

template <int MR, int NV>
INLINE void move_sums(Vec (&c)[MR][NV], float* sums, int64_t vector, bool is_load) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            float* const place = sums + m * PANEL + (vector + v) * WIDTH;
            if (is_load) c[m][v] = load(place);
            else store(place, c[m][v]);
        }
    }
}

// Computes blocks `first` to `end` - 1 of one tile of MR rows for NV vectors of columns.
template <class R, int HALVES, int MR, int NV>
void a8_tile(const A8Walk& a) {
    const A8Layout& l = *a.layout;
    Vec c[MR][NV] = {}, results[MR][NV] = {}, supers[2][NV] = {};
    if (a.first) {
        move_sums(results, a.sums, a.vector, true);
        move_sums(c, a.sums + MR * PANEL, a.vector, true);
    }
    const uint8_t* p = a.panel + l.numbers(a.first);
    const int32_t* x = a.x;
    const char* next = a.next;
    const int64_t excess = round_up(a.stride, 64) - a.stride;  // A block prefetches whole cache lines.
    constexpr int64_t WORDS = A8_WORDS * R::Dot::STRIDED;
    const int64_t begun = a.first / l.group_blocks;
    const float* totals = a.totals + begun * HALVES * MR;
    for (int64_t block = a.first, group_end = begun * l.group_blocks; block < a.end;) {
        if (l.super_bytes && block % (A8_SUPER / A8_BLOCK) == 0) {
            const auto* half = reinterpret_cast<const f16*>(p - l.super_bytes);
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                const f16* const place = half + (a.vector + v) * WIDTH;
                if (A8Layout::two_levels(a.weights->scales)) supers[0][v] = load(place);
                if (A8Layout::two_levels(a.weights->offsets)) supers[1][v] = load(place + (l.super_bytes / 2 - PANEL));
            }
        }
        group_end = group_end + l.group_blocks < l.blocks ? group_end + l.group_blocks : l.blocks;
        const int64_t until = group_end < a.end ? group_end : a.end;
        const uint8_t* const factors = p + (group_end - block) * l.block_bytes;
        for (; block < until; block++, p += l.block_bytes, x += (WORDS + HALVES + 1) * MR) {
            for (const char* const stop = next + a.stride; next < stop; next += 64) __builtin_prefetch(next, 0, 3);
            next -= excess;
            const int32_t* const starts = x + WORDS * MR;
            const auto* scales = reinterpret_cast<const float*>(starts + HALVES * MR);
#pragma GCC unroll 2
            for (int half = 0; half < HALVES; half++) {
                const uint8_t* const numbers = p + half * (l.block_bytes / 2) + a.vector * WIDTH * 4;
                multiply_words<R, MR, NV, HALVES>(numbers, a.weights->table, x + half * (WORDS / 2) * MR,
                                                  starts + half * MR, scales, c);
                if (HALVES == 2) {
                    add_group(a, factors + half * l.factor_bytes, totals + half * MR, supers, c, results);
                }
            }
        }
        if (block < group_end) break;
        if (HALVES == 1) add_group(a, factors, totals, supers, c, results);
        p = factors + HALVES * l.factor_bytes;
        totals += HALVES * MR;
        if (l.super_bytes && block % (A8_SUPER / A8_BLOCK) == 0) p += l.super_bytes;
    }
    move_sums(results, a.sums, a.vector, false);
    if (a.end < l.blocks) move_sums(c, a.sums + MR * PANEL, a.vector, false);
}

// Computes all columns of a panel for a tile of `rows` rows.
template <class R, int HALVES, int MR>
void a8_columns(int64_t rows, A8Walk a) {
    if constexpr (MR > 0) {
        if (rows != MR) return a8_columns<R, HALVES, MR - 1>(rows, a);
        constexpr int NV = a8_vectors(MR);
        const int64_t share = a.stride;  // the bytes that all vectors together prefetch in a block
        a.stride = share * NV * WIDTH / PANEL;
        for (; a.vector < PANEL / WIDTH; a.vector += NV) {
            a8_tile<R, HALVES, MR, NV>(a);
            a.next += (a.end - a.first) * a.stride;
        }
    }
}

// Writes the results of a tile for one panel to y.
template <class T>
void write_results(const A8Product<T>& p, int64_t panel, int64_t first, int64_t size, const float* sums) {
    const int64_t left = p.weights->n - panel * PANEL, columns = left < PANEL ? left : PANEL;
    for (int64_t m = 0; m < size; m++, sums += PANEL) {
        T* const y = p.y + (first + m) * p.y_stride + panel * PANEL;
        for (int64_t i = 0; i < columns; i += WIDTH) {
            const int64_t n = columns - i < WIDTH ? columns - i : WIDTH;
            Vec result = load(sums + i);
            if (p.bias) result = result + load(p.bias + panel * PANEL + i, n);
            if (n < WIDTH) store(y + i, result, n);
            else store(y + i, result);
        }
    }
}

// The struct `A8Part` is a part of a product: some of the tiles of rows, with all columns.
template <class T>
struct A8Part {
    A8Product<T> product;
    int32_t* x;     // the quantised inputs of the whole product
    float* totals;  // the sums over the groups of the whole product, or null
    int64_t tile, tile_end;
    int64_t tiles_before, panels_before;  // the numbers of tiles and panels in all earlier parts
};

// A span is a range of blocks whose weights of one panel fit into the L1 or L2 cache.
constexpr int64_t A8_SPAN_BYTES = 1 << 15;

// Computes one panel of a part. Every tile computes one span before any tile starts the next span, and prefetches a
// part of the next span. So the weights come from memory once.
template <class R, int HALVES, class T>
void a8_panel(const A8Part<T>& part, const A8Layout& l, int64_t panel) {
    const A8Product<T>& p = part.product;
    const Tiles tiles(p.m, A8_ROWS);
    const int64_t row = a8_row<R>(l), sharers = part.tile_end - part.tile, groups = l.groups * l.halves;
    constexpr int64_t UNIT = A8_SUPER / A8_BLOCK, SUMS = 2 * A8_ROWS * PANEL;
    const int64_t wanted = A8_SPAN_BYTES / l.block_bytes / UNIT * UNIT, span = wanted > UNIT ? wanted : UNIT;
    auto* const sums = static_cast<float*>(scratch(4, sharers * SUMS * 4));
    const bool reads_fast = p.weights->bits == 8 && l.group_blocks == 1 && p.m <= 2;
    const int64_t distance = reads_fast ? prefetch_distance_of_few_rows() : prefetch_distance();
    const uint8_t* const from = p.panels + panel * l.panel_bytes;
    for (int64_t first = 0; first < l.blocks; first += sharers == 1 ? l.blocks : span) {
        const int64_t end = sharers == 1 || first + span > l.blocks ? l.blocks : first + span;
        const int64_t next = end < l.blocks ? l.numbers(end) : l.panel_bytes, bytes = next - l.numbers(first);
        const int64_t stride = ceil_div(bytes, (end - first) * sharers);
        for (int64_t t = part.tile; t < part.tile_end; t++) {
            const int64_t at = tiles.first(t), size = tiles.size(t), turn = t - part.tile;
            const int64_t ahead = sharers == 1 ? distance : next + turn * (end - first) * stride;
            const A8Walk walk{p.weights, &l, from, 0, part.x + at * row + first * (row / l.blocks) * size,
                              part.totals + at * groups, first, end, sums + turn * SUMS,
                              reinterpret_cast<const char*>(from) + ahead, stride};
            a8_columns<R, HALVES, A8_ROWS>(size, walk);
        }
    }
    for (int64_t t = part.tile; t < part.tile_end; t++) {
        write_results(p, panel, tiles.first(t), tiles.size(t), sums + (t - part.tile) * SUMS);
    }
}

// Calls f with a value of the struct that reads the numbers of the weight.
template <class F>
INLINE void with_reader(const A8Weights& w, const F& f) {
    if (w.has_table) return f(Looked{});
    if (w.bits == 4) return f(Four{});
    f(Eight{});
}

// The struct `A8Parts` is a list of parts whose weights have the same format.
template <class T>
struct A8Parts {
    const A8Weights& weights;
    A8Part<T>* parts;
    int64_t count = 0, tiles = 0, panels = 0;

    // Returns the number of bytes of the quantised inputs and the totals of one row.
    static int64_t row_bytes(const A8Weights& w, const A8Layout& l) {
        int64_t row = 0;
        with_reader(w, [&](auto r) { row = a8_row<decltype(r)>(l); });
        return 4 * (row + (w.offsets || w.has_zeros ? l.groups * l.halves : 0));
    }

    // Divides the tiles of a product into `blocks` parts. `x` is memory for the quantised inputs.
    void add(const A8Product<T>& p, const A8Layout& l, char* x, int64_t blocks) {
        const int64_t whole = Tiles(p.m, A8_ROWS).count;
        int64_t row = 0;
        with_reader(weights, [&](auto r) { row = a8_row<decltype(r)>(l); });
        auto* const words = reinterpret_cast<int32_t*>(x);
        float* const totals = weights.offsets || weights.has_zeros ? (float*)(words + p.m * row) : nullptr;
        blocks = blocks < 1 ? 1 : blocks > whole ? whole : blocks;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t tile = whole * block / blocks, end = whole * (block + 1) / blocks;
            parts[count++] = {p, words, totals, tile, end, tiles, panels};
            tiles += end - tile, panels += ceil_div(weights.n, PANEL);
        }
    }

    // Quantises the inputs of all parts. Calls before(product, first, size) for rows `first` to `first` + `size` - 1 of
    // a product first.
    template <class F>
    void quantize(const A8Layout& l, const F& before) const {
        const int64_t row = ceil_div(1 << 14, A8_ROWS * weights.k);  // about 16,384 inputs at a time
        with_reader(weights, [&](auto r) {
            using R = decltype(r);
            parallel_for(tiles, row, [&](int64_t tile, int64_t last) {
                const A8Part<T>* part = parts;
                for (; tile < last; tile++) {
                    while (part + 1 < parts + count && part[1].tiles_before <= tile) part++;
                    const Tiles all(part->product.m, A8_ROWS);
                    const int64_t t = part->tile + tile - part->tiles_before, at = all.first(t), size = all.size(t);
                    before(part->product, at, size);
                    quantize_rows<R>(part->product, l, at, size, part->x + at * a8_row<R>(l),
                                     part->totals ? part->totals + at * l.groups * l.halves : nullptr);
                }
            });
        });
    }

    void multiply(const A8Layout& l) const {
        with_reader(weights, [&](auto r) {
            using R = decltype(r);
            const auto panels_before = [&](int64_t i) { return i < count ? parts[i].panels_before : panels; };
            parallel_for_parts(count, panels_before, [&](int64_t i, int64_t panel, int64_t last) {
                for (; panel < last; panel++) {
                    if (l.halves == 2) a8_panel<R, 2>(parts[i], l, panel);
                    else a8_panel<R, 1>(parts[i], l, panel);
                }
            });
        });
    }
};

// The approximate number of bytes of quantised inputs in one part of a product. These inputs fit into the cache.
constexpr int64_t A8_X_BYTES = 1 << 20;

template <class T>
void a8_multiply(const A8Product<T>& p) {
    if (p.m == 0) return;
    const A8Layout l(*p.weights);
    const int64_t x_bytes = p.m * A8Parts<T>::row_bytes(*p.weights, l), threads = num_threads();
    const int64_t by_size = ceil_div(x_bytes, A8_X_BYTES), tiles = Tiles(p.m, A8_ROWS).count;
    // A product with few columns is divided by rows into more parts, so that all threads have work.
    const int64_t by_threads = threads > 1 ? ceil_div(4 * threads, ceil_div(p.weights->n, PANEL)) : 1;
    A8Parts<T> all{*p.weights, static_cast<A8Part<T>*>(scratch(1, tiles * int64_t(sizeof(A8Part<T>))))};
    all.add(p, l, static_cast<char*>(scratch(0, x_bytes)), by_size > by_threads ? by_size : by_threads);
    all.quantize(l, [](const A8Product<T>&, int64_t, int64_t) {});
    all.multiply(l);
}
