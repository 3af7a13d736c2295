// This file divides matrix products, and layers of experts, into parts and passes that `amx.inl` computes.

// Copies one row of x, and fills its incomplete steps with zeros. Two steps lie `between` elements apart in `out`.
inline void copy_row(const Weights& w, const bf16* x, int64_t between, bf16* out) {
    const int64_t inputs = 2 * w.group_pairs();
    for (int64_t start = 0; start < w.k; start += inputs) {
        const int64_t end = w.k - start < inputs ? w.k : start + inputs;
        for (int64_t k = start; k < end; k += STEP, out += between) {
            if (end - k >= STEP) {
                std::memcpy(out, x + k, STEP * sizeof(bf16));
            } else {
                std::memset(out, 0, STEP * sizeof(bf16));
                std::memcpy(out, x + k, (end - k) * sizeof(bf16));
            }
        }
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
    int64_t count = 0, pieces = 0, most_stored = 0;

    // Returns the number of bytes of memory that `rows` rows of x may need.
    static int64_t row_bytes(const Weights& w, int64_t rows) {
        const int64_t copied = Layout(w).steps * STEP * 2;
        return rows * (copied + (w.shift == Shift::none ? 0 : w.groups() * 4));
    }

    // Returns the largest number of parts into which the method `add` divides a product.
    static int64_t parts_of(const Product<bf16>& p, int64_t least) {
        const int64_t blocks = ceil_div(p.m, MAX_ROWS), row = Layout(p.weights).pass_steps(blocks) * STEP * 2;
        const int64_t by_cache = ceil_div(row * p.m, X_BLOCK_BYTES), by_sums = ceil_div(blocks, MOST_BLOCKS);
        const int64_t by_size = by_cache > by_sums ? by_cache : by_sums;
        const int64_t wanted = least > by_size ? least : by_size;
        return wanted < 1 ? 1 : wanted > blocks ? blocks : wanted;
    }

    // Divides a product by rows into at least `least` parts, if it has enough rows, and copies the rows of x where that
    // pays or where the tiles cannot use them as they are.
    void add(const Product<bf16>& p, int64_t least) {
        const Weights& w = p.weights;
        const Layout layout(w);
        const int64_t groups = w.groups(), blocks = ceil_div(p.m, MAX_ROWS), number = parts_of(p, least);
        const bool copies = p.rows || !layout.whole_steps || blocks > FEW_BLOCKS;
        const bool shifts = w.quantized() && w.shift != Shift::none;
        const int64_t stride = copies ? layout.steps * STEP : p.x_stride;
        auto* const copy = (bf16*)memory;
        auto* const sums = (float*)(memory + (copies ? p.m * stride * 2 : 0));
        memory = (char*)(sums + (shifts ? p.m * groups : 0));
        if (copies || shifts) {
            parallel_for(p.m, ceil_div(1 << 14, w.k), [&](int64_t m, int64_t end) {
                for (; m < end; m++) {
                    const bf16* const x = p.x + (p.rows ? p.rows[m] : m) * p.x_stride;
                    const int64_t block = m / MAX_ROWS * MAX_ROWS, rows = p.m - block < MAX_ROWS ? p.m - block : MAX_ROWS;
                    if (copies) copy_row(w, x, rows * STEP, copy + block * stride + (m - block) * STEP);
                    if (shifts) sum_row(w, x, sums + m * groups);
                }
            });
        }
        const int64_t panels = ceil_div(p.n, PANEL), share = ceil_div(panels, num_threads());
        for (int64_t i = 0; i < number; i++) {
            const int64_t row = blocks * i / number * MAX_ROWS, next = blocks * (i + 1) / number * MAX_ROWS;
            const int64_t rows = (next < p.m ? next : p.m) - row, own = ceil_div(rows, MAX_ROWS);
            const int64_t grain = ceil_div(PIECE_BYTES, panel_bytes<bf16>(w) * own);
            const int64_t pass_steps = layout.pass_steps(own);
            if (pass_steps < layout.steps && most_stored < panels * own * SUMS) most_stored = panels * own * SUMS;
            parts[count++] = {p, (copies ? copy : p.x) + row * stride, stride, copies,
                              shifts ? sums + row * groups : nullptr, row, rows, grain < share ? grain : share, pieces,
                              pass_steps, nullptr};
            pieces += ceil_div(panels, parts[count - 1].grain);
        }
    }

    // Computes a pass of the parts `first` to `end` - 1.
    void run_parts(int64_t first, int64_t end, int64_t pass) const {
        const int64_t before = parts[first].pieces_before;
        const auto pieces_before = [&](int64_t i) {
            return (first + i < count ? parts[first + i].pieces_before : pieces) - before;
        };
        parallel_for_parts(end - first, pieces_before, [&](int64_t i, int64_t piece, int64_t last) {
            const Part& part = parts[first + i];
            const int64_t panels = ceil_div(part.product.n, PANEL);
            const int64_t panel_end = last * part.grain < panels ? last * part.grain : panels;
            multiply_panels(part, pass, piece * part.grain, panel_end);
        });
    }

    // Computes all parts. Parts with several passes run one after the other, so that they share the memory for sums.
    void run() {
        if (!most_stored) return count ? run_parts(0, count, 0) : void();
        auto* const stored = static_cast<float*>(scratch(5, most_stored * 4));
        for (int64_t i = 0; i < count; i++) {
            const int64_t passes = ceil_div(Layout(parts[i].product.weights).steps, parts[i].pass_steps);
            if (passes > 1) parts[i].stored = stored;
            for (int64_t pass = 0; pass < passes; pass++) run_parts(i, i + 1, pass);
        }
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
    const int64_t bytes = first_bytes > second_bytes ? first_bytes : second_bytes;
    // Each expert with tokens has a part for each X_BLOCK_BYTES of its rows and for each MOST_BLOCKS blocks, and at least
    // one part.
    const int64_t more = bytes / X_BLOCK_BYTES + entries / (MOST_BLOCKS * MAX_ROWS) + 1;
    const int64_t most = (e.experts < entries ? e.experts : entries) + more;
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
