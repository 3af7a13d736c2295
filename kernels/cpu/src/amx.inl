// This file multiplies bf16 inputs by packed weights with the tiles of `amx_tiles.inl`.
//
// A step is 32 elements along K. In one step, a tile of x has up to 16 rows of x, and a tile of weights has 16 columns
// as 16 pairs of neighbouring elements along K. The two tiles of one step of a panel lie side by side in a packed bf16
// weight. Each element of y is summed in one element of a tile, in ascending order along K, for any number of rows. So
// the result for a row does not depend on the number of rows.
//
// Quantised weights are converted to bf16 tiles first, once for all rows of a block. Each group of such a weight begins
// with a new step. Elements that are missing in the last step of a group, or of K, count as zeros.
constexpr int64_t STEP = 32, STEP_PAIRS = STEP / 2, STEP_BYTES = STEP * PANEL * 2;
constexpr int64_t MAX_ROWS = 2 * TILE_ROWS, SUMS = MAX_ROWS * PANEL;  // rows, and sums, that are computed together
constexpr int64_t SPAN = 16;  // the number of steps of quantised weights that are converted at once
// The approximate size of a piece of work: the bytes of its weights times the number of blocks of MAX_ROWS rows.
constexpr int64_t PIECE_BYTES = 1 << 17;
// The approximate number of bytes of input rows that stay in the cache while all panels pass.
constexpr int64_t X_BLOCK_BYTES = 1 << 20;

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
};

// The struct `Part` is a part of a matrix product: some of its rows, with all panels. `x` has the rows of the part with
// all steps, `x_stride` elements apart, and `sums` has the sum of each row of x over each group of the weight if the
// weight has offsets or zeros. The threads share the part in pieces of `grain` panels.
struct Part {
    Product<bf16> product;
    const bf16* x;
    int64_t x_stride;
    const float* sums;
    int64_t row, rows, grain, pieces_before;
};

