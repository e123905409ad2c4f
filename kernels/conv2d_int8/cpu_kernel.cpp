// Convolution of bytes, bias, ReLU and max-pool in one loop: exact int32 sums, of which the largest of each window is
// scaled. As scaling and rounding keep the order of numbers, that is the largest of what they make of all of them.
#include "cpu_channels.hpp"
#include "cpu_planes.hpp"

namespace {

i64 packed_bytes(const PerfkitConv2dInt8& p) { return few(p) ? PlanesShape(p).packed() : ChannelsShape(p).packed(); }

template <class Shape, class Pass>
void run(const Call& call, Threads threads) {
    const Shape shape(call.p);
    const i64 windows = call.p.pool * call.p.pool, taps = call.p.kernel_height * call.p.kernel_width * call.p.inputs;
    const i64 work = call.p.batch * call.p.outputs * call.area() * windows * taps;
    const i64 useful = std::min(threads.count, work / WORTH + 1), chunks = call.p.batch * Pass(shape, call, useful).chunks();
    const i64 slices = std::min(chunks, useful > 1 ? 4 * useful : 1);
    std::atomic<bool> failed{false};
    parallel(slices, threads, useful, [&](i64 s) {
        try {
            Pass pass(shape, call, useful);
            for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices; ++i) pass.run(i);
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    });
    if (failed) throw std::bad_alloc();
}

}  // namespace

extern "C" std::int64_t perfkit_conv2d_int8_packed_bytes(const PerfkitConv2dInt8* p) {
    return Packed::size(p->outputs, packed_bytes(*p));
}

// weight: OIHW, scale: (O,), dense. Returns whether all scales are positive and finite.
extern "C" int perfkit_conv2d_int8_pack(const PerfkitConv2dInt8* p, const std::int8_t* weight, const float* scale,
                                        void* to) {
    const Packed packed(p->outputs, packed_bytes(*p), to);
    few(*p) ? PlanesShape(*p).pack(weight, packed.weights()) : ChannelsShape(*p).pack(weight, packed.weights());
    const i64 K = p->inputs * p->kernel_height * p->kernel_width;
    return packed.tell(p->outputs, K, scale, [&](i64 n, i64 k) { return weight[n * K + k]; });
}

// bias may be null. Returns 1 where memory is short, else 0.
extern "C" int perfkit_conv2d_int8(const PerfkitConv2dInt8* p, const void* x, void* weight, const float* bias, void* y,
                                   perfkit::Threads threads) try {
    const Packed packed(p->outputs, packed_bytes(*p), weight);
    const PerOutput numbers(packed, p->outputs, bias, p->zero);
    const bool in_jax = p->in_jax;
    const Grid grid(p->scale, p->zero, p->top, in_jax), y_grid(p->y_scale, p->y_zero, p->y_top, in_jax);
    const Finish finish{
        in_jax ? 1.0f : float(p->scale), p->relu ? 0.0f : -std::numeric_limits<float>::infinity(), packed.scales(),
        numbers.biases.get(), numbers.begin.get(), p->y_kind, y_grid, y};
    const Call call{*p, x, packed.weights(), grid, finish};
    few(*p) ? run<PlanesShape, PlanesPass>(call, threads) : run<ChannelsShape, ChannelsPass>(call, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" const char* perfkit_conv2d_int8_instructions() { return instructions(); }
