// Computes the softmax over the expert logits of one token and chooses the `top_k` experts with the largest logits. If
// experts have equal logits, the expert with the lower id is chosen first. memory: [experts + WIDTH] floats of scratch.
template <class T>
void route_row(const T* logits, int64_t experts, int64_t top_k, float* weights, int32_t* ids, float* memory) {
    for (int64_t e = 0; e < experts; e += WIDTH)
        store(memory + e, take(logits + e, experts - e < WIDTH ? experts - e : WIDTH));
    float maximum = memory[0];
    for (int64_t e = 1; e < experts; e++) maximum = memory[e] > maximum ? memory[e] : maximum;
    Vec weight_sum = set(0);
    for (int64_t e = 0; e < experts; e += WIDTH) {
        const int64_t n = experts - e < WIDTH ? experts - e : WIDTH;
        const Vec weight = exp(load(memory + e, n) - set(maximum));
        store(memory + e, weight);
        weight_sum = weight_sum + load(memory + e, n);
    }
    const float sum_of_all = sum(weight_sum);
    for (int64_t k = 0; k < top_k; k++) {
        // Experts are compared by logit and not by softmax weight, because two different logits can give the same
        // weight after rounding.
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            bool taken = false;
            for (int64_t i = 0; i < k; i++) taken |= ids[i] == e;
            if (!taken && (best < 0 || to_float(logits[e]) > to_float(logits[best]))) best = e;
        }
        ids[k] = int32_t(best);
        weights[k] = memory[best] / sum_of_all;
    }
}
