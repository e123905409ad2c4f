// The kernel of cpu_kernel.cpp as a custom call of XLA's: one direction of one layer, its scales numbers of the program.
#include <cstring>
#include <vector>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

decltype(&perfkit_rnn_int8) run;

const float* floats(const In& buffer) { return static_cast<const float*>(buffer.untyped_data()); }
float* floats(Out& buffer) { return static_cast<float*>(buffer->untyped_data()); }

// x: (T, B, I); h0: (B, H); c0: the same of an LSTM, else of any width; scales: of x and h; y: (T, B, H).
ffi::Error layer(std::int64_t cell, std::int64_t threads, In x, In h0, In c0, In w_ih, In scale_ih, In w_hh, In scale_hh,
                 In bias, In bias_hn, In scales, Out y, Out hn, Out cn) {
    const auto sizes = x.dimensions();
    const std::vector<std::int64_t> rows(sizes[0], sizes[1]);
    std::vector<std::int64_t> starts(sizes[0]);
    const void* const weights[] = {w_ih.untyped_data(),     scale_ih.untyped_data(), w_hh.untyped_data(),
                                   scale_hh.untyped_data(), bias.untyped_data(),     bias_hn.untyped_data()};
    PerfkitRnnInt8 p{};
    p.cell = cell, p.steps = sizes[0], p.batch = sizes[1], p.inputs = sizes[2], p.hidden = h0.dimensions()[1];
    p.layers = p.directions = 1;
    p.batch_sizes = rows.data(), p.starts = starts.data();
    p.x = floats(x), p.x_row = p.inputs, p.x_step = p.batch * p.inputs;
    p.out = floats(y), p.out_row = p.hidden, p.out_step = p.batch * p.hidden;
    p.x_fixed = floats(scales)[0], p.h_fixed = floats(scales)[1];
    p.weights = weights;
    p.h = floats(hn), p.c = floats(cn);
    p.threads = {threads};
    std::memcpy(p.h, h0.untyped_data(), h0.size_bytes());
    std::memcpy(p.c, c0.untyped_data(), c0.size_bytes());
    const int failed = run(&p);
    if (failed == 1) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the int8 recurrent kernel");
    if (failed) return ffi::Error::InvalidArgument("a recurrent cell that the int8 kernel does not know");
    return ffi::Error::Success();
}

}  // namespace

extern "C" void perfkit_use(void* kernel) { run = reinterpret_cast<decltype(run)>(kernel); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_rnn_int8_xla, layer,
                              ffi::Ffi::Bind()
                                  .Attr<std::int64_t>("cell")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
