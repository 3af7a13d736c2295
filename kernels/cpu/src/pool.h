// This header implements a thread pool for 1 to several hundred threads on one or several memory nodes. OpenMP is not
// used, because OpenMP's threads either spin while the server is idle or sleep between two kernels of a step.
//
// A job is one call of `Pool::run`. A job is open while the calling thread takes pieces of the job. Workers that are
// awake join the job. When no piece is left, the caller closes the job. The caller then waits for the workers that
// joined the job, but not for workers that were asleep. So if another process occupies a core, the pool loses only the
// work of that core. A worker without a job spins for Worker::SPIN_NS nanoseconds, which is longer than the time
// between two kernels of a step, and then sleeps.
//
// With more threads than processors, only as many workers are on duty as there are processors for, because each further
// one would only take a processor from another. A job is announced to the workers on duty alone, and the others sleep.
// The workers take turns (`turns.h`): after TURN_PIECES pieces for each thread on duty, the worker that has been on
// duty for longest leaves and the next one takes its place. A worker that has had no work yet stays until it has. No
// job is faster for it. The work is divided fairly among all threads over time, and what each has taken shows that it
// is alive.
//
// The threads form groups of at most GROUP threads. All threads of a group belong to one memory node. Each group has a
// range of the job's items of its own. A thread first takes pieces from its own group's range, then from those of other
// groups of its node, then from all others. So the threads of one group share a counter, but all threads do not, and a
// node's threads read the same part of a weight in every product. A job with few pieces is announced only to as many
// threads as it has pieces.
//
// The code uses POSIX threads and no part of the C++ library that is not in its headers, so that the compiled library
// needs no particular version of the C++ library.
#pragma once
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "nodes.h"
#include "turns.h"
#include "worker.h"
#if defined(__x86_64__) && defined(__GLIBC__)
// Since version 2.34 glibc has new versions of these functions, which are the old ones under another name. A library
// that asks for the old versions also runs with older versions of glibc.
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.2.5");
#elif defined(__aarch64__) && defined(__GLIBC__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.17");
__asm__(".symver pthread_join, pthread_join@GLIBC_2.17");
#endif

class Pool {
public:
    static constexpr int64_t GROUP = 16;
    static constexpr int64_t MOST_THREADS = 1024;
    // When a turn is over, nobody does the leaving worker's work for about 100 us, until the next worker has woken up.
    // A piece often takes 1 us or more, so a turn is several times as long.
    static constexpr int64_t TURN_PIECES = 512;

    // `before_sleep` is called by a worker that is about to sleep.
    constexpr explicit Pool(void (*before_sleep)()) : before_sleep_(before_sleep) {}

