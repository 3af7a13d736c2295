/* Prints the rate of fused multiply-adds of AVX2, in operations per second, of as many threads as the argument says.

A thread has twelve independent sums, so that the latency of an instruction is hidden. A fused multiply-add of a vector of
eight float32 counts as 16 operations. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { SUMS = 12, MOST_THREADS = 1024 };
static const long STEPS = 300000000;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

#define ADD(sum) "vfmadd231ps %%ymm0, %%ymm0, %%ymm" #sum "\n"

static void *run(void *rate) {
    long steps = STEPS;
    const double start = now();
    __asm__ volatile("vzeroall\n"
                     "1:\n" ADD(1) ADD(2) ADD(3) ADD(4) ADD(5) ADD(6) ADD(7) ADD(8) ADD(9) ADD(10) ADD(11) ADD(12)
                     "dec %0\n"
                     "jnz 1b\n"
                     : "+r"(steps)
                     :
                     : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                       "xmm12", "cc");
    *(double *)rate = 16.0 * SUMS * STEPS / (now() - start);
    return NULL;
}

int main(int count, char **arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 1;
    static pthread_t started[MOST_THREADS];
    static double rates[MOST_THREADS];
    double sum = 0;
    if (threads < 1 || threads > MOST_THREADS) return 1;
    for (int i = 0; i < threads; i++) pthread_create(&started[i], NULL, run, &rates[i]);
    for (int i = 0; i < threads; i++) pthread_join(started[i], NULL), sum += rates[i];
    printf("%.6g\n", sum);
    return 0;
}
