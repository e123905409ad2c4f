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

// The last layer's state after the last step, (B, H), of one direction and nothing ragged: `call` lacks the addresses
// and the threads. The fourth argument makes it a layer of `perfkit_sequence` like others.
extern "C" int perfkit_rnn_last(const PerfkitRnnForward* call, const void* x, const void* const* weights, const void*,
                                void* last, perfkit::Threads threads) try {
    PerfkitRnnForward with = *call;
    PerfkitRnn& stack = with.stack;
    stack.x = x, stack.weights = weights, stack.threads = threads;
    const i64 bytes = stack.batch * stack.hidden * (stack.dtype ? 2 : 4);
    const std::unique_ptr<char[]> states(new char[stack.layers * bytes]);
    with.hn = states.get();
    const int failed = perfkit::run_forward(with);
    if (!failed) std::memcpy(last, &states[(stack.layers - 1) * bytes], bytes);
    return failed;
} catch (const std::bad_alloc&) {
    return 1;
}

extern "C" int perfkit_rnn_backward(const PerfkitRnnBackward* call) { return perfkit::run_backward(*call); }

// The instructions that the products were built for.
extern "C" const char* perfkit_rnn_instructions() { return perfkit::instructions(); }