    // Calls body(context, begin, end) for ranges that together are the items 0 to n - 1. If `in_runs` is true, a thread
    // takes many neighbouring pieces of `grain` items at once while many are left. `first_of_node`: [nodes + 1], the
    // first item of each node's share and the number of items, or null if the items are divided evenly.
    void run(int64_t n, int64_t grain, bool in_runs, Body body, const void* context,
             const int64_t* first_of_node = nullptr) {
        if (n <= 0) return;
        const int64_t pieces = (n + grain - 1) / grain;
        if (threads_.load(std::memory_order_relaxed) == 1 || pieces <= 1 || working()) return body(context, 0, n);
        // If the pool is running another thread's job, this thread runs its own job alone.
        if (busy_.test_and_set(std::memory_order_acquire)) return body(context, 0, n);
        const bool waits = together(), in_turns = in_turns_ && !waits;
        if (in_turns) count_for_turn(pieces);
        const int64_t threads = in_turns ? turns_.threads : threads_.load(std::memory_order_relaxed);
        const int64_t wanted = pieces < threads ? pieces : threads;
        const Group* home = &groups_[nodes_.count > 1 ? first_group_[nodes_.current()] : 0];
        const int64_t used = in_turns ? choose_on_duty(wanted, home->node) : choose_groups(wanted, *home);
        if (in_turns) home = used_[0];
        divide(n, grain, used, (in_turns ? wanted == threads : used == count_) ? first_of_node : nullptr);
        const Job job{body, context, grain, in_runs, waits ? taking_part_ : 0};
        open(job, used);
        work(*home, job, taken_by_callers_);
        for (int64_t i = 0; i < used; i++) used_[i]->gate.fetch_and(~OPEN);
        for (int64_t i = 0; i < used; i++) wait_until_left(*used_[i]);
        jobs_.store(jobs_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
        busy_.clear(std::memory_order_release);
    }

    // Sets the number of threads, of which the calling thread of a job is one. Returns the number of threads that there
    // are now, which is smaller if the system starts no more.
    int64_t set_threads(int64_t threads) {
        threads = threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
        Lock lock(busy_);
        return threads == threads_.load() ? threads : start(threads);
    }

    // Sets which processors belong to which memory node. The threads are divided among the nodes in proportion to the
    // nodes' processors, and are bound to the processors of their node if there is more than one node.
    void set_nodes(const Nodes& nodes) {
        Lock lock(busy_);
        if (nodes == nodes_) return;
        const int64_t threads = threads_.load();
        stop();
        nodes_ = nodes;
        start(threads);
    }

    // If `together` is true, no thread takes its second piece of a job before all threads that the job needs have taken
    // their first piece. It is for tests, which would otherwise not know that several threads share a job.
    void set_together(bool together) {
        Lock lock(busy_);
        together_.store(together);
    }
    bool together() const { return together_.load(std::memory_order_relaxed); }

    // Sets how many processors the pool believes to have, or 0 for those that the caller of `set_threads` may use, and
    // the number of pieces for each thread on duty after which a turn is over. It is for tests.
    void set_turns(int64_t processors, int64_t pieces) {
        Lock lock(busy_);
        processors_ = processors, turn_pieces_ = pieces;
        start(threads_.load());
    }

    // Returns how many turns of workers are over since the number of threads was set.
    int64_t turns() {
        Lock lock(busy_);
        return turns_.passed;
    }

    int64_t threads() const { return threads_.load(std::memory_order_relaxed); }
    // The number of workers that could not be bound to the processors of their node.
    int64_t unbound() const { return unbound_.load(); }
    // The number of jobs that several threads have run.
    int64_t jobs() const { return jobs_.load(std::memory_order_relaxed); }
    const Nodes& nodes() const { return nodes_; }
    // Returns the first of `count` items in the share of a node, or `count` for the node after the last one.
    int64_t share(int64_t count, int64_t node) const { return count * threads_before_node_[node] / threads(); }

    // Writes to counts[i] how many ranges of items thread i has taken since the number of threads was set, for each i
    // below `size`. Thread 0 stands for the callers.
    void taken(int64_t* counts, int64_t size) {
        Lock lock(busy_);
        for (int64_t i = 0; i < size; i++) {
            counts[i] = i == 0 ? taken_by_callers_.load() : i < threads_.load() ? workers_[i - 1]->taken.load() : 0;
        }
    }

    // These functions must be called before a fork of the process, and after it in the parent and the child. A fork
    // waits for the jobs of other threads. In the child the workers do not exist, so its pool begins with one thread.
    void before_fork() {
        while (!working() && busy_.test_and_set(std::memory_order_acquire)) sched_yield();
    }
    void after_fork_in_parent() {
        if (!working()) busy_.clear(std::memory_order_release);
    }
    void after_fork_in_child() {
        threads_.store(1), count_ = 0, workers_count_ = 0, working() = false;
        busy_.clear(std::memory_order_release);
    }

private:
    static constexpr uint64_t OPEN = Group::OPEN;

    struct Lock {
        std::atomic_flag& flag;
        explicit Lock(std::atomic_flag& of) : flag(of) {
            while (flag.test_and_set(std::memory_order_acquire)) sched_yield();
        }
        ~Lock() { flag.clear(std::memory_order_release); }
        Lock(const Lock&) = delete;
        Lock& operator=(const Lock&) = delete;
    };

    // `working` is true while the current thread runs pieces of a job. If such a piece itself starts another job, the
    // current thread alone runs that other job.
    static bool& working() {
        static thread_local bool value = false;
        return value;
    }

    // Puts the groups that a job for `wanted` threads needs into `used_`, and sets how many workers of each take part.
    // Returns the number of these groups. Groups near the caller come first if not all are needed.
    int64_t choose_groups(int64_t wanted, const Group& home) {
        int64_t left = wanted - 1, used = 0;
        const bool all = wanted == threads_.load(std::memory_order_relaxed);
        for (int64_t i = 0; i < count_ && (all || used == 0 || left > 0); i++) {
            Group& group = groups_[all ? i : order_[home.index * count_ + i]];
            const int64_t limit = left < group.workers ? left : group.workers;
            group.limit.store(limit, std::memory_order_relaxed);
            group.sharing = group.threads;
            left -= limit;
            used_[used++] = &group;
        }
        taking_part_ = wanted - left;
        return used;
    }

    // Does the same among the workers on duty. The groups of the caller's node come first, and on each node the workers
    // that have been on duty for longest, so that they have work before they leave. A job for all threads on duty uses
    // a group of every node, even if none of its workers is on duty, because the node has a share of the items.
    int64_t choose_on_duty(int64_t wanted, int64_t home) {
        int64_t left = wanted - 1, used = 0;
        const bool all = wanted == turns_.threads;
        for (int64_t n = 0; n < nodes_.count && (all || used == 0 || left > 0); n++) {
            const int64_t node = (home + n) % nodes_.count, groups = groups_of_node_[node];
            const Ring& ring = turns_.rings[node];
            const int64_t count = left < ring.on_duty ? left : ring.on_duty;
            const int64_t oldest = ring.workers ? workers_[ring.oldest]->group->index - first_group_[node] : 0;
            int64_t rest = count;
            for (int64_t i = 0; i < groups && (i == 0 || rest > 0); i++) {
                Group& group = groups_[first_group_[node] + (oldest + i) % groups];
                const int64_t limit = ring.count_of(group.first_worker, group.workers, count);
                group.limit.store(limit, std::memory_order_relaxed);
                // The caller takes the pieces of the first group, too.
                group.sharing = used == 0 ? limit + 1 : limit > 0 ? limit : 1;
                rest -= limit;
                used_[used++] = &group;
            }
            left -= count;
        }
        return used;
    }

    // Counts the pieces of the next job. If the turn is over, the oldest worker on duty of each node goes, provided
    // that it has had work. The epochs change so that workers that wait for a job see that they are on duty no longer.
    void count_for_turn(int64_t pieces) {
        if ((turn_left_ -= pieces) > 0) return;
        bool passed = false;
        for (int64_t node = 0; node < nodes_.count; node++) {
            Ring& ring = turns_.rings[node];
            if (ring.on_duty == 0 || taken_by(ring.oldest) == ring.taken) continue;
            ring.pass();
            ring.taken = taken_by(ring.oldest);
            passed = true;
        }
        if (!passed) return;
        turn_left_ = turn_pieces_ * turns_.threads;
        turns_.passed++;
        turns_.divide(nodes_.count);
        set_duties();
    }

    void set_duties() {
        for (int64_t g = 0; g < count_; g++) {
            Group& group = groups_[g];
            const Ring& ring = turns_.rings[group.node];
            const int64_t first = ring.first_of(group.first_worker, group.workers);
            const int64_t on_duty = ring.count_of(group.first_worker, group.workers, ring.on_duty);
            if (first == group.first.load() && on_duty == group.on_duty.load()) continue;
            group.first.store(first), group.on_duty.store(on_duty);
            group.epoch.fetch_add(1);
        }
    }

    int64_t taken_by(int64_t worker) const { return workers_[worker]->taken.load(std::memory_order_relaxed); }

    // Divides the items among the groups in use, in proportion to the threads for which they are meant.
    void divide(int64_t n, int64_t grain, int64_t used, const int64_t* first_of_node) {
        // Each node has a share of its own with `first_of_node`, or else there is one share for all.
        int64_t all[Nodes::MOST], before[Nodes::MOST];
        for (int64_t share = 0; share < (first_of_node ? nodes_.count : 1); share++) all[share] = before[share] = 0;
        for (int64_t i = 0; i < used; i++) all[first_of_node ? used_[i]->node : 0] += used_[i]->sharing;
        for (int64_t i = 0; i < used; i++) {
            Group& group = *used_[i];
            const int64_t share = first_of_node ? group.node : 0, earlier = before[share], threads = all[share];
            const int64_t first = first_of_node ? first_of_node[share] : 0;
            const int64_t size = first_of_node ? first_of_node[share + 1] - first : n;
            const int64_t pieces = (size + grain - 1) / grain, end = pieces * (earlier + group.sharing) / threads;
            group.next.store(first + pieces * earlier / threads * grain, std::memory_order_relaxed);
            group.end = end == pieces ? first + size : first + end * grain;
            before[share] += group.sharing;
        }
    }

    void open(const Job& job, int64_t used) {
        for (int64_t i = 0; i < used; i++) used_[i]->job = job;
        if (job.together) arrived_.store(0);
        for (int64_t i = 0; i < used; i++) {
            used_[i]->gate.fetch_or(OPEN);
            used_[i]->epoch.fetch_add(1);
        }
        for (int64_t i = 0; i < used; i++) {
            const int64_t limit = used_[i]->limit.load(std::memory_order_relaxed);
            // The first worker of a group wakes two others, each of which wakes two more, while pieces are left.
            for (int64_t w = 0; w < limit && (w == 0 || job.together); w++) worker_at(*used_[i], w).wake();
        }
    }

    Worker& worker_at(const Group& group, int64_t position) const {
        return *workers_[group.first_worker + group.index_at(position)];
    }

    void wait_until_left(const Group& group) {
        for (int64_t i = 0; group.gate.load() != 0; i++) {
            if (i < patience_) relax();
            else sched_yield();
        }
    }

    // Runs pieces of a job until none is left, for a thread of the group `home`.
    void work(const Group& home, const Job& job, std::atomic<int64_t>& taken) {
        working() = true;
        int64_t ranges = 0, begin, end;
        for (int64_t i = 0; i < count_; i++) {
            Group& group = groups_[order_[home.index * count_ + i]];
            while (claim(group, job, ranges == 0, begin, end)) {
                job.body(job.context, begin, end);
                if (ranges++ == 0 && job.together) wait_for_others(job);
            }
        }
        taken.store(taken.load(std::memory_order_relaxed) + ranges, std::memory_order_relaxed);
        working() = false;
    }

    void wait_for_others(const Job& job) {
        arrived_.fetch_add(1);
        while (arrived_.load() < job.together) sched_yield();
    }

    // Takes a range of items from a group's part of a job. Returns false if none is left. With `in_runs`, the number of
    // pieces in the range is large at first, because each thread then reads memory in order, which is faster, and small
    // at the end, so that all threads finish at about the same time.
    static bool claim(Group& group, const Job& job, bool is_first, int64_t& begin, int64_t& end) {
        int64_t at = group.next.load(), size = job.grain;
        const int64_t last = group.end;
        if (!job.in_runs && !job.together) {
            if (at >= last) return false;
            at = group.next.fetch_add(size);
        } else {
            do {
                if (at >= last) return false;
                const int64_t run = (last - at) / (2 * group.sharing * job.grain);
                size = run > 1 && job.in_runs && !(job.together && is_first) ? run * job.grain : job.grain;
            } while (!group.next.compare_exchange_weak(at, at + size));
        }
        begin = at, end = at + size < last ? at + size : last;
        return at < last;
    }

    static void* serve(void* argument) {
        Worker& worker = *static_cast<Worker*>(argument);
        Pool& pool = *worker.pool;
        Group& group = *worker.group;
        if (pool.nodes_.count > 1 && !pool.nodes_.bind_this_thread(group.node)) pool.unbound_.fetch_add(1);
        pool.started_.fetch_add(1);
        for (uint64_t seen = 1;;) {
            worker.wait(seen, pool.before_sleep_);
            if (pool.stopping_.load()) return nullptr;
            seen = group.epoch.load();
            if (worker.position() >= group.limit.load(std::memory_order_relaxed)) continue;
            // The limit and the positions of an open job do not change, so they decide only now.
            const bool joined = group.gate.fetch_add(1) & OPEN;
            const int64_t own = worker.position(), limit = group.limit.load(std::memory_order_relaxed);
            if (joined && own < limit) {
                for (int64_t i = 2 * own + 1; i <= 2 * own + 2; i++) {
                    if (i < limit && group.next.load() < group.end) pool.worker_at(group, i).wake();
                }
                pool.work(group, group.job, worker.taken);
            }
            group.gate.fetch_sub(1);
        }
    }

    // Ends the workers and starts `threads` - 1 new ones. Returns the number of threads that there are then.
    int64_t start(int64_t threads) {
        stop();
        make_groups(threads);
        const int64_t processors = processors_ ? processors_ : usable_processors();
        patience_ = threads > processors ? 64 : 4000;
        start_turns(threads, processors > 1 ? processors : 2);
        started_.store(0), unbound_.store(0), taken_by_callers_.store(0);
        for (int64_t g = 0; g < count_; g++) {
            for (int64_t i = 0; i < groups_[g].workers; i++) {
                auto* const worker = new (allocate(sizeof(Worker))) Worker{this, &groups_[g], i, {}, {}, {}};
                if (pthread_create(&worker->thread, nullptr, serve, worker) != 0) {
                    std::free(worker);
                    return start(workers_count_ + 1);  // fewer threads are divided in another way
                }
                workers_[workers_count_++] = worker;
            }
        }
        threads_.store(threads);
        while (started_.load() < workers_count_) sched_yield();
        return threads;
    }

    // Puts `most` of the threads on duty, or all if there are no more.
    void start_turns(int64_t threads, int64_t most) {
        in_turns_ = threads > most;
        turns_.passed = 0;
        if (!in_turns_) return;
        int64_t workers[Nodes::MOST];
        for (int64_t node = 0; node < nodes_.count; node++) workers[node] = threads_of_node_[node] - (node == 0);
        turns_.start(workers, nodes_.count, most);
        turn_left_ = turn_pieces_ * most;
        set_duties();
    }

    void stop() {
        stopping_.store(true);
        for (int64_t g = 0; g < count_; g++) groups_[g].epoch.fetch_add(1);
        for (int64_t i = 0; i < workers_count_; i++) workers_[i]->wake();
        for (int64_t i = 0; i < workers_count_; i++) pthread_join(workers_[i]->thread, nullptr);
        for (int64_t i = 0; i < workers_count_; i++) std::free(workers_[i]);
        std::free(groups_), std::free(order_);
        groups_ = nullptr, order_ = nullptr;
        threads_.store(1), workers_count_ = 0, count_ = 0;
        stopping_.store(false);
    }

    // Divides the threads into groups of about the same size. Thread 0, the caller, counts as one of the first group.
    void make_groups(int64_t threads) {
        nodes_.divide(threads, threads_before_node_);
        groups_ = static_cast<Group*>(allocate((threads / GROUP + Nodes::MOST + 1) * int64_t(sizeof(Group))));
        for (int64_t node = 0; node < nodes_.count; node++) {
            const int64_t own = threads_before_node_[node + 1] - threads_before_node_[node];
            const int64_t groups = (own + GROUP - 1) / GROUP;
            threads_of_node_[node] = own, groups_of_node_[node] = groups, first_group_[node] = own ? count_ : 0;
            for (int64_t i = 0; i < groups; i++, count_++) {
                Group& group = *new (groups_ + count_) Group;
                const int64_t first = threads_before_node_[node] + own * i / groups;
                group.threads = threads_before_node_[node] + own * (i + 1) / groups - first;
                group.index = count_, group.node = node, group.workers = group.threads - (first == 0);
                group.first_worker = first - (first > 0), group.on_duty.store(group.workers);
            }
        }
        order_ = static_cast<int64_t*>(allocate(count_ * count_ * int64_t(sizeof(int64_t))));
        for (int64_t g = 0; g < count_; g++) {
            int64_t* to = order_ + g * count_;
            for (int same = 1; same >= 0; same--) {
                for (int64_t i = 0; i < count_; i++) {
                    const int64_t other = (g + i) % count_;
                    if ((groups_[other].node == groups_[g].node) == same) *to++ = other;
                }
            }
        }
    }

    // Ends the process if there is no memory, because the kernels cannot report an error.
    static void* allocate(int64_t bytes) {
        void* const memory = std::aligned_alloc(LINE, size_t((bytes + LINE - 1) / LINE * LINE));
        if (!memory) std::abort();
        return memory;
    }

    // What callers write for each job is apart from what is constant between two calls of `start`.
    alignas(LINE) std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    int64_t taking_part_ = 0;
    std::atomic<int64_t> jobs_{0};
    std::atomic<int64_t> taken_by_callers_{0};
    Group* used_[MOST_THREADS / GROUP + Nodes::MOST + 1] = {};
    int64_t turn_left_ = 0;  // the number of pieces until the turn is over
    Turns turns_;
    alignas(LINE) std::atomic<int64_t> arrived_{0};
    alignas(LINE) std::atomic<int64_t> threads_{1};
    std::atomic<bool> stopping_{false};
    std::atomic<bool> together_{false};
    bool in_turns_ = false;  // whether there are more threads than can be on duty
    int64_t count_ = 0, workers_count_ = 0, patience_ = 4000, processors_ = 0, turn_pieces_ = TURN_PIECES;
    Group* groups_ = nullptr;
    int64_t* order_ = nullptr;  // order_: [groups, groups]; in each row the order in which a group takes others' pieces
    void (*before_sleep_)();
    Worker* workers_[MOST_THREADS] = {};
    Nodes nodes_;
    int64_t threads_before_node_[Nodes::MOST + 1] = {0, 1}, threads_of_node_[Nodes::MOST] = {};
    int64_t first_group_[Nodes::MOST] = {}, groups_of_node_[Nodes::MOST] = {};
    std::atomic<int64_t> started_{0}, unbound_{0};
};
