// The kernel of cpu_kernel.cpp as custom calls of XLA's: scales are numbers of the program.
#include <algorithm>
#include <cstring>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Numbers64 = ffi::Span<const std::int64_t>;

decltype(&perfkit_conv2d_int8) run;
decltype(&perfkit_conv2d_int8_pack) run_pack;

bool read(Numbers64 shape, PerfkitConv2dInt8& p) {
    if (shape.size() * sizeof(std::int64_t) != sizeof p) return false;
    std::memcpy(&p, shape.begin(), sizeof p);
    return true;
}
ffi::Error other_size() {
    return ffi::Error::InvalidArgument("shape has not as many numbers as PerfkitConv2dInt8");
}

ffi::Error pack(Numbers64 shape, In weight, In scales, Out packed) {
    PerfkitConv2dInt8 p;
    if (!read(shape, p)) return other_size();
    const float* const of = static_cast<const float*>(scales.untyped_data());
    if (p.pool > 1 && std::any_of(of, of + p.outputs, [](float scale) { return scale < 0; }))
        return ffi::Error::InvalidArgument("a scale of int8 weights is negative: the largest of sums would be the least");
    run_pack(&p, static_cast<const std::int8_t*>(weight.untyped_data()), of, packed->untyped_data());
    return ffi::Error::Success();
}

// scales: of x, and of y where it is of bytes.
ffi::Error convolve(Numbers64 shape, std::int64_t threads, In x, In packed, In bias, In scales, Out y) {
    PerfkitConv2dInt8 p;
    if (!read(shape, p)) return other_size();
    const float* const of = static_cast<const float*>(scales.untyped_data());
    p.scale = of[0], p.y_scale = of[1];
    const float* const biases = bias.element_count() ? static_cast<const float*>(bias.untyped_data()) : nullptr;
    if (run(&p, x.untyped_data(), packed.untyped_data(), biases, y->untyped_data(), {threads}))
        return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                          "no memory for the int8 convolution kernel's working space");
    return ffi::Error::Success();
}

}  // namespace

extern "C" void perfkit_use(void* kernel, void* packing) {
    run = reinterpret_cast<decltype(run)>(kernel);
    run_pack = reinterpret_cast<decltype(run_pack)>(packing);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_conv2d_int8_xla_pack, pack,
                              ffi::Ffi::Bind().Attr<Numbers64>("shape").Arg<In>().Arg<In>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_conv2d_int8_xla, convolve,
                              ffi::Ffi::Bind()
                                  .Attr<Numbers64>("shape")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Arg<In>()
                                  .Ret<ffi::AnyBuffer>());
