// The kernel of cpu_kernel.cpp as custom calls of XLA's. What is not there, or not wanted, is an empty buffer.
#include <cstring>

#include "cpu_problem.hpp"

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;
using Numbers64 = ffi::Span<const std::int64_t>;

decltype(&perfkit_conv2d_forward) run_forward;
decltype(&perfkit_conv2d_backward) run_backward;

template <class T = void>
T* at(const In& buffer) {
    return buffer.element_count() ? static_cast<T*>(buffer.untyped_data()) : nullptr;
}
template <class T = void>
T* at(Out& buffer) {
    return at<T>(*buffer);
}

// Calls run(problem) of the kernel with the problem that `shape` holds.
template <class Run>
ffi::Error with(Numbers64 shape, Run run) {
    PerfkitConv2d problem;
    if (shape.size() * sizeof(std::int64_t) != sizeof problem)
        return ffi::Error::InvalidArgument("shape has not as many numbers as PerfkitConv2d");
    std::memcpy(&problem, shape.begin(), sizeof problem);
    if (run(&problem)) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for conv2d's working space");
    return ffi::Error::Success();
}

ffi::Error forward(Numbers64 shape, std::int64_t threads, In x, In weight, In bias, Out y, Out argmax) {
    return with(shape, [&](const PerfkitConv2d* problem) {
        return run_forward(problem, at(x), at(weight), at(bias), at(y), at<std::uint8_t>(argmax), {threads});
    });
}

ffi::Error image(Numbers64 shape, std::int64_t threads, In x, In weight, In argmax, In d_y, Out d_x) {
    return with(shape, [&](const PerfkitConv2d* problem) {
        return run_backward(problem, at(x), at(weight), at<std::uint8_t>(argmax), at(d_y), at(d_x), nullptr, nullptr,
                            {threads});
    });
}

ffi::Error weight(Numbers64 shape, std::int64_t threads, In x, In weight, In argmax, In d_y, Out d_weight, Out d_bias) {
    return with(shape, [&](const PerfkitConv2d* problem) {
        return run_backward(problem, at(x), at(weight), at<std::uint8_t>(argmax), at(d_y), nullptr,
                            at<float>(d_weight), at<float>(d_bias), {threads});
    });
}

auto bound() { return ffi::Ffi::Bind().Attr<Numbers64>("shape").Attr<std::int64_t>("threads"); }

}  // namespace

extern "C" void perfkit_use(void* forward, void* backward) {
    run_forward = reinterpret_cast<decltype(run_forward)>(forward);
    run_backward = reinterpret_cast<decltype(run_backward)>(backward);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_conv2d_xla_forward, forward,
                              bound().Arg<In>().Arg<In>().Arg<In>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(perfkit_conv2d_xla_image, image,
                              bound().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    perfkit_conv2d_xla_weight, weight,
    bound().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
