// This file has the matrix products that use the tiles of the processor extension AMX, and an emulation of the tiles for
// tests. It also asks the operating system for the permission to use the tiles.
//
// A thread's tiles are part of what the operating system saves when it switches threads. A thread that sleeps therefore
// releases its tiles before (see the function `release_tiles`). A signal handler does not change the tiles, because the
// operating system saves them. A child process after `fork` has the permission, but its tiles are not configured; every
// piece of work checks the configuration first.
#include "amx.h"

#include <type_traits>

#if JAMBA_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define KERNEL_FILE "amx_emulated.inl"
#include "for_each_level.h"

namespace {

thread_local bool uses_tiles = false;

}  // namespace

#if JAMBA_AMX
BEGIN_TARGET_AMX
namespace amx {
using namespace avx512;
#define LEVEL_AMX
#define LEVEL_AVX512
#define DOT_PRODUCTS
#include "formats.inl"
#include "factors.inl"
#include "silu.inl"
#include "entries.inl"
#include "amx_tiles.inl"
#include "amx.inl"
#include "amx_work.inl"
#include "amx_tiles_end.inl"
#undef DOT_PRODUCTS
#undef LEVEL_AVX512
#undef LEVEL_AMX
inline void release() { _tile_release(); }
}  // namespace amx
END_TARGET
#endif

static AmxState find_state() {
#if JAMBA_AMX
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA of Linux
    constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BF16) || !(d & TILE)) return AmxState::absent;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? AmxState::refused : AmxState::usable;
#else
    return AmxState::not_compiled;
#endif
}

AmxState amx_state() {
    static const AmxState state = find_state();
    return state;
}

// Returns the number of an `AmxState`, for messages to the user.
EXPORT int64_t amx_availability() { return int64_t(amx_state()); }

void tiles_in_use() { uses_tiles = true; }

void release_tiles() {
#if JAMBA_AMX
    if (uses_tiles) amx::release();
#endif
    uses_tiles = false;
}

void amx_linear(Level wanted, const Product<bf16>& product) {
#if JAMBA_AMX
    if (wanted == Level::amx) return amx::multiply(product);
#endif
    DISPATCH(emulated::multiply, product);
    (void)wanted;
}

void amx_experts(Level wanted, const Experts<bf16>& experts) {
#if JAMBA_AMX
    if (wanted == Level::amx) return amx::mix_experts(experts);
#endif
    DISPATCH(emulated::mix_experts, experts);
    (void)wanted;
}
