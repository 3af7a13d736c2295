// This file detects the machine's instruction set. It also defines an empty Python module, because setuptools builds
// the library as an extension module. Python calls the library's functions through ctypes.
#include <Python.h>

#include <atomic>

#include "common.h"

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
    return __builtin_cpu_supports("avx512bf16") ? Level::avx512_bf16 : Level::avx512;
#else
    return Level::portable;
#endif
}

static std::atomic<Level> current{detect()};

Level level() { return current.load(std::memory_order_relaxed); }

EXPORT int64_t machine_level() { return int64_t(level()); }

// Selects the instruction set `wanted`, so that tests can also run the kernels of lower instruction sets. If the
// machine lacks `wanted`, the machine's highest instruction set is selected. Returns the selected instruction set.
EXPORT int64_t set_level(int64_t wanted) {
    const int64_t highest = int64_t(detect());
    current.store(Level(wanted < 0 || wanted > highest ? highest : wanted));
    return int64_t(level());
}

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
