// This file detects the machine's instruction set, and selects the one in use.
#include <atomic>

#include "amx.h"

#if JAMBA_ARM && defined(__linux__)
#include <sys/auxv.h>
#elif JAMBA_ARM && defined(__APPLE__)
#include <sys/sysctl.h>
#elif JAMBA_X86
#include <cpuid.h>
#endif

namespace {

#if JAMBA_ARM
enum class ArmFeature { dot, bf16, i8mm };

// Returns whether the processor has a feature, as the operating system tells. On other systems than Linux and macOS the
// answer is no.
bool has(ArmFeature feature) {
#if defined(__linux__)
    // The bits HWCAP_ASIMDDP, HWCAP2_BF16 and HWCAP2_I8MM of Linux. Old headers do not have the last two.
    switch (feature) {
        case ArmFeature::dot: return getauxval(AT_HWCAP) >> 20 & 1;
        case ArmFeature::bf16: return getauxval(AT_HWCAP2) >> 14 & 1;
        case ArmFeature::i8mm: return getauxval(AT_HWCAP2) >> 13 & 1;
    }
#elif defined(__APPLE__)
    constexpr const char* NAMES[] = {"hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_BF16",
                                     "hw.optional.arm.FEAT_I8MM"};
    int found = 0;
    size_t size = sizeof(found);
    return sysctlbyname(NAMES[int(feature)], &found, &size, nullptr, 0) == 0 && found;
#endif
    return (void)feature, false;
}
#endif

#if JAMBA_X86
// Returns whether the processor converts f16. The `__builtin_cpu_supports` of older versions of Clang does not know it.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

Level detect() {
#if JAMBA_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())) {
        return Level::portable;
    }
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
        return Level::avx2;
    }
    if (!__builtin_cpu_supports("avx512bf16")) return Level::avx512;
    return amx_state() == AmxState::usable ? Level::amx : Level::avx512_bf16;
#elif JAMBA_ARM
    if (!has(ArmFeature::dot)) return Level::neon;
    return has(ArmFeature::bf16) && has(ArmFeature::i8mm) ? Level::neon_bf16 : Level::neon_dot;
#else
    return Level::portable;
#endif
}

// The lowest instruction set for which this library has code.
#if JAMBA_ARM
constexpr Level LOWEST = Level::neon;
#else
constexpr Level LOWEST = Level::portable;
#endif

std::atomic<Level> current{detect()}, current_products{detect()};

}  // namespace

Level level() { return current.load(std::memory_order_relaxed); }
Level product_level() { return current_products.load(std::memory_order_relaxed); }

// Returns the instruction set of the matrix products, which is also that of all other kernels unless it is emulated.
EXPORT int64_t machine_level() { return int64_t(product_level()); }

// Returns the machine's highest instruction set.
EXPORT int64_t highest_level() {
    static const Level highest = detect();
    return int64_t(highest);
}

// Returns whether this machine can run the level `wanted`.
EXPORT int64_t has_level(int64_t wanted) {
    if (is_emulated(Level(wanted))) return wanted <= int64_t(Level::neon_bf16_emulated);
    return wanted >= int64_t(LOWEST) && wanted <= highest_level();
}

// Selects the instruction set `wanted`, so that tests can also run the kernels of lower instruction sets. If the
// machine lacks `wanted`, the machine's highest instruction set is selected. An emulated level is selected for the
// matrix products only, with the highest instruction set for all other kernels. Returns the selected instruction set.
EXPORT int64_t set_level(int64_t wanted) {
    const int64_t highest = highest_level(), products = has_level(wanted) ? wanted : highest;
    current_products.store(Level(products));
    current.store(Level(is_emulated(Level(products)) ? highest : products));
    return products;
}
