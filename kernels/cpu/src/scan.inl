// This file computes the selective scan. Each lane of a vector is a channel, so no sum crosses lanes, and a channel can
// have any number of states. A group is WIDTH neighbouring channels. The decay rates and the states of a group are
// transposed to [states, WIDTH]. If the number of states is known at compile time, the states stay in registers from
// row to row. A piece of work has several neighbouring groups. A thread computes AHEAD rows of all groups of its piece,
// one group after another, before the thread computes the next AHEAD rows. The reason is that the inputs of
// neighbouring groups are adjacent in memory.
//
// In decode, with one row per sequence, the transposition would take most of the time. Therefore another layout is used
// in decode if a channel has as many states as a vector has lanes: a vector has all states of one channel. In this
// layout, only the sums over states cross lanes, and these sums have the same order as with one channel per lane.

// The function `to_lanes` transposes the states of n channels, [n, states], to [states, WIDTH], with zeros in the lanes
// from n on. The function `from_lanes` transposes [states, WIDTH] back to [n, states].
INLINE void to_lanes(const float* from, float* to, int64_t states, int64_t n) {
    if (states == 16 && n == 16 && WIDTH == 16) return transpose16(from, to);
    for (int64_t i = 0; i < WIDTH; i++) {
        for (int64_t s = 0; s < states; s++) to[s * WIDTH + i] = i < n ? from[i * states + s] : 0.0f;
    }
}
INLINE void from_lanes(const float* from, float* to, int64_t states, int64_t n) {
    if (states == 16 && n == 16 && WIDTH == 16) return transpose16(from, to);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t s = 0; s < states; s++) to[i * states + s] = from[s * WIDTH + i];
    }
}

// Computes one row of the scan for WIDTH channels, one channel per lane: h = exp(dt * a) * h + drive * b, where `drive`
// is dt * u. Returns the sum of h * c over the states. `step` is dt / ln 2, so that exp(dt * a) is 2^(step * a). The
// function `state_step` computes the same formula with one state per lane.
template <int S>
INLINE Vec scan_step(Vec* h, const float* a, Vec step, Vec drive, const float* b, const float* c, int64_t states) {
    constexpr int LOCKSTEP = S % 4 == 0 && S > 0 ? 4 : 1;
    Vec sums[S ? S / LOCKSTEP : 1];
    for (Vec& total : sums) total = set(0);
#pragma GCC unroll 4
    for (int64_t s = 0; s < (S ? S : states); s += LOCKSTEP) {
        Vec decay[LOCKSTEP], part[LOCKSTEP];
        for (int i = 0; i < LOCKSTEP; i++) decay[i] = step * load(a + (s + i) * WIDTH);
        exp2_below_one<LOCKSTEP>(decay, decay);
        for (int i = 0; i < LOCKSTEP; i++) h[s + i] = fma(decay[i], h[s + i], drive * set(b[s + i]));
        for (int i = 0; i < LOCKSTEP; i++) part[i] = h[s + i] * set(c[s + i]);
        if constexpr (S % 4 == 0 && S > 0) sums[s / 4] = (part[0] + part[2]) + (part[1] + part[3]);
        else sums[0] = sums[0] + part[0];
    }
    if constexpr (S == 16) return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int s = 1; s < S / LOCKSTEP; s++) sums[0] = sums[0] + sums[s];
    return sums[0];
}

// Computes one row of the scan for N channels, where a vector has the WIDTH states of one channel. h, a: [N, WIDTH].
// The vector parts[i] receives the products h * c of channel i. The caller then adds the lanes of parts[i] with the
// function `sums`, in the same order as the function `scan_step` adds the states.
template <int N>
INLINE void state_step(float* h, const float* a, const float* step, const float* drive, Vec b, Vec c, Vec* parts) {
    Vec decay[N];
    for (int i = 0; i < N; i++) decay[i] = set(step[i]) * load(a + i * WIDTH);
    exp2_below_one<N>(decay, decay);
    for (int i = 0; i < N; i++) {
        const Vec next = fma(decay[i], load(h + i * WIDTH), set(drive[i]) * b);
        store(h + i * WIDTH, next);
        parts[i] = next * c;
    }
}

