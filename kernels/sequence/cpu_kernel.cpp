// Layers one after the other by one call: what each needs beside its input was worked out before.
#include <cstdint>
#include <memory>
#include <new>

#include "_thread_pool.hpp"

extern "C" struct PerfkitLayer {
    void *run, *problem;  // the kernel's function and what it is told
    void *weight, *bias;  // bias may be null
    std::int64_t convolves;
    std::int64_t bytes;  // of its output, of which the last one's is the caller's
};

namespace {

// As vectors are read: one that lies in two cache lines takes twice as long.
struct Release {
    void operator()(char* at) const { ::operator delete(at, std::align_val_t{64}); }
};
using Lines = std::unique_ptr<char[], Release>;
Lines lines(std::int64_t bytes) { return Lines(static_cast<char*>(::operator new(bytes, std::align_val_t{64}))); }

using Linear = int (*)(const void* problem, const void* x, void* weight, void* bias, void* y, perfkit::Threads);
using Convolution = int (*)(const void* problem, const void* x, void* weight, void* bias, void* y, void* argmax,
                            perfkit::Threads);

}  // namespace

// Returns 1 where memory is short, else 0.
extern "C" int perfkit_sequence(const PerfkitLayer* layers, std::int64_t count, const void* x, void* y,
                                perfkit::Threads threads) try {
    Lines last;
    for (std::int64_t i = 0; i < count; ++i) {
        const PerfkitLayer& layer = layers[i];
        Lines own = i + 1 < count ? lines(layer.bytes) : nullptr;
        void* const to = own ? own.get() : y;
        const int failed =
            layer.convolves
                ? reinterpret_cast<Convolution>(layer.run)(layer.problem, x, layer.weight, layer.bias, to, nullptr, threads)
                : reinterpret_cast<Linear>(layer.run)(layer.problem, x, layer.weight, layer.bias, to, threads);
        if (failed) return failed;
        last = std::move(own), x = last.get();
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
