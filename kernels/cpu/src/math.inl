// This file has mathematical functions that take vectors of the type `Vec`. The header `simd.h` includes this file once
// for each instruction set. The result for an element does not depend on the element's lane.

// Computes e^x of N vectors, with an error of at most 2 units in the last place. The result is 0 below x = -104,
// infinite above x = 88.73, and NaN for NaN. The steps for one vector depend on each other and would stall the
// processor, so each step is done for all N vectors before the next step.
template <int N>
INLINE void exp(const Vec* x, Vec* y) {
    // These are the coefficients of the polynomial in Cephes' expf, with the highest power first. The polynomial is
    // accurate for r from -0.35 to 0.35.
    constexpr float COEFFICIENTS[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    Vec n[N], r[N], p[N];
    for (int i = 0; i < N; i++) r[i] = min(set(89.0f), max(set(-105.0f), x[i]));
    for (int i = 0; i < N; i++) n[i] = round(r[i] * set(1.44269504f));
    // n * ln 2 is subtracted from r. For precision, ln 2 is split into two parts, so that the product of n and the
    // first part is exact.
    for (int i = 0; i < N; i++) r[i] = fma(n[i], set(-0.693359375f), r[i]);
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

// Computes 2^x of N vectors for x <= 0, with an error of at most one unit in the last place. The result is NaN for NaN.
// This function takes half as long as `exp`.
template <int N>
INLINE void exp2_below_one(const Vec* x, Vec* y) {
    // The argument x is rounded to the nearest integer n. The difference r = x - n is from -1/2 to 1/2. For such r, 2^r
    // is computed as 1 + r * polynomial(r). The coefficients minimise the largest relative error and are ordered from
    // the highest power down.
    constexpr float COEFFICIENTS[] = {1.3398875017e-3f, 9.6184369177e-3f, 5.5503323674e-2f, 2.4022647738e-1f, 6.9314718246e-1f};
    Vec n[N], r[N], p[N];
    for (int i = 0; i < N; i++) r[i] = max(set(-151.0f), x[i]);  // Below -150, 2^x is 0 in float32.
    for (int i = 0; i < N; i++) n[i] = round(r[i]);
    for (int i = 0; i < N; i++) r[i] = r[i] - n[i];
    for (int i = 0; i < N; i++) p[i] = set(1.5353360504e-4f);
    for (const float coefficient : COEFFICIENTS) {
        for (int i = 0; i < N; i++) p[i] = fma(p[i], r[i], set(coefficient));
    }
    for (int i = 0; i < N; i++) y[i] = scale(fma(p[i], r[i], set(1.0f)), n[i]);
}

INLINE Vec silu(Vec x) { return x / (set(1.0f) + exp(set(0.0f) - x)); }

// Returns ln x by the method of Cephes' logf. x must be positive and not subnormal.
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

// Returns ln(1 + e^x). For x above 20 the result is x, because ln(1 + e^x) rounds to x in float32.
INLINE Vec softplus(Vec x) {
    // The variable y is e^x, and the variable u is 1 + y rounded to float32. The term (y - (u - 1)) / u corrects the
    // rounding error of u, which matters if y is small. The error is so small that a line is exact enough for 1 / u.
    const Vec y = exp(min(set(20.0f), x)), u = set(1.0f) + y;
    const Vec inverse = max(set(0.0f), fma(u, set(-0.5f), set(1.5f)));
    const Vec small = fma(y - (u - set(1.0f)), inverse, log(u));
    return where_greater(x, set(20.0f), x, small);
}

// Returns the sum of the elements. The upper half of the elements is added to the lower half, then the upper half of
// these sums to the lower half, and so on, until one sum remains.
INLINE float sum(Vec x) {
    alignas(64) float v[WIDTH];
    store(v, x);
    for (int64_t half = WIDTH / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half; i++) v[i] = v[i] + v[i + half];
    }
    return v[0];
}

// The function `take` loads, and the function `put` stores, the first n <= WIDTH elements of a vector. The common case,
// n == WIDTH, uses no mask.
template <class T>
INLINE Vec take(const T* p, int64_t n) {
    return n == WIDTH ? load(p) : load(p, n);
}
template <class T>
INLINE void put(T* p, Vec x, int64_t n) {
    if (n == WIDTH) store(p, x);
    else store(p, x, n);
}

// Rounds x to the precision of T and returns the result as float32.
template <class T>
INLINE Vec rounded(Vec x) {
    alignas(64) T memory[WIDTH];
    store(memory, x);
    return load(memory);
}
