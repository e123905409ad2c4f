// Threads for kernels: the framework's own where it lends them, else a few persistent ones.
//
// Why not OpenMP of our own: the framework in the same process brings a runtime, and two of them fight for the cores. Its
// threads go on spinning for a while after each of its operations: where another pool's then want the same cores, both
// are held up. Why not threads per call: starting one costs more than a short sequence takes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
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

using Task = void (*)(void* context, long index);

// Those that a call may use. `parallel` is GNU OpenMP's GOMP_parallel, or another's of its type, of the runtime whose
// threads work for the framework; null for the pool's.
struct Threads {
    std::int64_t count;
    void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
};

// A fork takes no threads along: a child must not ask for those of its parent.
inline const pid_t loaded_by = getpid();

class ThreadPool {
  public:

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

    // Calls task(context, i) for each i in [0, tasks), on at most so many threads of which this is one; returns when all
    // are done. They are begun in order. A task must not throw. While another thread of the process uses the pool, this
    // one works alone.
    static void run(long tasks, Threads threads, Task task, void* context) {
        const std::int64_t count = threads.count < tasks ? threads.count : tasks;
        if (count > 1 && threads.parallel != nullptr && loaded_by == getpid()) {
            Job job{task, context, tasks};
            threads.parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(count), 0);
        } else if (count <= 1 || !instance().run_on_pool(tasks, int(count), task, context)) {
            for (long i = 0; i < tasks; ++i) task(context, i);
        }
    }

  private:
    static constexpr int LOOKS = 5000;  // about 0.1 ms

    struct Job {
        Task task;
        void* context;
        long tasks;
        std::atomic<long> next{0};

        void work() {
            for (long i; (i = next.fetch_add(1)) < tasks;) task(context, i);
        }
    };

    // False where the pool is in use.
    bool run_on_pool(long tasks, int threads, Task task, void* context) {
        if (busy_.test_and_set(std::memory_order_acquire)) return false;
        const int helpers = start(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_.task = task, job_.context = context, job_.tasks = tasks;
            job_.next.store(0);
            places_ = helpers;
        }
        wake_.notify_all();
        job_.work();
        {
            std::unique_lock<std::mutex> lock(mutex_);
            places_ = 0;  // who has not come by now would find nothing to do, and is not waited for
            done_.wait(lock, [this] { return active_ == 0; });
        }
        busy_.clear(std::memory_order_release);
        return true;
    }

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
            job_.work();
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    const pid_t pid_ = getpid();
    std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
    std::mutex mutex_;
    std::condition_variable wake_, done_;
    Job job_{};
    int started_ = 0, active_ = 0;
    std::atomic<int> places_{0};  // changed under the mutex
};

}  // namespace perfkit
