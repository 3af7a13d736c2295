// This file runs a layer of experts with 8-bit activations, as `experts.inl` does with the model's dtype.

template <class T>
void a8_mix_experts(const A8Experts<T>& e) {
    const int64_t entries = e.tokens * e.top_k, wide = 2 * e.inner;
    const A8Layout first_layout(*e.gate_up), second_layout(*e.down);
    const int64_t first_row = A8Parts<T>::row_bytes(*e.gate_up, first_layout);
    const int64_t second_row = A8Parts<T>::row_bytes(*e.down, second_layout);
    const int64_t parts_bytes = (e.experts < entries ? e.experts : entries) * int64_t(sizeof(A8Part<T>));
    auto* const memory = static_cast<char*>(scratch(1, parts_bytes + (2 * entries + e.experts + 1) * 4));
    const Order order = sort_entries(e, reinterpret_cast<int32_t*>(memory + parts_bytes));
    auto* const quantized = static_cast<char*>(scratch(0, entries * (first_row > second_row ? first_row : second_row)));
    T* const hidden = static_cast<T*>(scratch(2, entries * wide * int64_t(sizeof(T))));
    T* const outputs = static_cast<T*>(scratch(3, entries * e.hidden * int64_t(sizeof(T))));

    auto each_expert = [&](const A8Weights& w, const A8Layout& l, int64_t row, const auto& product) {
        A8Parts<T> all{w, reinterpret_cast<A8Part<T>*>(memory)};
        for (int64_t i = 0; i < e.experts; i++) {
            const int64_t start = order.starts[i], size = order.starts[i + 1] - start;
            const uint8_t* const panels = w.panels + i * ceil_div(w.n, PANEL) * l.panel_bytes;
            if (size) all.add(product(panels, start, size), l, quantized + start * row, 1);
        }
        return all;
    };
    const auto first = each_expert(
        *e.gate_up, first_layout, first_row, [&](const uint8_t* panels, int64_t start, int64_t size) {
            return A8Product<T>{e.x, e.x_stride, order.tokens + start, e.gate_up, panels, nullptr, hidden + start * wide,
                                wide, size};
        });
    first.quantize(first_layout, [](const A8Product<T>&, int64_t, int64_t) {});
    first.multiply(first_layout);
    const auto second = each_expert(
        *e.down, second_layout, second_row, [&](const uint8_t* panels, int64_t start, int64_t size) {
            return A8Product<T>{hidden + start * wide, wide, nullptr, e.down, panels, nullptr,
                                outputs + start * e.hidden, e.hidden, size};
        });
    second.quantize(second_layout, [&](const A8Product<T>& p, int64_t row, int64_t size) {
        for (T* gate = const_cast<T*>(p.x) + row * wide; size > 0; size--, gate += wide) {
            silu_and_mul_row(gate, gate + e.inner, gate, e.inner);
        }
    });
    second.multiply(second_layout);
    add_outputs<T>(e, order, outputs);
}
