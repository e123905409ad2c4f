// Stacks of recurrent layers on int8 weights. The equations are in __init__.py, the same roundings in plain torch
// operations in reference.py; results are equal to it bit for bit on every processor, as the products are integers and
// the gates use only operations that IEEE 754 rounds once.
//
// Letters: T time steps, B batch rows, P rows of all steps, I input features, H hidden units, H_ these rounded up to whole
// panels, G gates, K columns of a weight matrix (I or H), L lanes of a vector of 32-bit numbers. Units are those of the
// hidden state; a channel is one unit of one gate.
//
// Batch rows are independent of each other: a thread carries a slice of them through all layers. Where there are fewer
// slices than threads, layers of a slice run beside each other, one some steps behind the one below it.
#include <deque>

#include "cpu_line.hpp"

namespace {

// Rows of a slice share each load of the weights; beyond so many there is nothing to gain.
constexpr i64 FEWEST_ROWS = 4, MOST_ROWS = 64;

inline i64 slices_of(const PerfkitRnnInt8& p) {
    const i64 most = (p.batch + MOST_ROWS - 1) / MOST_ROWS, count = std::max<i64>(1, p.threads.count);
    const i64 slices = (most + count - 1) / count * count;
    const i64 fewest = p.layers * p.directions > 1 ? FEWEST_ROWS : FEWEST_ROWS / 2;
    return std::clamp<i64>(p.batch / fewest, 1, slices);
}

template <class Cell>
void run_stack(const PerfkitRnnInt8& p) {
    Stack<Cell> stack(p);
    const std::vector<i64> cuts = cut(p.batch_sizes, p.steps, p.batch, slices_of(p));
    const i64 slices = i64(cuts.size()) - 1, of_slice = p.layers * p.directions;
    std::deque<Line<Cell>> lines;  // those of a slice one after the other, the lowest layer first
    for (i64 slice = 0; slice < slices; ++slice)
        for (i64 i = 0; i < of_slice; ++i) lines.emplace_back(stack, i, cuts[slice], cuts[slice + 1]);
    const bool beside = slices < p.threads.count && of_slice > 1;
    const auto run = [&](i64 slice, i64 i) {
        const Line<Cell>* below[2] = {};
        for (i64 way = 0; i >= p.directions && way < p.directions; ++way)
            below[way] = &lines[slice * of_slice + (i / p.directions - 1) * p.directions + way];
        lines[slice * of_slice + i].run(below, beside);
    };
    in_order(beside ? slices * of_slice : slices, p.threads, stack.failed, [&](i64 task) {
        if (beside) return run(task % slices, task / slices);
        for (i64 i = 0; i < of_slice; ++i) run(task, i);
    });
}

}  // namespace

// Returns 0; 1 if memory ran out, and 2 for a cell that is not known.
extern "C" int perfkit_rnn_int8(const PerfkitRnnInt8* call) {
    try {
        switch (call->cell) {
            case 0: run_stack<Lstm>(*call); return 0;
            case 1: run_stack<Gru>(*call); return 0;
            case 2: run_stack<RnnTanh>(*call); return 0;
            case 3: run_stack<RnnRelu>(*call); return 0;
        }
        return 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The same, with the addresses of the weights right behind the struct, in place of `weights`.
extern "C" int perfkit_rnn_int8_in_line(const PerfkitRnnInt8* call) {
    PerfkitRnnInt8 with = *call;
    with.weights = reinterpret_cast<const void* const*>(call + 1);
    return perfkit_rnn_int8(&with);
}

// The instructions that the integer products were built for.
extern "C" const char* perfkit_rnn_int8_instructions() {
#if PERFKIT_DOTS
    return "NEON-DOTPROD";
#elif BIASED && defined(__AVX512VNNI__)
    return "AVX512-VNNI";
#elif BIASED
    return "AVX-VNNI";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "plain C++";
#endif
}
