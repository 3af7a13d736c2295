// This file runs a layer of experts. Each expert runs once per step, on all tokens that chose this expert, so that the
// expert's weights are read only once per step.

template <class T>
void mix_experts(const Experts<T>& e) {
    const int64_t entries = e.tokens * e.top_k, wide = 2 * e.inner, first_row = x_row(e.gate_up);
    const int64_t row = first_row > x_row(e.down) ? first_row : x_row(e.down);
    auto of_expert = [](Weights all, int64_t n, int64_t i) {
        all.panels += i * ceil_div(n, PANEL) * panel_bytes<T>(all);
        return all;
    };
    const int64_t parts_bytes = (e.experts < entries ? e.experts : entries) * int64_t(sizeof(Part<T>));
    auto* const memory = static_cast<char*>(scratch(1, parts_bytes + (2 * entries + e.experts + 1) * 4));
    const Order order = sort_entries(e, reinterpret_cast<int32_t*>(memory + parts_bytes));
    auto* const packed = static_cast<PackedX*>(scratch(0, entries * row * 4));
    T* const hidden = static_cast<T*>(scratch(2, entries * wide * int64_t(sizeof(T))));
    void* const outputs = scratch(3, entries * e.hidden * int64_t(e.sums ? sizeof(float) : sizeof(T)));

    auto each_expert = [&](const auto& product, const Weights& weights) {
        Parts<T> all{reinterpret_cast<Part<T>*>(memory)};
        for (int64_t i = 0; i < e.experts; i++) {
            const int64_t start = order.starts[i], size = order.starts[i + 1] - start;
            if (size) all.add(product(i, start, size), packed + start * x_row(weights), 1);
        }
        return all;
    };
    const Parts<T> first = each_expert(
        [&](int64_t i, int64_t start, int64_t size) {
            return Product<T>{e.x, e.x_stride, order.tokens + start, of_expert(e.gate_up, wide, i), nullptr,
                              hidden + start * wide, wide, size, wide};
        },
        e.gate_up);
    pack_parts(first, [](const Product<T>&, int64_t, int64_t) {});
    multiply_parts(first);
    const Parts<T> second = each_expert(
        [&](int64_t i, int64_t start, int64_t size) {
            const int64_t first = start * e.hidden;
            return Product<T>{hidden + start * wide, wide, nullptr, of_expert(e.down, e.hidden, i), nullptr,
                              e.sums ? nullptr : static_cast<T*>(outputs) + first, e.hidden, size, e.hidden,
                              e.sums ? static_cast<float*>(outputs) + first : nullptr};
        },
        e.down);
    pack_parts(second, [&](const Product<T>& p, int64_t row, int64_t size) {
        for (T* gate = const_cast<T*>(p.x) + row * wide; size > 0; size--, gate += wide) {
            silu_and_mul_row(gate, gate + e.inner, gate, e.inner);
        }
    });
    multiply_parts(second);
    if (e.sums) return add_sums<T>(e, order, static_cast<const float*>(outputs));
    add_outputs(e, order, static_cast<const T*>(outputs));
}
