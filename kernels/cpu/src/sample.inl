// The struct `Uniform` has a vector of random numbers u, uniformly distributed in (0, 1). Where u is below 1/2, `upper`
// is 0 and `ends` is u. Elsewhere `upper` is 1 and `ends` is 1 - u, because float32 cannot represent a u close to 1
// precisely.
struct Uniform {
    Vec ends, upper;
};

// Returns one uniform random number for each of the WIDTH tokens whose token ids are id(0) to id(WIDTH - 1). The tokens
// are candidates for one row of logits, and `key` is the random key of this row. As in `kernels/reference/sample.py`,
// the random number of the token with id i is made from output number i of the generator SplitMix64.
template <class F>
INLINE Uniform uniform(uint64_t key, const F& id) {
    // Each arithmetic operation has a loop of its own, so that the compiler can vectorise the loop.
    alignas(64) uint64_t bits[WIDTH];
    alignas(64) int64_t numbers[WIDTH];
    alignas(64) float ends[WIDTH], upper[WIDTH];
    for (int64_t i = 0; i < WIDTH; i++) bits[i] = key + uint64_t(id(i) + 1) * 0x9E3779B97F4A7C15u;
    for (int64_t i = 0; i < WIDTH; i++) bits[i] = (bits[i] ^ bits[i] >> 30) * 0xBF58476D1CE4E5B9u;
    for (int64_t i = 0; i < WIDTH; i++) bits[i] = (bits[i] ^ bits[i] >> 27) * 0x94D049BB133111EBu;
    for (int64_t i = 0; i < WIDTH; i++) numbers[i] = int64_t((bits[i] ^ bits[i] >> 31) >> 12);
    for (int64_t i = 0; i < WIDTH; i++) upper[i] = float(numbers[i] >> 51);
    for (int64_t i = 0; i < WIDTH; i++) numbers[i] ^= -(numbers[i] >> 51) & ((int64_t(1) << 52) - 1);
    for (int64_t i = 0; i < WIDTH; i++) ends[i] = (float(numbers[i]) + 0.5f) * 0x1p-52f;
    return {load(ends), load(upper)};
}

// Returns standard Gumbel noise, -ln(-ln u), in float32. The noise differs from the noise of
// `kernels/reference/sample.py` by about 1e-6. Where u is above 1/2, the noise is computed from 1 - u, because float32
// cannot represent a u close to 1 precisely.
INLINE Vec gumbel_noise(const Uniform& u) {
    // Let x be 1 - u, and v be 1 - x rounded to float32. Then ln(1 - x) is ln(v) + (1 - x - v) / v, except for terms of
    // second order in the rounding error 1 - x - v.
    const Vec one = set(1.0f), half = set(0.5f), v = one - u.ends;
    const Vec known = where_greater(u.upper, half, v, u.ends);
    const Vec lost = where_greater(u.upper, half, ((one - v) - u.ends) / v, set(0.0f));
    return set(0.0f) - log(set(0.0f) - (log(known) + lost));
}

// Returns an upper bound of the Gumbel noise -ln(-ln u) without computing a logarithm. For u above 1/2, the returned
// number is an upper bound of -ln(1 - u), which is larger than the noise, and exceeds the noise by at most 0.93. For u
// below 1/2, the noise is less than 0.367, and 0.37 is returned.
INLINE Vec noise_bound(const Uniform& u) {
    Vec m, e;
    split(u.ends, m, e);  // Here 1 - u = m * 2^e. Because m >= 3/4, -ln(1 - u) <= -e * ln 2 - ln(3/4).
    return where_greater(u.upper, set(0.5f), fma(e, set(-0.6931472f), set(0.289f)), set(0.37f));
}

// Returns the position of the largest score: the first such position if several scores are equally large, and 0 if no
// score is above -infinity. The function `score(i, n)` returns the scores at positions i to i + n - 1. Positions with
// the score NaN or -infinity are ignored.
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

// Replaces the elements of x after the first n by -infinity. A masked load sets these elements to zero, and zero could
// be larger than all scores.
INLINE Vec only_first(Vec x, int64_t n) {
    if (n == WIDTH) return x;
    alignas(64) float v[WIDTH];
    store(v, x);
    for (int64_t i = n; i < WIDTH; i++) v[i] = -__builtin_inff();
    return load(v);
}

// The struct `Tokens` is a list of tokens of a row, in ascending order of their ids. The score of a token is (logit -
// largest logit of the row) / temperature, so no score is above 0. The array `masses` is used for top-p only, and has
// exp(score) of each token.
struct Tokens {
    int64_t count;
    int32_t* ids;
    float *scores, *masses;
};

// Returns an integer key by which scores are compared: a larger score has a smaller key. The score must not be above 0.
INLINE uint32_t rank_key(float score) { return to_bits(score) & 0x7fffffff; }

