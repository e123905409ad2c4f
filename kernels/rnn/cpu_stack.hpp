// What both passes share: the call as a binding gives it, where rows are, how the work is divided, how threads wait.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

#include "_in_order.hpp"
#include "cpu_cells.hpp"
#include "cpu_products.hpp"

namespace {
using perfkit::i64;
}

// One call: T steps of B rows, a stack of layers, each in one or two directions; W = layers * directions, the
// directions of layer 0 first. R rows are stored of what has no strides: T * B of them time-major, or the P of packed
// data. `Data`, the type of all that is not said to be another, is float or bfloat16, which `dtype` tells. Forward, the
// weights and x may be float32 that is rounded to bfloat16 as it is read, as autocast does before a call.
extern "C" struct PerfkitRnn {
    i64 cell;   // 0 LSTM, 1 GRU, 2 RNN tanh, 3 RNN relu; G = 4, 3, 1, 1 gates, S = 4, 4, 1, 1 of them saved
    i64 dtype;  // 0 float32, 1 bfloat16, 2 bfloat16 but for weights, 3 but for weights and x
    i64 steps, batch, inputs, hidden, layers, directions;
    i64 ragged;       // 0: every row has T steps; 1: rows have their own lengths; 2: they are packed, sorted by length
    const i64* rows;  // ragged 1: (B,), lengths in 1..T; 2: (T,), batch sizes, never rising, the first B; 0: not used
    perfkit::Threads threads;
    const void* const* weights;  // (W, 4): w_ih (G H, I), w_hh (G H, H), b_ih, b_hh (G H,); biases may be null
    const void *h0, *c0;         // (W, B, H), null for zeros; c0 for LSTM only
    const void* x;               // row b of step t is at x + t * x_step + b * x_row, and row p of packed data at
    i64 x_step, x_row;           // x + p * x_row, in numbers; features are contiguous; y and gradients likewise
    void* y;                     // forward: written, zeros past a row's length; backward: as forward left it; null,
                                 // of one direction, where no outputs are wanted
    i64 y_step, y_row;
    void* gates;   // (W, R, S, H), what the backward pass needs; forward: null to save nothing
    float* cells;  // (W, R, H), LSTM only
    void* inner;   // (layers - 1, R, H directions), outputs between layers; forward: may be null
};

extern "C" struct PerfkitRnnForward {
    PerfkitRnn stack;
    void *hn, *cn;  // (W, B, H); cn for LSTM only, null where it is not wanted
};

// Gradients, d_ for each of what has one.
extern "C" struct PerfkitRnnBackward {
    PerfkitRnn stack;
    const void* d_y;  // what it holds past a row's length is not read
    i64 d_y_step, d_y_row;
    const void *d_hn, *d_cn;  // (W, B, H), null for zeros
    void* d_x;                // may be null; zeros past a row's length
    i64 d_x_step, d_x_row;
    void *d_h0, *d_c0;         // (W, B, H)
    float* const* d_weights;   // (W, 4), each of its weight's shape; those of biases may be null
};

namespace perfkit {

// The rows are sorted by length, longest first: at step t the sorted rows [0, sizes[t]) are there, and the sorted row b
// is row order[b] of the states. Its place at step t is starts[t] + order[b] where rows have strides, and t * step more
// in what is stored without.
struct Order {
    std::vector<i64> sizes, starts, order;
    i64 step, stored;

    explicit Order(const PerfkitRnn& p)
        : sizes(p.steps, p.batch), starts(p.steps, 0), order(p.batch), step(p.batch), stored(p.steps * p.batch) {
        std::iota(order.begin(), order.end(), 0);
        if (p.ragged == 1) {
            std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return p.rows[a] > p.rows[b]; });
            for (i64 t = 0, b = p.batch; t < p.steps; ++t) {
                while (b > 0 && p.rows[order[b - 1]] <= t) --b;
                sizes[t] = b;
            }
        } else if (p.ragged == 2) {
            std::copy(p.rows, p.rows + p.steps, sizes.begin());
            std::partial_sum(sizes.begin(), sizes.end() - 1, starts.begin() + 1);
            step = 0, stored = starts.back() + sizes.back();
        }
    }
    i64 place(i64 t, i64 b) const { return starts[t] + order[b]; }
    // How many of the sorted rows [first, last) are there at time t.
    i64 there(i64 t, i64 first, i64 last) const { return std::clamp<i64>(sizes[t] - first, 0, last - first); }
};

// The steps of one layer, one direction and some of the rows: `done` of them, in the order in which they are computed.
struct Line {
    i64 layer, way, first, last;
    std::atomic<i64> done{0};
};

// How a call is divided. Batch rows are independent of each other: lines of a slice of them each need nothing of the
// other slices. Where there are fewer slices than threads, a line runs beside the line of the layer below, some steps
// behind it, or of the other direction; and where those are still too few, `parts` threads share the units of a line.
struct Plan {
    std::vector<i64> cuts;
    Threads threads;
    i64 parts;
    bool beside;  // lines of one slice run at the same time

    // `rows`: as many as a product takes at a time.
    Plan(const PerfkitRnn& p, const Order& order, int gates, bool may_share, i64 panels, i64 rows) {
        // Rows of a slice share each load of the weights; beyond 64 of them there is nothing to gain.
        constexpr i64 FEWEST = 4, MOST = 64;
        const double row = double(gates) * double(p.hidden * p.hidden);
        const double work = 2 * row * double(order.stored) * double(p.layers * p.directions);
        threads = p.threads;
        i64& count = threads.count;
        count = work < WORTH_WAKING ? 1 : std::max<i64>(1, count);
        const i64 lines = p.layers * p.directions;
        i64 slices = (p.batch + MOST * count - 1) / (MOST * count) * count;
        if (p.batch >= 2 * rows * count && slices == count) slices *= 2;  // one that is held up can be helped
        if (count == 1) slices = (p.batch + MOST - 1) / MOST;
        slices = std::clamp<i64>(p.batch / (lines > 1 ? FEWEST : FEWEST / 2), 1, slices);
        beside = slices < count;
        parts = 1;
        if (may_share && slices * lines < count && row > WORTH_SHARING)
            parts = std::min(count / (slices * lines), panels);
        cuts = cut(order.sizes.data(), p.steps, p.batch, slices);
    }

    // Multiplications: about 20 microseconds of one thread; about 1 microsecond of it, a few exchanges between threads.
    static constexpr double WORTH_WAKING = 1e6, WORTH_SHARING = 1e5;
};

}  // namespace perfkit
