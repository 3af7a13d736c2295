// This file multiplies bf16 inputs by packed weights with the tiles of `amx_tiles.inl`.
//
// A step is 32 elements along K. In one step, a tile of x has up to 16 rows of x, and a tile of weights has 16 columns
// as 16 pairs of neighbouring elements along K. The two tiles of one step of a panel lie side by side in a packed bf16
// weight. Each element of y is summed in one element of a tile, in ascending order along K, for any number of rows. So
// the result for a row does not depend on the number of rows.
//
// Quantised weights are converted to bf16 tiles first, once for all rows of a block. Each group of such a weight begins
// with a new step. Elements that are missing in the last step of a group, or of K, count as zeros.
//
// With many rows, the time of a product is the time in which tiles come from the caches. A core's L1 cache feeds the tiles
// twice as fast as its L2 cache, and that ten times as fast as memory. So the input rows are copied, so that the
// tiles of a block of MAX_ROWS rows are adjacent; a part of a product has only as many rows, and a pass over K is only as
// long, as the L2 cache has room for; and all blocks of a part use the same SPAN steps of weights, which stay in the L1
// cache, while the next SPAN steps are prefetched into the L2 cache. Sums that a block does not keep in tiles meanwhile
// are stored, which changes no bit.
constexpr int64_t STEP = 32, STEP_PAIRS = STEP / 2, STEP_BYTES = STEP * PANEL * 2;
constexpr int64_t MAX_ROWS = 2 * TILE_ROWS, SUMS = MAX_ROWS * PANEL;  // rows, and sums, that are computed together
constexpr int64_t SPAN = 8;
constexpr int64_t FEW_BLOCKS = 2;  // up to so many blocks of rows, the blocks walk along all of K one after the other
constexpr int64_t PASS_STEPS = 80;  // the largest number of steps of a pass over K if there are more blocks
constexpr int64_t MOST_BLOCKS = 16;  // the largest number of blocks of rows in a part
// The approximate size of a piece of work: the bytes of its weights times the number of blocks of MAX_ROWS rows.
constexpr int64_t PIECE_BYTES = 1 << 17;
// The approximate number of bytes of input rows that stay in the cache while all panels pass.
constexpr int64_t X_BLOCK_BYTES = 5 << 18;

// The struct `Layout` says how K is divided into steps.
struct Layout {
    int64_t group_steps, steps;  // the steps of a group, except that the last group may have fewer; the steps of K
    bool whole_steps;            // whether no step has to be filled with zeros
    explicit Layout(const Weights& w) {
        const int64_t groups = w.groups();
        group_steps = ceil_div(w.group_pairs(), STEP_PAIRS);
        steps = (groups - 1) * group_steps + ceil_div(w.group_pairs(groups - 1), STEP_PAIRS);
        whole_steps = w.k % STEP == 0 && (groups == 1 || w.group_size % STEP == 0);
    }
    // Returns the number of steps of a pass over K. If there are several groups, a pass ends with a group.
    int64_t pass_steps(int64_t blocks) const {
        if (blocks <= FEW_BLOCKS || steps <= PASS_STEPS) return steps;
        const int64_t length = ceil_div(steps, ceil_div(steps, PASS_STEPS));
        return group_steps < steps ? ceil_div(length, group_steps) * group_steps : length;
    }
};

// The struct `Part` is a part of a matrix product: some of its rows, with all panels. The threads share the part in pieces
// of `grain` panels.
struct Part {
    Product<bf16> product;
    // The rows of the part with all steps. If `copied` is true, the rows of each block of MAX_ROWS rows are stored in the
    // order [step][row][STEP]. Otherwise they are rows of the input, `x_stride` elements apart.
    const bf16* x;
    int64_t x_stride;
    bool copied;
    const float* sums;  // the sum of each row of x over each group of the weight, if the weight has offsets or zeros
    int64_t row, rows, grain, pieces_before;
    // If a pass has fewer steps than K, `stored` has memory for the sums of all panels between two passes: [panel][block]
    // [row][column].
    int64_t pass_steps;
    float* stored;