// Keeps the tokens with the largest scores, at most `most` tokens. If `by_mass` is true, no more tokens are kept than
// are needed for the sum of their masses to reach `mass`. Of tokens with equal scores, those with lower token ids are
// kept first. The tokens are not sorted. Instead, the integer key (see the function `rank_key`) of the lowest kept
// score is found digit by digit, from the highest digit on. bins: [BINS]; places: [count].
INLINE void keep_best(Tokens& tokens, int64_t most, double mass, bool by_mass, Bin* bins, int32_t* places) {
    // The limit is the integer key of the lowest kept score. At the start of each iteration, the digits of the limit
    // from bit `shift + DIGIT_BITS` on are known; in the first iteration, no digit is known. `count` is the number of
    // tokens whose keys have the same known digits as the limit. `done` is the number of tokens whose keys are smaller
    // than the limit in these digits. The scores of these `done` tokens are larger than the lowest kept score, so all
    // these tokens are kept.
    int64_t count = tokens.count, done = 0;
    double mass_done = 0;
    for (int64_t i = 0; i < count; i++) places[i] = int32_t(i);
    for (int shift = 2 * DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        auto digit = [&](int64_t i) { return rank_key(tokens.scores[places[i]]) >> shift & (BINS - 1); };
        for (int64_t b = 0; b < BINS; b++) bins[b] = {0, 0};
        for (int64_t i = 0; i < count; i++) {
            Bin& bin = bins[digit(i)];
            bin.count++;
            if (by_mass) bin.mass += double(tokens.masses[places[i]]);
        }
        int64_t cut = -1;
        for (int64_t b = 0; b < BINS; b++) {
            if (!bins[b].count) continue;
            if (cut >= 0) done += bins[cut].count, mass_done += bins[cut].mass;
            cut = b;
            if (done + bins[b].count >= most || (by_mass && mass_done + bins[b].mass >= mass)) break;
        }
        int64_t left = 0;
        for (int64_t i = 0; i < count; i++) {
            if (digit(i) == cut) places[left++] = places[i];
        }
        count = left;
    }
    const uint32_t key = rank_key(tokens.scores[places[0]]);
    int64_t ties = 0;
    do {
        if (by_mass) mass_done += double(tokens.masses[places[ties]]);
        ties++;
    } while (ties < count && done + ties < most && !(by_mass && mass_done >= mass));
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens.count; i++) {
        const uint32_t here = rank_key(tokens.scores[i]);
        if (here > key || (here == key && ties-- <= 0)) continue;
        tokens.ids[kept] = tokens.ids[i], tokens.scores[kept] = tokens.scores[i], kept++;
    }
    tokens.count = kept;
}

// Returns the tokens of a row that remain after filtering by top-k and then by top-p. `best` is the row's largest
// logit.
INLINE Tokens filtered(const SampleRow& row, Vec best) {
    const int64_t whole = (row.size + WIDTH - 1) / WIDTH * WIDTH;
    auto* const memory = static_cast<int32_t*>(scratch(0, whole * 4 * sizeof(int32_t)));
    Bin* const bins = static_cast<Bin*>(scratch(1, BINS * sizeof(Bin)));
    Tokens tokens{row.size, memory, (float*)memory + whole, (float*)memory + 2 * whole};
    int32_t* const places = memory + 3 * whole;
    for (int64_t i = 0; i < row.size; i++) tokens.ids[i] = int32_t(i);
    for (int64_t i = 0; i < row.size; i += WIDTH) {
        const int64_t n = row.size - i < WIDTH ? row.size - i : WIDTH;
        store(tokens.scores + i, (take(row.logits + i, n) - best) / set(row.temperature));
    }
    if (row.top_k > 0 && row.top_k < row.size) keep_best(tokens, row.top_k, 0, false, bins, places);
    if (row.top_p < 1) {
        double mass = 0;
        for (int64_t i = 0; i < tokens.count; i += WIDTH) {
            store(tokens.masses + i, exp(load(tokens.scores + i)));
        }
        for (int64_t i = 0; i < tokens.count; i++) mass += double(tokens.masses[i]);
        keep_best(tokens, tokens.count, double(row.top_p) * mass, true, bins, places);
    }
    return tokens;
}

void sample_row(const SampleRow& row, int64_t* token) {
    const int64_t greedy =
        first_largest(row.size, [&](int64_t i, int64_t n) { return only_first(take(row.logits + i, n), n); });
    *token = greedy;
    if (row.temperature == 0 || row.logits[greedy] == -__builtin_inff()) return;
    // The largest logit is subtracted from all logits, so that a division by a small temperature cannot overflow.
    const Vec best = set(row.logits[greedy]), divisor = set(row.temperature), none = set(-__builtin_inff());
    auto after_min_p = [&](Vec score) { return where_greater(set(row.least), score, none, score); };
    if (row.top_k == 0 && row.top_p >= 1) {
        float top = -__builtin_inff();
        *token = first_largest(row.size, [&](int64_t i, int64_t n) {
            const Vec score = after_min_p((take(row.logits + i, n) - best) / divisor);
            const Uniform u = uniform(row.key, [=](int64_t lane) { return i + lane; });
            // For most vectors, the upper bound of the noise shows that no token of the vector can have the largest
            // noisy score. For these vectors, the exact noise is not computed.
            if (largest(score + noise_bound(u)) < top) return none;
            const Vec noisy = only_first(score + gumbel_noise(u), n);
            const float here = largest(noisy);
            top = here > top ? here : top;
            return noisy;
        });
        return;
    }
    const Tokens tokens = filtered(row, best);
    *token = tokens.ids[first_largest(tokens.count, [&](int64_t i, int64_t n) {
        const Uniform u = uniform(row.key, [&](int64_t lane) { return lane < n ? tokens.ids[i + lane] : 0; });
        return only_first(after_min_p(take(tokens.scores + i, n)) + gumbel_noise(u), n);
    })];
}
