// The struct `ConvWindow` finds the input rows of the convolution for one sequence. Rows of the current call are read
// from x. The convolution also needs a few rows of earlier calls, which are read from the sequence's convolution state.
// The pointers begin at the first channel that the caller needs.
template <class T>
struct ConvWindow {
    const T* x;  // x points to the sequence's first row in the current call.
    int64_t x_stride;
    // history: the sequence's convolution state [history_rows, channels], or null if the sequence has no state yet
    const T* history;
    int64_t history_rows, channels;

    // Returns the address of input row `row`. Row 0 is the first row of the current call, and negative rows are read
    // from the convolution state. Returns null if the sequence has no state yet and `row` is negative: such a row is
    // all zeros.
    INLINE const T* at(int64_t row) const {
        if (row >= 0) return x + row * x_stride;
        return history ? history + (history_rows + row) * channels : nullptr;
    }

    INLINE ConvWindow from_channel(int64_t c) const {
        return {x + c, x_stride, history ? history + c : nullptr, history_rows, channels};
    }

    // Writes to `to` the convolution state after the first `rows` rows of the current call, for n channels. The
    // argument `to` is allowed to be `history` itself, because the rows are copied in ascending order and every row of
    // `history` is copied to a lower address.
    INLINE void save(T* to, int64_t rows, int64_t n) const {
        for (int64_t j = 0; j < history_rows; j++) {
            const T* from = at(rows - history_rows + j);
            if (from) std::memcpy(to + j * channels, from, n * sizeof(T));
            else std::memset(to + j * channels, 0, n * sizeof(T));
        }
    }
};

// Computes the output rows `begin` to `end` - 1 of one sequence for the channels `channel` to `channel` + n - 1. The
// arguments `window` and `out` begin at channel `channel`. W is the number of taps of the convolution if this number is
// known at compile time, otherwise 0.
template <int W, class T>
INLINE void convolve(const ConvArguments<T>& a, const ConvWindow<T>& window, int64_t begin, int64_t end,
                     int64_t channel, int64_t n, T* out) {
    const int64_t width = W ? W : a.width;
    Vec taps[W ? W : 1];
    for (int i = 0; i < W; i++) taps[i] = take(a.weight + i * a.channels + channel, n);
    const Vec bias = a.bias ? take(a.bias + channel, n) : set(0);
    for (int64_t t = begin; t < end; t++) {
        Vec total = set(0);
        for (int64_t i = 0; i < width; i++) {
            const T* const from = window.at(t - (width - 1) + i);
            const Vec tap = W ? taps[W ? i : 0] : take(a.weight + i * a.channels + channel, n);
            total = fma(from ? take(from, n) : set(0), tap, total);
        }
        put(out + t * a.channels, silu(total + bias), n);
    }
}

// Computes the convolution of all sequences for the channels `first` to `last` - 1.
template <class T>
void convolve_piece(const ConvArguments<T>& a, int64_t first, int64_t last) {
    for (int64_t i = 0; i < a.segments.count; i++) {
        const int64_t row = a.segments.begin(i), rows = a.segments.end(i) - row;
        T* const state = a.state + a.segments.state_ids[i] * a.state_stride + first;
        const ConvWindow<T> window{a.x + row * a.x_stride + first, a.x_stride,
                                   a.segments.continues(i) ? state : nullptr, a.width - 1, a.channels};
        for (int64_t t = 0; t < rows; t += AHEAD) {
            const int64_t stop = t + AHEAD < rows ? t + AHEAD : rows;
            for (int64_t channel = first; channel < last; channel += WIDTH) {
                const int64_t n = last - channel < WIDTH ? last - channel : WIDTH;
                const ConvWindow<T> part = window.from_channel(channel - first);
                T* const out = a.out + row * a.channels + channel;
                if (a.width == 4) convolve<4>(a, part, t, stop, channel, n, out);
                else convolve<0>(a, part, t, stop, channel, n, out);
            }
        }
        for (int64_t j = a.segments.first_save(i); j < a.segments.last_save(i); j++) {
            T* const slot = a.state + a.segments.save_slots[j] * a.state_stride + first;
            window.save(slot, a.segments.save_rows[j] + 1 - row, last - first);
        }
        window.save(state, rows, last - first);
    }
}

template <class T>
void convolve_all(const ConvArguments<T>& a) {
    const int64_t width = piece_channels(a.channels, WIDTH), rows = a.segments.end(a.segments.count - 1);
    parallel_for((a.channels + width - 1) / width, 1 + MIN_PIECE * WIDTH / (rows * width + 1),
                 [&](int64_t i, int64_t end) {
                     for (; i < end; i++)
                         convolve_piece(a, i * width, (i + 1) * width < a.channels ? (i + 1) * width : a.channels);
                 });
}
