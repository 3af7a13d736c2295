// This file has the few functions of the C++ library that compilers call in code like that of the kernels: for static
// variables of functions and for thread_local variables with a destructor. With glibc, the library has its own, because
// those of the C++ library would bring in its handling of exceptions, which needs a recent version of glibc.
#include <cstdint>
#include <cstdlib>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#include <sched.h>

extern "C" {

int __cxa_thread_atexit_impl(void (*destroy)(void*), void* object, void* library);

int __cxa_thread_atexit(void (*destroy)(void*), void* object, void* library) {
    return __cxa_thread_atexit_impl(destroy, object, library);
}

// The first byte of a guard is 1 when its variable is initialised, and the second while a thread initialises it.
int __cxa_guard_acquire(uint8_t* guard) {
    while (!__atomic_load_n(guard, __ATOMIC_ACQUIRE)) {
        if (!__atomic_exchange_n(guard + 1, uint8_t(1), __ATOMIC_ACQUIRE)) {
            if (!__atomic_load_n(guard, __ATOMIC_ACQUIRE)) return 1;
            __atomic_store_n(guard + 1, uint8_t(0), __ATOMIC_RELEASE);
            return 0;
        }
        sched_yield();
    }
    return 0;
}

void __cxa_guard_release(uint8_t* guard) {
    __atomic_store_n(guard, uint8_t(1), __ATOMIC_RELEASE);
    __atomic_store_n(guard + 1, uint8_t(0), __ATOMIC_RELEASE);
}

}  // extern "C"
#endif
