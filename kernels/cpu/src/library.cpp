// This file detects the machine's instruction set. It also defines an empty Python module, because setuptools builds
// the library as an extension module. Python calls the library's functions through ctypes.
#include <Python.h>

#include <atomic>

#include "amx.h"

static Level detect() {
#if JAMBA_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) {
        return Level::portable;
    }
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))) {
        return Level::avx2;
    }
    if (!__builtin_cpu_supports("avx512bf16")) return Level::avx512;
    return amx_state() == AmxState::usable ? Level::amx : Level::avx512_bf16;
#else
    return Level::portable;
#endif
}

static std::atomic<Level> current{detect()}, current_products{detect()};

Level level() { return current.load(std::memory_order_relaxed); }
Level product_level() { return current_products.load(std::memory_order_relaxed); }

// Returns the instruction set of the matrix products, which is also that of all other kernels unless it is emulated.
EXPORT int64_t machine_level() { return int64_t(product_level()); }

// Returns the machine's highest instruction set.
EXPORT int64_t highest_level() {
    static const Level highest = detect();
    return int64_t(highest);
}

// Selects the instruction set `wanted`, so that tests can also run the kernels of lower instruction sets. If the
// machine lacks `wanted`, the machine's highest instruction set is selected. `amx_emulated` selects the emulation for
// the matrix products and the highest instruction set for all other kernels. Returns the selected instruction set.
EXPORT int64_t set_level(int64_t wanted) {
    const int64_t highest = highest_level(), emulated = int64_t(Level::amx_emulated);
    const int64_t products = wanted == emulated ? emulated : wanted < 0 || wanted > highest ? highest : wanted;
    current_products.store(Level(products));
    current.store(Level(products == emulated ? highest : products));
    return products;
}

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
