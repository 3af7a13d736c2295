// This file computes what the scales, offsets and zeros of a quantised weight add to a product. `gemm.h` defines where
// a panel has them. A sum over a group of inputs is multiplied by the group's scale. An offset is multiplied by the sum
// of x over the group, and a zero by the negative of this sum.

// The struct `GroupPlace` says where a tile finds the factors of a group: the addresses of the panels of the tile's
// strips, the number of the first strip, the number of the group, and the offset of the group's factors in a panel.
struct GroupPlace {
    const char* const* panels;
    int64_t strip, group, offset;
};

// With AVX-512, the registers hold the sums of a tile beside the factors of a group, so that the functions which add a
// group are inlined into the function `tile`. With AVX2 and NEON, the compiler would then keep accumulators of the loop
// before in memory, which halves the speed of that loop. The function `add_group` is therefore a function of its own
// there, and also in `portable`, where it takes less time to compile.
#if defined(LEVEL_AVX512) && !defined(LEVEL_AMX)
#define INLINE_READ INLINE
#define INLINE_GROUP INLINE
#else
#define INLINE_READ inline
#define INLINE_GROUP __attribute__((noinline))
#endif

// Reads the factors of one strip's columns, or multiplies the factors by those of the second level. `numbers` is the
// address of the factors of column 0 of the strip's panel, and `supers` that of the factors of the second level.
INLINE_READ void read_factors(Scale scale, const char* numbers, const char* supers, int64_t column, float* out) {
    for (int64_t i = column; i < column + STRIP; i += WIDTH, out += WIDTH) {
        switch (scale) {
            case Scale::f32: store(out, load((const float*)numbers + i)); break;
            case Scale::f16: store(out, load((const f16*)numbers + i)); break;
            case Scale::two_levels_unsigned:
                store(out, load((const f16*)supers + i) * float_bytes<false>(numbers + i));
                break;
            case Scale::two_levels_signed:
                store(out, load((const f16*)supers + i) * float_bytes<true>(numbers + i));
                break;
        }
    }
}

// Reads the offsets of one strip's columns, or the negatives of the zeros.
INLINE_READ void read_shifts(const Weights& w, const char* numbers, const char* supers, int64_t column, float* out) {
    if (w.shift == Shift::offset) return read_factors(w.scale, numbers, supers + 2 * PANEL, column, out);
    for (int64_t i = column; i < column + STRIP; i += WIDTH, out += WIDTH) {
        store(out, set(0.0f) - float_bytes<false>(numbers + i));
    }
}

// Computes totals += scale * c for the columns of NS strips, where c has the unscaled sums over one group. If SHIFT is
// not `none`, what the offsets or the zeros add is computed too. scales[s] and shifts[s] have the factors of strip s: a
// shift is an offset or the negative of a zero. x has the sum of each of the MR rows of x over the group.
template <Shift SHIFT, int MR, int NS>
INLINE void add_scaled(const Vec (&c)[MR][VECTORS * NS], const float* const (&scales)[NS], const float (&shifts)[NS][STRIP],
                       const float* x, Vec (&totals)[MR][VECTORS * NS]) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS * NS; v++) {
        const Vec scale = load(scales[v / VECTORS] + v % VECTORS * WIDTH);
        const Vec shift = SHIFT == Shift::none ? scale : load(shifts[v / VECTORS] + v % VECTORS * WIDTH);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
            const Vec sum = SHIFT == Shift::zero ? fma(shift, set(x[m]), c[m][v]) : c[m][v];
            totals[m][v] = fma(scale, sum, totals[m][v]);
            if (SHIFT == Shift::offset) totals[m][v] = fma(shift, set(x[m]), totals[m][v]);
        }
    }
}

// Adds what one group contributes to the sums of a tile. `c`, `x` and `totals` are those of the function `add_scaled`.
template <int MR, int NS>
INLINE_GROUP void add_group(const Vec (&c)[MR][VECTORS * NS], const Weights& w, const GroupPlace& place, const float* x,
                            Vec (&totals)[MR][VECTORS * NS]) {
    alignas(64) float factors[NS][STRIP], shifts[NS][STRIP];
    const float* scales[NS];
    for (int s = 0; s < NS; s++) {
        scales[s] = (const float*)(place.panels[s] + place.offset) + (place.strip + s) % STRIPS * STRIP;
    }
    if (w.scale != Scale::f32 || w.shift != Shift::none) {
        for (int s = 0; s < NS; s++) {
            const char *const panel = place.panels[s], *const numbers = panel + place.offset;
            const int64_t column = (place.strip + s) % STRIPS * STRIP;
            const char* const second = panel + w.super_offset(place.group);
            read_factors(w.scale, numbers, second, column, factors[s]);
            scales[s] = factors[s];
            if (w.shift != Shift::none) read_shifts(w, numbers + PANEL * w.scale_item(), second, column, shifts[s]);
        }
    }
    switch (w.shift) {
        case Shift::none: return add_scaled<Shift::none, MR, NS>(c, scales, shifts, x, totals);
        case Shift::offset: return add_scaled<Shift::offset, MR, NS>(c, scales, shifts, x, totals);
        case Shift::zero: return add_scaled<Shift::zero, MR, NS>(c, scales, shifts, x, totals);
    }
}

#undef INLINE_GROUP
#undef INLINE_READ

// Computes the sums of the rows `first` to `first` + `size` - 1 of x over each group of the weight: sums [group][row].
// Every WIDTH-th element of a group is added in ascending order, and then the WIDTH partial sums are added in halves.
template <class T>
void sum_groups(const Product<T>& p, int64_t first, int64_t size, float* sums) {
    const Weights& w = p.weights;
    for (int64_t m = 0; m < size; m++) {
        const T* x = p.x + (p.rows ? p.rows[first + m] : first + m) * p.x_stride;
        for (int64_t g = 0; g < w.groups(); g++) {
            const int64_t start = g * w.group_size, end = w.k - start < w.group_size ? w.k : start + w.group_size;
            Vec total = set(0.0f);
            for (int64_t k = start; k < end; k += WIDTH) total = total + load(x + k, end - k < WIDTH ? end - k : WIDTH);
            float parts[WIDTH];
            store(parts, total);
            for (int64_t half = WIDTH / 2; half; half /= 2) {
                for (int64_t i = 0; i < half; i++) parts[i] += parts[i + half];
            }
            sums[g * size + m] = parts[0];
        }
    }
}
