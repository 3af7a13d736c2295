// This file runs a layer of experts. Each expert runs once per step, on all tokens that chose this expert, so that the
// expert's weights are read only once per step.

// An entry is the choice of one expert by one token. Entry t * top_k + k is the choice at position k in the top-k list
// of token t. The struct `Order` has the list of all entries, sorted by expert. Entries of the same expert are sorted
// by entry number.
struct Order {
    int32_t* tokens;  // tokens[i] is the token of the entry at position i of the list that is sorted by expert.
    int32_t* places;  // places[i] is the position of entry number i in the list that is sorted by expert.
    // starts[e] is the position of the first entry of expert e in the sorted list. starts[experts] is the number of
    // entries.
    int32_t* starts;
};

template <class T>
Order sort_entries(const Experts<T>& e, int32_t* memory) {
    const int64_t entries = e.tokens * e.top_k;
    const Order order{memory, memory + entries, memory + 2 * entries};
    for (int64_t i = 0; i <= e.experts; i++) order.starts[i] = 0;
    for (int64_t i = 0; i < entries; i++) order.starts[e.ids[i] + 1]++;
    for (int64_t i = 0; i < e.experts; i++) order.starts[i + 1] += order.starts[i];
    for (int64_t i = 0; i < entries; i++) {
        // After this loop, starts[e] is the position of the first entry of expert e + 1 in the sorted list.
        const int32_t place = order.starts[e.ids[i]]++;
        order.places[i] = place;
        order.tokens[place] = int32_t(i / e.top_k);
    }
    for (int64_t i = e.experts; i > 0; i--) order.starts[i] = order.starts[i - 1];
    order.starts[0] = 0;
    return order;
}

// Computes y[t], the weighted sum of the outputs of token t's experts, in float32 and in the order of the token's top-k
// list. As in transformers, the weight of each expert is first rounded to the dtype T. Then the product of this weight
// and the expert's output is rounded to T.
template <class T>
void add_outputs(const Experts<T>& e, const Order& order, const T* outputs) {
    parallel_for(e.tokens, ceil_div(1 << 15, e.hidden * e.top_k), [&](int64_t t, int64_t end) {
        for (; t < end; t++) {
            const int32_t* places = order.places + t * e.top_k;
            for (int64_t i = 0; i < e.hidden; i += WIDTH) {
                const int64_t n = e.hidden - i < WIDTH ? e.hidden - i : WIDTH;
                Vec total = set(0.0f);
                for (int64_t rank = 0; rank < e.top_k; rank++) {
                    const Vec weight = set(to_float(from_float<T>(e.weights[t * e.top_k + rank])));
                    const Vec part = rounded<T>(take(outputs + places[rank] * e.hidden + i, n) * weight);
                    total = rank ? total + part : part;
                }
                put(e.y + t * e.hidden + i, total, n);
            }
        }
    });
}

template <class T>
void mix_experts(const Experts<T>& e) {
    const int64_t entries = e.tokens * e.top_k, wide = 2 * e.inner, highest = e.hidden > e.inner ? e.hidden : e.inner;
    auto of_expert = [](Weights all, int64_t n, int64_t i) {
        all.panels += i * ceil_div(n, PANEL) * panel_bytes<T>(all);
        return all;
    };
    const int64_t parts_bytes = (e.experts < entries ? e.experts : entries) * int64_t(sizeof(Part<T>));
    auto* const memory = static_cast<char*>(scratch(1, parts_bytes + (2 * entries + e.experts + 1) * 4));
    const Order order = sort_entries(e, reinterpret_cast<int32_t*>(memory + parts_bytes));
    auto* const packed = static_cast<PackedX*>(scratch(0, entries * x_row(highest) * 4));
    T* const hidden = static_cast<T*>(scratch(2, entries * wide * int64_t(sizeof(T))));
    T* const outputs = static_cast<T*>(scratch(3, entries * e.hidden * int64_t(sizeof(T))));

    auto each_expert = [&](const auto& product, int64_t k) {
        Parts<T> all{reinterpret_cast<Part<T>*>(memory)};
        for (int64_t i = 0; i < e.experts; i++) {
            const int64_t start = order.starts[i], size = order.starts[i + 1] - start;
            if (size) all.add(product(i, start, size), packed + start * x_row(k), 1);
        }
        return all;
    };
    const Parts<T> first = each_expert(
        [&](int64_t i, int64_t start, int64_t size) {
            return Product<T>{e.x, e.x_stride, order.tokens + start, of_expert(e.gate_up, wide, i), nullptr,
                              hidden + start * wide, size, wide};
        },
        e.hidden);
    pack_parts(first, [](const Product<T>&, int64_t, int64_t) {});
    multiply_parts(first);
    const Parts<T> second = each_expert(
        [&](int64_t i, int64_t start, int64_t size) {
            return Product<T>{hidden + start * wide, wide, nullptr, of_expert(e.down, e.hidden, i), nullptr,
                              outputs + start * e.hidden, size, e.hidden};
        },
        e.inner);
    pack_parts(second, [&](const Product<T>& p, int64_t row, int64_t size) {
        for (T* gate = const_cast<T*>(p.x) + row * wide; size > 0; size--, gate += wide) {
            silu_and_mul_row(gate, gate + e.inner, gate, e.inner);
        }
    });
    multiply_parts(second);
    add_outputs(e, order, outputs);
}
