// Softmax over one row's experts and the best `top_k` of them, ties to the lower index. memory: [experts + WIDTH].
template <class T>
void route_row(const T* logits, int64_t experts, int64_t top_k, float* weights, int32_t* ids, float* memory) {
    for (int64_t e = 0; e < experts; e += WIDTH)
        store(memory + e, take(logits + e, experts - e < WIDTH ? experts - e : WIDTH));
    float peak = memory[0];
    for (int64_t e = 1; e < experts; e++) peak = memory[e] > peak ? memory[e] : peak;
    Vec total = set(0);
    for (int64_t e = 0; e < experts; e += WIDTH) {
        const int64_t n = experts - e < WIDTH ? experts - e : WIDTH;
        const Vec weight = exp(load(memory + e, n) - set(peak));
        store(memory + e, weight);
        total = total + load(memory + e, n);
    }
    const float sum_of_all = sum(total);
    for (int64_t k = 0; k < top_k; k++) {
        // By the logits, for different ones may have the same weight.
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
