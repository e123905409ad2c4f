// What is asked for.
#pragma once

#include <cstdint>

#include "_thread_pool.hpp"

extern "C" struct PerfkitLinearInt8Static {
    std::int64_t rows, outputs, inputs, relu;
    std::int64_t x_kind, y_kind;  // FLOAT32, UINT8, BFLOAT16; x is one of the first two
    std::int64_t in_jax;  // NaN becomes the zero, and the outputs' scales are multiplied with x's already
    std::int64_t zero, top;       // of x's grid
    double scale;                 // 0 to read x's grid, of which top alone is given, from x
    std::int64_t y_zero, y_top;  // of y's, where it is of bytes
    double y_scale;
};

extern "C" std::int64_t perfkit_linear_int8_static_packed_bytes(std::int64_t outputs, std::int64_t inputs);
extern "C" int perfkit_linear_int8_static_pack(std::int64_t outputs, std::int64_t inputs, const std::int8_t* weight,
                                        const float* scale, void* to);
extern "C" int perfkit_linear_int8_static(const PerfkitLinearInt8Static* told, const void* x, void* weight, const float* bias, void* y,
                                   perfkit::Threads threads);
