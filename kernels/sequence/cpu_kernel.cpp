// Layers one after the other by one call: what each needs beside its input was worked out before.
//
// Rows, or images, are independent of each other in all layers: each thread takes some through all of them, so that it
// waits for the others once and finds in its cache what it has just written.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "_thread_pool.hpp"

extern "C" struct PerfkitLayer {
    void *run, *problem;  // the kernel's function and what it is told
    void *weight, *bias;  // bias may be null
    std::int64_t convolves;
    std::int64_t numbers;  // that the problem is made of, the first one of which is how many rows there are
    std::int64_t bytes;    // of its output for each of the sequence's rows
};

extern "C" struct PerfkitSequence {
    const PerfkitLayer* layers;
    std::int64_t count;
    std::int64_t rows;     // that can be computed apart: 1 where none can
    std::int64_t x_bytes;  // of each
    std::int64_t work;     // multiply-adds of all
};

namespace {

using perfkit::Threads;
using Linear = int (*)(const void* problem, const void* x, void* weight, void* bias, void* y, Threads);
using Convolution = int (*)(const void* problem, const void* x, void* weight, void* bias, void* y, void* argmax, Threads);

constexpr std::int64_t FEWEST = 16;      // rows that make good use of each load of the weights
constexpr std::int64_t MOST = 48;        // rows whose values are to stay in the second-level cache
constexpr std::int64_t WORTH = 1 << 20;  // multiply-adds that are worth waking a thread for
constexpr std::int64_t MOST_NUMBERS = 32;

// As vectors are read: one that lies in two cache lines takes twice as long.
struct Release {
    void operator()(char* at) const { ::operator delete(at, std::align_val_t{64}); }
};
using Lines = std::unique_ptr<char[], Release>;
Lines lines(std::int64_t bytes) { return Lines(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))); }

// In how many parts the rows are computed, and by how many threads at once.
struct Slices {
    std::int64_t count = 1, useful = 1;
    bool whole = true;  // layer by layer, each by all threads

    Slices(const PerfkitSequence& all, std::int64_t threads) {
        const std::int64_t most = std::max<std::int64_t>(1, std::min(threads, all.work / WORTH));
        if (all.rows < FEWEST * most || all.count == 0) return;
        count = most * ((all.rows + MOST * most - 1) / (MOST * most)), useful = most, whole = false;
    }
};

// So many of the rows. Returns 1 where memory is short, else 0.
int run_rows(const PerfkitSequence& all, std::int64_t rows, const void* x, void* y, Threads threads) try {
    Lines last;
    for (std::int64_t i = 0; i < all.count; ++i) {
        const PerfkitLayer& layer = all.layers[i];
        std::int64_t part[MOST_NUMBERS];
        const void* problem = layer.problem;
        if (rows < all.rows) {
            std::memcpy(part, problem, layer.numbers * sizeof *part);
            part[0] = part[0] / all.rows * rows, problem = part;
        }
        Lines own = i + 1 < all.count ? lines(layer.bytes * rows) : nullptr;
        void* const to = own ? own.get() : y;
        const int failed =
            layer.convolves
                ? reinterpret_cast<Convolution>(layer.run)(problem, x, layer.weight, layer.bias, to, nullptr, threads)
                : reinterpret_cast<Linear>(layer.run)(problem, x, layer.weight, layer.bias, to, threads);
        if (failed) return failed;
        last = std::move(own), x = last.get();
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // namespace

// Returns 1 where memory is short, else 0.
extern "C" int perfkit_sequence(const PerfkitSequence* all, const void* x, void* y, Threads threads) {
    const Slices slices(*all, threads.count);
    if (slices.whole) return run_rows(*all, all->rows, x, y, threads);
    struct Work {
        const PerfkitSequence& all;
        const char* x;
        char* y;
        std::int64_t slices;
        std::atomic<int> failed{0};

        void run(std::int64_t slice) {
            const std::int64_t from = all.rows * slice / slices, to = all.rows * (slice + 1) / slices;
            const std::int64_t y_bytes = all.layers[all.count - 1].bytes;
            if (const int found = run_rows(all, to - from, x + from * all.x_bytes, y + from * y_bytes, {1})) failed = found;
        }
    } work{*all, static_cast<const char*>(x), static_cast<char*>(y), slices.count};
    perfkit::ThreadPool::run(
        slices.count, {slices.useful, threads.parallel},
        [](void* context, long slice) { static_cast<Work*>(context)->run(slice); }, &work);
    return work.failed;
}

// The bytes of what layers hand on, at most at once: of each part that is computed, a layer's input and its output.
extern "C" std::int64_t perfkit_sequence_between(const PerfkitSequence* all, Threads threads) {
    const Slices slices(*all, threads.count);
    std::int64_t most = 0;
    for (std::int64_t i = 0; i + 1 < all->count; ++i)
        most = std::max(most, all->layers[i].bytes + (i > 0 ? all->layers[i - 1].bytes : 0));
    return slices.useful * ((all->rows + slices.count - 1) / slices.count) * most;
}
