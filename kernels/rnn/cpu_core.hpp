// Stacks of recurrent layers on a CPU, forward and backward, whatever binding calls them: include this, fill a
// PerfkitRnnForward or PerfkitRnnBackward of cpu_stack.hpp, and call run_forward or run_backward.
//
// Letters: T time steps, B batch rows, I input features, H hidden units, G gates, S values saved of each unit and step
// for the backward pass, R rows of all steps, K columns of a weight matrix, L lanes of a vector.
//
// Batch rows are independent of each other: a thread carries a slice of them through the whole sequence, no barriers.
// The hidden state's product and the gates are one loop, so the gates are computed on sums that were just found.
#pragma once

#include "cpu_backward.hpp"
#include "cpu_forward.hpp"
#include "cpu_instructions.hpp"

namespace perfkit {

// `dtypes`: how many of those that `PerfkitRnn` names a pass knows.
template <template <class, class, class> class Run, class Call>
int run_call(const Call& call, i64 dtypes) {
    const auto of_cell = [&](auto cell) {
        using Cell = decltype(cell);
        if (call.stack.dtype == 0) return Run<Cell, float, float>::run(call);
        return Run<Cell, Bf16, Low>::run(call);
    };
    if (call.stack.dtype < 0 || call.stack.dtype >= dtypes) return 2;
    try {
        switch (call.stack.cell) {
            case 0: return of_cell(Lstm{});
            case 1: return of_cell(Gru{});
            case 2: return of_cell(Rnn<false>{});
            case 3: return of_cell(Rnn<true>{});
        }
        return 2;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

template <class Cell, class Data, class Operand>
struct RunForward {
    static int run(const PerfkitRnnForward& call) {
        Forward<Cell, Data, Operand>(call, have_tiles()).run();
        return 0;
    }
};

template <class Cell, class Data, class Operand>
struct RunBackward {
    static int run(const PerfkitRnnBackward& call) {
        Backward<Cell, Data, Operand>(call, have_tiles()).run();
        return 0;
    }
};

// 0; 1 if memory ran out, and 2 for a cell or dtype that is not known.
inline int run_forward(const PerfkitRnnForward& call) { return run_call<RunForward>(call, 4); }
inline int run_backward(const PerfkitRnnBackward& call) { return run_call<RunBackward>(call, 2); }

}  // namespace perfkit
