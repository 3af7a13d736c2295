// This program tests the thread pool of the CPU kernels (kernels/cpu/src/pool.h) without the kernels.
//
//   driver fuzz SEED ROUNDS      random jobs: sizes, threads, nodes, turns, nested jobs, several callers, forks
//   driver together THREADS      every thread takes a part of one job; prints how many ranges each thread took
//   driver turns THREADS PROCESSORS NODES    workers take turns until each has had work
//   driver nodes FIRST SECOND    two nodes with one processor each: where pieces of a job and pages of memory go
//   driver barrier THREADS       the time of a job in which all threads wait for each other
//
// It ends with status 0 and a line that begins with "ok", or prints what is wrong.
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "place.h"
#include "pool.h"

namespace {

Pool pool([] {});

[[noreturn]] void fail(const char* what) {
    std::printf("failed: %s\n", what);
    std::fflush(stdout);
    _exit(1);
}

template <class F>
void run(int64_t n, int64_t grain, bool in_runs, const F& f, const int64_t* first_of_node = nullptr) {
    pool.run(
        n, grain, in_runs,
        [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f,
        first_of_node);
}

// The processors that this process may use, divided among `nodes` nodes.
Nodes made_up(int64_t nodes) {
    cpu_set_t set;
    sched_getaffinity(0, sizeof(set), &set);
    std::vector<int64_t> numbers, of;
    for (int i = 0; i < CPU_SETSIZE; i++) {
        if (CPU_ISSET(i, &set)) numbers.push_back(i);
    }
    if (int64_t(numbers.size()) < nodes) nodes = int64_t(numbers.size());
    for (size_t i = 0; i < numbers.size(); i++) of.push_back(int64_t(i) % nodes);
    Nodes found;
    if (!Nodes::make(numbers.data(), of.data(), int64_t(numbers.size()), nodes, found)) fail("made-up nodes");
    return found;
}

using Random = std::mt19937_64;
int64_t below(Random& random, int64_t limit) { return int64_t(random() % uint64_t(limit)); }

// Runs one job of random size, and checks that each item was run exactly once. The counts are no atomic variables, so a
// tool that looks for races also sees whether the caller may read what the workers wrote.
void random_job(Random& random, int depth) {
    const int64_t n = below(random, below(random, 4) ? 300 : 20000);
    const int64_t grain = 1 + below(random, below(random, 3) ? 4 : 100);
    const bool in_runs = below(random, 2), nests = depth < 2 && below(random, 4) == 0;
    std::vector<int> counts(size_t(n), 0);
    const uint64_t seed = random();
    const int64_t middle = below(random, n + 1), shares[] = {0, middle, n};
    const bool divides = n > 0 && pool.nodes().count == 2 && below(random, 2);
    const auto body = [&](int64_t begin, int64_t end) {
        if (begin < 0 || begin >= end || end > n) fail("a range is empty or out of bounds");
        for (int64_t i = begin; i < end; i++) counts[size_t(i)]++;
        if (nests && begin % 97 == 0) {
            Random own(seed + uint64_t(begin));
            random_job(own, depth + 1);
        }
    };
    run(n, grain, in_runs, body, divides ? shares : nullptr);
    for (int count : counts) {
        if (count != 1) fail("an item was not run exactly once");
    }
}

// A child process has no workers. It runs jobs alone, and can start workers of its own.
void fork_and_run(Random& random) {
    const uint64_t seed = random();
    const pid_t child = fork();
    if (child == 0) {
        Random own(seed);
        if (pool.threads() != 1) fail("the child counts threads that do not exist");
        for (int i = 0; i < 3; i++) random_job(own, 0);
        if (pool.set_threads(3) != 3) fail("the child's threads");
        for (int i = 0; i < 3; i++) random_job(own, 0);
        _exit(0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) fail("the child process");
}

void fuzz(uint64_t seed, int64_t rounds) {
    constexpr int64_t THREADS[] = {1, 2, 3, 4, 7, 15, 16, 17, 33, 64, 192};
    constexpr int64_t PROCESSORS[] = {0, 0, 1, 2, 5, 24}, TURN_PIECES[] = {1, 30, Pool::TURN_PIECES};
    int64_t turns = 0;
    Random random(seed);
    for (int64_t round = 0; round < rounds; round++) {
        if (below(random, 3) == 0) pool.set_nodes(made_up(1 + below(random, 2)));
        pool.set_threads(THREADS[below(random, 11)]);
        if (below(random, 3) == 0) pool.set_turns(PROCESSORS[below(random, 6)], TURN_PIECES[below(random, 3)]);
        pool.set_together(below(random, 4) == 0);
        if (below(random, 4) == 0) usleep(useconds_t(below(random, 300)));  // some workers fall asleep
        std::vector<std::thread> callers;
        const uint64_t seeds = random();
        const bool changes = below(random, 4) == 0, forks = below(random, 4) == 0;
        for (uint64_t i = 0; i < uint64_t(below(random, 4)); i++) {
            callers.emplace_back([seeds, i, changes] {
                Random own(seeds + i);
                for (int64_t jobs = below(own, 10); jobs >= 0; jobs--) random_job(own, 0);
                if (changes) pool.set_threads(1 + below(own, 20));
            });
        }
        for (int64_t jobs = below(random, 20); jobs >= 0; jobs--) random_job(random, 0);
        if (forks) fork_and_run(random);
        for (auto& caller : callers) caller.join();
        turns += pool.turns();
    }
    if (rounds >= 20 && turns == 0) fail("no worker has passed its turn on");
    std::printf("ok: %ld rounds with seed %lu\n", long(rounds), static_cast<unsigned long>(seed));
}

void together(int64_t threads) {
    if (pool.set_threads(threads) != threads) fail("the threads cannot be started");
    pool.set_together(true);
    std::vector<int> counts(size_t(threads) * 4, 0);
    for (int job = 0; job < 10; job++) {
        run(int64_t(counts.size()), 1, true, [&](int64_t i, int64_t end) {
            for (; i < end; i++) counts[size_t(i)]++;
        });
    }
    for (int count : counts) {
        if (count != 10) fail("an item was not run exactly once in each job");
    }
    std::vector<int64_t> taken(static_cast<size_t>(threads), 0);
    pool.taken(taken.data(), threads);
    int64_t least = taken[0];
    for (int64_t count : taken) least = count < least ? count : least;
    if (threads > 1 && least < 10) fail("a thread had no part in a job");
    std::printf("ok: each of %ld threads took at least %ld ranges in 10 jobs\n", long(threads), long(least));
}

// If there are fewer processors than threads, each worker has work after enough turns, and no more threads take part in
// a job than are on duty. If there are enough processors, there are no turns.
void take_turns(int64_t threads, int64_t processors, int64_t nodes) {
    constexpr int64_t N = 200;
    const bool in_turns = threads > processors;
    pool.set_nodes(made_up(nodes));
    pool.set_turns(processors, 20);
    if (pool.set_threads(threads) != threads) fail("the threads cannot be started");
    static std::atomic<int> seen{0};
    std::vector<int> by(N);
    std::vector<int64_t> taken(static_cast<size_t>(threads), 0);
    int64_t jobs = 0;
    for (int64_t least = 0; in_turns ? least == 0 : jobs < 200; jobs++) {
        if (jobs == 100'000) fail("a worker has had no work");
        run(N, 1, jobs % 2, [&](int64_t i, int64_t end) {
            static thread_local const int number = seen.fetch_add(1);
            for (volatile int spent = 0; i < end; i++) {
                by[size_t(i)] = number;
                for (int k = 0; k < 300; k++) spent = spent + 1;
            }
        });
        if (int64_t(std::set<int>(by.begin(), by.end()).size()) > std::max<int64_t>(processors, 2)) {
            fail("more threads than processors took part in a job");
        }
        pool.taken(taken.data(), threads);
        least = *std::min_element(taken.begin(), taken.end());
    }
    if (in_turns != (pool.turns() > 0)) fail("turns end if and only if there are fewer processors than threads");
    if (in_turns) std::printf("ok: each of %ld threads had work\n", long(threads));
    else std::printf("ok: no turns with %ld threads on %ld processors\n", long(threads), long(processors));
}

int touched_by[64];  // the processor that wrote to each page of `pages`
alignas(4096) char pages[64 * 4096];

void touch(char* page) {
    *page = 1;
    touched_by[(page - pages) / 4096] = sched_getcpu();
}

void two_nodes(int64_t first, int64_t second) {
    const int64_t numbers[] = {first, second}, of[] = {0, 1};
    Nodes nodes;
    if (!Nodes::make(numbers, of, 2, 2, nodes)) fail("the nodes");
    pool.set_nodes(nodes);
    pool.set_threads(20);
    pool.set_together(true);
    if (pool.unbound()) fail("a thread is not bound to its node");
    // Each thread takes its first piece from the share of its node. The caller may run on any node.
    constexpr int64_t N = 1000;
    std::vector<int> processor(N, -1);
    run(N, 1, false, [&](int64_t i, int64_t) { processor[size_t(i)] = sched_getcpu(); });
    int64_t right = 0;
    for (size_t i = 0; i < 10; i++) right += (processor[i] == first) + (processor[N / 2 + i] == second);
    if (right < 19) fail("first pieces were not taken by the threads of their node");
    // Two arrays of 32 pages: each node has one half of each of them.
    place(nodes, 20, pages, 32 * 4096, 2, touch);
    for (int64_t page = 0; page < 64; page++) {
        if (touched_by[page] != (page % 32 < 16 ? first : second)) fail("a page was written by another node");
    }
    const char* const some = right < 20 ? "19 of 20" : "20";
    std::printf("ok: %s first pieces ran on their node, and all pages were written there\n", some);
}

void barrier(int64_t threads) {
    pool.set_threads(threads);
    constexpr int64_t JOBS = 20000;
    double best = 1e9;
    for (int repetition = 0; repetition < 5; repetition++) {
        const auto start = std::chrono::steady_clock::now();
        for (int64_t i = 0; i < JOBS; i++) {
            // Each thread has one piece, and waits in it for all others: no thread can run two pieces.
            std::atomic<int64_t> arrived{0};
            run(threads, 1, true, [&](int64_t, int64_t) {
                arrived.fetch_add(1);
                while (arrived.load(std::memory_order_relaxed) < threads) sched_yield();
            });
        }
        const double ns = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
        best = ns / JOBS < best ? ns / JOBS : best;
    }
    std::printf("ok: a job in which all of %ld threads meet takes %.0f ns\n", long(threads), best);
}

}  // namespace

int main(int count, char** arguments) {
    pthread_atfork([] { pool.before_fork(); }, [] { pool.after_fork_in_parent(); },
                   [] { pool.after_fork_in_child(); });
    const auto number = [&](int i) { return i < count ? std::atoll(arguments[i]) : 0; };
    const char* const mode = count > 1 ? arguments[1] : "";
    if (!std::strcmp(mode, "fuzz")) fuzz(uint64_t(number(2)), number(3));
    else if (!std::strcmp(mode, "together")) together(number(2));
    else if (!std::strcmp(mode, "turns")) take_turns(number(2), number(3), number(4));
    else if (!std::strcmp(mode, "nodes")) two_nodes(number(2), number(3));
    else if (!std::strcmp(mode, "barrier")) barrier(number(2));
    else fail("the comment at the top of driver.cpp says what the arguments are");
    return 0;
}