// Adds steps to the sums of up to MAX_ROWS rows and a panel. If `is_first`, the sums begin with zeros; otherwise they
// begin with the contents of `sums`.
inline void add_steps(TileSet& set, const bf16* x, int64_t x_stride, int64_t rows, const char* weights, int64_t steps,
                      bool is_first, int64_t ahead, float* sums) {
    constexpr int64_t ROW = PANEL * 4, BELOW = TILE_ROWS * PANEL;
    const bool two = rows > TILE_ROWS;
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
    for (int64_t step = 0; step < steps; step++, x += STEP, weights += STEP_BYTES) {
        TILE_LOAD(set, 6, weights, PANEL * 4);
        TILE_LOAD(set, 7, weights + TILE_BYTES, PANEL * 4);
        TILE_LOAD(set, 4, x, x_stride * 2);
        if (ahead) {
            for (int64_t i = 0; i < STEP_BYTES; i += 64) __builtin_prefetch(weights + ahead + i, 0, 3);
        }
        TILE_PRODUCT(set, 0, 4, 6);
        TILE_PRODUCT(set, 1, 4, 7);
        if (two) {
            TILE_LOAD(set, 5, x + TILE_ROWS * x_stride, x_stride * 2);
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

inline void multiply_plain(TileSet& set, const Part& part, int64_t panel, int64_t ahead) {
    const Weights& w = part.product.weights;
    const char* const weights = w.panels + panel * panel_bytes<bf16>(w);
    const int64_t full = w.pairs() / STEP_PAIRS, rest = w.pairs() % STEP_PAIRS;
    alignas(64) char last[STEP_BYTES];
    alignas(64) float sums[SUMS];
    if (rest) {
        std::memcpy(last, weights + full * STEP_BYTES, rest * PAIR_BYTES<bf16>);
        std::memset(last + rest * PAIR_BYTES<bf16>, 0, STEP_BYTES - rest * PAIR_BYTES<bf16>);
    }
    for (int64_t m = 0; m < part.rows; m += MAX_ROWS) {
        const int64_t rows = part.rows - m < MAX_ROWS ? part.rows - m : MAX_ROWS;
        const bf16* const x = part.x + m * part.x_stride;
        if (full) add_steps(set, x, part.x_stride, rows, weights, full, true, ahead, sums);
        if (rest) add_steps(set, x + full * STEP, part.x_stride, rows, last, 1, !full, 0, sums);
        write_rows(part.product, panel, part.row + m, rows, sums);
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

// Adds the sums over a group to `totals`, multiplied by the group's scales, with what offsets or zeros add.
inline void add_group(const Part& part, const Run& run, int64_t row, int64_t rows, const float* sums, float* totals) {
    const Weights& w = part.product.weights;
    for (int64_t m = 0; m < rows; m++) {
        const Vec x = set(part.sums ? part.sums[(row + m) * w.groups() + run.group] : 0.0f);
        for (int64_t c = 0; c < PANEL; c += WIDTH) {
            float* const total = totals + m * PANEL + c;
            Vec sum = load(sums + m * PANEL + c), before = run.group ? load(total) : set(0.0f);
            if (w.shift == Shift::zero) sum = multiply_add(load(run.shifts + c), x, sum);
            before = multiply_add(load(run.scales + c), sum, before);
            if (w.shift == Shift::offset) before = multiply_add(load(run.shifts + c), x, before);
            store(total, before);
        }
    }
}

template <class W>
void multiply_quantized(TileSet& set, const Part& part, int64_t panel, int64_t ahead) {
    const Weights& w = part.product.weights;
    const char* const weights = w.panels + panel * panel_bytes<bf16>(w);
    const Layout layout(w);
    const int64_t blocks = ceil_div(part.rows, MAX_ROWS);
    auto* const sums = static_cast<float*>(scratch(4, SPAN * STEP_BYTES + 2 * blocks * SUMS * 4));
    float* const totals = sums + blocks * SUMS;
    char* const tiles = (char*)(totals + blocks * SUMS);
    Run runs[SPAN];
    for (int64_t start = 0; start < layout.steps;) {
        const int64_t end = start + SPAN < layout.steps ? start + SPAN : layout.steps, span = start;
        int64_t count = 0;
        while (start < end) {
            Run& run = runs[count++];
            run.group = start / layout.group_steps, run.first = start % layout.group_steps;
            const int64_t left = ceil_div(w.group_pairs(run.group), STEP_PAIRS) - run.first;
            run.is_last = left <= end - start;
            run.steps = run.is_last ? left : end - start;
            convert_run<W>(w, weights, run, ahead, tiles + (start - span) * STEP_BYTES);
            start += run.steps;
        }
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t m = block * MAX_ROWS, rows = part.rows - m < MAX_ROWS ? part.rows - m : MAX_ROWS;
            const bf16* x = part.x + m * part.x_stride + span * STEP;
            const char* from = tiles;
            for (const Run* run = runs; run < runs + count; run++) {
                add_steps(set, x, part.x_stride, rows, from, run->steps, !run->first, 0, sums + block * SUMS);
                x += run->steps * STEP, from += run->steps * STEP_BYTES;
                if (run->is_last) add_group(part, *run, m, rows, sums + block * SUMS, totals + block * SUMS);
            }
            if (end == layout.steps) write_rows(part.product, panel, part.row + m, rows, totals + block * SUMS);
        }
    }
}

inline void multiply_panels(const Part& part, int64_t panel, int64_t end) {
    TileSet set;
    const int64_t ahead = prefetch_distance();
    for (; panel < end; panel++) {
        switch (part.product.weights.kind) {
            case Kind::plain: multiply_plain(set, part, panel, ahead); break;
            case Kind::int8: multiply_quantized<Int8>(set, part, panel, ahead); break;
            case Kind::uint8: multiply_quantized<UInt8>(set, part, panel, ahead); break;
            case Kind::fp8: multiply_quantized<Fp8>(set, part, panel, ahead); break;
#if !defined(LEVEL_AVX512) && !defined(DOT_PRODUCTS)
            case Kind::int4: multiply_quantized<Int4>(set, part, panel, ahead); break;
            case Kind::uint4: multiply_quantized<UInt4>(set, part, panel, ahead); break;
#endif
            default: multiply_quantized<Table4>(set, part, panel, ahead); break;
        }
    }
}

// Copies one row of x, and fills its incomplete steps with zeros.
inline void copy_row(const Weights& w, const Layout& layout, const bf16* x, bf16* out) {
    const int64_t inputs = 2 * w.group_pairs(), whole = layout.group_steps * STEP;
    std::memset(out, 0, layout.steps * STEP * sizeof(bf16));
    for (int64_t start = 0; start < w.k; start += inputs, out += whole) {
        std::memcpy(out, x + start, (w.k - start < inputs ? w.k - start : inputs) * sizeof(bf16));
    }
}

// Computes the sum of one row of x over each group. Every 16th element of a group is added in ascending order, and then
// the 16 partial sums are added in halves.
inline void sum_row(const Weights& w, const bf16* x, float* sums) {
    for (int64_t start = 0; start < w.k; start += w.group_size) {
        const int64_t end = w.k - start < w.group_size ? w.k : start + w.group_size;
        float parts[16] = {};
        for (int64_t k = start; k < end; k++) parts[(k - start) % 16] += to_float(x[k]);
        for (int64_t half = 8; half; half /= 2) {
            for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
        }
        *sums++ = parts[0];
    }
}

// The struct `Work` is a list of parts, and the memory for the copies of their input rows.
struct Work {
    Part* parts;
    char* memory;
    int64_t count = 0, pieces = 0;

    // Returns the number of bytes of memory that `rows` rows of x may need.
    static int64_t row_bytes(const Weights& w, int64_t rows) {
        const int64_t copied = Layout(w).steps * STEP * 2;
        return rows * (copied + (w.shift == Shift::none ? 0 : w.groups() * 4));
    }

    // Returns the largest number of parts into which the method `add` divides a product.
    static int64_t parts_of(const Product<bf16>& p, int64_t least) {
        const int64_t blocks = ceil_div(p.m, MAX_ROWS), by_size = ceil_div(row_bytes(p.weights, p.m), X_BLOCK_BYTES);
        const int64_t wanted = least > by_size ? least : by_size;
        return wanted < 1 ? 1 : wanted > blocks ? blocks : wanted;
    }

    // Divides a product by rows into at least `least` parts, if it has enough rows, and copies the rows of x where the
    // tiles cannot use them as they are.
    void add(const Product<bf16>& p, int64_t least) {
        const Weights& w = p.weights;
        const Layout layout(w);
        const bool copies = p.rows || !layout.whole_steps, shifts = w.quantized() && w.shift != Shift::none;
        const int64_t stride = copies ? layout.steps * STEP : p.x_stride, groups = w.groups();
        auto* const copy = (bf16*)memory;
        auto* const sums = (float*)(memory + (copies ? p.m * stride * 2 : 0));
        memory = (char*)(sums + (shifts ? p.m * groups : 0));
        if (copies || shifts) {
            parallel_for(p.m, ceil_div(1 << 14, w.k), [&](int64_t m, int64_t end) {
                for (; m < end; m++) {
                    const bf16* const x = p.x + (p.rows ? p.rows[m] : m) * p.x_stride;
                    if (copies) copy_row(w, layout, x, copy + m * stride);
                    if (shifts) sum_row(w, x, sums + m * groups);
                }
            });
        }
        const int64_t panels = ceil_div(p.n, PANEL), share = ceil_div(panels, num_threads());
        const int64_t blocks = ceil_div(p.m, MAX_ROWS), number = parts_of(p, least);
        for (int64_t i = 0; i < number; i++) {
            const int64_t row = blocks * i / number * MAX_ROWS, next = blocks * (i + 1) / number * MAX_ROWS;
            const int64_t rows = (next < p.m ? next : p.m) - row;
            const int64_t grain = ceil_div(PIECE_BYTES, panel_bytes<bf16>(w) * ceil_div(rows, MAX_ROWS));
            parts[count++] = {p, (copies ? copy : p.x) + row * stride, stride, shifts ? sums + row * groups : nullptr,
                              row, rows, grain < share ? grain : share, pieces};
            pieces += ceil_div(panels, parts[count - 1].grain);
        }
    }

    void run() const {
        const auto pieces_before = [&](int64_t i) { return i < count ? parts[i].pieces_before : pieces; };
        parallel_for_parts(count, pieces_before, [&](int64_t i, int64_t first, int64_t last) {
            const Part& part = parts[i];
            const int64_t panels = ceil_div(part.product.n, PANEL);
            const int64_t panel_end = last * part.grain < panels ? last * part.grain : panels;
            multiply_panels(part, first * part.grain, panel_end);
        });
    }
};

inline void multiply(const Product<bf16>& p) {
    if (p.m == 0) return;
    // A product with few columns is divided by rows into more parts than the cache size requires, so that all threads
    // have work.
    const int64_t threads = num_threads(), least = threads > 1 ? ceil_div(4 * threads, ceil_div(p.n, PANEL)) : 1;
    auto* const parts = static_cast<Part*>(scratch(1, Work::parts_of(p, least) * int64_t(sizeof(Part))));
    Work work{parts, static_cast<char*>(scratch(0, Work::row_bytes(p.weights, p.m)))};
    work.add(p, least);
    work.run();
}

// Computes a layer of experts, as the function `mix_experts` in `experts.inl` does.
inline void mix_experts(const Experts<bf16>& e) {
    const int64_t entries = e.tokens * e.top_k, wide = 2 * e.inner;
    const int64_t first_bytes = Work::row_bytes(e.gate_up, entries), second_bytes = Work::row_bytes(e.down, entries);
    // Each expert with tokens has a part for each megabyte of its rows, and at least one part.
    const int64_t bytes = first_bytes > second_bytes ? first_bytes : second_bytes;
    const int64_t most = (e.experts < entries ? e.experts : entries) + bytes / X_BLOCK_BYTES + 1;
    auto* const memory = static_cast<char*>(scratch(1, most * int64_t(sizeof(Part)) + (2 * entries + e.experts + 1) * 4));
    const Order order = sort_entries(e, reinterpret_cast<int32_t*>(memory + most * sizeof(Part)));
    auto* const hidden = static_cast<bf16*>(scratch(2, entries * wide * 2));
    void* const outputs = scratch(3, entries * e.hidden * (e.sums ? 4 : 2));
    auto* const copies = static_cast<char*>(scratch(0, bytes));

    auto each_expert = [&](const auto& product) {
        Work work{reinterpret_cast<Part*>(memory), copies};
        for (int64_t i = 0; i < e.experts; i++) {
            const int64_t start = order.starts[i], size = order.starts[i + 1] - start;
            if (size) work.add(product(i, start, size), 1);
        }
        work.run();
    };
    auto of_expert = [](Weights all, int64_t n, int64_t i) {
        all.panels += i * ceil_div(n, PANEL) * panel_bytes<bf16>(all);
        return all;
    };
    each_expert([&](int64_t i, int64_t start, int64_t size) {
        return Product<bf16>{e.x, e.x_stride, order.tokens + start, of_expert(e.gate_up, wide, i), nullptr,
                             hidden + start * wide, wide, size, wide};
    });
    parallel_for(entries, 1 + 8192 / (e.inner + 1), [&](int64_t row, int64_t end) {
        for (bf16* gate = hidden + row * wide; row < end; row++, gate += wide) {
            silu_and_mul_row(gate, gate + e.inner, gate, e.inner);
        }
    });
    each_expert([&](int64_t i, int64_t start, int64_t size) {
        const int64_t first = start * e.hidden;
        return Product<bf16>{hidden + start * wide, wide, nullptr, of_expert(e.down, e.hidden, i), nullptr,
                             e.sums ? nullptr : static_cast<bf16*>(outputs) + first, e.hidden, size, e.hidden,
                             e.sums ? static_cast<float*>(outputs) + first : nullptr};
    });
    if (e.sums) return add_sums<bf16>(e, order, static_cast<const float*>(outputs));
    add_outputs(e, order, static_cast<const bf16*>(outputs));
}

#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_PRODUCT