    int64_t blocks() const { return ceil_div(rows, MAX_ROWS); }
    int64_t block_rows(int64_t block) const {
        const int64_t left = rows - block * MAX_ROWS;
        return left < MAX_ROWS ? left : MAX_ROWS;
    }
    // Returns the address of a block's first row at a step, and how many elements lie between two rows and two steps.
    const bf16* block_x(int64_t block, int64_t step, int64_t steps, int64_t* between_rows, int64_t* between_steps) const {
        *between_rows = copied ? STEP : x_stride, *between_steps = copied ? block_rows(block) * STEP : STEP;
        return x + block * MAX_ROWS * (copied ? steps * STEP : x_stride) + step * *between_steps;
    }
};

// The struct `Next` is memory that is prefetched while a block adds steps: `lines` cache lines for each step.
struct Next {
    const char* memory;
    int64_t lines;
    bool near;  // whether the memory is needed so soon that it is prefetched into the L1 cache
};

INLINE void prefetch_next(const Next& next, int64_t step) {
    const char* const memory = next.memory + step * next.lines * 64;
    if (next.near) {
        for (int64_t i = 0; i < next.lines; i++) __builtin_prefetch(memory + i * 64, 0, 3);
    } else {
        for (int64_t i = 0; i < next.lines; i++) __builtin_prefetch(memory + i * 64, 0, 2);
    }
}

// Adds `steps` steps to the sums of a block of up to MAX_ROWS rows and a panel, from step `step` on. If `is_first`, the
// sums begin with zeros; otherwise they begin with the contents of `sums`.
inline void add_steps(TileSet& set, const Part& part, int64_t block, int64_t step, int64_t all_steps, const char* weights,
                      int64_t steps, bool is_first, Next next, float* sums) {
    constexpr int64_t ROW = PANEL * 4, BELOW = TILE_ROWS * PANEL;
    const int64_t rows = part.block_rows(block);
    const bool two = rows > TILE_ROWS;
    int64_t between_rows, between_steps;
    const bf16* x = part.block_x(block, step, all_steps, &between_rows, &between_steps);
    TILE_INPUTS_WRITTEN();
    set.configure(rows);
    if (is_first) {
        TILE_ZERO(set, 0);
        TILE_ZERO(set, 1);
        if (two) {
            TILE_ZERO(set, 2);
            TILE_ZERO(set, 3);
        }
    } else {
        TILE_LOAD(set, 0, sums, ROW);
        TILE_LOAD(set, 1, sums + 16, ROW);
        if (two) {
            TILE_LOAD(set, 2, sums + BELOW, ROW);
            TILE_LOAD(set, 3, sums + BELOW + 16, ROW);
        }
    }
    for (int64_t i = 0; i < steps; i++, x += between_steps, weights += STEP_BYTES) {
        TILE_LOAD(set, 6, weights, PANEL * 4);
        TILE_LOAD(set, 4, x, between_rows * 2);
        TILE_LOAD(set, 7, weights + TILE_BYTES, PANEL * 4);
        TILE_PRODUCT(set, 0, 4, 6);
        if (two) TILE_LOAD(set, 5, x + TILE_ROWS * between_rows, between_rows * 2);
        prefetch_next(next, i);
        TILE_PRODUCT(set, 1, 4, 7);
        if (two) {
            TILE_PRODUCT(set, 2, 5, 6);
            TILE_PRODUCT(set, 3, 5, 7);
        }
    }
    TILE_STORE(set, 0, sums, ROW);
    TILE_STORE(set, 1, sums + 16, ROW);
    if (two) {
        TILE_STORE(set, 2, sums + BELOW, ROW);
        TILE_STORE(set, 3, sums + BELOW + 16, ROW);
    }
}

// Writes the sums of `rows` rows from row `row` of the product on, for one panel, to y, with the bias added.
inline void write_rows(const Product<bf16>& p, int64_t panel, int64_t row, int64_t rows, const float* sums) {
    for (int64_t c = 0; c < PANEL; c += WIDTH) {
        const int64_t column = panel * PANEL + c, n = p.n - column < WIDTH ? p.n - column : WIDTH;
        if (n <= 0) return;
        const Vec bias = p.bias ? take(p.bias + column, n) : set(0.0f);
        for (int64_t m = 0; m < rows; m++) {
            const Vec sum = load(sums + m * PANEL + c);
            if (p.sums) put(p.sums + (row + m) * p.y_stride + column, sum, n);
            else put(p.y + (row + m) * p.y_stride + column, p.bias ? sum + bias : sum, n);
        }
    }
}

