// What is asked for, and of whom: for the kernel, and for what binds it.
#pragma once

#include <cstdint>

#include "_thread_pool.hpp"

// x[n][c][h][w] lies at x + n * x_n + c * x_c + h * x_h + w * x_w, weights likewise. y, argmax and d_y are dense, NCHW
// or NHWC; their height and width are those after the pool. d_x lies as x, d_weight as weight.
extern "C" struct PerfkitConv2d {
    std::int64_t batch, inputs, height, width, outputs, kernel_height, kernel_width;
    std::int64_t stride_h, stride_w, top, left, dilation_h, dilation_w, groups, pool;
    std::int64_t out_height, out_width;
    std::int64_t relu, bfloat16, channels_last;
    std::int64_t x_n, x_c, x_h, x_w, w_o, w_i, w_h, w_w;
};

// bias may be null. argmax is null, or is filled for the backward pass. Returns 1 where memory is short, else 0.
extern "C" int perfkit_conv2d_forward(const PerfkitConv2d* problem, void* x, void* weight, void* bias, void* y,
                                      std::uint8_t* argmax, perfkit::Threads threads);

// argmax is null where the forward pass had neither pool nor ReLU; d_x, d_weight and d_bias where they are not wanted.
// d_weight and d_bias are float32; all are written whole.
extern "C" int perfkit_conv2d_backward(const PerfkitConv2d* problem, void* x, void* weight, const std::uint8_t* argmax,
                                       void* d_y, void* d_x, float* d_weight, float* d_bias, perfkit::Threads threads);
