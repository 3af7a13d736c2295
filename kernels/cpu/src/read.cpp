// This file reads tensors from files with all threads: plain numbers, numbers of four bits, and the blocks of GGUF
// files, which it unpacks. `engine/gguf/blocks.py` says what blocks contain; both give the same bits.
#include "common.h"

#include <cerrno>
#include <unistd.h>

#include <atomic>

namespace {

constexpr int64_t SHORTER = -1, NOT_FINITE = -2;  // results of reading, beside 0 and the numbers of the system's errors

// Reads `size` bytes from the offset `start` of an open file. Returns 0, SHORTER or the number of an error.
int64_t read_all(int64_t file, int64_t start, int64_t size, uint8_t* out) {
    while (size > 0) {
        const ssize_t count = pread(int(file), out, size_t(size), off_t(start));
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return SHORTER;
        start += count, size -= count, out += count;
    }
    return 0;
}

// Runs read(i) for all pieces below `count` on all threads, until one of them cannot be read. Returns the failure, or 0.
// If numbers are not finite, all other pieces are read nevertheless.
template <class F>
int64_t read_pieces(int64_t count, const F& read) {
    std::atomic<int64_t> failure{0}, not_finite{0};
    parallel_for(count, 1, [&](int64_t i, int64_t end) {
        for (; i < end && failure.load(std::memory_order_relaxed) == 0; i++) {
            if (const int64_t found = read(i)) (found == NOT_FINITE ? not_finite : failure).store(found);
        }
    });
    return failure.load() ? failure.load() : not_finite.load();
}

// Returns whether the bits `mask`, the exponent of a number, are all set in one of `count` numbers: it is then infinite
// or not a number.
template <class Bits>
bool has_full_exponent(const uint8_t* numbers, int64_t count, Bits mask) {
    Bits found = 0;
    for (int64_t i = 0; i < count; i++) {
        Bits bits;
        std::memcpy(&bits, numbers + i * int64_t(sizeof(Bits)), sizeof(Bits));
        found |= Bits(-Bits((bits & mask) == mask));
    }
    return found != 0;
}

// The numbers of the element types in `kernels/cpu/read.py`. The first three are those of the enum `Dtype`.
enum class Element : int64_t { f32, bf16, f16, byte, fp8 };

bool is_finite(const uint8_t* numbers, int64_t bytes, Element element) {
    switch (element) {
        case Element::f32: return !has_full_exponent<uint32_t>(numbers, bytes / 4, 0x7f800000);
        case Element::bf16: return !has_full_exponent<uint16_t>(numbers, bytes / 2, 0x7f80);
        case Element::f16: return !has_full_exponent<uint16_t>(numbers, bytes / 2, 0x7c00);
        case Element::fp8: return !has_full_exponent<uint8_t>(numbers, bytes, 0x7f);  // NaN; there is no infinity
        default: return true;
    }
}

// The destination of one block, or of several blocks. The comment at the function `read_blocks` explains the arrays.
struct Groups {
    uint8_t *values, *scales, *offsets, *super_scales, *super_offsets;
};

// Unpacks `bytes` bytes with two numbers each. Each run of RUN bytes has RUN numbers in the lower halves of its bytes,
// then RUN numbers in the upper halves.
template <int RUN>
void nibbles(const uint8_t* from, int bytes, uint8_t* out) {
    for (int start = 0; start < bytes; start += RUN, from += RUN, out += 2 * RUN) {
        for (int i = 0; i < RUN; i++) out[i] = from[i] & 15, out[RUN + i] = from[i] >> 4;
    }
}

// Adds numbers of WIDTH bits, shifted by `shift`, to the numbers in `out`. Each run of RUN bytes has RUN numbers in the
// lowest bits of its bytes, then RUN numbers in the next bits, and so on.
template <int RUN, int WIDTH>
void add_bits(const uint8_t* from, int bytes, int shift, uint8_t* out) {
    for (int start = 0; start < bytes; start += RUN, from += RUN) {
        for (int bit = 0; bit < 8; bit += WIDTH, out += RUN) {
            for (int i = 0; i < RUN; i++) out[i] |= uint8_t((from[i] >> bit & ((1 << WIDTH) - 1)) << shift);
        }
    }
}

template <int COUNT>
void subtract(uint8_t* values, int zero) {
    for (int i = 0; i < COUNT; i++) values[i] = uint8_t(values[i] - zero);
}

void copy_half(const uint8_t* from, uint8_t* to) { std::memcpy(to, from, 2); }
// Copies a half precision number with the opposite sign: a minimum is subtracted, and an offset is added.
void copy_negative(const uint8_t* from, uint8_t* to) { to[0] = from[0], to[1] = from[1] ^ 0x80; }

// Adds the fifth bits of 32 numbers to `out`: bit i of the four bytes belongs to number i.
void add_fifth_bits(const uint8_t* from, uint8_t* out) {
    for (int i = 0; i < 32; i++) out[i] |= uint8_t((from[i / 8] >> i % 8 & 1) << 4);
}

// Unpacks the pairs of numbers of six bits of the types Q4_K and Q5_K, and the half precision numbers before them.
void k_factors(const uint8_t* block, const Groups& to) {
    const uint8_t *const first = block + 4, *const second = block + 8, *const rest = block + 12;
    for (int i = 0; i < 4; i++) {
        to.scales[i] = first[i] & 0x3f, to.offsets[i] = second[i] & 0x3f;
        to.scales[4 + i] = uint8_t((rest[i] & 15) | (first[i] >> 2 & 0x30));
        to.offsets[4 + i] = uint8_t(rest[i] >> 4 | (second[i] >> 2 & 0x30));
    }
    copy_half(block, to.super_scales), copy_negative(block + 2, to.super_offsets);
}

// One struct for each type of block: its number of inputs, of bytes and of groups, whether it has offsets, and how a
// block is unpacked.
template <int INPUTS_, int BYTES_, int GROUPS_, bool OFFSETS_>
struct Sizes {
    static constexpr int INPUTS = INPUTS_, BYTES = BYTES_, GROUPS = GROUPS_;
    static constexpr bool OFFSETS = OFFSETS_, TWO_LEVELS = INPUTS_ == 256;
};
struct Q8_0 : Sizes<32, 34, 1, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), std::memcpy(to.values, b + 2, 32);
    }
};
struct Q4_0 : Sizes<32, 18, 1, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), nibbles<16>(b + 2, 16, to.values), subtract<32>(to.values, 8);
    }
};
struct Q4_1 : Sizes<32, 20, 1, true> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), copy_half(b + 2, to.offsets), nibbles<16>(b + 4, 16, to.values);
    }
};
struct Q5_0 : Sizes<32, 22, 1, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), nibbles<16>(b + 6, 16, to.values);
        add_fifth_bits(b + 2, to.values), subtract<32>(to.values, 16);
    }
};
struct Q5_1 : Sizes<32, 24, 1, true> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), copy_half(b + 2, to.offsets);
        nibbles<16>(b + 8, 16, to.values), add_fifth_bits(b + 4, to.values);
    }
};
struct Q2_K : Sizes<256, 84, 16, true> {
    static void unpack(const uint8_t* b, const Groups& to) {
        for (int i = 0; i < 16; i++) to.scales[i] = b[i] & 15, to.offsets[i] = b[i] >> 4;
        std::memset(to.values, 0, 256), add_bits<32, 2>(b + 16, 64, 0, to.values);
        copy_half(b + 80, to.super_scales), copy_negative(b + 82, to.super_offsets);
    }
};
struct Q3_K : Sizes<256, 110, 16, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        nibbles<8>(b + 96, 8, to.scales), add_bits<4, 2>(b + 104, 4, 4, to.scales), subtract<16>(to.scales, 32);
        std::memset(to.values, 0, 256), add_bits<32, 2>(b + 32, 64, 0, to.values);
        add_bits<32, 1>(b, 32, 2, to.values), subtract<256>(to.values, 4);
        copy_half(b + 108, to.super_scales);
    }
};
struct Q4_K : Sizes<256, 144, 8, true> {
    static void unpack(const uint8_t* b, const Groups& to) { k_factors(b, to), nibbles<32>(b + 16, 128, to.values); }
};
struct Q5_K : Sizes<256, 176, 8, true> {
    static void unpack(const uint8_t* b, const Groups& to) {
        k_factors(b, to), nibbles<32>(b + 48, 128, to.values), add_bits<32, 1>(b + 16, 32, 4, to.values);
    }
};
struct Q6_K : Sizes<256, 210, 16, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        nibbles<64>(b, 128, to.values), add_bits<32, 2>(b + 128, 64, 4, to.values), subtract<256>(to.values, 32);
        std::memcpy(to.scales, b + 192, 16), copy_half(b + 208, to.super_scales);
    }
};
struct IQ4_NL : Sizes<32, 18, 1, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        copy_half(b, to.scales), nibbles<16>(b + 2, 16, to.values);
    }
};
struct IQ4_XS : Sizes<256, 136, 8, false> {
    static void unpack(const uint8_t* b, const Groups& to) {
        nibbles<1>(b + 4, 4, to.scales);
        for (int i = 0; i < 8; i++) to.scales[i] |= uint8_t((b[2 + i / 4] >> 2 * (i % 4) & 3) << 4);
        subtract<8>(to.scales, 32), nibbles<16>(b + 8, 128, to.values), copy_half(b, to.super_scales);
    }
};

