// Convolution, bias, ReLU and max-pool in one loop over pooled outputs, and its gradients, in float32 sums.
//
// Letters: N images, I input channels of a group, O output channels, T taps (I times the kernel's size), P the pool's
// side, W its P * P places ("windows"), L lanes of a vector, Q planes.
//
// Lanes are pooled outputs. What tap t in window w needs of L neighbouring outputs lies in x with a step of P * stride
// between them; it is copied once into a plane of its own, which all output channels then read as whole vectors. Taps
// and windows that look at the same place share a plane: 3x3 taps in 2x2 windows have 16 planes, not 36. Padding,
// strides, dilation, layout and dtype are all dealt with by that copy.
#include "cpu_backward.hpp"
#include "cpu_channels.hpp"
#include "cpu_tiles.hpp"

extern "C" int perfkit_conv2d_forward(const PerfkitConv2d* problem, void* x, void* weight, void* bias, void* y,
                                      std::uint8_t* argmax, perfkit::Threads threads) try {
    const bool half = problem->bfloat16;
    std::vector<float> own, biases(problem->outputs + L);
    for (i64 o = 0; bias && o < problem->outputs; ++o) biases[o] = Numbers{bias, half}[o];
#if PERFKIT_TILES
    if (by_tiles(*problem) && forward_by_tiles(Shape(*problem, true), {x, half}, {weight, half}, biases.data(),
                                               {y, half}, argmax, threads))
        return 0;
#endif
    const Shape p(*problem);
#if defined(__AVX512F__)
    if (by_channels(p)) {
        forward_by_channels(p, {x, half}, {weight, half}, biases.data(), {y, half}, argmax, threads);
        return 0;
    }
#endif
    if (p.paired) own = p.pairs({weight, half});
    const float* weights = p.paired ? own.data() : p.weights({weight, half}, own);
    const Forward pass{p, {x, half}, {y, half}, weights, biases.data(), argmax};
    const i64 chunks = p.batch * p.chunks, useful = std::min(threads.count, p.work() / WORTH + 1);
    const i64 slices = std::min(chunks, useful > 1 ? 4 * useful : 1);
    std::vector<Planes> planes;
    for (i64 s = 0; s < slices; ++s) planes.emplace_back(p);
    parallel(slices, threads, p.work(), [&](i64 s) {
        for (i64 i = chunks * s / slices; i < chunks * (s + 1) / slices; ++i)
            argmax ? pass.run<true>(p.chunk(i), planes[s]) : pass.run<false>(p.chunk(i), planes[s]);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" int perfkit_conv2d_backward(const PerfkitConv2d* problem, void* x, void* weight, const std::uint8_t* argmax,
                                       void* d_y, void* d_x, float* d_weight, float* d_bias,
                                       perfkit::Threads threads) try {
    const Shape p(*problem);
    const bool half = p.bfloat16;
    const Numbers returned{d_y, half};
    if (d_weight || d_bias) weight_gradients(p, {x, half}, argmax, returned, d_weight, d_bias, threads);
    std::vector<float> own;
    if (d_x) image_gradients(p, p.weights({weight, half}, own), argmax, returned, {d_x, half}, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}
