// What is asked for.
#pragma once

#include <cstdint>

#include "_thread_pool.hpp"

// A stack of layers, each in one or two directions; W = layers * directions, the directions of layer 0 first.
extern "C" struct PerfkitRnnInt8 {
    std::int64_t cell;  // 0 LSTM, 1 GRU, 2 RNN tanh, 3 RNN relu; G = 4, 3, 1, 1 gates
    std::int64_t steps, batch, inputs, hidden, layers, directions;
    const std::int64_t* batch_sizes;  // (T,), never rising: at step t the rows [0, batch_sizes[t]) are there
    const std::int64_t* starts;       // (T,) the place of step t's first row in x and out, in units of row strides
    const float* x;
    std::int64_t x_step, x_row;  // strides in floats; features are contiguous. The row b of step t lies at
    float* out;         // x + t * x_step + (starts[t] + b) * x_row
    std::int64_t out_step, out_row;
    float x_fixed;               // the static scale of x, 0 for one of each row and step
    float h_fixed;               // that of hidden states, of a single layer; 0 as the package's head has it
    const void* const* weights;  // (W, 6): w_ih packed, its scales (G, H), w_hh, its scales, bias (G, H), bias_hn (H,) of GRU
    float *h, *c;                // (W, B, H), the initial states, replaced by the final ones; c for LSTM only
    perfkit::Threads threads;
};

extern "C" int perfkit_rnn_int8(const PerfkitRnnInt8* call);
