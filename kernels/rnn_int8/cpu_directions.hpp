// One call of the kernel, and what of it is the same for all rows and steps.
#pragma once

#include <atomic>
#include <type_traits>
#include <vector>

#include "_in_order.hpp"
#include "_memory.hpp"
#include "cpu_cells.hpp"
#include "cpu_problem.hpp"

namespace {

// Numbers of channels, with H rounded up to whole panels.
template <class Cell>
struct Direction {
    static constexpr int G = Cell::G;
    i64 K, K4_x, K4_h;
    const std::int8_t *w_ih, *w_hh;
    // (G, H_): scales times the gates' factors; these times the one scale that all rows have, where they have one;
    // biases times the factors; and what sums begin with.
    Array<float> scale_x, scale_h, common_x, common_h, bias, bias_hn;
    Array<std::int32_t> start_x, start_h;

    Direction(const PerfkitRnnInt8& p, i64 number, i64 H_) {
        const void* const* given = p.weights + 6 * number;
        const i64 layer = number / p.directions;
        K = layer ? p.hidden * p.directions : p.inputs, K4_x = (K + 3) / 4, K4_h = (p.hidden + 3) / 4;
        w_ih = static_cast<const std::int8_t*>(given[0]), w_hh = static_cast<const std::int8_t*>(given[2]);
        const auto numbers = [&](int i) { return static_cast<const float*>(given[i]); };
        pad(scale_x, numbers(1), p.hidden, H_, G), pad(scale_h, numbers(3), p.hidden, H_, G);
        pad(bias, numbers(4), p.hidden, H_, G);
        if (Cell::GRU) pad(bias_hn, numbers(5), p.hidden, H_, 1);
        for (i64 i = 0; Cell::GRU && i < p.hidden; ++i) bias_hn[i] *= Cell::FACTORS[G - 1];
        common_x.allocate(G * H_), common_h.allocate(G * H_);
        const float common = layer ? 1.0f / 127.0f : p.x_fixed;
        for (int g = 0; g < G; ++g)
            for (i64 i = g * H_; i < (g + 1) * H_; ++i) {
                scale_x[i] *= Cell::FACTORS[g], scale_h[i] *= Cell::FACTORS[g], bias[i] *= Cell::FACTORS[g];
                common_x[i] = scale_x[i] * common, common_h[i] = scale_h[i] * h_scale(p);
            }
        begin(start_x, w_ih + 4 * K4_x * G * p.hidden, p.hidden, H_);
        begin(start_h, w_hh + 4 * K4_h * G * p.hidden, p.hidden, H_);
    }

    // Of hidden states of which all rows have the same.
    static float h_scale(const PerfkitRnnInt8& p) { return p.h_fixed > 0 ? p.h_fixed : 1.0f / 127.0f; }

  private:
    static void pad(Array<float>& to, const float* from, i64 H, i64 H_, int gates) {
        to.allocate_zeros(gates * H_);
        for (int g = 0; g < gates; ++g) std::memcpy(&to[g * H_], from + g * H, H * sizeof(float));
    }
    // What BIAS adds is taken off: the sums of each channel's weights lie behind them.
    static void begin(Array<std::int32_t>& to, const std::int8_t* sums, i64 H, i64 H_) {
        to.allocate_zeros(G * H_);
        for (int g = 0; BIAS && g < G; ++g)
            for (i64 u = 0; u < H; ++u) to[g * H_ + u] = -BIAS * load<std::int32_t>(sums + 4 * (g * H + u));
    }
};

// What all lines of a call read.
template <class Cell>
struct Stack {
    const PerfkitRnnInt8& p;
    const i64 H, H_, width;       // hidden units; rounded up to whole panels; of a layer's outputs
    const bool bounded;           // hidden states lie in [-1, 1]: their scale is 1/127
    const i64 q_stride;           // of rows of quantized outputs between layers
    std::vector<i64> offsets;     // (T,), rows of all steps before each
    std::vector<Direction<Cell>> directions;
    // Outputs between layers, by turns: (P, q_stride) if they are bounded, else (P, width).
    Array<Activation> q_between[2];
    Array<float> between[2];
    std::atomic<bool> failed{false};

    explicit Stack(const PerfkitRnnInt8& call)
        : p(call), H(p.hidden), H_(round_up(H, PANEL)), width(H * p.directions),
          bounded(Cell::BOUNDED && (!Cell::GRU || within_1(p))), q_stride(round_up(width, PANEL)), offsets(p.steps) {
        i64 rows = 0;
        for (i64 t = 0; t < p.steps; ++t) offsets[t] = rows, rows += p.batch_sizes[t];
        directions.reserve(p.layers * p.directions);
        for (i64 i = 0; i < p.layers * p.directions; ++i) directions.emplace_back(p, i, H_);
        for (i64 i = 0; i < 2 && i < p.layers - 1; ++i)
            if (bounded)
                q_between[i].allocate(rows * q_stride);
            else
                between[i].allocate(rows * width);
    }

  private:
    // States of other cells are after their first step.
    static bool within_1(const PerfkitRnnInt8& p) {
        bool within = true;
        for (i64 i = 0; i < p.layers * p.directions * p.batch * p.hidden; ++i) within &= p.h[i] >= -1 && p.h[i] <= 1;
        return within;
    }
};

}  // namespace