// Computes rows `begin` to `end` - 1, at most AHEAD rows, for the channels `channel` to `channel` + n - 1. b, c: [end -
// begin, states]. The first loop prepares the inputs of all rows, and the last loop computes the outputs of all rows.
// In these two loops, no row depends on another row, so the processor can compute several rows at once.
template <int S, class T>
INLINE void scan_group(const ScanArguments<T>& a, const float* rates, Vec* h, int64_t begin, int64_t end,
                       int64_t channel, int64_t n, const float* b, const float* c) {
    const int64_t states = S ? S : a.states;
    const Vec dt_bias = take(a.dt_bias + channel, n), d = take(a.d + channel, n);
    Vec dt[AHEAD], u[AHEAD], y[AHEAD];
    for (int64_t t = begin; t < end; t++) {
        u[t - begin] = take(a.u + t * a.u_stride + channel, n);
        dt[t - begin] = softplus(take(a.dt + t * a.dt_stride + channel, n) + dt_bias);
    }
    for (int64_t i = 0; i < end - begin; i++) {
        const Vec step = dt[i] * set(PER_LN_2);
        y[i] = scan_step<S>(h, rates, step, dt[i] * u[i], b + i * states, c + i * states, states);
    }
    for (int64_t t = begin; t < end; t++) {
        const Vec gate = silu(take(a.z + t * a.z_stride + channel, n));
        put(a.out + t * a.channels + channel, fma(d, u[t - begin], y[t - begin]) * gate, n);
    }
}

// Computes row t for the channels `channel` to `channel` + n - 1, where each channel has WIDTH states. The states are
// updated in place.
template <class T>
INLINE void scan_row(const ScanArguments<T>& a, int64_t t, float* state, int64_t channel, int64_t n) {
    alignas(64) float steps[WIDTH], drives[WIDTH], totals[WIDTH];
    const Vec u = take(a.u + t * a.u_stride + channel, n), d = take(a.d + channel, n);
    const Vec dt = softplus(take(a.dt + t * a.dt_stride + channel, n) + take(a.dt_bias + channel, n));
    store(steps, dt * set(PER_LN_2)), store(drives, dt * u);
    const Vec b = load(a.b + t * a.b_stride), c = load(a.c + t * a.c_stride);
    float* const h = state + channel * WIDTH;
    const float* const rates = a.a + channel * WIDTH;
    Vec parts[SUMS];
    if (n == WIDTH) {
        for (int64_t i = 0; i < SUMS; i += 4) {
            state_step<4>(h + i * WIDTH, rates + i * WIDTH, steps + i, drives + i, b, c, parts + i);
        }
    } else {
        for (Vec& part : parts) part = set(0);
        for (int64_t i = 0; i < n; i++) {
            state_step<1>(h + i * WIDTH, rates + i * WIDTH, steps + i, drives + i, b, c, parts + i);
        }
    }
    sums(parts, totals);
    const Vec gate = silu(take(a.z + t * a.z_stride + channel, n));
    put(a.out + t * a.channels + channel, fma(d, u, load(totals)) * gate, n);
}

// Converts rows of the matrix B or C of the scan, [rows, states], to float32.
template <class T>
INLINE void widen_projection(const T* from, int64_t stride, int64_t rows, int64_t states, float* to) {
    for (int64_t t = 0; t < rows; t++) {
        for (int64_t s = 0; s < states; s += WIDTH) {
            const int64_t n = states - s < WIDTH ? states - s : WIDTH;
            store(to + t * states + s, take(from + t * stride + s, n), n);
        }
    }
}

// The struct `ScanPiece` is a piece of work: the channels `first` to `last` - 1 of all sequences. The struct also has
// scratch memory for the states of these channels.
template <class T>
struct ScanPiece {
    const ScanArguments<T>& a;
    int64_t first, last;
    float *rates, *h;  // rates and h are scratch memory: [groups, states, WIDTH]
    float *b, *c;      // b and c are scratch memory: [AHEAD, states]

    // Calls f(first channel, number of channels, offset of the group in `rates` and `h`) for each group of WIDTH
    // channels.
    template <class F>
    INLINE void groups(const F& f) const {
        for (int64_t channel = first; channel < last; channel += WIDTH) {
            f(channel, last - channel < WIDTH ? last - channel : WIDTH, (channel - first) * a.states);
        }
    }

