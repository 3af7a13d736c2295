// This file defines vectors of WIDTH whole numbers of 32 bits.
typedef int32_t Lanes __attribute__((vector_size(4 * WIDTH)));

INLINE Lanes read_lanes(const char* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
