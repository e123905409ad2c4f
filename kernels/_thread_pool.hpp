// A few persistent threads for kernels whose tasks are independent of each other.
//
// Why not OpenMP: the framework in the same process brings a runtime of its own, and two of them fight for the cores.
// Why not threads per call: starting one costs more than a short sequence takes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace perfkit {

// What a thread does while it looks for something again and again.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class ThreadPool {
  public:
    using Task = void (*)(void* context, long index);

    // The pool of this process. A fork leaves the child the memory of the threads but not the threads: it gets a new
    // pool, and the old one is leaked, as nothing in it can be trusted. Pools are never destroyed: their threads may
    // outlive every static object.
    static ThreadPool& instance() {
        static std::atomic<ThreadPool*> current{nullptr};
        ThreadPool* pool = current.load();
        while (pool == nullptr || pool->pid_ != getpid()) {
            ThreadPool* fresh = new ThreadPool;
            if (current.compare_exchange_strong(pool, fresh)) return *fresh;
            delete fresh;  // another thread was first, and no thread of this one has started
        }
        return *pool;
    }

    // Calls task(context, i) for each i in [0, tasks), on at most `threads` threads of which this is one; returns when
    // all are done. A task must not throw. While another thread of the process uses the pool, this one works alone.
    void run(long tasks, int threads, Task task, void* context) {
        if (threads <= 1 || tasks <= 1 || busy_.test_and_set(std::memory_order_acquire)) {
            for (long i = 0; i < tasks; ++i) task(context, i);
            return;
        }
        const int helpers = start(static_cast<int>(threads < tasks ? threads : tasks) - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task, context_ = context, tasks_ = tasks;
            next_.store(0);
            places_ = helpers;
        }
        wake_.notify_all();
        work();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            places_ = 0;  // who has not come by now would find nothing to do, and is not waited for
            done_.wait(lock, [this] { return active_ == 0; });
        }
        busy_.clear(std::memory_order_release);
    }

  private:
    static constexpr int LOOKS = 5000;  // about 0.1 ms

    // Have `wanted` threads if the system grants them; how many of them there are.
    int start(int wanted) {
        try {
            for (; started_ < wanted; ++started_) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
        }
        return started_ < wanted ? started_ : wanted;
    }

    void help() {
        for (;;) {
            // Calls come one after the other, and waking a thread on an idle processor may take longer than a short
            // one: also who was woken too late for this call looks for the next.
            for (int looks = 0; places_.load(std::memory_order_relaxed) == 0 && looks < LOOKS; ++looks) relax();
            std::unique_lock<std::mutex> lock(mutex_);
            if (places_ == 0) {
                wake_.wait(lock);
                if (places_ == 0) continue;
            }
            --places_, ++active_;
            lock.unlock();
            work();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    void work() {
        for (long i; (i = next_.fetch_add(1)) < tasks_;) task_(context_, i);
    }

    const pid_t pid_ = getpid();
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Task task_ = nullptr;
    void* context_ = nullptr;
    long tasks_ = 0;
    std::atomic<long> next_{0};
    int started_ = 0, active_ = 0;
    std::atomic<int> places_{0};  // changed under the mutex
};

}  // namespace perfkit
