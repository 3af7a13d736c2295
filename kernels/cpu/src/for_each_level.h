// This header compiles the file KERNEL_FILE in each namespace of `simd.h`, one per instruction set. The macro
// DISPATCH(f, arguments) then calls the function f of the namespace for the instruction set that `level()` returns. The
// header has no include guard, because a source file is allowed to include the header several times, each time with
// another KERNEL_FILE.
#include "simd.h"

#if JAMBA_X86
BEGIN_TARGET_AVX512
namespace avx512 {
#define LEVEL_AVX512
#include KERNEL_FILE
#undef LEVEL_AVX512
}
END_TARGET
BEGIN_TARGET_AVX2
namespace avx2 {
#define LEVEL_AVX2
#include KERNEL_FILE
#undef LEVEL_AVX2
}
END_TARGET
#endif
#if JAMBA_ARM  // Every such processor has NEON, so that no portable kernels are compiled.
namespace neon {
#define LEVEL_NEON
#include KERNEL_FILE
#undef LEVEL_NEON
}
#else
namespace portable {
#include KERNEL_FILE
}
#endif

#ifndef DISPATCH
#if JAMBA_X86
#define DISPATCH(f, ...)                                          \
    (level() >= Level::avx512 ? avx512::f(__VA_ARGS__)            \
     : level() == Level::avx2 ? avx2::f(__VA_ARGS__)              \
                              : portable::f(__VA_ARGS__))
#elif JAMBA_ARM
#define DISPATCH(f, ...) neon::f(__VA_ARGS__)
#else
#define DISPATCH(f, ...) portable::f(__VA_ARGS__)
#endif
#endif