constexpr int64_t PIECE = 1 << 17;  // numbers; a piece and what is made of it fit into the second level of a CPU's cache

template <class Type>
int64_t read_type(int64_t file, int64_t start, int64_t blocks, const Groups& to) {
    constexpr int64_t STEP = PIECE / Type::INPUTS, FACTOR = Type::TWO_LEVELS ? 1 : 2;  // FACTOR: bytes of a scale
    return read_pieces((blocks + STEP - 1) / STEP, [&](int64_t piece) -> int64_t {
        const int64_t first = piece * STEP, count = blocks - first < STEP ? blocks - first : STEP;
        auto* const data = static_cast<uint8_t*>(scratch(0, STEP * Type::BYTES));
        const int64_t failure = read_all(file, start + first * Type::BYTES, count * Type::BYTES, data);
        if (failure) return failure;
        const auto at = [&](int64_t block) {
            const int64_t group = block * Type::GROUPS * FACTOR;
            return Groups{to.values + block * Type::INPUTS, to.scales + group,
                          Type::OFFSETS ? to.offsets + group : nullptr,
                          Type::TWO_LEVELS ? to.super_scales + 2 * block : nullptr,
                          Type::TWO_LEVELS && Type::OFFSETS ? to.super_offsets + 2 * block : nullptr};
        };
        for (int64_t i = 0; i < count; i++) Type::unpack(data + i * Type::BYTES, at(first + i));
        const Groups found = at(first);
        const int64_t halves = 2 * count * (Type::TWO_LEVELS ? 1 : Type::GROUPS);
        const bool finite = is_finite(Type::TWO_LEVELS ? found.super_scales : found.scales, halves, Element::f16);
        const uint8_t* const offsets = Type::TWO_LEVELS ? found.super_offsets : found.offsets;
        return finite && (!Type::OFFSETS || is_finite(offsets, halves, Element::f16)) ? 0 : NOT_FINITE;
    });
}

}  // namespace

