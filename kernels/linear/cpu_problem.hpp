// What is asked for, and of whom: for the kernel, and for what binds it.
#pragma once

#include <cstdint>

#include "_thread_pool.hpp"

extern "C" struct PerfkitLinear {
    std::int64_t rows, outputs, inputs, relu, bfloat16;
    std::int64_t across;               // w is (K, N), as is
    std::int64_t wide_weight, wide_y;  // where of bfloat16 numbers w or y is float32 all the same
};

// x: (M, K), w: (N, K), bias: (N) or null, y: (M, N), dense. Returns 1 where memory is short, else 0.
extern "C" int perfkit_linear(const PerfkitLinear* p, void* x, void* w, void* bias, void* y, perfkit::Threads threads);

// The same with w: (K, N), and a bias in float32. Returns 2 where there are no instructions for it.
extern "C" int perfkit_linear_across(const PerfkitLinear* p, void* x, void* w, const float* bias, void* y,
                                     perfkit::Threads threads);

// Whether there are.
extern "C" int perfkit_linear_has_across(std::int64_t bfloat16);
