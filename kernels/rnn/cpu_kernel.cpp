// Stacks of recurrent layers, for ctypes.
#include "cpu_core.hpp"

// 0; 1 if memory ran out, and 2 for a cell or dtype that is not known.
extern "C" int perfkit_rnn_forward(const PerfkitRnnForward* call) { return perfkit::run_forward(*call); }

// The same, with the addresses of the weights right behind the struct, in place of `weights`: one piece of memory is
// quicker to fill than two.
extern "C" int perfkit_rnn_forward_in_line(const PerfkitRnnForward* call) {
    PerfkitRnnForward with = *call;
    with.stack.weights = reinterpret_cast<const void* const*>(call + 1);
    return perfkit::run_forward(with);
}

extern "C" int perfkit_rnn_backward(const PerfkitRnnBackward* call) { return perfkit::run_backward(*call); }

// The instructions that the products were built for.
extern "C" const char* perfkit_rnn_instructions() { return perfkit::instructions(); }
