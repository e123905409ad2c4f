// Stacks of recurrent layers, for ctypes.
#include "cpu_core.hpp"

// 0; 1 if memory ran out, and 2 for a cell or dtype that is not known.
extern "C" int perfkit_rnn_forward(const PerfkitRnnForward* call) { return perfkit::run_forward(*call); }

extern "C" int perfkit_rnn_backward(const PerfkitRnnBackward* call) { return perfkit::run_backward(*call); }

// The instructions that the products were built for.
extern "C" const char* perfkit_rnn_instructions() { return perfkit::instructions(); }
