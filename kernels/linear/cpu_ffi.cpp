// The kernel of cpu_kernel.cpp as a custom call of XLA's.
#include <cstring>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

decltype(&perfkit_linear_across) run;

ffi::Error across(ffi::Span<const std::int64_t> shape, std::int64_t threads, ffi::AnyBuffer x, ffi::AnyBuffer w,
                  ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y) {
    PerfkitLinear p;
    if (shape.size() * sizeof(std::int64_t) != sizeof p)
        return ffi::Error::InvalidArgument("shape has not as many numbers as PerfkitLinear");
    std::memcpy(&p, shape.begin(), sizeof p);
    const float* const biases = static_cast<const float*>(bias.untyped_data());
    const int failed = run(&p, x.untyped_data(), w.untyped_data(), biases, y->untyped_data(), {threads});
    if (failed == 2) return ffi::Error(ffi::ErrorCode::kUnimplemented, "this processor lacks AVX-512, or its bfloat16");
    if (failed) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the linear kernel's working space");
    return ffi::Error::Success();
}

}  // namespace

extern "C" void perfkit_use(void* kernel) { run = reinterpret_cast<decltype(run)>(kernel); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_linear_xla, across,
                              ffi::Ffi::Bind()
                                  .Attr<ffi::Span<const std::int64_t>>("shape")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());