    void load_state(int64_t sequence) const {
        if (!a.segments.continues(sequence)) {
            std::memset(h, 0, (last - first + WIDTH - 1) / WIDTH * WIDTH * a.states * sizeof(float));
            return;
        }
        const float* const state = a.state + a.segments.state_ids[sequence] * a.state_stride;
        groups(
            [&](int64_t channel, int64_t n, int64_t at) { to_lanes(state + channel * a.states, h + at, a.states, n); });
    }

    void prefetch(const float* memory, int64_t channel, int64_t n) const {
        for (int64_t i = 0; i < n * a.states; i += 16) __builtin_prefetch(memory + channel * a.states + i);
    }

    void prefetch_state(int64_t slot) const { prefetch(a.state + slot * a.state_stride, first, last - first); }

    void save_state(int64_t slot) const {
        float* const state = a.state + slot * a.state_stride;
        groups([&](int64_t channel, int64_t n, int64_t at) {
            from_lanes(h + at, state + channel * a.states, a.states, n);
        });
    }

    template <int S>
    void run(int64_t begin, int64_t end) const {
        for (int64_t t = begin; t < end; t += AHEAD) {
            const int64_t stop = t + AHEAD < end ? t + AHEAD : end;
            widen_projection(a.b + t * a.b_stride, a.b_stride, stop - t, a.states, b);
            widen_projection(a.c + t * a.c_stride, a.c_stride, stop - t, a.states, c);
            groups([&](int64_t channel, int64_t n, int64_t at) {
                if constexpr (S > 0) {
                    Vec state[S];
                    for (int s = 0; s < S; s++) state[s] = load(h + at + s * WIDTH);
                    scan_group<S>(a, rates + at, state, t, stop, channel, n, b, c);
                    for (int s = 0; s < S; s++) store(h + at + s * WIDTH, state[s]);
                } else {
                    scan_group<S>(a, rates + at, (Vec*)(h + at), t, stop, channel, n, b, c);
                }
            });
        }
    }

    // Computes one row of each sequence. Every sequence must have a state, and every channel must have WIDTH states.
    void single_rows() const {
        prefetch(a.a, first, last - first);
        prefetch_state(a.segments.state_ids[0]);
        for (int64_t i = 0; i < a.segments.count; i++) {
            float* const state = a.state + a.segments.state_ids[i] * a.state_stride;
            const bool more = i + 1 < a.segments.count;
            const float* const next = a.state + (more ? a.segments.state_ids[i + 1] * a.state_stride : 0);
            for (int64_t channel = first; channel < last; channel += WIDTH) {
                const int64_t n = last - channel < WIDTH ? last - channel : WIDTH;
                if (more) prefetch(next, channel, n);
                scan_row(a, i, state, channel, n);
            }
        }
    }

    template <int S>
    void all_sequences() const {
        groups([&](int64_t channel, int64_t n, int64_t at) {
            to_lanes(a.a + channel * a.states, rates + at, a.states, n);
        });
        for (int64_t i = 0; i < a.segments.count; i++) {
            load_state(i);
            if (i + 1 < a.segments.count) prefetch_state(a.segments.state_ids[i + 1]);
            int64_t row = a.segments.begin(i);
            for (int64_t j = a.segments.first_save(i); j < a.segments.last_save(i); j++) {
                run<S>(row, a.segments.save_rows[j] + 1);
                save_state(a.segments.save_slots[j]);
                row = a.segments.save_rows[j] + 1;
            }
            run<S>(row, a.segments.end(i));
            save_state(a.segments.state_ids[i]);
        }
    }
};

template <class T>
void scan_all(const ScanArguments<T>& a) {
    const int64_t width = piece_channels(a.channels, WIDTH), rows = a.segments.end(a.segments.count - 1);
    parallel_for(
        (a.channels + width - 1) / width, 1 + MIN_PIECE * WIDTH / (rows * width + 1), [&](int64_t i, int64_t end) {
            const int64_t block = width * a.states;
            float* const memory = (float*)scratch(0, (2 * block + 2 * AHEAD * a.states) * sizeof(float));
            for (; i < end; i++) {
                const int64_t first = i * width, last = first + width < a.channels ? first + width : a.channels;
                const ScanPiece<T> piece{
                    a, first, last, memory, memory + block, memory + 2 * block, memory + 2 * block + AHEAD * a.states};
                if (a.states == SUMS && WIDTH == SUMS && !a.segments.query_start) piece.single_rows();
                else if (a.states == 16) piece.template all_sequences<16>();
                else piece.template all_sequences<0>();
            }
        });
}