// Converts one pair of neighbouring elements along K of all columns of a panel to bf16.
template <class W>
INLINE void convert_pair(const Reader<W>& reader, const char* step, int pair, char* out) {
    for (int64_t strip = 0; strip < STRIPS; strip++, out += STRIP * 4, step += STRIP * Reader<W>::COLUMN_BYTES) {
        for (int v = 0; v < VECTORS; v++) {
#ifdef DOT_PRODUCTS
            _mm512_storeu_si512(out + 64 * v, (__m512i)reader.vector(step, v, pair));
#else
            bf16 halves[2][WIDTH];
            for (int half = 0; half < 2; half++) store(halves[half], reader.vector(step, v, pair, half));
            auto* const pairs = (bf16*)out + 2 * WIDTH * v;
            for (int64_t c = 0; c < WIDTH; c++) pairs[2 * c] = halves[0][c], pairs[2 * c + 1] = halves[1][c];
#endif
        }
    }
}

// The struct `Run` is some neighbouring steps of one group.
struct Run {
    int64_t group, first, steps;  // `first` counts from the beginning of the group
    bool is_last;                 // whether the run includes the last step of the group
    bool is_whole() const { return first == 0 && is_last; }
    alignas(64) float scales[PANEL], shifts[PANEL];
};

// Converts the weights of a run to tiles, and reads the group's factors if the run includes the group's last step. The
// argument `weights` is the address of a panel.
template <class W>
void convert_run(const Weights& w, const char* weights, Run& run, int64_t ahead, char* out) {
    using R = Reader<W>;
    const R reader(w);
    const int64_t pairs = w.group_pairs(run.group), end = (run.first + run.steps) * STEP_PAIRS;
    const int64_t known = end < pairs ? end : pairs;
    const char* step = weights + w.group_offset(run.group) + run.first * STEP_PAIRS / R::PAIRS * R::BYTES;
    for (int64_t pair = run.first * STEP_PAIRS; pair < known; pair += R::PAIRS, step += R::BYTES) {
        for (int64_t i = 0; i < R::BYTES; i += 64) __builtin_prefetch(step + ahead + i, 0, 3);
        for (int i = 0; i < R::PAIRS; i++, out += PAIR_BYTES<bf16>) convert_pair<W>(reader, step, i, out);
    }
    if (end > known) std::memset(out, 0, (end - known) * PAIR_BYTES<bf16>);
    if (!run.is_last) return;
    const char* const second = w.two_levels() ? weights + w.super_offset(run.group) : nullptr;
    for (int64_t c = 0; c < PANEL; c += STRIP) {
        read_factors(w.scale, step, second, c, run.scales + c);
        if (w.shift != Shift::none) read_shifts(w, step + PANEL * w.scale_item(), second, c, run.shifts + c);
    }
}

// Computes a * b + c, rounded once with every instruction set, so that the emulation has the bits of the instruction.
INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#ifdef LEVEL_AMX
    return fma(a, b, c);
#else
    return fused(a, b, c);
#endif
}

// Adds the sums over a group to `totals`, multiplied by the group's scales, with what offsets or zeros add. If FIRST is
// true, the group is the first one of K, and the totals before it are zeros.
template <Shift SHIFT, bool FIRST>
INLINE void add_sums_of_group(const Part& part, const Run& run, int64_t row, int64_t rows, const float* sums,
                              float* totals) {
    const int64_t groups = part.product.weights.groups();
    for (int64_t c = 0; c < PANEL; c += WIDTH) {
        const Vec scale = load(run.scales + c), shift = SHIFT == Shift::none ? scale : load(run.shifts + c);
        for (int64_t m = 0; m < rows; m++) {
            float* const total = totals + m * PANEL + c;
            Vec sum = load(sums + m * PANEL + c), before = FIRST ? set(0.0f) : load(total);
            const Vec x = set(SHIFT == Shift::none ? 0.0f : part.sums[(row + m) * groups + run.group]);
            if (SHIFT == Shift::zero) sum = multiply_add(shift, x, sum);
            before = multiply_add(scale, sum, before);
            if (SHIFT == Shift::offset) before = multiply_add(shift, x, before);
            store(total, before);
        }
    }
}