// Reads `size` bytes from the offset `start` of an open file. `element` is the type of the numbers, which must be finite
// (see the enum `Element`); `size` is a whole number of them. Returns 0, SHORTER if the file ends earlier, NOT_FINITE, or
// the number of an error of the operating system.
EXPORT int64_t read_numbers(int64_t file, int64_t start, int64_t size, int64_t element, uint8_t* out) {
    constexpr int64_t STEP = 1 << 18;
    return read_pieces((size + STEP - 1) / STEP, [=](int64_t piece) -> int64_t {
        const int64_t first = piece * STEP, count = size - first < STEP ? size - first : STEP;
        if (const int64_t failure = read_all(file, start + first, count, out + first)) return failure;
        return is_finite(out + first, count, Element(element)) ? 0 : NOT_FINITE;
    });
}

// Reads `size` bytes with two signed numbers of four bits each and writes one number to each byte of `out`. The first
// number is in the lower four bits. The result is that of `read_numbers`.
EXPORT int64_t read_nibbles(int64_t file, int64_t start, int64_t size, uint8_t* out) {
    constexpr int64_t STEP = PIECE / 2;
    return read_pieces((size + STEP - 1) / STEP, [=](int64_t piece) -> int64_t {
        const int64_t first = piece * STEP, count = size - first < STEP ? size - first : STEP;
        auto* const data = static_cast<uint8_t*>(scratch(0, STEP));
        if (const int64_t failure = read_all(file, start + first, count, data)) return failure;
        uint8_t* const to = out + 2 * first;
        for (int64_t i = 0; i < count; i++) {
            to[2 * i] = uint8_t(((data[i] & 15) ^ 8) - 8), to[2 * i + 1] = uint8_t((data[i] >> 4 ^ 8) - 8);
        }
        return 0;
    });
}

// Reads blocks of a type, whose number in GGUF files is `type`, from the offset `start` of an open file. values:
// [blocks, inputs of a block], one byte each; scales, offsets: [blocks, groups of a block], halves for blocks of 32
// inputs and bytes for blocks of 256; super_scales, super_offsets: halves [blocks]. What the type does not have is null.
// The result is that of `read_numbers`, and EINVAL for a type that is not known.
EXPORT int64_t read_blocks(int64_t file, int64_t start, int64_t type, int64_t blocks, uint8_t* values, uint8_t* scales,
                           uint8_t* offsets, uint8_t* super_scales, uint8_t* super_offsets) {
    const Groups to{values, scales, offsets, super_scales, super_offsets};
    switch (type) {
        case 2: return read_type<Q4_0>(file, start, blocks, to);
        case 3: return read_type<Q4_1>(file, start, blocks, to);
        case 6: return read_type<Q5_0>(file, start, blocks, to);
        case 7: return read_type<Q5_1>(file, start, blocks, to);
        case 8: return read_type<Q8_0>(file, start, blocks, to);
        case 10: return read_type<Q2_K>(file, start, blocks, to);
        case 11: return read_type<Q3_K>(file, start, blocks, to);
        case 12: return read_type<Q4_K>(file, start, blocks, to);
        case 13: return read_type<Q5_K>(file, start, blocks, to);
        case 14: return read_type<Q6_K>(file, start, blocks, to);
        case 20: return read_type<IQ4_NL>(file, start, blocks, to);
        case 23: return read_type<IQ4_XS>(file, start, blocks, to);
        default: return EINVAL;
    }
}
