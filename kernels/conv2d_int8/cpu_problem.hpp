// What is asked for.
#pragma once

#include <cstdint>

#include "_thread_pool.hpp"

// x is dense, of FLOAT32 or UINT8, NCHW or NHWC; y likewise, of those or BFLOAT16. y's height and width are those after
// the pool.
extern "C" struct PerfkitConv2dInt8 {
    std::int64_t batch, inputs, height, width, outputs, kernel_height, kernel_width;
    std::int64_t stride_h, stride_w, top_pad, left_pad, dilation_h, dilation_w, pool;
    std::int64_t out_height, out_width, relu;
    std::int64_t x_kind, y_kind, x_last, y_last;  // NHWC
    std::int64_t in_jax;  // NaN becomes the zero, and the outputs' scales are multiplied with x's already
    std::int64_t zero, top;  // of x's grid
    double scale;
    std::int64_t y_zero, y_top;  // of y's, where it is of bytes
    double y_scale;
};

extern "C" std::int64_t perfkit_conv2d_int8_packed_bytes(const PerfkitConv2dInt8* p);
extern "C" int perfkit_conv2d_int8_pack(const PerfkitConv2dInt8* p, const std::int8_t* weight, const float* scale,
                                        void* to);
extern "C" int perfkit_conv2d_int8(const PerfkitConv2dInt8* p, const void* x, void* weight, const float* bias, void* y,
                                   perfkit::Threads threads);