inline void add_group(const Part& part, const Run& run, int64_t row, int64_t rows, const float* sums, float* totals) {
    const auto add = [&](auto first) {
        constexpr bool FIRST = decltype(first)::value;
        switch (part.product.weights.shift) {
            case Shift::none: return add_sums_of_group<Shift::none, FIRST>(part, run, row, rows, sums, totals);
            case Shift::offset: return add_sums_of_group<Shift::offset, FIRST>(part, run, row, rows, sums, totals);
            case Shift::zero: return add_sums_of_group<Shift::zero, FIRST>(part, run, row, rows, sums, totals);
        }
    };
    if (run.group) add(std::false_type{});
    else add(std::true_type{});
}

// The struct `Group` adds the sums over groups to the totals, each only after the steps of the next group: the processor
// then need not wait for the tiles of a group before it begins with the next one.
struct Group {
    const Part& part;
    float* whole_groups;  // [2][SUMS]
    int64_t turn;
    const Run* run;  // the group that is not added yet, or null
    int64_t row, rows;
    const float* sums;
    float* totals;

    // Returns memory for the sums over a group. It is used again after the next group.
    float* memory() { return whole_groups + (turn ^= 1) * SUMS; }
    void add() {
        if (run) add_group(part, *run, row, rows, sums, totals);
        run = nullptr;
    }
    void next(const Run* own, int64_t own_row, int64_t own_rows, const float* own_sums, float* own_totals) {
        add();
        run = own, row = own_row, rows = own_rows, sums = own_sums, totals = own_totals;
    }
};

// The struct `Span` is some neighbouring steps of a panel, which all blocks of a part use one after the other.
struct Span {
    int64_t first, end;  // numbers of steps
    const char* weights;  // the tiles
    Run runs[SPAN];
    int64_t count;  // the number of runs

    bool is_last(const Layout& layout) const { return end == layout.steps; }
};

// Divides a span of a quantised weight into runs, and converts them to tiles in `tiles`.
template <class W>
void convert_span(const Weights& w, const Layout& layout, const char* weights, int64_t ahead, Span& span, char* tiles) {
    span.weights = tiles, span.count = 0;
    for (int64_t start = span.first; start < span.end;) {
        Run& run = span.runs[span.count++];
        run.group = start / layout.group_steps, run.first = start % layout.group_steps;
        const int64_t left = ceil_div(w.group_pairs(run.group), STEP_PAIRS) - run.first;
        run.is_last = left <= span.end - start;
        run.steps = run.is_last ? left : span.end - start;
        convert_run<W>(w, weights, run, ahead, tiles + (start - span.first) * STEP_BYTES);
        start += run.steps;
    }
}

// Sets the addresses of a span of a weight in bf16, which has one run. Its tiles are used where they are, unless the last
// step of K has to be filled with zeros.
inline void place_span(const Weights& w, const Layout& layout, const char* weights, Span& span, char* tiles) {
    span.weights = weights + span.first * STEP_BYTES, span.count = 1;
    span.runs[0].group = 0, span.runs[0].first = span.first, span.runs[0].steps = span.end - span.first;
    const int64_t bytes = (w.pairs() - span.first * STEP_PAIRS) * PAIR_BYTES<bf16>;
    if (!span.is_last(layout) || w.pairs() % STEP_PAIRS == 0) return;
    std::memcpy(tiles, span.weights, bytes);
    std::memset(tiles + bytes, 0, (span.end - span.first) * STEP_BYTES - bytes);
    span.weights = tiles;
}

