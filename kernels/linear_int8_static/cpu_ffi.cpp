// The kernel of cpu_kernel.cpp as custom calls of XLA's: scales are numbers of the program.
#include <cstring>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

decltype(&perfkit_linear_int8_static) run;
decltype(&perfkit_linear_int8_static_pack) run_pack;

ffi::Error pack(In weight, In scales, Out packed) {
    const auto sizes = weight.dimensions();
    run_pack(sizes[0], sizes[1], static_cast<const std::int8_t*>(weight.untyped_data()),
             static_cast<const float*>(scales.untyped_data()), packed->untyped_data());
    return ffi::Error::Success();
}

// scales: of x, and of y where it is of bytes.
ffi::Error linear(ffi::Span<const std::int64_t> shape, std::int64_t threads, In x, In packed, In bias, In scales, Out y) {
    PerfkitLinearInt8Static p;
    if (shape.size() * sizeof(std::int64_t) != sizeof p)
        return ffi::Error::InvalidArgument("shape has not as many numbers as PerfkitLinearInt8Static");
    std::memcpy(&p, shape.begin(), sizeof p);
    const float* const of = static_cast<const float*>(scales.untyped_data());
    p.scale = of[0], p.y_scale = of[1];
    const float* const biases = bias.element_count() ? static_cast<const float*>(bias.untyped_data()) : nullptr;
    if (run(&p, x.untyped_data(), packed.untyped_data(), biases, y->untyped_data(), {threads}))
        return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for the int8 linear kernel's working space");
    return ffi::Error::Success();
}

}  // namespace

extern "C" void perfkit_use(void* kernel, void* packing) {
    run = reinterpret_cast<decltype(run)>(kernel);
    run_pack = reinterpret_cast<decltype(run_pack)>(packing);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_linear_int8_static_xla_pack, pack,
                              ffi::Ffi::Bind().Arg<In>().Arg<In>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_linear_int8_static_xla, linear,
                              ffi::Ffi::Bind()
                                  .Attr<ffi::Span<const std::int64_t>>("shape")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Ret<ffi::AnyBuffer>());
