// Sets logit i to minus infinity unless bit i of `allowed` is 1, for each i below `n`, which is at most 32.
INLINE void forbid_word(float* logits, uint32_t allowed, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        logits[i] = (allowed >> i) & 1 ? logits[i] : -std::numeric_limits<float>::infinity();
    }
}

// Sets logit i to minus infinity unless bit i of `masks` is 1, for each i below `size`. Each word of `masks` has 32
// bits, the lowest bit first.
inline void forbid(float* logits, const uint32_t* masks, int64_t size) {
    int64_t v = 0;
    for (; v + 32 <= size; v += 32) {
        if (masks[v / 32] != ~uint32_t(0)) forbid_word(logits + v, masks[v / 32], 32);
    }
    if (v < size) forbid_word(logits + v, masks[v / 32], size - v);
}