// Computes the steps `first` to `end` - 1 of a part for one panel.
template <class W>
void multiply_panel(TileSet& set, const Part& part, int64_t panel, int64_t first, int64_t end, int64_t ahead) {
    constexpr bool PLAIN = std::is_same_v<W, bf16>;
    const Weights& w = part.product.weights;
    const Layout layout(w);
    const int64_t blocks = part.blocks(), panels = ceil_div(part.product.n, PANEL), size = panel_bytes<bf16>(w);
    const char* const weights = w.panels + panel * size;
    const bool few = blocks <= FEW_BLOCKS, groups = layout.group_steps < layout.steps;
    // A span of a weight in bf16 needs memory for tiles only if it has to be filled with zeros.
    const int64_t length = PLAIN && few && layout.whole_steps ? end - first : SPAN;
    auto* const memory = static_cast<float*>(scratch(4, SPAN * STEP_BYTES + 2 * (blocks + 1) * SUMS * 4));
    float* const whole_groups = memory + 2 * blocks * SUMS;  // for the sums over groups that are whole in a span
    char* const tiles = (char*)(whole_groups + 2 * SUMS);
    float* const stored = part.stored + (part.stored ? panel * blocks * SUMS : 0);
    float* const sums = part.stored && !groups ? stored : memory;
    float* const totals = part.stored && groups ? stored : memory + blocks * SUMS;
    const int64_t step_bytes = size / layout.steps;
    Group group{part, whole_groups, 0, nullptr, 0, 0, nullptr, nullptr};
    Span span;
    for (span.first = first; span.first < end; span.first = span.end) {
        span.end = span.first + length < end ? span.first + length : end;
        if constexpr (PLAIN) place_span(w, layout, weights, span, tiles);
        else convert_span<W>(w, layout, weights, ahead, span, tiles);
        const int64_t steps = span.end - span.first;
        Next next{weights + span.end * step_bytes, ceil_div(step_bytes, 64 * blocks), false};
        if (span.end == end) next.memory = weights + (panel + 1 < panels ? size : 0) + first * step_bytes;
        if (few) next = {span.weights + ahead, PLAIN && ahead ? STEP_BYTES / 64 : 0, true};
        for (int64_t block = 0; block < blocks; block++) {
            const char* from = span.weights;
            const int64_t rows = part.block_rows(block), row = block * MAX_ROWS;
            Next own = next;
            if (!few) own.memory += block * steps * next.lines * 64;
            for (const Run* run = span.runs; run < span.runs + span.count; run++) {
                const int64_t step = span.first + (from - span.weights) / STEP_BYTES;
                float* const in_run = run->is_whole() && groups ? group.memory() : sums + block * SUMS;
                add_steps(set, part, block, step, layout.steps, from, run->steps, !run->first, own, in_run);
                from += run->steps * STEP_BYTES, own.memory += run->steps * own.lines * 64;
                if (!PLAIN && run->is_last) group.next(run, row, rows, in_run, totals + block * SUMS);
            }
            if (!span.is_last(layout) && block + 1 < blocks) continue;
            group.add();
            if (!span.is_last(layout)) continue;
            write_rows(part.product, panel, part.row + row, rows, (PLAIN ? sums : totals) + block * SUMS);
        }
    }
}

// Computes the steps of K in pass number `pass` of a part for the panels `panel` to `panel_end` - 1.
inline void multiply_panels(const Part& part, int64_t pass, int64_t panel, int64_t panel_end) {
    TileSet set;
    const int64_t ahead = prefetch_distance(), steps = Layout(part.product.weights).steps;
    const int64_t first = pass * part.pass_steps, end = first + part.pass_steps < steps ? first + part.pass_steps : steps;
    for (; panel < panel_end; panel++) {
        switch (part.product.weights.kind) {
            case Kind::plain: multiply_panel<bf16>(set, part, panel, first, end, ahead); break;
            case Kind::int8: multiply_panel<Int8>(set, part, panel, first, end, ahead); break;
            case Kind::uint8: multiply_panel<UInt8>(set, part, panel, first, end, ahead); break;
            case Kind::fp8: multiply_panel<Fp8>(set, part, panel, first, end, ahead); break;
#if !defined(LEVEL_AVX512) && !defined(DOT_PRODUCTS)
            case Kind::int4: multiply_panel<Int4>(set, part, panel, first, end, ahead); break;
            case Kind::uint4: multiply_panel<UInt4>(set, part, panel, first, end, ahead); break;
#endif
            default: multiply_panel<Table4>(set, part, panel, first, end, ahead); break;
        }
    }
}
