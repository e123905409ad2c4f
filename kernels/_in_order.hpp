// Tasks of which some wait for what others do.
#pragma once

#include <atomic>
#include <new>
#include <thread>

#include "_thread_pool.hpp"

namespace perfkit {

using i64 = std::int64_t;

class Failed {};  // another thread's task has failed

// Waits for other threads: soon they are done, or they do not run, and get this processor.
template <class Ready>
void wait(const std::atomic<bool>& failed, Ready ready) {
    for (int spins = 0; !ready(); ++spins) {
        if (failed.load(std::memory_order_relaxed)) throw Failed();
        if (spins < 2000)
            relax();
        else
            std::this_thread::yield();
    }
}

// Of so many, those whose input parts a layer computes at a time while the layer above it waits for their outputs: the
// more there are, the longer it waits for the first ones, and the fewer, the more often the weights are read. Both cost
// about as much for the root.
inline i64 few_steps(i64 steps) {
    i64 few = 4;
    while (few * few < steps) few += 4;
    return few;
}

// Calls task(i) for i in [0, tasks) on the pool's threads; they are begun in order, so one may wait for an earlier one.
// Throws std::bad_alloc.
template <class Task>
void in_order(i64 tasks, Threads threads, std::atomic<bool>& failed, Task task) {
    struct Work {
        Task& task;
        std::atomic<bool>& failed;
    } work{task, failed};
    const auto run = [](void* context, long i) {
        Work& work = *static_cast<Work*>(context);
        if (work.failed) return;
        try {
            work.task(i);
        } catch (const std::bad_alloc&) {
            work.failed = true;
        } catch (const Failed&) {
        }
    };
    ThreadPool::run(long(tasks), threads, run, &work);
    if (failed) throw std::bad_alloc();
}

}  // namespace perfkit
