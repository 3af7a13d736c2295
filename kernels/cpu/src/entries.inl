// This file sorts the tokens of a step by the experts that they chose, and adds the outputs of each token's experts. The
// type E is a struct with the tokens and the experts of a layer, such as `Experts` in `gemm.h`.

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

template <class E>
Order sort_entries(const E& e, int32_t* memory) {
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
template <class T, class E>
void add_outputs(const E& e, const Order& order, const T* outputs) {
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

// Computes what `add_outputs` computes, from outputs in float32 and without rounding the products or the result to T.
// The weights are rounded to T.
template <class T, class E>
void add_sums(const E& e, const Order& order, const float* outputs) {
    parallel_for(e.tokens, ceil_div(1 << 15, e.hidden * e.top_k), [&](int64_t t, int64_t end) {
        for (; t < end; t++) {
            const int32_t* places = order.places + t * e.top_k;
            for (int64_t i = 0; i < e.hidden; i += WIDTH) {
                const int64_t n = e.hidden - i < WIDTH ? e.hidden - i : WIDTH;
                Vec total = set(0.0f);
                for (int64_t rank = 0; rank < e.top_k; rank++) {
                    const Vec weight = set(to_float(from_float<T>(e.weights[t * e.top_k + rank])));
                    const Vec part = take(outputs + places[rank] * e.hidden + i, n) * weight;
                    total = rank ? total + part : part;
                }
                put(e.sums + t * e.hidden + i, total, n);
            }
        }
    });
}
