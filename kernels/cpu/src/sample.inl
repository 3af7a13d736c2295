// Standard Gumbel noise of tokens id to id + WIDTH - 1 in the row with `key`, as `kernels/reference/sample.py` defines
// it: -ln(-ln u) with u from output number id of SplitMix64. In float32, so that it differs from the reference's by
// about 1e-6; the half above u = 1/2 is taken from its end, where the tail needs the digits.
INLINE Vec gumbel_noise(uint64_t key, int64_t id) {
    alignas(64) float ends[WIDTH], upper[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) {
        uint64_t bits = key + uint64_t(id + i + 1) * 0x9E3779B97F4A7C15u;
        bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9u;
        bits = (bits ^ bits >> 27) * 0x94D049BB133111EBu;
        const int64_t number = int64_t((bits ^ bits >> 31) >> 12), other = (int64_t(1) << 52) - 1 - number;
        ends[i] = (float(number < other ? number : other) + 0.5f) * 0x1p-52f;
        upper[i] = number < other ? 0.0f : 1.0f;
    }
    // u or, in the upper half, 1 - u is x. ln(1 - x) = ln(v) + (1 - x - v) / v for v = 1 - x as rounded.
    const Vec x = load(ends), is_upper = load(upper), one = set(1.0f), half = set(0.5f), v = one - x;
    const Vec u = where_greater(is_upper, half, v, x);
    const Vec lost = where_greater(is_upper, half, ((one - v) - x) / v, set(0.0f));
    return set(0.0f) - log(set(0.0f) - (log(u) + lost));
}

// The place of the largest score, the first of equals; 0 where none is above -infinity. score(i, n) gives those of
// elements [i, i + n), NaN or -infinity for none.
template <class F>
INLINE int64_t first_largest(int64_t size, const F& score) {
    alignas(64) float lane[WIDTH], scores[WIDTH], places[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) lane[i] = float(i);
    Vec best = set(-__builtin_inff()), place = set(0);
    for (int64_t i = 0; i < size; i += WIDTH) {
        const Vec here = score(i, size - i < WIDTH ? size - i : WIDTH);
        place = where_greater(here, best, load(lane) + set(float(i)), place);
        best = where_greater(here, best, here, best);
    }
    store(scores, best), store(places, place);
    float top = scores[0], first = places[0];
    for (int64_t i = 1; i < WIDTH; i++) {
        if (scores[i] > top || (scores[i] == top && places[i] < first)) top = scores[i], first = places[i];
    }
    return int64_t(first);
}

// -infinity behind the first n elements, which a load fills with zeros: those might be the largest.
INLINE Vec only_first(Vec x, int64_t n) {
    if (n == WIDTH) return x;
    alignas(64) float v[WIDTH];
    store(v, x);
    for (int64_t i = n; i < WIDTH; i++) v[i] = -__builtin_inff();
    return load(v);
}

// One row. least: ln(min_p), -infinity for none.
void sample_row(const float* logits, int64_t size, float temperature, float least, uint64_t key, int64_t* token) {
    const int64_t greedy =
        first_largest(size, [&](int64_t i, int64_t n) { return only_first(take(logits + i, n), n); });
    *token = greedy;
    if (temperature == 0) return;
    // Relative to the best token, so that no temperature overflows.
    const Vec best = set(logits[greedy]), divisor = set(temperature), none = set(-__builtin_inff());
    *token = first_largest(size, [&](int64_t i, int64_t n) {
        const Vec score = (take(logits + i, n) - best) / divisor;
        return only_first(where_greater(set(least), score, none, score + gumbel_noise(key, i)), n);
    });
}
