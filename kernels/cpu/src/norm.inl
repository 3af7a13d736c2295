// Computes RMSNorm of one row. First, summed = x + residual is rounded to T. Then normed = summed / rms * weight, where
// rms is sqrt(mean(summed^2) + eps), and summed / rms is rounded to T before the multiplication by the weight. If
// `residual` is null, x is used in place of summed.
template <class T>
void rms_norm_row(const T* x, const T* residual, const T* weight, float eps, T* normed, T* summed, int64_t size) {
    Vec squares[4] = {set(0), set(0), set(0), set(0)};
    for (int64_t i = 0; i < size; i += WIDTH) {
        const int64_t n = size - i < WIDTH ? size - i : WIDTH;
        Vec v = take(x + i, n);
        if (residual) {
            v = rounded<T>(v + take(residual + i, n));
            put(summed + i, v, n);
        }
        Vec& part = squares[i / WIDTH % 4];
        part = fma(v, v, part);
    }
    const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(size);
    const Vec scale = set(1.0f / __builtin_sqrtf(mean + eps));
    const T* const input = residual ? summed : x;
    for (int64_t i = 0; i < size; i += WIDTH) {
        const int64_t n = size - i < WIDTH ? size - i : WIDTH;
        put(normed + i, rounded<T>(take(input + i, n) * scale) * take(weight + i, n), n);
    }
}
