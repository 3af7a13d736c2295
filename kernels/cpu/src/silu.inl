// Computes silu(gate) * up for one row. silu(gate) is rounded to T before it is multiplied by `up`.
template <class T>
void silu_and_mul_row(const T* gate, const T* up, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += WIDTH) {
        const int64_t n = size - i < WIDTH ? size - i : WIDTH;
        alignas(64) T rounded[WIDTH];
        store(rounded, silu(load(gate + i, n)));
        store(out + i, load(rounded) * load(up + i, n), n);
    }
}

template <class T>
void silu_and_mul(const T* x, T* out, int64_t rows, int64_t size, int64_t stride) {
    parallel_for(rows, 1 + 8192 / (size + 1), [=](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) {
            silu_and_mul_row(x + t * stride, x + t * stride + size, out + t * size, size);
        }
    });
}
