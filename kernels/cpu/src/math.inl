// Functions of a Vec, compiled for each level by `simd.h`. An element's result does not depend on its place.

// e^x of N vectors, within 2 units in the last place; 0 below -104, infinite above 88.73, NaN for NaN. Step by step
// side by side, for the steps of one vector wait for each other.
template <int N>
INLINE void exp(const Vec* x, Vec* y) {
    // Cephes expf, highest power first, for r within +-0.35
    constexpr float COEFFICIENTS[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Vec n[N], r[N], p[N];
    for (int i = 0; i < N; i++) r[i] = min(set(89.0f), max(set(-105.0f), x[i]));
    for (int i = 0; i < N; i++) n[i] = round(r[i] * set(1.44269504f));
    for (int i = 0; i < N; i++) r[i] = fma(n[i], set(-0.693359375f), r[i]);  // ln 2 in two parts; the first product is exact
    for (int i = 0; i < N; i++) r[i] = fma(n[i], set(2.12194440e-4f), r[i]);
    for (int i = 0; i < N; i++) p[i] = set(1.9875691500e-4f);
    for (const float coefficient : COEFFICIENTS) {
        for (int i = 0; i < N; i++) p[i] = fma(p[i], r[i], set(coefficient));
    }
    for (int i = 0; i < N; i++) y[i] = scale(fma(p[i], r[i] * r[i], r[i]) + set(1.0f), n[i]);
}
INLINE Vec exp(Vec x) {
    Vec y;
    exp<1>(&x, &y);
    return y;
}

// 2^x of N vectors for x <= 0, within a unit in the last place; NaN for NaN. Half the work of `exp`.
template <int N>
INLINE void exp2_below_one(const Vec* x, Vec* y) {
    // 2^r = 1 + r * this, highest power first, for r within +-1/2: least largest relative error
    constexpr float COEFFICIENTS[] = {1.3398875017e-3f, 9.6184369177e-3f, 5.5503323674e-2f, 2.4022647738e-1f, 6.9314718246e-1f};
    Vec n[N], r[N], p[N];
    for (int i = 0; i < N; i++) r[i] = max(set(-151.0f), x[i]);  // 2^-150 is rounded to 0
    for (int i = 0; i < N; i++) n[i] = round(r[i]);
    for (int i = 0; i < N; i++) r[i] = r[i] - n[i];
    for (int i = 0; i < N; i++) p[i] = set(1.5353360504e-4f);
    for (const float coefficient : COEFFICIENTS) {
        for (int i = 0; i < N; i++) p[i] = fma(p[i], r[i], set(coefficient));
    }
    for (int i = 0; i < N; i++) y[i] = scale(fma(p[i], r[i], set(1.0f)), n[i]);
}

INLINE Vec silu(Vec x) { return x / (set(1.0f) + exp(set(0.0f) - x)); }

// ln x for positive normal x. Cephes logf.
INLINE Vec log(Vec x) {
    Vec m, e;
    split(x, m, e);
    const Vec r = m - set(1.0f), z = r * r;
    Vec p = set(7.0376836292e-2f);
    p = fma(p, r, set(-1.1514610310e-1f));
    p = fma(p, r, set(1.1676998740e-1f));
    p = fma(p, r, set(-1.2420140846e-1f));
    p = fma(p, r, set(1.4249322787e-1f));
    p = fma(p, r, set(-1.6668057665e-1f));
    p = fma(p, r, set(2.0000714765e-1f));
    p = fma(p, r, set(-2.4999993993e-1f));
    p = fma(p, r, set(3.3333331174e-1f));
    p = p * r * z;
    p = fma(e, set(-2.12194440e-4f), p);
    p = fma(z, set(-0.5f), p) + r;
    return fma(e, set(0.693359375f), p);
}

// ln(1 + e^x), and x itself above 20, where float32 knows no difference.
INLINE Vec softplus(Vec x) {
    // ln(1 + y) = ln(u) + (y - (u - 1)) / u for u = 1 + y as rounded, which mends what u has lost of a small y.
    const Vec y = exp(min(set(20.0f), x)), u = set(1.0f) + y;
    const Vec small = log(u) + (y - (u - set(1.0f))) / u;
    return where_greater(x, set(20.0f), x, small);
}

INLINE float sum(Vec x) {  // halves upon halves
    alignas(64) float v[WIDTH];
    store(v, x);
    for (int64_t half = WIDTH / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; i++) v[i] = v[i] + v[i + half];
    }
    return v[0];
}

// The first n <= WIDTH elements; the common case needs no mask.
template <class T>
INLINE Vec take(const T* p, int64_t n) {
    return n == WIDTH ? load(p) : load(p, n);
}
template <class T>
INLINE void put(T* p, Vec x, int64_t n) {
    if (n == WIDTH) store(p, x);
    else store(p, x, n);
}

// x as it is after a store to memory of type T.
template <class T>
INLINE Vec rounded(Vec x) {
    alignas(64) T memory[WIDTH];
    store(memory, x);
    return load(memory);
}
